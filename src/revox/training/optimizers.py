"""The optimizer of the encoder: AdamW, or Muon for the matrices of its transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from revox.training.settings import EncoderTraining

Optimizer = torch.optim.Optimizer


class Optimizers:
    """Several optimizers of different parameters, used as one."""

    def __init__(self, *members: Optimizer) -> None:
        self.members = members

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all."""
        return [group for one in self.members for group in one.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all."""
        for one in self.members:
            one.zero_grad(set_to_none)

    def step(self) -> None:
        """One step of each."""
        for one in self.members:
            one.step()

    def state_dict(self) -> dict[str, Any]:
        """For a later `load_state_dict`."""
        return {str(i): one.state_dict() for i, one in enumerate(self.members)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        for i, one in enumerate(self.members):
            one.load_state_dict(state[str(i)])


def encoder_optimizer(parameters: Sequence[Tensor], settings: EncoderTraining) -> Optimizer | Optimizers:
    """The optimizer of `parameters` that `settings` ask for.

    Muon (https://kellerjordan.github.io/posts/muon) takes matrices, with steps of the size of AdamW's (Liu et
    al., arXiv 2502.16982), so that one learning rate serves both. Convolutions and vectors stay with AdamW.
    """
    muon = settings.optimizer == "muon"
    matrices = [p for p in parameters if p.dim() > 1 and not (muon and p.dim() == 2)]
    adamw = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate, betas=settings.betas,
    )  # fmt: skip
    if not muon:
        return adamw
    return Optimizers(
        adamw,
        torch.optim.Muon(
            [p for p in parameters if p.dim() == 2], lr=settings.learning_rate,
            weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw",
        ),
    )  # fmt: skip
