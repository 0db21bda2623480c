"""At the release's sizes our names and shapes are those of vllm-omni's own modules (without memory)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from oracle import Oracle, release_params, small_params
from subject import config_of

from revox.checkpoint.params import Params, read_params
from revox.checkpoint.release import expected_tensors

TABLE = "mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight"
BUFFERS = ("quantizer.semantic_codebook.cluster_usage", "quantizer.semantic_codebook.embedding_sum")


@pytest.mark.parametrize("params", [release_params(), small_params()], ids=["release", "small"])
def test_the_inventory_of_codec_and_acoustic_transformer_is_the_published_modules(
    oracle: Oracle, params: dict
):
    with torch.device("meta"):
        codec, acoustic = oracle.audio_tokenizer(params), oracle.acoustic_transformer(params)
    theirs = {f"acoustic_transformer.{name}": tuple(p.shape) for name, p in acoustic.named_parameters()}
    for name, parameter in codec.named_parameters():
        embedding = name == "audio_token_embedding.embeddings.weight"
        theirs[TABLE if embedding else f"audio_tokenizer.{name}"] = tuple(parameter.shape)
    for name in BUFFERS:
        theirs[f"audio_tokenizer.{name}"] = tuple(codec.state_dict()[name].shape)
    prefixes = ("audio_tokenizer.", "acoustic_transformer.", TABLE)
    inventory = expected_tensors(Params.model_validate(params).voxtral_config())
    assert {n: spec.shape for n, spec in inventory.items() if n.startswith(prefixes)} == theirs


@pytest.mark.parametrize("params", [release_params(), small_params()], ids=["release", "small"])
def test_params_json_gives_the_sizes_that_the_comparisons_use(tmp_path: Path, params: dict):
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert read_params(tmp_path).voxtral_config() == config_of(params)
