"""Weights say a loss's share of the gradient, whatever its size."""

from __future__ import annotations

import pytest
import torch

from revox.training.balance import GradientBalancer
from revox.training.world import World


def test_each_gradient_counts_by_its_weight_and_not_by_its_size():
    balancer = GradientBalancer({"a": 1.0, "b": 3.0}, World())
    a, b = torch.tensor([100.0, 0.0]), torch.tensor([0.0, 0.001])
    assert torch.allclose(balancer.combine({"a": a, "b": b}), torch.tensor([1.0, 3.0]))


def test_the_norm_is_a_moving_average_corrected_for_its_start():
    balancer = GradientBalancer({"a": 2.0}, World(), decay=0.9)
    balancer.combine({"a": torch.tensor([3.0])})
    found = balancer.combine({"a": torch.tensor([4.0])})
    mean_square = (0.9 * 0.1 * 9 + 0.1 * 16) / (1 - 0.81)
    assert float(found) == pytest.approx(2 * 4 / mean_square**0.5)
    later = GradientBalancer({"a": 2.0}, World(), decay=0.9)
    later.load_state_dict(balancer.state_dict())
    more = {"a": torch.tensor([1.0])}
    assert torch.equal(later.combine(more), balancer.combine(more))


def test_without_balance_it_is_the_plain_weighted_sum_and_an_unknown_loss_is_refused():
    balancer = GradientBalancer({"a": 1.0, "b": 0.5}, World(), balance=False)
    found = balancer.combine({"a": torch.tensor([2.0]), "b": torch.tensor([4.0])})
    assert float(found) == 4.0
    with pytest.raises(KeyError):
        balancer.combine({"c": torch.ones(1)})


@pytest.mark.parametrize("balance", [True, False])
def test_a_factor_scales_a_losss_share_and_leaves_its_norm_alone(balance: bool):
    plain, faded = (GradientBalancer({"a": 1.0, "b": 2.0}, World(), balance=balance) for _ in range(2))
    gradients = {"a": torch.tensor([5.0, 0.0]), "b": torch.tensor([0.0, 0.3])}
    wanted = plain.combine(gradients)
    for _ in range(3):  # also once the norms have settled
        found = faded.combine(gradients, {"b": 0.25})
        assert torch.allclose(found, wanted * torch.tensor([1.0, 0.25]))
    assert torch.allclose(faded.combine(gradients), wanted)
