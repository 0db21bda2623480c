"""A folder of scaled FP8 weights, as some servers take: every command refuses it with inspect's sentence."""

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
def fp8_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab checkpoint with its linear layers in F8_E4M3, one float32 scale beside each."""
    folder = tmp_path_factory.mktemp("fp8") / "checkpoint"
    shutil.copytree(checkpoint_folder(), folder)
    weights = folder / "consolidated.safetensors"
    tensors = load_file(weights)
    for name in [n for n in tensors if n.startswith(("layers.", "acoustic_transformer.layers."))]:
        if tensors[name].ndim == 2:
            scale = tensors[name].float().abs().max() / LARGEST
            tensors[f"{name}_scale"] = scale.reshape(1)
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
def test_scaled_fp8_weights_are_refused_with_the_sentence_of_inspect(
    fp8_folder, arguments, exit_code, tmp_path, monkeypatch, capfd
):
    sentence = inspect(fp8_folder).unreadable
    assert sentence is not None
    assert "FP8" in sentence
    filled = [part.replace("FOLDER", str(fp8_folder)).replace("OUT", str(tmp_path)) for part in arguments]
    monkeypatch.setenv("COLUMNS", "4000")
    monkeypatch.setattr(sys, "argv", ["revox", *filled])
    with pytest.raises(SystemExit) as ended:
        main.main()
    out, err = capfd.readouterr()
    assert ended.value.code == exit_code
    assert sentence in out + err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("*.wav"))
