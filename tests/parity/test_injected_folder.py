"""A folder with an encoder injected, in vllm-omni's own audio tokenizer: whole, and with revox's rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from oracle import (
    Oracle,
    load_into_oracle,
    random_acoustic_state,
    random_backbone_state,
    random_codec_state,
    small_params,
)
from safetensors.torch import load_file, save_file
from subject import speechlike
from torch import Tensor, nn

from lab.tokenizer import write_tekken
from revox.checkpoint.inject import inject
from revox.checkpoint.load import load_model

ENCODER = ("audio_tokenizer.input_proj.", "audio_tokenizer.encoder_blocks.")


@pytest.fixture(scope="module")
def weights(oracle: Oracle) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random weights of a whole checkpoint at small size, in the file's names: released, and the encoder."""
    params = small_params()
    with torch.no_grad():
        state = random_codec_state(oracle.audio_tokenizer(params), 11)
        state |= random_acoustic_state(oracle.acoustic_transformer(params), 12)
    state |= random_backbone_state(params, 13)
    state["mm_audio_embeddings.tok_embeddings.weight"] = torch.randn(params["vocab_size"], params["dim"])
    encoder = {name: tensor for name, tensor in state.items() if name.startswith(ENCODER)}
    return {name: tensor.bfloat16() for name, tensor in state.items() if name not in encoder}, encoder


@pytest.fixture(scope="module")
def injected(weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    released, encoder = weights
    folder = tmp_path_factory.mktemp("injected") / "checkpoint"
    (folder / "voice_embedding").mkdir(parents=True)
    params = small_params()
    params["multimodal"]["audio_tokenizer_args"]["voice"] = {}
    (folder / "params.json").write_text(json.dumps(params))
    write_tekken(folder / "tekken.json", {})
    save_file(released, folder / "consolidated.safetensors")
    save_file(encoder, folder.with_name("encoder.safetensors"))  # float32, as a run has it
    inject(folder, folder.with_name("encoder.safetensors"), None)
    return folder


@pytest.fixture(scope="module")
def theirs(oracle: Oracle, injected: Path) -> nn.Module:
    """vllm-omni's tokenizer as served, every parameter NaN before the folder's weights go in."""
    tokenizer = oracle.audio_tokenizer(small_params(), torch.bfloat16)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.fill_(torch.nan)
    state = {
        name: tensor
        for name, tensor in load_file(injected / "consolidated.safetensors").items()
        if not name.startswith("acoustic_transformer.")
    }
    assert not tokenizer.encoder_loaded
    return load_into_oracle(tokenizer, state)


def test_all_of_the_encoder_arrives_there_and_not_only_its_flag(theirs: nn.Module, weights):
    assert theirs.encoder_loaded
    own = {f"audio_tokenizer.{name}": p for name, p in theirs.named_parameters()}
    assert sorted(name for name in own if name.startswith(ENCODER)) == sorted(weights[1])
    assert len(weights[1]) == 114
    for name, tensor in weights[1].items():
        assert torch.equal(own[name], tensor.bfloat16()), name
    assert not any(bool(parameter.isnan().any()) for parameter in own.values())


@pytest.mark.parametrize("samples", [10 * 1920, 1920 + 333])
def test_it_gives_the_rows_that_revox_gives_with_the_folder(theirs: nn.Module, injected: Path, samples: int):
    clip = speechlike(samples, seed=samples)
    expected = theirs.encode_waveforms([clip])[0]
    model = load_model(injected)
    ours = model.mm_audio_embeddings.voice_embedding(model.audio_tokenizer.encode_as_served(clip[None])[0])
    assert ours.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(ours, expected)
