"""The paper's stochastic quantization of latents (Voxtral TTS, arXiv 2603.25551)."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_acoustic(values: Tensor, levels: int, rng: torch.Generator) -> Tensor:
    """`values` in [-1, 1], `[batch, ...]`, as the decoder meets them in training, straight through.

    Each clip of the batch draws for itself: rounded to `levels` levels 50 %, dithered by uniform noise of
    +-1/levels 25 %, passed 25 %.
    """
    return quantize_drawn(values, levels, *acoustic_draws(values.shape, rng))


def acoustic_draws(shape: torch.Size | tuple[int, ...], rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """What chance says for values of `shape` `[batch, ...]`: noise in [0, 1) of that shape, and a number in
    [0, 1) for each clip, `[batch, 1, ...]`."""
    return torch.rand(shape, generator=rng), torch.rand((shape[0], *[1] * (len(shape) - 1)), generator=rng)


def quantize_drawn(values: Tensor, levels: int, noise: Tensor, chance: Tensor) -> Tensor:
    """`quantize_acoustic` with the draws given."""
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
    """`latents` `[batch, frames, dim]` as the decoder meets them: the nearest row of `table` straight through
    where a clip's `chance` `[batch]` is below 1/2, else themselves."""
    nearest = torch.cdist(latents.detach().flatten(0, 1), table).argmin(dim=-1)
    rows = table[nearest].view_as(latents)
    quantized = latents + (rows - latents).detach()
    return torch.where((chance.to(latents.device) < 0.5)[:, None, None], quantized, latents)
