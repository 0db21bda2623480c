"""bf16 as in serving: bit for bit what the published package computes when run the same way on this device.

Serving builds the modules under a bf16 default dtype, runs the encoder under bf16 autocast, the quantizer in
bf16 outside of it, the acoustic transformer and the decoder in bf16 throughout.
"""

from __future__ import annotations

import pytest
import torch
from oracle import noise_injected, oracle_velocity
from subject import Pair, noise_of, random_codes, speechlike


@pytest.mark.parametrize("samples", [1920, 700, 25 * 1920, 25 * 1920 + 333])
def test_codes_of_a_clip_are_identical_to_the_served_ones(served: Pair, samples: int):
    clip = speechlike(samples, seed=samples)
    theirs = served.their_codec._tokenize_audio(clip[None, None])
    assert torch.equal(served.codec.encode_as_served(clip[None]), theirs)


def test_bf16_choices_differ_from_float32s_so_that_the_comparison_means_something(small: Pair, served: Pair):
    clip = speechlike(25 * 1920, seed=1)
    bf16, float32 = served.codec.encode_as_served(clip[None]), small.codec.encode(clip[None])
    assert 0 < (bf16 != float32).float().mean() < 0.5


@pytest.mark.parametrize("samples", [1920, 10 * 1920 + 5])
def test_rows_of_a_clip_are_identical_to_the_served_reference_path(served: Pair, samples: int):
    clip = speechlike(samples, seed=samples)
    served.their_codec._encoder_loaded = True
    theirs = served.their_codec.encode_waveforms([clip])[0]
    ours = served.embeddings.voice_embedding(served.codec.encode_as_served(clip[None])[0])
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)


def test_quantizing_bf16_latents_is_identical(served: Pair):
    latents = noise_of(1, 1, served.config.codec.latent_dim, 500).bfloat16()
    assert torch.equal(served.codec.quantizer.encode(latents), served.their_codec.quantizer.encode(latents))


def test_bf16_latents_of_codes_are_identical(served: Pair):
    codes = random_codes(served.config, 1, 50, seed=2)
    theirs = served.their_codec.quantizer.decode(codes, torch.bfloat16)
    assert torch.equal(served.codec.quantizer.decode(codes, torch.bfloat16), theirs)


@pytest.mark.parametrize("frames", [1, 3, 40])
def test_the_decoded_waveform_is_identical_to_the_served_one(served: Pair, frames: int):
    codes = random_codes(served.config, 1, frames, seed=frames)
    theirs = served.their_codec.decode_helper_batch_async([(codes[0] + 2).T])[0]
    assert torch.equal(served.codec.decode_whole(codes)[0].float(), theirs)


def test_velocity_is_identical(served: Pair):
    x = noise_of(3, 6, 36).bfloat16()
    hidden = noise_of(4, 6, served.config.acoustic.input_dim).bfloat16()
    times = torch.linspace(0, 1, 6, dtype=torch.bfloat16)
    ours = served.acoustic.velocity(x, times, hidden)
    assert torch.equal(ours, oracle_velocity(served.their_acoustic, x, times, hidden))


@pytest.mark.parametrize("alpha", [1.0, 1.2, 2.0])
def test_frames_are_the_served_ones_up_to_ties(served: Pair, alpha: float):
    hidden = noise_of(5, 32, served.config.acoustic.input_dim).bfloat16()
    noise = noise_of(6, 32, 36).bfloat16()
    # Serving makes cfg_alpha a tensor of the hidden state's dtype: 1.2 becomes 1.203125.
    with noise_injected(served.oracle, noise):
        theirs = served.their_acoustic(hidden, torch.full((32,), alpha, dtype=torch.bfloat16))
    ours = served.acoustic.frame(hidden, noise, cfg_alpha=alpha)
    # The times are projected once for all steps, in a product of another number of rows, which some
    # processors without bf16 instructions round another way: a level may then be the next one.
    assert torch.equal(ours[:, 0], theirs[:, 0])
    assert (ours - theirs).abs().max() <= 1
    assert (ours != theirs).float().mean() < 0.003


def test_serving_takes_its_times_in_bf16(served: Pair):
    # linspace in bf16 is not float32's linspace cast: 6/7 becomes 0.859375, not 0.85546875.
    assert served.their_acoustic._timesteps[6] == 0.859375
    assert torch.linspace(0, 1, 8).bfloat16()[6] == 0.85546875


def test_semantic_logits_are_a_bf16_product_cast_to_float32(served: Pair):
    hidden = noise_of(7, 16, served.config.acoustic.input_dim).bfloat16()
    rows = served.config.codebook_rows[0]
    theirs = served.their_acoustic.semantic_codebook_output(hidden).float()
    ours = served.acoustic.semantic_logits(hidden)
    assert ours.dtype == torch.float32
    assert torch.equal(ours[:, 1:rows], theirs[:, 1:rows])


def test_rows_of_frames_are_identical(served: Pair):
    ids = random_codes(served.config, 1, 300, seed=8) + 2
    assert torch.equal(served.embeddings.frames(ids)[0], served.their_codec.encode_tokens([ids])[0])
