"""Voice embeddings compared with those of the presets, and the spread that the model's table gives them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from revox.metrics.errors import MetricError
from revox.model.config import N_SPECIAL_CODES
from revox.model.voxtral import Voxtral

NEAR_ZERO = 0.1  # of a dimension's root mean square over the presets


class PresetEmbeddings:
    """The embeddings of the model's own voices, and how far another voice's is from them.

    `embeddings` are the presets', `[frames, dim]` each. The last frame, the end, is the same in all and left
    out. Raises MetricError with fewer than two presets.
    """

    def __init__(self, embeddings: Sequence[Tensor]) -> None:
        voices = [embedding[:-1].detach().cpu().double() for embedding in embeddings]
        voices = [v for v in voices if len(v)]
        if len(voices) < 2:
            raise MetricError(
                "a voice embedding is compared with the presets', and this checkpoint has fewer than two; "
                "use a checkpoint with its voice_embedding folder"
            )
        self.voices = voices

    def score(self, embedding: Tensor) -> dict[str, float]:
        """Figures of an `embedding` `[frames, dim]` (without its last frame) against all presets.

        frame_norm: mean norm of a frame. mean_cosine: of the mean frame and the presets' (0.94 and more
        between any two voices). offset: norm of the mean frame less the presets' mean frame. nearest_preset:
        the largest cosine, after that subtraction, with a preset's mean frame (left out with a single
        preset, as in `score_presets` of two). spread: geometric mean over
        dimensions of the deviation over time, as a ratio to the presets'. spread_mismatch: mean |natural log|
        of the single ratios. sparsity: share of values under a tenth of their dimension's root mean square
        over the presets. sparsity_mismatch: mean absolute difference of that share from the presets',
        dimension by dimension.
        """
        return _figures(embedding[:-1], self.voices)

    def score_presets(self) -> list[dict[str, float]]:
        """The same of every preset, against the others."""
        return [_figures(own, self.voices[:i] + self.voices[i + 1 :]) for i, own in enumerate(self.voices)]


def _figures(embedding: Tensor, voices: Sequence[Tensor]) -> dict[str, float]:
    own = embedding.detach().cpu().double()
    if own.dim() != 2 or not len(own) or own.shape[1] != voices[0].shape[1]:
        raise MetricError(
            f"an embedding {list(embedding.shape)} cannot be scored; give [frames, {voices[0].shape[1]}]"
        )
    everything = torch.cat(list(voices))
    common, mean = everything.mean(dim=0), own.mean(dim=0)
    offsets = torch.stack([v.mean(dim=0) for v in voices]) - common
    rms = everything.square().mean(dim=0).sqrt().clamp_min(1e-12)

    def spread(x: Tensor) -> Tensor:
        return x.std(dim=0, correction=0).clamp_min(1e-12)

    def near_zero(x: Tensor) -> Tensor:
        return (x.abs() < NEAR_ZERO * rms).double().mean(dim=0)

    # Within voices: the difference between voices is in the offset.
    ratio = (spread(own) / torch.stack([spread(v) for v in voices]).square().mean(dim=0).sqrt()).log()
    sparse = near_zero(own)
    expected = torch.stack([near_zero(v) for v in voices]).mean(dim=0)
    # A single voice is the mean itself, so that nothing is left of it to be like.
    nearest = torch.cosine_similarity((mean - common)[None], offsets).max().item()
    return {
        **({"nearest_preset": nearest} if len(voices) > 1 else {}),
        "frame_norm": own.norm(dim=1).mean().item(),
        "mean_cosine": torch.cosine_similarity(mean, common, dim=0).item(),
        "offset": (mean - common).norm().item(),
        "spread": ratio.mean().exp().item(),
        "spread_mismatch": ratio.abs().mean().item(),
        "sparsity": sparse.mean().item(),
        "sparsity_mismatch": (sparse - expected).abs().mean().item(),
    }


def table_deviation(model: Voxtral) -> Tensor:
    """Standard deviation `[dim]` of the sum of one row drawn from each codebook, special rows left out."""
    rows = model.config.codebook_rows
    table = model.mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight
    books = table[: sum(rows)].float().split(rows)
    return torch.stack([book[N_SPECIAL_CODES:].var(dim=0) for book in books]).sum(0).sqrt()
