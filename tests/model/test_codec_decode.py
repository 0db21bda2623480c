"""Decoding in bounded pieces against decoding all at once, and how far back the decoder sees."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from revox.model.codec import Codec
from revox.model.config import CodecConfig
from revox.model.decoder_state import DecoderState

SMALL = CodecConfig(
    semantic_codebook_size=64, semantic_dim=8, dim=32, hidden_dim=48, head_dim=8, n_heads=4, n_kv_heads=4,
    layer_scale_init=0.5,
)  # fmt: skip
LAB = replace(SMALL, decoder_transformer_lengths=(1, 1, 2, 2), encoder_transformer_lengths=(2, 2, 1, 1))
CONFIGS = [SMALL, LAB, replace(SMALL, attn_sliding_window_size=8, patch_proj_kernel_size=3)]
CONFIG_NAMES = ["release", "lab", "narrow"]


def codec_of(config: CodecConfig) -> Codec:
    torch.manual_seed(0)
    codec = Codec(config, with_encoder=False).eval().requires_grad_(False)
    codec.quantizer.semantic_codebook.embedding_sum.normal_()
    return codec


def codes_of(config: CodecConfig, frames: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    semantic = torch.randint(config.semantic_codebook_size, (1, frames), generator=generator)
    return torch.cat((semantic, torch.randint(21, (36, frames), generator=generator)))


@pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_NAMES)
def test_the_left_context_ends_at_the_farthest_frame_that_a_gradient_finds(config):
    codec = codec_of(config).double()
    latents = torch.randn(1, config.latent_dim, 60, dtype=torch.double, requires_grad=True)
    frame = codec.decode_latents(latents)[0, 50 * 1920 : 51 * 1920]
    [gradient] = torch.autograd.grad(frame.square().sum(), latents)
    touched = gradient[0].abs().sum(0).nonzero().flatten()
    assert 50 - int(touched.min()) == codec.left_context
    assert int(touched.max()) == 50


def test_the_releases_decoder_sees_21_frames_back():
    assert codec_of(SMALL).left_context == 21


def chunks_of(frames: int, sizes: list[int]) -> list[int]:
    """`sizes`, over and over, until they make `frames`."""
    chunks: list[int] = []
    while sum(chunks) < frames:
        chunks.append(min(sizes[len(chunks) % len(sizes)], frames - sum(chunks)))
    return chunks


@pytest.mark.parametrize(
    "sizes", [[1], [2], [3, 1], [5, 5, 5, 5, 5, 25], [1, 2, 4, 8], [40, 1], [60]], ids=str
)
@pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_NAMES)
def test_a_stream_in_chunks_of_any_sizes_is_the_whole(config, sizes):
    codec, codes = codec_of(config), codes_of(config, 60)[None]
    whole, state = codec.decode_whole(codes), codec.empty_state()
    chunks = [codec.decode(chunk, state) for chunk in codes.split(chunks_of(60, sizes), dim=-1)]
    assert [chunk.shape[1] // 1920 for chunk in chunks] == chunks_of(60, sizes)
    assert (torch.cat(chunks, dim=1) - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_streams_at_any_positions_share_a_batch():
    codec = codec_of(SMALL)
    codes = [codes_of(SMALL, 40).roll(shift, 1)[None] for shift in range(4)]
    whole = [codec.decode_whole(one)[0] for one in codes]
    chance, at = random.Random(3), [0] * 4
    states = [codec.empty_state() for _ in codes]
    decoded: list[list[torch.Tensor]] = [[] for _ in codes]
    while any(position < 40 for position in at):
        size = chance.choice([1, 2, 7])
        able = [i for i in range(4) if at[i] + size <= 40] or [i for i in range(4) if at[i] < 40]
        size = min(size, *(40 - at[i] for i in able), 40)
        members = chance.sample(able, chance.randint(1, len(able)))
        batch = DecoderState.stack([states[i] for i in members])
        waveforms = codec.decode(torch.cat([codes[i][..., at[i] : at[i] + size] for i in members]), batch)
        for i, waveform, state in zip(members, waveforms, batch.split(), strict=True):
            decoded[i].append(waveform)
            states[i], at[i] = state, at[i] + size
    for pieces, expected in zip(decoded, whole, strict=True):
        assert (torch.cat(pieces) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_state_is_as_large_at_any_frame_and_holds_no_memory_of_the_batch_it_was_in():
    codec = codec_of(SMALL)
    state = codec.empty_state()
    size = state.nbytes
    for frames in (1, 30, 100):
        batch = DecoderState.stack([state] * 3)
        codec.decode(codes_of(SMALL, frames).expand(3, -1, -1), batch)
        state = batch.split()[1]
        assert state.nbytes == size
        assert sum(tensor.untyped_storage().nbytes() for tensor in state.past.values()) == size


def test_a_decode_that_fails_leaves_the_states_it_was_stacked_from_as_they_were(monkeypatch):
    codec, codes = codec_of(SMALL), codes_of(SMALL, 20)[None]
    state = codec.empty_state()
    first = codec.decode(codes[..., :10], state)
    with monkeypatch.context() as patch:
        patch.setattr(codec.output_proj, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            codec.decode(codes[..., 10:], DecoderState.stack([state]))
    together = torch.cat((first, codec.decode(codes[..., 10:], state)), dim=1)
    whole = codec.decode_whole(codes)
    assert (together - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("frames", [1, 99, 100, 101, 230])
def test_decoding_in_pieces_is_decoding_at_once(frames):
    codec = codec_of(SMALL)
    codes = torch.stack((codes_of(SMALL, frames), codes_of(SMALL, frames).flip(1)))
    whole, pieces = codec.decode_whole(codes), codec.decode(codes)
    assert pieces.shape == whole.shape
    assert (pieces - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_the_longest_speech_is_decoded_in_pieces_of_bounded_length_and_no_frame_twice(monkeypatch):
    codec, lengths = codec_of(SMALL), []
    monkeypatch.setattr(
        codec,
        "decode_latents",
        lambda x, _: lengths.append(x.shape[-1]) or torch.zeros(1, 1920 * x.shape[-1]),
    )
    assert codec.decode(codes_of(SMALL, 2048)[None]).shape == (1, 2048 * 1920)
    assert max(lengths) <= 100
    assert sum(lengths) == 2048


def test_no_frames_decode_to_no_samples():
    assert codec_of(SMALL).decode(codes_of(SMALL, 0)[None]).shape == (1, 0)
