from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import revox
from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.load import load_model
from revox.checkpoint.release import ENCODER_PREFIXES
from revox.checkpoint.tensors import WEIGHTS
from revox.evaluation.clips import find_clips
from revox.evaluation.errors import EvaluationError
from revox.evaluation.evaluate import evaluate
from revox.evaluation.reference_encoder import original_codec
from revox.evaluation.subject import Setup

CLIP = Path(__file__).parents[1] / "speech" / "clips" / "103-1240-0000.flac"
WITHOUT_LAB = """
import sys

class NoLab:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lab":
            raise AssertionError("lab is imported")

sys.meta_path.insert(0, NoLab())
sys.argv[0] = "revox"
from revox.cli.main import main
try:
    main()
finally:
    assert not {"lab", "tests"} & {name.partition(".")[0] for name in sys.modules}
"""


@pytest.fixture
def encoder(tiny_checkpoint_with_encoder, tmp_path):
    """The encoder's tensors alone, as `revox encoder export` names them."""
    tensors = load_file(tiny_checkpoint_with_encoder / WEIGHTS)
    path = tmp_path / "encoder.safetensors"
    save_file({name: x for name, x in tensors.items() if name.startswith(ENCODER_PREFIXES)}, path)
    return path


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    shutil.copy(CLIP, folder)
    return folder


def test_the_encoder_of_a_file_encodes_as_inside_the_checkpoint(
    tiny_checkpoint, tiny_checkpoint_with_encoder, encoder
):
    inside = load_model(tiny_checkpoint_with_encoder, dtype=torch.float32, parts=("audio_tokenizer",))
    wave = torch.sin(torch.arange(24000) * 0.05)
    codec = original_codec(tiny_checkpoint, encoder)
    expected = inside.audio_tokenizer.encode(wave[None])
    assert torch.equal(codec.encode(wave[None])[:, 1:], expected[:, 1:])  # the codebooks are two


def test_an_encoder_from_a_file_is_evaluated_from_the_package_alone_without_the_lab(
    tiny_checkpoint, encoder, clips, tmp_path
):
    package = tmp_path / "installed"
    package.mkdir()
    (package / "revox").symlink_to(Path(revox.__file__).parent)
    options = ["--encoder", str(encoder), "--clips", str(clips), "--out", "out", "--seeds", "1"]
    command = ["evaluate", "codec", str(tiny_checkpoint), *options, "--method", "encoder", "--seconds", "1"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LAB, *command],
        cwd=tmp_path,
        env={"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["facts"]["codes found by"] == "encoder (encoder: encoder.safetensors)"
    assert "decoded" in {row["name"] for row in report["tables"][0]["rows"]}


def test_a_missing_file_and_another_codecs_encoder_are_sentences(tiny_checkpoint, encoder, clips, tmp_path):
    setup = Setup(tiny_checkpoint, tmp_path / "out", encoder=tmp_path / "none.safetensors")
    with pytest.raises(EvaluationError, match=r"none\.safetensors is not a file; .*revox encoder export"):
        evaluate("codec", setup, find_clips(clips))
    tensors = load_file(encoder)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name][:1].clone()}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors is not an encoder of .*size mismatch"):
        original_codec(tiny_checkpoint, tmp_path / "other.safetensors")
