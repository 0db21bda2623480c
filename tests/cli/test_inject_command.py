"""`revox inject` and `revox encoder` from the command line: what a user types and is told."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from conftest import tiny_model
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


ENCODER = "consolidated.encoder.safetensors"


def sha(folder: Path) -> str:
    return hashlib.sha256((folder / "consolidated.safetensors").read_bytes()).hexdigest()


def test_in_and_out_again_leaves_the_weights_as_they_were(folder, encoder, monkeypatch, capsys):
    before = sha(folder)
    revox(monkeypatch, "inject", "-c", folder, "--encoder", encoder.parent, "--dry-run")
    said = capsys.readouterr().out
    assert "114 tensors of the encoder would be added in consolidated.encoder.safetensors" in said
    assert "nothing was written" in said
    assert not (folder / ENCODER).exists()
    revox(monkeypatch, "inject", "-c", folder, "--encoder", encoder.parent)
    said = capsys.readouterr().out
    assert "114 tensors of the encoder added" in said
    assert sha(folder) == before
    revox(monkeypatch, "inspect", folder)
    assert "revox injected this encoder" in capsys.readouterr().out
    revox(monkeypatch, "inject", "-c", folder, "--eject")
    assert "114 tensors of an encoder taken out" in capsys.readouterr().out
    assert not (folder / ENCODER).exists()
    assert sha(folder) == before


def test_in_place_still_works_and_says_that_it_is_the_default(folder, encoder, monkeypatch, capsys):
    revox(monkeypatch, "inject", "-c", folder, "--encoder", encoder, "--in-place")
    assert "--in-place is the default" in capsys.readouterr().err
    assert (folder / ENCODER).exists()


def test_an_encoder_exported_from_one_folder_goes_into_another(
    folder, encoder, tmp_path, monkeypatch, capsys
):
    one, two, shared = tmp_path / "one", tmp_path / "two", tmp_path / "shared.safetensors"
    revox(monkeypatch, "inject", "-c", folder, "--encoder", encoder, "--out", one, "--merge")
    revox(monkeypatch, "encoder", "export", "-c", one, "-o", shared)
    assert (tmp_path / "shared.md").read_text().count("CC BY-NC 4.0") >= 1
    revox(monkeypatch, "inject", "-c", folder, "--encoder", shared, "-o", two)
    merged = load_file(one / "consolidated.safetensors")
    parts = load_file(two / "consolidated.safetensors") | load_file(two / ENCODER)
    assert set(merged) == set(parts)
    assert all((merged[name] == parts[name]).all() for name in merged)
    # This encoder names no decoder, so nobody knows which it was trained against.
    assert "it was trained against" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [(), ("e.safetensors", "ada/encoder", "--private", "-m", "first"), ("--help",)]
)
def test_push_says_what_to_do_instead_in_one_sentence_and_exit_code_2(monkeypatch, capsys, words):
    with pytest.raises(SystemExit) as ended:
        revox(monkeypatch, "encoder", "push", *words)
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("revox: `revox encoder push` is gone; upload the file with `hf upload")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("inject", "-c", "{folder}"), "--encoder RUN-or-FILE"),
        (("inject", "-c", "{folder}", "--encoder", "{encoder}", "--eject"), "either --encoder"),
        (("inject", "-c", "{folder}", "--encoder", "{encoder}", "--merge"), "say --merge --out FOLDER"),
        (("inject", "-c", "{folder}", "--encoder", "{encoder}", "--in-place", "-o", "x"), "either --out"),
        (("inject", "-c", "{folder}", "--eject", "--replace"), "are for adding an encoder"),
        (("inject", "-c", "{folder}", "--eject", "--out", "x"), "are for adding an encoder"),
        (("inject", "-c", "{folder}", "--eject"), "nothing to take out"),
        (("inject", "-c", "{folder}", "--encoder", "{folder}"), "holds no encoder.safetensors"),
        (("inject", "-c", "{folder}/nowhere", "--encoder", "{encoder}"), "nowhere"),
        (("encoder", "export", "-o", "x.safetensors"), "name a checkpoint with an encoder (--checkpoint)"),
        (("encoder", "export", "-c", "{folder}", "-o", "x.safetensors"), "no codec encoder to export"),
        (("encoder", "export", "-c", "{folder}", "-o", "x.pt"), "should end in .safetensors"),
        (("encoder", "export", "--run", "{encoder}", "-o", "x.safetensors"), "`revox inject --encoder RUN`"),
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
