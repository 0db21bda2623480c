"""The module tree is the file: `Voxtral.state_dict()` against the inventory and the release."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from revox.checkpoint.params import Params
from revox.checkpoint.release import expected_tensors
from revox.model.voxtral import Voxtral, parameter_name, tensor_name

ENCODER = ("audio_tokenizer.input_proj.", "audio_tokenizer.encoder_blocks.")


@pytest.fixture(scope="module")
def release() -> Params:
    path = Path(__file__).parents[1] / "parity" / "release_params.json"
    return Params.model_validate(json.loads(path.read_text()))


@pytest.fixture(scope="module")
def with_encoder(release: Params) -> dict[str, tuple[int, ...]]:
    return shapes_of(release, with_encoder=True)


@pytest.fixture(scope="module")
def as_released(release: Params) -> dict[str, tuple[int, ...]]:
    return shapes_of(release, with_encoder=False)


def shapes_of(params: Params, with_encoder: bool) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = Voxtral(params.voxtral_config(), with_encoder)
    return {tensor_name(name): tuple(t.shape) for name, t in model.state_dict().items()}


def test_the_model_with_encoder_holds_exactly_the_inventory(release: Params, with_encoder: dict):
    expected = {name: spec.shape for name, spec in expected_tensors(release.voxtral_config()).items()}
    assert with_encoder == expected


def test_the_model_without_encoder_holds_the_releases_386_tensors_and_4002_million_parameters(
    as_released: dict,
):
    assert len(as_released) == 386
    assert not [name for name in as_released if name.startswith(ENCODER)]
    assert round(sum(torch.Size(s).numel() for s in as_released.values()) / 1e6) == 4002


def test_the_withheld_encoder_is_114_tensors_of_149_million_parameters(with_encoder: dict):
    shapes = {n: s for n, s in with_encoder.items() if n.startswith(ENCODER)}
    assert len(shapes) == 114
    assert round(sum(torch.Size(s).numel() for s in shapes.values()) / 1e6, 2) == 149.47


def test_the_releases_known_shapes_are_there(as_released: dict):
    known = {
        "layers.25.attention.wq.weight": (4096, 3072),
        "layers.0.attention.wk.weight": (1024, 3072),
        "layers.0.feed_forward.w2.weight": (3072, 9216),
        "norm.weight": (3072,),
        "mm_audio_embeddings.tok_embeddings.weight": (131072, 3072),
        "mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight": (9088, 3072),
        "acoustic_transformer.input_projection.weight": (3072, 36),
        "acoustic_transformer.semantic_codebook_output.weight": (8320, 3072),
        "acoustic_transformer.acoustic_codebook_output.weight": (36, 3072),
        "audio_tokenizer.quantizer.semantic_codebook.cluster_usage": (8192,),
        "audio_tokenizer.quantizer.semantic_codebook.embedding_sum": (8192, 256),
        "audio_tokenizer.decoder_blocks.0.conv.parametrizations.weight.original1": (1024, 292, 3),
        "audio_tokenizer.decoder_blocks.2.conv.parametrizations.weight.original0": (1024, 1, 1),
        "audio_tokenizer.output_proj.conv.parametrizations.weight.original1": (240, 1024, 7),
    }
    assert {name: as_released[name] for name in known} == known
    assert len([name for name in as_released if name.startswith("acoustic_transformer.")]) == 33


@pytest.mark.parametrize(
    "name", ["layers.3.attention.wq.weight", "norm.weight", "acoustic_transformer.norm.weight"]
)
def test_names_go_to_the_module_tree_and_back(name: str):
    assert tensor_name(parameter_name(name)) == name
    assert parameter_name("acoustic_transformer.norm.weight") == "acoustic_transformer.norm.weight"
    assert parameter_name("norm.weight") == "backbone.norm.weight"
