"""Losses weighted by their share of the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from revox.training.world import World


class GradientBalancer:
    """Sums gradients of several losses with respect to one tensor, each scaled to its weight's share.

    After EnCodec's balancer (arXiv 2210.13438, section 3.4): sum_i w_i g_i / E||g_i||, with E a moving
    average over steps (its start corrected for) and the norm that of the whole batch over all ranks. Without
    `balance` it is the plain sum_i w_i g_i.
    """

    def __init__(self, weights: dict[str, float], world: World, *, balance: bool = True, decay: float = 0.99):
        self.weights, self.world, self.balance, self.decay = weights, world, balance, decay
        self.squares: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def combine(self, gradients: dict[str, Tensor], factors: dict[str, float] | None = None) -> Tensor:
        """The weighted sum; `gradients` are of one shape, each of this rank's mean loss.

        `factors` multiply some weights for this step. A loss fades by such a factor: one in the loss itself
        would be divided out with its norm. Raises KeyError for a loss without a weight.
        """
        scales = {name: self.weights[name] * (factors or {}).get(name, 1.0) for name in gradients}
        if self.balance:
            squares = torch.stack([g.float().square().sum() for g in gradients.values()])
            # A rank's mean loss counts 1 / ranks in the whole: so do its gradients in the whole's norm.
            found = (self.world.sum(squares) / self.world.size**2).tolist()
            for name, square in zip(gradients, found, strict=True):
                old, count = self.squares.get(name, 0.0), self.counts.get(name, 0) + 1
                self.squares[name] = self.decay * old + (1 - self.decay) * square
                self.counts[name] = count
                mean = self.squares[name] / (1 - self.decay**count)
                scales[name] /= max(mean, 1e-24) ** 0.5
        total = torch.zeros_like(next(iter(gradients.values())))
        for name, gradient in gradients.items():
            total += scales[name] * gradient
        return total

    def state_dict(self) -> dict[str, Any]:
        """For a later `load_state_dict`."""
        return {"squares": dict(self.squares), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.squares, self.counts = dict(state["squares"]), dict(state["counts"])
