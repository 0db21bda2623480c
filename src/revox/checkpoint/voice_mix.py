"""A voice between voices: the frames of the heaviest, its acoustic codes moved to statistics between all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from revox.checkpoint.errors import VoiceError

_LEAST_DEVIATION = 0.3  # levels: a codebook that hardly moves is moved as a whole, not blown up


def parse_weights(parts: Sequence[str]) -> dict[str, float]:
    """Voices and their shares, which add up to 1, of words such as `ada=0.7`.

    Raises VoiceError for fewer than two voices, one that comes twice, or a weight that is not a positive
    number.
    """
    weights: dict[str, float] = {}
    for part in parts:
        name, _, text = part.partition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = 0.0
        if not name or not 0 < weight < float("inf"):
            raise VoiceError(f"{part!r} is not a voice and its weight; write NAME=0.7, above 0")
        if name in weights:
            raise VoiceError(f"the voice {name} is given twice; give each voice once")
        weights[name] = weight
    if len(weights) < 2:
        raise VoiceError("a mix takes two voices or more, such as ada=0.7 bob=0.3")
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def mix_codes(codes: Mapping[str, Tensor], weights: Mapping[str, float], levels: int) -> Tensor:
    """Codes `[n_codebooks, frames]`, from 0, between those of several voices; acoustic ones have `levels`.

    Frames and semantic codes (what is spoken) are the heaviest voice's. Mean and standard deviation of each
    acoustic codebook over the frames (how it sounds) become the weighted means of all voices'.
    """
    base = codes[max(weights, key=lambda name: weights[name])]
    own = base[1:].double()
    mean = torch.zeros(len(own), 1, dtype=torch.float64)
    deviation = torch.zeros_like(mean)
    for name, weight in weights.items():
        acoustic = codes[name][1:].double()
        mean += weight * acoustic.mean(1, keepdim=True)
        deviation += weight * _deviation(acoustic)
    moved = (own - own.mean(1, keepdim=True)) * (deviation / _deviation(own)) + mean
    return torch.cat((base[:1], moved.round().clamp(0, levels - 1).long()))


def _deviation(acoustic: Tensor) -> Tensor:
    return acoustic.std(1, correction=0, keepdim=True).clamp_min(_LEAST_DEVIATION)
