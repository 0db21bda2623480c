"""Tensors into the model: what does not fit is a sentence."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.load import load_model


def test_whole_numbers_in_place_of_weights_are_refused_by_name(tiny_checkpoint, tmp_path):
    shutil.copy(tiny_checkpoint / "params.json", tmp_path)
    state = load_file(tiny_checkpoint / "consolidated.safetensors")
    for name in ("norm.weight", "audio_tokenizer.quantizer.semantic_codebook.embedding_sum"):
        wrong = {**state, name: state[name].to(torch.int16)}
        save_file(wrong, tmp_path / "consolidated.safetensors")
        with pytest.raises(CheckpointError, match=rf"{name} is I16 .*, where params.json asks for BF16"):
            load_model(tmp_path)
