"""An average of a network's weights over the steps of its training (Polyak and Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def moving_average(module: nn.Module, decay: float) -> AveragedModel:
    """A copy of `module` that follows it at each `update_parameters(module)`, an exponential moving average.

    The first update copies; the `n`-th after it keeps min(`decay`, (1 + n) / (10 + n)) of what was there, so
    that where a run began is soon forgotten. Buffers are the module's as they are.
    """

    def update(averages: Sequence[Tensor], now: Sequence[Tensor], updates: Tensor | int) -> None:
        n = float(updates)
        share = 1 - min(decay, (1 + n) / (10 + n))
        for one, other in zip(averages, now, strict=True):
            one.lerp_(other.to(one.dtype), share)

    return AveragedModel(module, multi_avg_fn=update)
