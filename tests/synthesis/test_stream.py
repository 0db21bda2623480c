from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch

from revox.model.codec import Codec
from revox.model.config import CodecConfig
from revox.synthesis import stream as streaming
from revox.synthesis.generate import generate
from revox.synthesis.stream import chunk_ends, decode, decode_after, decoder_reach, stream

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


def test_chunks_end_where_serving_ends_them():
    assert list(islice(chunk_ends(), 9)) == [5, 10, 15, 20, 25, 50, 75, 100, 125]


@pytest.mark.parametrize(
    "config",
    [SMALL, LAB, replace(SMALL, attn_sliding_window_size=8, patch_proj_kernel_size=3)],
    ids=["release", "lab", "narrow"],
)
def test_the_reach_is_the_farthest_frame_that_a_gradient_finds(config):
    codec = codec_of(config).double()
    latents = torch.randn(1, config.latent_dim, 60, dtype=torch.double, requires_grad=True)
    frame = codec.decode_latents(latents)[0, 50 * 1920 : 51 * 1920]
    [gradient] = torch.autograd.grad(frame.square().sum(), latents)
    touched = gradient[0].abs().sum(0).nonzero().flatten()
    assert 50 - int(touched.min()) == decoder_reach(codec)
    assert int(touched.max()) == 50


def test_the_releases_decoder_reaches_21_frames_back():
    assert decoder_reach(codec_of(SMALL)) == 21


def test_a_decode_with_the_reach_as_context_is_exact_and_with_less_is_not(monkeypatch):
    codec, codes = codec_of(SMALL), codes_of(SMALL, 60)
    with torch.inference_mode():
        whole = codec.decode(codes[None])[0]
        part = decode_after(codec, codes, 45)
        assert (part - whole[45 * 1920 :]).abs().max() <= 1e-5 * whole.abs().max()
        monkeypatch.setattr(streaming, "decoder_reach", lambda codec: 12)
        part = decode_after(codec, codes, 45)
        assert (part - whole[45 * 1920 :]).abs().max() > 1e-4 * whole.abs().max()


@pytest.mark.parametrize("frames", [1, 99, 100, 101, 230])
def test_decoding_in_pieces_is_decoding_at_once(frames):
    codec, codes = codec_of(SMALL), codes_of(SMALL, frames)
    with torch.inference_mode():
        whole = codec.decode(codes[None])[0]
    pieces = decode(codec, codes)
    assert pieces.shape == whole.shape
    assert (pieces - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_nothing_decodes_to_nothing():
    assert decode(codec_of(SMALL), codes_of(SMALL, 0)).shape == (0,)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    from revox.checkpoint.load import load_model

    return load_model(tiny_checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompt(model):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(20, 256, generator=generator) * 0.28


@pytest.mark.parametrize("limit", [1, 5, 7, 25, 60])
def test_a_stream_is_the_whole_speech_within_1e_5_whatever_the_limit(model, prompt, limit):
    chunks = list(stream(model, prompt, 4, max_frames=limit))
    [spoken] = generate(model, [prompt], [4], max_frames=limit)
    whole = model.audio_tokenizer.decode(spoken.codes[None])[0]
    together = torch.cat([samples for samples, _ in chunks])
    assert together.shape == whole.shape
    assert (together - whole).abs().max() <= 1e-5 * whole.abs().max().clamp(min=1)
    assert [cut for _, cut in chunks] == [False] * (len(chunks) - 1) + [not spoken.ended]


@pytest.mark.parametrize("length", [0, 3, 5, 12, 25, 26, 51])
def test_a_stream_that_ends_by_itself_is_whole_and_not_cut(model, prompt, length, monkeypatch):
    real = model.acoustic_transformer.frame
    seen = []

    def frame(hidden, *rest):
        ids = real(hidden, *rest)
        # Never the end before `length` frames, always after.
        ids[:, 0] = torch.where(ids[:, 0] == 1, 2, ids[:, 0])
        if len(seen) == length:
            ids[:, 0] = 1
        seen.append(ids)
        return ids

    monkeypatch.setattr(model.acoustic_transformer, "frame", frame)
    chunks = list(stream(model, prompt, 4))
    assert sum(len(samples) for samples, _ in chunks) == length * 1920
    assert not any(cut for _, cut in chunks)
    ends = [end for end in islice(chunk_ends(), 20) if end < length]
    assert [len(samples) // 1920 for samples, _ in chunks] == [
        end - start for start, end in zip([0, *ends], [*ends, length], strict=True) if end > start
    ]


def test_the_first_chunk_comes_after_five_frames(model, prompt, monkeypatch):
    real, spoken = model.acoustic_transformer.frame, []
    monkeypatch.setattr(
        model.acoustic_transformer,
        "frame",
        lambda hidden, *rest: spoken.append(1) or real(hidden, *rest).clamp(min=2),
    )
    next(stream(model, prompt, 4))
    assert len(spoken) == 5
