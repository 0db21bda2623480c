"""Tensors into the model: what does not fit is a sentence."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from revox.checkpoint import load
from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.load import load_model
from revox.model.linear import BFloat16Linear, Linear


def test_whole_numbers_in_place_of_weights_are_refused_by_name(tiny_checkpoint, tmp_path):
    shutil.copy(tiny_checkpoint / "params.json", tmp_path)
    state = load_file(tiny_checkpoint / "consolidated.safetensors")
    for name in ("norm.weight", "audio_tokenizer.quantizer.semantic_codebook.embedding_sum"):
        wrong = {**state, name: state[name].to(torch.int16)}
        save_file(wrong, tmp_path / "consolidated.safetensors")
        with pytest.raises(CheckpointError, match=rf"{name} is I16 .*, where params.json asks for BF16"):
            load_model(tmp_path)


def test_without_bf16_instructions_rows_are_multiplied_in_float32_with_the_same_result(
    tiny_checkpoint, monkeypatch
):
    monkeypatch.setattr(load, "multiplies_bf16", lambda: True)
    plain = load_model(tiny_checkpoint)
    monkeypatch.setattr(load, "multiplies_bf16", lambda: False)
    model = load_model(tiny_checkpoint)
    wide = {n for n, m in model.named_modules() if isinstance(m, BFloat16Linear) and m.wide}
    parts = ("acoustic_transformer.layers.", "audio_tokenizer.decoder_blocks.")
    assert wide == {n for n, m in plain.named_modules() if isinstance(m, Linear) and n.startswith(parts)}
    hidden = torch.randn(3, model.config.backbone.dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    noise = torch.zeros(3, model.config.codec.acoustic_dim)
    with torch.no_grad():
        points = [one.acoustic_transformer.flow(hidden, noise).float() for one in (plain, model)]
        codes = torch.randint(0, 20, (1, 37, 8), generator=torch.Generator().manual_seed(1))
        sounds = [one.audio_tokenizer.decode(codes).float() for one in (plain, model)]
    assert torch.allclose(*points, atol=0.05)
    assert (sounds[0] - sounds[1]).norm() < 0.03 * sounds[0].norm()
