"""Decoding in bounded pieces against decoding all at once, and how far back the decoder sees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from revox.model.codec import Codec
from revox.model.config import CodecConfig

SMALL = CodecConfig(
    semantic_codebook_size=64, semantic_dim=8, dim=32, hidden_dim=48, head_dim=8, n_heads=4, n_kv_heads=4,
    layer_scale_init=0.5,
)  # fmt: skip
LAB = replace(SMALL, decoder_transformer_lengths=(1, 1, 2, 2), encoder_transformer_lengths=(2, 2, 1, 1))


def codec_of(config: CodecConfig) -> Codec:
    torch.manual_seed(0)
    codec = Codec(config, with_encoder=False).eval().requires_grad_(False)
    codec.quantizer.semantic_codebook.embedding_sum.normal_()
    return codec


def codes_of(config: CodecConfig, frames: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    semantic = torch.randint(config.semantic_codebook_size, (1, frames), generator=generator)
    return torch.cat((semantic, torch.randint(21, (36, frames), generator=generator)))


@pytest.mark.parametrize(
    "config",
    [SMALL, LAB, replace(SMALL, attn_sliding_window_size=8, patch_proj_kernel_size=3)],
    ids=["release", "lab", "narrow"],
)
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


def test_a_decode_from_a_later_frame_is_exact_with_the_left_context_and_not_with_less():
    codec, codes = codec_of(SMALL), codes_of(SMALL, 60)[None]
    whole = codec.decode_whole(codes)
    part = codec.decode(codes, start=45)
    assert (part - whole[:, 45 * 1920 :]).abs().max() <= 1e-5 * whole.abs().max()
    codec.left_context = 12
    part = codec.decode(codes, start=45)
    assert (part - whole[:, 45 * 1920 :]).abs().max() > 1e-4 * whole.abs().max()


@pytest.mark.parametrize("frames", [1, 99, 100, 101, 230])
def test_decoding_in_pieces_is_decoding_at_once(frames):
    codec = codec_of(SMALL)
    codes = torch.stack((codes_of(SMALL, frames), codes_of(SMALL, frames).flip(1)))
    whole, pieces = codec.decode_whole(codes), codec.decode(codes)
    assert pieces.shape == whole.shape
    assert (pieces - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_the_longest_speech_is_decoded_in_pieces_of_bounded_length(monkeypatch):
    codec, lengths = codec_of(SMALL), []
    monkeypatch.setattr(
        codec, "decode_latents", lambda x: lengths.append(x.shape[-1]) or torch.zeros(1, 1920 * x.shape[-1])
    )
    assert codec.decode(codes_of(SMALL, 2048)[None]).shape == (1, 2048 * 1920)
    assert max(lengths) <= 121


def test_no_frames_decode_to_no_samples():
    assert codec_of(SMALL).decode(codes_of(SMALL, 0)[None]).shape == (1, 0)
