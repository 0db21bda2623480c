"""The paper's stochastic quantization of latents (Voxtral TTS, arXiv 2603.25551)."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_acoustic(values: Tensor, levels: int, rng: torch.Generator) -> Tensor:
    """`values` `[batch, ...]` in [-1, 1] as the decoder receives them in training, straight-through.

    Of the clips of a batch, 50 % are rounded to `levels` levels, 25 % get uniform noise of +-1/levels, and
    25 % pass unchanged.
    """
    return quantize_drawn(values, levels, *acoustic_draws(values.shape, rng))


def acoustic_draws(shape: torch.Size | tuple[int, ...], rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random draws for values of `shape` `[batch, ...]`: noise in [0, 1) of that shape, and a number in
    [0, 1) for each clip, `[batch, 1, ...]`."""
    return torch.rand(shape, generator=rng), torch.rand((shape[0], *[1] * (len(shape) - 1)), generator=rng)


def quantize_drawn(values: Tensor, levels: int, noise: Tensor, chance: Tensor) -> Tensor:
    """`quantize_acoustic` with the draws of `acoustic_draws`."""
    half = (levels - 1) / 2
    rounded = (values.detach() * half + half).round() / half - 1
    dither = (noise.to(values.device) * 2 - 1) / levels
    chance = chance.to(values.device)
    return torch.where(
        chance < 0.5,
        values + (rounded - values).detach(),
        torch.where(chance < 0.75, values + dither, values),
    )


def quantize_semantic(latents: Tensor, table: Tensor, chance: Tensor) -> Tensor:
    """`latents` `[batch, frames, dim]` as the decoder receives them in training: the nearest rows of `table`
    `[size, dim]`, straight-through, for clips whose `chance` `[batch]` is below 1/2; the others unchanged."""
    nearest = torch.cdist(latents.detach().flatten(0, 1), table).argmin(dim=-1)
    rows = table[nearest].view_as(latents)
    quantized = latents + (rows - latents).detach()
    return torch.where((chance.to(latents.device) < 0.5)[:, None, None], quantized, latents)
