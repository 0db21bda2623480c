"""What the codec may look at: its causality and reach, worked out from its kernels, strides and windows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from revox.model.codec import Codec
from revox.model.config import CodecConfig

NARROW = CodecConfig(
    semantic_codebook_size=64, semantic_dim=12, dim=32, hidden_dim=48, head_dim=8, n_heads=4, n_kv_heads=4
)
PATCHES = NARROW.patches_per_frame


@pytest.fixture(scope="module")
def codec() -> Codec:
    """Random weights with large LayerScales, in float64: what can matter does, visibly."""
    torch.manual_seed(0)
    codec = Codec(NARROW, with_encoder=True)
    for name, tensor in codec.state_dict().items():
        if name.endswith("_scale"):
            tensor.fill_(0.7)
        elif name.endswith("embedding_sum"):
            tensor.normal_()
    return codec.eval().double()


def frames_that_matter(output: Tensor, inputs: Tensor, frame_of: int) -> list[int]:
    """Frames of `inputs` (time last, `frame_of` steps a frame) on which `output` depends at all."""
    (gradient,) = torch.autograd.grad(output.square().sum(), inputs)
    per_step = gradient.abs().sum(dim=tuple(range(gradient.ndim - 1)))
    per_frame = per_step.unflatten(0, (-1, frame_of)).sum(-1)
    return per_frame.nonzero().flatten().tolist()


def test_a_latent_depends_on_its_own_frame_and_21_before_it(codec: Codec):
    # Back from frame t: conv k3 and two layers of window 2 reach frame t-6; every stride-2 conv (k 4, 2 to
    # the left) with two layers of windows 4, 8, 16 before it and the k 7 projection lead to patch 8t-164,
    # which lies in frame t-21.
    t = 25
    waveform = (torch.randn(1, 30 * NARROW.samples_per_frame, dtype=torch.float64) * 0.3).requires_grad_()
    latents = codec.encode_latents(waveform)
    assert frames_that_matter(latents[..., t], waveform, NARROW.samples_per_frame) == list(
        range(t - 21, t + 1)
    )


def test_a_frame_of_audio_depends_on_its_own_latent_and_21_before_it(codec: Codec):
    # Back from patch 8f: projection 6, windows 16, 8, 4, 2 twice each, three transposed convs (one input back
    # each) and conv k3: frame f-21.
    f = 25
    latents = torch.randn(1, NARROW.latent_dim, 30, dtype=torch.float64).requires_grad_()
    audio = codec.decode_latents(latents)
    size = NARROW.samples_per_frame
    assert frames_that_matter(audio[:, f * size : (f + 1) * size], latents, 1) == list(range(f - 21, f + 1))


@pytest.mark.parametrize(("context", "exact"), [(20, False), (21, True), (22, True), (25, True)])
def test_a_chunk_decoded_with_22_frames_of_left_context_is_the_whole_and_with_20_is_not(
    codec: Codec, context: int, exact: bool
):
    size, frames, start = NARROW.samples_per_frame, 40, 30
    latents = torch.randn(1, NARROW.latent_dim, frames, dtype=torch.float64)
    with torch.no_grad():
        whole = codec.decode_latents(latents)[:, start * size :]
        chunk = codec.decode_latents(latents[..., start - context :])[:, context * size :]
    error = float((whole - chunk).abs().max())
    assert error < 1e-12 if exact else error > 1e-12


def test_streaming_in_servings_chunks_gives_the_whole_decode(codec: Codec):
    size, frames = NARROW.samples_per_frame, 113
    codes = torch.cat(
        (torch.randint(64, (1, 1, frames)), torch.randint(21, (1, NARROW.acoustic_dim, frames))), dim=1
    )
    ends = [5, 10, 15, 20, *range(25, frames, 25), frames]
    with torch.no_grad():
        whole = codec.decode_whole(codes)
        pieces, start = [], 0
        for end in ends:
            context = min(start, 25)
            pieces.append(codec.decode_whole(codes[..., start - context : end])[:, context * size :])
            start = end
    assert torch.allclose(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-12)


def test_the_encoder_is_causal_to_the_frame(codec: Codec):
    size = NARROW.samples_per_frame
    waveform = torch.randn(1, 12 * size, dtype=torch.float64) * 0.3
    with torch.no_grad():
        whole = codec.encode_latents(waveform)
        changed = waveform.clone()
        changed[:, 7 * size :] = 0.9
        prefix = codec.encode_latents(waveform[:, : 7 * size])
        assert torch.allclose(codec.encode_latents(changed)[..., :7], whole[..., :7], rtol=0, atol=1e-12)
        assert not torch.allclose(codec.encode_latents(changed)[..., 7:], whole[..., 7:], rtol=0, atol=1e-3)
        assert torch.allclose(prefix, whole[..., :7], rtol=0, atol=1e-12)


@pytest.mark.parametrize("samples", [1, 240, 1919, 1920, 1921, 13440, 24000])
def test_a_clip_gives_a_latent_for_every_frame_begun(codec: Codec, samples: int):
    with torch.no_grad():
        assert codec.encode_latents(torch.zeros(1, samples, dtype=torch.float64)).shape[-1] == -(
            -samples // 1920
        )


def test_a_codec_without_its_encoder_has_no_parameter_for_it_and_says_so():
    codec = Codec(NARROW, with_encoder=False)
    assert not [name for name in codec.state_dict() if name.startswith(("input_proj", "encoder_blocks"))]
    with pytest.raises(RuntimeError, match="without its encoder"):
        codec.encode_latents(torch.zeros(1, 1920))
