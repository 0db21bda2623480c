"""Losses of latents whose codes are known, and of the use that latents make of the codebook."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def sharpness_of(table: Tensor, certainty: float = 3.0, sample: int = 1024) -> float:
    """The factor, in nats, of a squared distance to a codebook row in a softmax over rows: with it a row's
    logit exceeds that of a row at the median distance by `certainty` times the log of the codebook's size.

    `table` is `[size, dim]`; the median is over its first `sample` rows.
    """
    some = table[:sample].float()
    distances = torch.cdist(some, some).square()
    apart = distances[~torch.eye(len(some), dtype=torch.bool, device=some.device)].median()
    return certainty * math.log(len(table)) / max(float(apart), 1e-12)


def semantic_log_probabilities(latents: Tensor, table: Tensor, sharpness: float) -> Tensor:
    """Log probabilities `[..., size]` of the codes of `latents` `[..., dim]`.

    A softmax of minus the squared distance to each row of `table` `[size, dim]`, times `sharpness`: the
    likeliest code is the nearest, which serving takes.
    """
    points = latents.float().flatten(0, -2)
    distances = (
        points.square().sum(-1, keepdim=True) - 2 * points @ table.T + table.square().sum(-1)
    ).clamp_min(0)
    return (-sharpness * distances).log_softmax(dim=-1).unflatten(0, latents.shape[:-1])


def semantic_loss(latents: Tensor, codes: Tensor, table: Tensor, sharpness: float) -> Tensor:
    """Cross-entropy in nats, mean over frames, of `codes` `[batch, frames]` given `latents` `[batch, frames,
    dim]`."""
    found = semantic_log_probabilities(latents, table, sharpness)
    return functional.nll_loss(found.flatten(0, -2), codes.flatten())


def acoustic_loss(latents: Tensor, codes: Tensor, levels: int) -> Tensor:
    """Mean distance in levels of tanh(`latents`) `[batch, frames, 36]` from the levels `codes` `[batch, 36,
    frames]`: a regression to the median, which respects the order of levels."""
    half = (levels - 1) / 2
    values = (torch.tanh(latents.float()) + 1) * half
    return (values - codes.transpose(1, 2)).abs().mean()


def soft_semantic_loss(latents: Tensor, probabilities: Tensor, table: Tensor, sharpness: float) -> Tensor:
    """Cross-entropy in nats, mean over frames, of `probabilities` `[..., size]` of codes and those of
    `latents` `[..., dim]`; least where the two are the same."""
    found = semantic_log_probabilities(latents, table, sharpness)
    return -(probabilities * found).sum(dim=-1).mean()


def soft_acoustic_loss(latents: Tensor, values: Tensor, levels: int) -> Tensor:
    """Mean distance in levels of tanh(`latents`) `[..., 36]` from `values` `[..., 36]` in [-1, 1]."""
    return (torch.tanh(latents.float()) - values).abs().mean() * (levels - 1) / 2


def commitment_loss(latents: Tensor, codes: Tensor, table: Tensor) -> Tensor:
    """Mean squared distance of `latents` `[batch, frames, dim]` from the rows of `table` `[size, dim]` that
    `codes` `[batch, frames]` select, which get no gradient (van den Oord et al., arXiv 1711.00937), relative
    to the mean square of the table."""
    table = table.detach().float()
    return (latents.float() - table[codes]).square().mean() / table.square().mean().clamp_min(1e-12)


def diversity_loss(mean_probabilities: Tensor, frequencies: Tensor) -> Tensor:
    """Kullback-Leibler divergence in nats of a codebook's mean use `[size]` from `frequencies` `[size]`,
    those of the model's own speech, none of which may be 0.

    It prevents the collapse of soft assignments to a few codes, as the entropy of wav2vec 2.0 does (arXiv
    2006.11477, eq. 4), which is the case of uniform frequencies; but a language model uses some codes a
    hundred times as often as others.
    """
    p = mean_probabilities.clamp_min(1e-12)
    return (p * (p / frequencies).log()).sum()
