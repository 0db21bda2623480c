"""Scores of codec codes: against other codes, and on their own.

Codes are integer tensors `[37, frames]` (or `[..., codebooks, frames]`), raw and 0-based: codebook 0 is
semantic, the others acoustic levels. Two tensors that are compared have one shape, or the longer one is cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

ACOUSTIC_LEVELS = 21


def _paired(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    frames = min(a.shape[-1], b.shape[-1])
    return a[..., :frames], b[..., :frames]


def semantic_agreement(codes: Tensor, reference: Tensor) -> float:
    """Share of frames with the same semantic code."""
    a, b = _paired(codes, reference)
    return (a[..., 0, :] == b[..., 0, :]).double().mean().item()


def acoustic_exact_share(codes: Tensor, reference: Tensor) -> float:
    """Share of acoustic codes that are the same level. Two uniformly random codes agree in 1/21."""
    a, b = _paired(codes, reference)
    return (a[..., 1:, :] == b[..., 1:, :]).double().mean().item()


def acoustic_level_error(codes: Tensor, reference: Tensor) -> float:
    """Mean absolute difference of acoustic levels, in levels (0 to 20). Uniformly random codes: 6.98."""
    a, b = _paired(codes, reference)
    return (a[..., 1:, :] - b[..., 1:, :]).abs().double().mean().item()


def saturated_share(codes: Tensor, levels: int = ACOUSTIC_LEVELS) -> float:
    """Share of acoustic codes at the lowest or the highest level. Uniformly random codes: 2/21."""
    acoustic = codes[..., 1:, :]
    return ((acoustic == 0) | (acoustic == levels - 1)).double().mean().item()


def codebook_use(codes: Tensor, codebook: int = 0) -> int:
    """How many different codes of one codebook (0 is the semantic one) occur."""
    return int(codes[..., codebook, :].unique().numel())


def perplexity(codes: Tensor, codebook: int = 0) -> float:
    """exp(entropy in nats) of one codebook's codes: the number of codes, were all in equal use."""
    counts = codes[..., codebook, :].unique(return_counts=True)[1].double()
    share = counts / counts.sum()
    return float(torch.exp(-(share * share.log()).sum()))


def embedding_cosine(embedding: Tensor, reference: Tensor, mean: Tensor) -> float:
    """Mean cosine of corresponding frames of two voice embeddings `[frames, dim]`, less `mean` `[dim]`.

    `mean` is the mean frame of the presets: all voices share it, and with it any two have a cosine of 0.94 or
    more. Pass the embeddings without the end frame, which is the same in every voice.
    """
    count = min(len(embedding), len(reference))
    a, b = (x[:count].double() - mean.double() for x in (embedding, reference))
    return torch.cosine_similarity(a, b, dim=-1).mean().item()


def score_codes(codes: Tensor, reference: Tensor | None = None) -> dict[str, float]:
    """All scores of `codes`, by name; those against `reference` only when one is given."""
    scores = {
        "semantic_codes_used": float(codebook_use(codes)),
        "semantic_perplexity": perplexity(codes),
        "saturated_share": saturated_share(codes),
    }
    if reference is not None:
        scores["semantic_agreement"] = semantic_agreement(codes, reference)
        scores["acoustic_exact_share"] = acoustic_exact_share(codes, reference)
        scores["acoustic_level_error"] = acoustic_level_error(codes, reference)
    return scores


def semantic_variety(codes: Tensor) -> float:
    """Different semantic codes of an utterance's `codes` `[37, frames]`, as a share of its frames."""
    return codebook_use(codes) / max(1, codes.shape[-1])
