"""The paper's stochastic quantization of acoustic latents."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_acoustic(values: Tensor, levels: int, rng: torch.Generator) -> Tensor:
    """`values` in [-1, 1], `[batch, ...]`, as the decoder meets them in training, straight through.

    Each clip of the batch draws for itself: rounded to `levels` levels 50 %, dithered by uniform noise of
    +-1/levels 25 %, passed 25 % (Voxtral TTS paper, arXiv 2603.25551).
    """
    half = (levels - 1) / 2
    rounded = (values.detach() * half + half).round() / half - 1
    noise = (torch.rand(values.shape, generator=rng).to(values.device) * 2 - 1) / levels
    shape = (len(values), *[1] * (values.dim() - 1))
    chance = torch.rand(shape, generator=rng).to(values.device)
    return torch.where(
        chance < 0.5,
        values + (rounded - values).detach(),
        torch.where(chance < 0.75, values + noise, values),
    )
