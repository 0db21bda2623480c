"""A folder with an encoder injected, loaded by vllm-omni's own code: whole, and with revox's rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from oracle import (
    Oracle,
    random_acoustic_state,
    random_backbone_state,
    random_codec_state,
    small_params,
)
from safetensors.torch import load_file, save_file
from subject import speechlike
from torch import Tensor, nn
from vllm_loader import WHEEL, VllmLoader, find_vllm

from lab.tokenizer import write_tekken
from revox.checkpoint.inject import InjectionOptions, eject, inject
from revox.checkpoint.load import load_model
from revox.checkpoint.tensors import weight_files

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


@pytest.fixture(scope="module", params=["released", "sharded", "merged"])
def injected(weights, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder with the encoder beside the weights as released, beside shards with an index, or merged."""
    released, encoder = weights
    folder = tmp_path_factory.mktemp("injected") / "checkpoint"
    (folder / "voice_embedding").mkdir(parents=True)
    params = small_params()
    params["multimodal"]["audio_tokenizer_args"]["voice"] = {}
    (folder / "params.json").write_text(json.dumps(params))
    write_tekken(folder / "tekken.json", {})
    if request.param == "sharded":
        weight_map = {}
        for number, names in enumerate((sorted(released)[::2], sorted(released)[1::2]), 1):
            file = f"consolidated-{number:05d}-of-00002.safetensors"
            save_file({name: released[name] for name in names}, folder / file)
            weight_map |= dict.fromkeys(names, file)
        (folder / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file(released, folder / "consolidated.safetensors")
    save_file(encoder, folder.with_name("encoder.safetensors"))  # float32, as a run has it
    out = folder.with_name("merged") if request.param == "merged" else None
    options = InjectionOptions(out=out, merge=out is not None)
    return inject(folder, folder.with_name("encoder.safetensors"), options).folder


def read_by(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        yield from load_file(file).items()


@pytest.fixture(scope="module")
def theirs(oracle: Oracle, injected: Path) -> nn.Module:
    """vllm-omni's tokenizer as served, every parameter NaN before the folder's weights go in."""
    tokenizer = empty_tokenizer(oracle)
    assert not tokenizer.encoder_loaded
    loaded = oracle.load_weights(tokenizer, read_by(weight_files(injected)))
    assert {f"audio_tokenizer.{name}" for name, _ in tokenizer.named_parameters()} <= loaded
    return tokenizer


def empty_tokenizer(oracle: Oracle) -> nn.Module:
    tokenizer = oracle.audio_tokenizer(small_params(), torch.bfloat16)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.fill_(torch.nan)
    return tokenizer


def all_arrived(tokenizer: nn.Module, weights) -> None:
    assert tokenizer.encoder_loaded
    own = {f"audio_tokenizer.{name}": p for name, p in tokenizer.named_parameters()}
    assert sorted(name for name in own if name.startswith(ENCODER)) == sorted(weights[1])
    assert len(weights[1]) == 114
    for name, tensor in weights[1].items():
        assert torch.equal(own[name], tensor.bfloat16()), name
    assert not any(bool(parameter.isnan().any()) for parameter in own.values())


def test_all_of_the_encoder_arrives_there_and_not_only_its_flag(theirs: nn.Module, weights):
    all_arrived(theirs, weights)


@pytest.mark.parametrize("samples", [10 * 1920, 1920 + 333])
def test_it_gives_the_rows_that_revox_gives_with_the_folder(theirs: nn.Module, injected: Path, samples: int):
    clip = speechlike(samples, seed=samples)
    expected = theirs.encode_waveforms([clip])[0]
    model = load_model(injected)
    ours = model.mm_audio_embeddings.voice_embedding(model.audio_tokenizer.encode_as_served(clip[None])[0])
    assert ours.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(ours, expected)


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> VllmLoader:
    root = find_vllm(tmp_path_factory.mktemp("vllm"))
    if root is None:
        pytest.skip(f"vllm is not installed, and {WHEEL} names no wheel of it")
    return VllmLoader(root)


@pytest.mark.slow  # needs vllm's wheel, 315 MB
def test_vllms_own_loader_selects_the_files_that_revox_reads_and_hands_them_over_whole(
    vllm: VllmLoader, oracle: Oracle, injected: Path, weights
):
    assert vllm.files(injected) == [path.name for path in weight_files(injected)]
    tokenizer = empty_tokenizer(oracle)
    oracle.load_weights(tokenizer, vllm.weights(injected))
    all_arrived(tokenizer, weights)


@pytest.mark.slow
def test_vllms_own_loader_reads_no_encoder_where_revox_finds_none(vllm: VllmLoader, injected: Path):
    if len(weight_files(injected)) == 1:
        pytest.skip("the merged folder has no file to take away")
    copy = Path(shutil.copytree(injected, injected.with_name("copy")))
    eject(copy)
    assert vllm.files(copy) == [path.name for path in weight_files(copy)]
    assert not any(name.startswith(ENCODER) for name, _ in vllm.weights(copy))
    # Listed nowhere: vLLM passes it over where there is an index, and reads it where there is none.
    shutil.copy(injected / "consolidated.encoder.safetensors", copy)
    assert vllm.files(copy) == [path.name for path in weight_files(copy)]
