"""The quantizer, both ways, is the published one."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import codes_equal_up_to_ties, relative_error
from subject import Pair, noise_of, random_codes


def test_codes_of_latents_are_the_oracles_up_to_ties(small: Pair):
    latents = noise_of(1, 3, small.config.codec.latent_dim, 200)
    # The oracle's quantizer takes one clip at a time.
    theirs = torch.cat([small.their_codec.quantizer.encode(one[None]) for one in latents])
    ours = small.codec.quantizer.encode(latents)
    assert ours.dtype == torch.int64
    codebook = small.their_codec.quantizer.semantic_codebook.embedding
    assert codes_equal_up_to_ties(latents, ours, theirs, codebook, 21)
    assert theirs[:, 0].unique().numel() > 50, "the sample exercises many semantic codes"
    assert set(theirs[:, 1:].unique().tolist()) == set(range(21)), "and every acoustic level"


def test_latents_of_codes_are_the_oracles(small: Pair):
    codes = random_codes(small.config, 2, 300, seed=4)
    assert (
        relative_error(small.codec.quantizer.decode(codes), small.their_codec.quantizer.decode(codes)) < 1e-6
    )


def test_the_codebook_is_the_oracles_where_codes_were_never_used(small: Pair):
    usage = small.codec.quantizer.semantic_codebook.cluster_usage
    unused = usage < 1e-5
    assert unused.any()
    ours = small.codec.quantizer.semantic_codebook.embedding
    theirs = small.their_codec.quantizer.semantic_codebook.embedding
    assert relative_error(ours[unused], theirs[unused]) < 1e-6
    assert relative_error(ours, theirs) < 1e-6


def test_tanh_is_applied_once_and_rounding_is_half_to_even(small: Pair):
    codec = small.config.codec
    # tanh(x) = level/10 - 1 lands on a level exactly; a second tanh would not.
    levels = torch.arange(1, 20)
    latents = torch.zeros(1, codec.latent_dim, len(levels))
    latents[0, codec.semantic_dim :, :] = torch.atanh(levels / 10 - 1)
    assert torch.equal(small.codec.quantizer.encode(latents)[0, 1], levels)
    assert torch.equal(small.codec.quantizer.encode(latents), small.their_codec.quantizer.encode(latents))
    saturated = torch.full((1, codec.latent_dim, 2), 30.0)
    saturated[..., 1] = -30.0
    assert small.codec.quantizer.encode(saturated)[0, 1:].unique(dim=0).tolist() == [[20, 0]]
    # tanh(atanh(x)) need not be exact in float32, so a tie itself cannot be set up: a fine sweep instead.
    sweep = torch.linspace(-3, 3, 20001).expand(1, codec.latent_dim, -1)
    ours, theirs = small.codec.quantizer.encode(sweep), small.their_codec.quantizer.encode(sweep)
    assert torch.equal(ours[:, 1:], theirs[:, 1:])


@pytest.mark.parametrize(
    ("scalar", "code", "other", "equal"),
    [
        (math.atanh(0.05), 10, 11, True),  # (1.05 / 2) * 20 = 10.5: a tie
        (math.atanh(0.051), 10, 11, False),
        (math.atanh(0.05), 10, 12, False),
        (math.atanh(0.3), 13, 13, True),
    ],
)
def test_only_a_tie_excuses_an_acoustic_code(scalar: float, code: int, other: int, equal: bool):
    latents = torch.tensor([[[0.0], [scalar]]], dtype=torch.float64)
    a, b = torch.tensor([[[0], [code]]]), torch.tensor([[[0], [other]]])
    assert codes_equal_up_to_ties(latents, a, b, torch.zeros(2, 1), 21) is equal


@pytest.mark.parametrize(("point", "equal"), [(0.5, True), (0.5 + 3e-6, True), (0.5 + 1e-4, False)])
def test_only_a_tie_excuses_a_semantic_code(point: float, equal: bool):
    latents = torch.tensor([[[point], [0.0]]], dtype=torch.float64)
    a, b = torch.tensor([[[0], [10]]]), torch.tensor([[[1], [10]]])
    assert codes_equal_up_to_ties(latents, a, b, torch.tensor([[0.0], [1.0]]), 21) is equal
