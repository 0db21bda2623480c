"""`revox inject` and `revox encoder` from the command line: what a user types and is told."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from conftest import tiny_model
from revox.checkpoint import share
from revox.cli import main as cli


@pytest.fixture
def folder(tiny_checkpoint_copy: Path) -> Path:
    return tiny_checkpoint_copy


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    state = tiny_model(with_encoder=True, seed=3).audio_tokenizer.state_dict()
    path = tmp_path / "run" / "encoder.safetensors"
    path.parent.mkdir()
    save_file(
        {n: t.clone() for n, t in state.items() if n.startswith(("input_proj.", "encoder_blocks."))}, path
    )
    return path


def revox(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["revox", *map(str, arguments)])
    monkeypatch.setattr(
        cli, "COMMANDS", {name: cli.COMMANDS[name] for name in ("inject", "encoder", "inspect")}
    )
    try:
        cli.main()
    except SystemExit as ended:
        if ended.code:
            raise


def sha(folder: Path) -> str:
    return hashlib.sha256((folder / "consolidated.safetensors").read_bytes()).hexdigest()


def test_in_and_out_again_ends_with_the_same_bytes_and_says_so(folder, encoder, monkeypatch, capsys):
    before = sha(folder)
    revox(monkeypatch, "inject", "-c", folder, "--encoder", encoder.parent, "--in-place", "--dry-run")
    said = capsys.readouterr().out
    assert "114 tensors of the encoder would be added" in said
    assert "nothing was written" in said
    assert sha(folder) == before
    revox(monkeypatch, "inject", "-c", folder, "--encoder", encoder.parent, "--in-place")
    said = capsys.readouterr().out
    assert "114 tensors of the encoder added" in said
    assert "MODEL_CARD.md tells what it is" in said
    revox(monkeypatch, "inspect", folder)
    assert "revox injected this encoder" in capsys.readouterr().out
    revox(monkeypatch, "inject", "-c", folder, "--eject", "--in-place")
    assert "byte for byte" in capsys.readouterr().out
    assert sha(folder) == before


def test_an_encoder_exported_from_one_folder_goes_into_another(
    folder, encoder, tmp_path, monkeypatch, capsys
):
    revox(monkeypatch, "inject", "-c", folder, "--encoder", encoder, "--out", tmp_path / "one")
    revox(monkeypatch, "encoder", "export", "-c", tmp_path / "one", "-o", tmp_path / "shared.safetensors")
    assert (tmp_path / "shared.md").read_text().count("CC BY-NC 4.0") >= 1
    revox(
        monkeypatch,
        "inject",
        "-c",
        folder,
        "--encoder",
        tmp_path / "shared.safetensors",
        "-o",
        tmp_path / "two",
    )
    one, two = (load_file(tmp_path / name / "consolidated.safetensors") for name in ("one", "two"))
    assert set(one) == set(two)
    assert all((one[name] == two[name]).all() for name in one)
    assert "it was trained against this checkpoint's decoder" in capsys.readouterr().out


def test_push_hands_the_file_to_the_hub_and_prints_where_it_is(monkeypatch, capsys):
    def pushed(*arguments: object, **options: object) -> str:
        given.append((arguments, options))
        return "https://hub.example/commit/1"

    given: list = []
    monkeypatch.setattr(share, "push_encoder", pushed)
    revox(monkeypatch, "encoder", "push", "e.safetensors", "ada/encoder", "--private", "-m", "first")
    assert given == [((Path("e.safetensors"), "ada/encoder"), {"private": True, "message": "first"})]
    assert capsys.readouterr().out == "https://hub.example/commit/1\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("inject", "-c", "{folder}", "--in-place"), "--encoder RUN-or-FILE"),
        (("inject", "-c", "{folder}", "--encoder", "{encoder}", "--eject", "--in-place"), "either --encoder"),
        (("inject", "-c", "{folder}", "--encoder", "{encoder}"), "either --out FOLDER"),
        (("inject", "-c", "{folder}", "--encoder", "{encoder}", "--in-place", "-o", "x"), "either --out"),
        (("inject", "-c", "{folder}", "--eject", "--in-place", "--replace"), "are for adding an encoder"),
        (("inject", "-c", "{folder}", "--eject", "--in-place"), "nothing to take out"),
        (("inject", "-c", "{folder}", "--encoder", "{folder}", "--in-place"), "holds no encoder.safetensors"),
        (("inject", "-c", "{folder}/nowhere", "--encoder", "{encoder}", "--in-place"), "nowhere"),
        (("encoder", "export", "-o", "x.safetensors"), "name a checkpoint with an encoder, or a run"),
        (("encoder", "export", "-c", "{folder}", "-o", "x.safetensors"), "no codec encoder to export"),
        (("encoder", "export", "-c", "{folder}", "-o", "x.pt"), "should end in .safetensors"),
        (("encoder", "push", "{encoder}", "ada/encoder"), "card, is missing"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(folder, encoder, monkeypatch, capsys, arguments, sentence):
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        revox(monkeypatch, *(a.format(folder=folder, encoder=encoder) for a in arguments))
    error = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert [line for line in error if line.startswith("revox: ")] == error[-1:]
    assert sentence in error[-1]
    assert sorted(folder.rglob("*")) == before
