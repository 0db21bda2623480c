"""Gradients through the backbone in the memory of one layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .voxtral import Voxtral


@contextlib.contextmanager
def checkpointed_layers(model: Voxtral) -> Iterator[None]:
    """Within: the backbone keeps each layer's input only and computes it again for the gradient."""
    layers = list(model.backbone.layers)

    def wrapped(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *given: checkpoint(forward, *given, use_reentrant=False)

    for layer in layers:
        layer.forward = wrapped(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
