"""The encoder's codes are those of serving, and what cannot be encoded is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from oracle import OracleMissingError, load_into_oracle, load_oracle
from safetensors.torch import load_file
from torch import Tensor, nn

import revox
from revox.checkpoint.load import load_model
from revox.coding.encode import encode, served_codec
from revox.coding.errors import CodingError
from revox.coding.find import MODEL_PARTS
from revox.model.voxtral import Voxtral
from revox.speech import Audio

pytestmark = pytest.mark.usefixtures("one_thread")

AGREED = "a made-up voice"


@pytest.fixture(scope="module")
def exact(tiny_checkpoint_with_encoder: Path) -> Voxtral:
    return load_model(tiny_checkpoint_with_encoder, dtype=torch.float32, parts=MODEL_PARTS)


@pytest.fixture(scope="module")
def theirs(tiny_checkpoint_with_encoder: Path) -> nn.Module:
    """vllm-omni's tokenizer with the folder's weights."""
    try:
        oracle = load_oracle()
    except OracleMissingError as missing:
        sentence = str(missing)
        pytest.fail(sentence, pytrace=False)
    params = json.loads((tiny_checkpoint_with_encoder / "params.json").read_text())
    tokenizer = oracle.audio_tokenizer(params, torch.bfloat16)
    state = load_file(tiny_checkpoint_with_encoder / "consolidated.safetensors")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("acoustic_transformer.")}
    return load_into_oracle(tokenizer, kept)


def buzz(seconds: float, rate: int = 24000) -> Tensor:
    """Voiced syllables of a wandering pitch."""
    t = torch.arange(round(seconds * rate)) / rate
    phase = 2 * torch.pi * torch.cumsum(140 + 25 * torch.sin(2 * torch.pi * 0.9 * t), 0) / rate
    voice = torch.stack([torch.sin(k * phase) / k for k in range(1, 12)]).sum(0)
    noise = torch.randn(len(t), generator=torch.Generator().manual_seed(0)) * 1e-3
    return 0.1 * voice * (0.6 + torch.sin(2 * torch.pi * 3 * t)).clamp_min(0) + noise


@pytest.mark.parametrize("seconds", [0.9, 12.0])
def test_codes_are_rows_of_vllm_omni_whatever_type_the_weights_were_loaded_in(
    theirs: nn.Module, exact: Voxtral, tiny_checkpoint_with_encoder: Path, seconds: float
):
    clip = buzz(seconds)
    with torch.no_grad():
        expected = theirs.encode_waveforms([clip])[0]
        bf16 = load_model(tiny_checkpoint_with_encoder)
        for model in (bf16, exact):
            codes = encode(served_codec(model.audio_tokenizer), clip).codes
            assert torch.equal(bf16.mm_audio_embeddings.voice_embedding(codes), expected)
    assert exact.audio_tokenizer.output_proj.conv.weight.dtype == torch.float32  # it was copied


def test_a_clone_has_the_rows_that_vllm_omni_gives_its_reference(
    theirs: nn.Module, tiny_checkpoint_with_encoder: Path
):
    silence = torch.zeros(12000)
    audio = Audio(torch.cat((silence, buzz(7.0), silence)).numpy(), 24000)
    cloned = revox.load(tiny_checkpoint_with_encoder, lazy=True).clone(audio, consent=AGREED)
    assert cloned.coding.method == "encoder"
    assert cloned.reference.seconds > 6.5  # the whole stretch, in one piece
    with torch.no_grad():
        expected = theirs.encode_waveforms([torch.from_numpy(cloned.reference.samples)])[0]
    assert torch.equal(cloned.embedding, expected)


def test_latents_are_what_the_codes_were_rounded_from(exact: Voxtral):
    codec = served_codec(exact.audio_tokenizer)
    found = encode(codec, buzz(1.0))
    assert torch.equal(codec.quantizer.encode(found.latents[None].bfloat16())[0], found.codes)
    assert found.latents.dtype == torch.float32


def test_an_encoder_that_is_not_there_or_gives_no_numbers_is_refused(exact: Voxtral, tiny_checkpoint: Path):
    released = load_model(tiny_checkpoint, parts=("audio_tokenizer",)).audio_tokenizer
    with pytest.raises(CodingError, match="has no encoder"):
        encode(released, buzz(0.5))
    broken = served_codec(exact.audio_tokenizer)
    with torch.no_grad():
        broken.encoder_blocks[0].layers["0"].attention_scale.fill_(torch.nan)
    with pytest.raises(CodingError, match="not numbers"):
        encode(broken, buzz(0.5))


@pytest.mark.parametrize("samples", [torch.zeros(0), torch.zeros(2, 1920)])
def test_what_is_no_single_clip_is_refused(exact: Voxtral, samples: Tensor):
    with pytest.raises(ValueError, match="a clip is samples"):
        encode(exact.audio_tokenizer, samples)
