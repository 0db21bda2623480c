"""Float32: our codec is the published one, within 1e-5 relative, codes identical up to ties."""

from __future__ import annotations

import pytest
import torch
from oracle import codes_equal_up_to_ties, oracle_latents, relative_error
from subject import Pair, random_codes, speechlike

TOLERANCE = 1e-5
FRAME, PATCH = 1920, 240


def assert_same_codes(pair: Pair, latents: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    codebook = pair.their_codec.quantizer.semantic_codebook.embedding
    assert codes_equal_up_to_ties(latents, ours, theirs, codebook, pair.config.codec.acoustic_codebook_size)


@pytest.mark.parametrize("frames", [1, 5, 37])
def test_encoder_latents_and_codes_of_whole_frames_are_the_oracles(small: Pair, frames: int):
    clip = speechlike(frames * FRAME, seed=frames)
    theirs = oracle_latents(small.their_codec, clip)
    ours = small.codec.encode_latents(clip[None])
    assert ours.shape == (1, small.config.codec.latent_dim, frames)
    assert relative_error(ours, theirs) < TOLERANCE
    assert_same_codes(
        small, theirs, small.codec.encode(clip[None]), small.their_codec.quantizer.encode(theirs)
    )


@pytest.mark.parametrize(
    "samples", [FRAME + 1, 3 * FRAME - 1, 3 * FRAME + PATCH, 7 * FRAME + 777, 13440, 26880, 24000]
)
def test_encoder_of_a_length_that_is_no_whole_frame_is_the_oracles(small: Pair, samples: int):
    clip = speechlike(samples, seed=samples)
    theirs = oracle_latents(small.their_codec, clip)
    ours = small.codec.encode_latents(clip[None])
    assert ours.shape[-1] == -(-samples // FRAME)
    assert relative_error(ours, theirs) < TOLERANCE
    assert_same_codes(
        small, theirs, small.codec.encode(clip[None]), small.their_codec.quantizer.encode(theirs)
    )


@pytest.mark.parametrize("patches", range(1, 10))
def test_encoder_of_a_clip_of_a_few_patches_is_the_oracles_where_reflection_has_too_little(
    small: Pair, patches: int
):
    for samples in (patches * PATCH, patches * PATCH - 1, (patches - 1) * PATCH + 1):
        clip = speechlike(samples, seed=patches) + 0.1
        theirs = oracle_latents(small.their_codec, clip)
        assert relative_error(small.codec.encode_latents(clip[None]), theirs) < TOLERANCE


@pytest.mark.parametrize("frames", [1, 2, 3, 30, 130])
def test_decoder_waveform_is_the_oracles(small: Pair, frames: int):
    codes = random_codes(small.config, 1, frames, seed=frames)
    theirs = small.their_codec.decode(codes)[:, 0]
    ours = small.codec.decode(codes)
    assert ours.shape == (1, frames * FRAME)
    assert relative_error(ours, theirs) < TOLERANCE


def test_decoder_of_latents_is_the_oracles_without_the_quantizer(small: Pair):
    latents = torch.randn(2, small.config.codec.latent_dim, 9, generator=torch.Generator().manual_seed(5))
    theirs = small.their_codec._forward_decoder(latents)[:, 0]
    assert relative_error(small.codec.decode_latents(latents), theirs) < TOLERANCE


def test_every_item_of_a_batch_of_clips_encodes_as_the_oracle_encodes_it_alone(small: Pair):
    clips = torch.stack([speechlike(5 * PATCH + 17 + 6 * FRAME, seed=n) for n in range(3)])
    latents, codes = small.codec.encode_latents(clips), small.codec.encode(clips)
    for item, clip in enumerate(clips):
        alone = oracle_latents(small.their_codec, clip)
        assert relative_error(latents[item : item + 1], alone) < TOLERANCE
        theirs = small.their_codec.quantizer.encode(alone)
        assert_same_codes(small, alone, codes[item : item + 1], theirs)


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_heads": 6, "n_kv_heads": 6, "head_dim": 32},
        {"n_heads": 4, "n_kv_heads": 2},
        {"half_attn_window_upon_downsampling": False, "attn_sliding_window_size": 5},
        {"decoder_transformer_lengths_str": "1,1,2,2", "encoder_transformer_lengths_str": "2,2,1,1"},
        {"conv_weight_norm": False},
    ],
    ids=["heads-not-a-power-of-two", "grouped-heads", "constant-window", "uneven-depth", "plain-projections"],
)
def test_other_sizes_in_params_json_mean_what_they_mean_to_the_oracle(oracle, sizes: dict):
    pair = Pair.small(oracle, torch.float32, seed=7, **sizes)
    clip = speechlike(5 * FRAME, seed=1)
    assert (
        relative_error(pair.codec.encode_latents(clip[None]), oracle_latents(pair.their_codec, clip))
        < TOLERANCE
    )
    codes = random_codes(pair.config, 1, 6, seed=2)
    assert relative_error(pair.codec.decode(codes), pair.their_codec.decode(codes)[:, 0]) < TOLERANCE
