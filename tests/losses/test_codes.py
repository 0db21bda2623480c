"""Losses on latents against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from revox.losses.codes import (
    acoustic_loss,
    commitment_loss,
    diversity_loss,
    semantic_log_probabilities,
    semantic_loss,
    sharpness_of,
    soft_acoustic_loss,
    soft_semantic_loss,
)


def test_semantic_probabilities_are_a_softmax_of_squared_distances():
    rng = torch.Generator().manual_seed(0)
    table, latents = torch.randn(7, 3, generator=rng), torch.randn(2, 5, 3, generator=rng)
    found = semantic_log_probabilities(latents, table, 0.7)
    wanted = (-0.7 * torch.cdist(latents, table.expand(2, 7, 3)) ** 2).log_softmax(-1)
    assert torch.allclose(found, wanted, atol=1e-5)
    codes = torch.randint(7, (2, 5), generator=rng)
    one_by_one = [-float(wanted[b, t, codes[b, t]]) for b in range(2) for t in range(5)]
    assert float(semantic_loss(latents, codes, table, 0.7)) == pytest.approx(sum(one_by_one) / 10, abs=1e-5)


def test_a_latent_on_its_row_is_surely_that_code_and_one_between_two_is_either():
    table = torch.eye(64) * 5
    sharpness = sharpness_of(table)
    assert sharpness == pytest.approx(3 * math.log(64) / 50)
    on_row = semantic_log_probabilities(table[3][None, None], table, sharpness)[0, 0].exp()
    assert float(on_row[3]) > 0.99
    between = semantic_log_probabilities(((table[3] + table[4]) / 2)[None, None], table, sharpness)[
        0, 0
    ].exp()
    assert float(between[3]) == pytest.approx(float(between[4]))
    assert float(between[3]) > 0.4


def test_the_acoustic_loss_counts_levels():
    codes = torch.tensor([[[0, 10, 20]]])  # one clip, one codebook, three frames
    values = torch.tensor([-0.9, 0.2, 1.0]).clamp(-1 + 1e-6, 1 - 1e-6)
    latents = torch.atanh(values)[None, :, None]
    assert float(acoustic_loss(latents, codes, 21)) == pytest.approx((1 + 2 + 0) / 3, abs=1e-4)


def test_commitment_moves_the_latents_and_never_the_rows():
    table = torch.tensor([[0.0, 1.0], [3.0, 4.0]], requires_grad=True)
    latents = torch.tensor([[[0.0, 4.0]]], requires_grad=True)
    loss = commitment_loss(latents, torch.tensor([[1]]), table)
    assert float(loss.detach()) == pytest.approx((9 / 2) / (26 / 4))
    loss.backward()
    assert table.grad is None
    assert float(latents.grad[0, 0, 0]) < 0


def test_use_of_a_codebook_as_often_as_the_model_uses_it_costs_nothing_and_a_single_code_most():
    frequencies = torch.tensor([0.5, 0.3, 0.15, 0.05])
    assert float(diversity_loss(frequencies, frequencies)) == pytest.approx(0.0, abs=1e-6)
    assert float(diversity_loss(torch.eye(4)[3], frequencies)) == pytest.approx(-math.log(0.05), abs=1e-6)
    for use in (torch.full((4,), 1 / 4), torch.tensor([0.1, 0.2, 0.3, 0.4])):
        wanted = kl_divergence(Categorical(use), Categorical(frequencies))
        assert float(diversity_loss(use, frequencies)) == pytest.approx(float(wanted), abs=1e-6)
    even = torch.full((8,), 1 / 8)  # then it is the entropy term of wav2vec 2.0
    assert float(diversity_loss(torch.eye(8)[0], even)) == pytest.approx(math.log(8), abs=1e-6)


def test_soft_losses_of_certain_labels_are_the_hard_ones_and_least_at_their_own_distribution():
    rng = torch.Generator().manual_seed(0)
    table, latents = torch.randn(16, 4, generator=rng), torch.randn(2, 5, 4, generator=rng)
    codes = torch.randint(16, (2, 5), generator=rng)
    certain = torch.nn.functional.one_hot(codes, 16).float()
    hard = semantic_loss(latents, codes, table, 0.5)
    torch.testing.assert_close(soft_semantic_loss(latents, certain, table, 0.5), hard)
    own = semantic_log_probabilities(latents, table, 0.5).exp()
    entropy = -(own * own.log()).sum(dim=-1).mean()
    torch.testing.assert_close(soft_semantic_loss(latents, own, table, 0.5), entropy)
    values = torch.randn(2, 5, 36, generator=rng)
    levels = torch.randint(21, (2, 36, 5), generator=rng)
    of_levels = levels.transpose(1, 2) / 10 - 1
    torch.testing.assert_close(soft_acoustic_loss(values, of_levels, 21), acoustic_loss(values, levels, 21))
