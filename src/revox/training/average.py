"""An average of a network's weights over the steps of its training (Polyak and Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def moving_average(module: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of `module`, updated by `update_parameters(module)`.

    The first update copies; the `n`-th after it has a decay of min(`decay`, (1 + n) / (10 + n)), so that the
    initial weights are soon forgotten. Buffers are copied from the module.
    """

    def update(averages: Sequence[Tensor], now: Sequence[Tensor], updates: Tensor | int) -> None:
        n = float(updates)
        share = 1 - min(decay, (1 + n) / (10 + n))
        for one, other in zip(averages, now, strict=True):
            one.lerp_(other.to(one.dtype), share)

    return AveragedModel(module, multi_avg_fn=update)
