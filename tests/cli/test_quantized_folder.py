"""Quantized folders: what revox reads is spoken, what it does not is refused with inspect's sentence."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from revox.checkpoint.inspect import inspect
from revox.cli import main
from revox.demo import checkpoint_folder

LARGEST = torch.finfo(torch.float8_e4m3fn).max


@pytest.fixture(scope="module")
def refused_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab checkpoint with its linear layers in F8_E4M3, and two scales beside each, as NVFP4 has."""
    folder = tmp_path_factory.mktemp("fp8") / "checkpoint"
    shutil.copytree(checkpoint_folder(), folder)
    weights = folder / "consolidated.safetensors"
    tensors = load_file(weights)
    for name in [n for n in tensors if n.startswith(("layers.", "acoustic_transformer.layers."))]:
        if tensors[name].ndim == 2:
            scale = tensors[name].float().abs().max() / LARGEST
            tensors[f"{name}_scale"] = scale.reshape(1)
            tensors[f"{name}_scale_2"] = torch.ones(1)
            tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
    weights.unlink()
    save_file(tensors, weights)
    return folder


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (("speak", "ten to five", "--voice", "neutral_male", "-o", "OUT/a.wav", "-c", "FOLDER"), 2),
        (("serve", "FOLDER", "--port", "0"), 2),
        (("doctor", "FOLDER", "--quick", "--out", "OUT"), 1),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_weights_with_an_unknown_scale_are_refused_with_the_sentence_of_inspect(
    refused_folder, arguments, exit_code, tmp_path, monkeypatch, capfd
):
    sentence = inspect(refused_folder).unreadable
    assert sentence is not None
    assert "FP8" in sentence
    filled = [part.replace("FOLDER", str(refused_folder)).replace("OUT", str(tmp_path)) for part in arguments]
    monkeypatch.setenv("COLUMNS", "4000")
    monkeypatch.setattr(sys, "argv", ["revox", *filled])
    with pytest.raises(SystemExit) as ended:
        main.main()
    out, err = capfd.readouterr()
    assert ended.value.code == exit_code
    assert sentence in out + err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("*.wav"))


def test_a_quantized_folder_is_written_with_its_quality_and_speaks(tmp_path, monkeypatch, capfd):
    def revox(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["revox", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main.main()
        out, err = capfd.readouterr()
        assert not ended.value.code, err
        return out + err

    folder = tmp_path / "small"
    said = revox("quantize", checkpoint_folder(), "--out", folder, "--utterances", 2, "--max-seconds", 1)
    card = (folder / "README.md").read_text()
    assert "| int8 | " in said
    assert "| int8 | " in card
    assert "2 utterances in 2 voices" in card
    spoken = revox("speak", "ten to five", "--voice", "neutral_male", "-o", tmp_path / "a.wav", "-c", folder)
    assert "(cpu, int8)" in spoken


def test_a_measurement_that_is_stopped_leaves_a_card_of_this_folder(tmp_path, monkeypatch):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("revox.evaluation.weights_table.weights_agreement", stopped)
    arguments = ["revox", "quantize", str(checkpoint_folder()), "--out", str(tmp_path / "small")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 130
    assert "Not measured" in (tmp_path / "small" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--weights", "int2"), "weights 'int2' cannot be stored; take int8 or int4."),
        ((), "is there already; name a folder that does not exist yet."),
    ],
)
def test_what_cannot_be_quantized_is_said_before_anything_is_written(
    arguments, sentence, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("COLUMNS", "4000")
    command = ["revox", "quantize", str(checkpoint_folder()), "--out", str(tmp_path), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    assert sentence in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
