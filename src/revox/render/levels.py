"""Each segment at the target loudness by a gain of its own, under a true-peak ceiling."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from revox.speech import limit_peaks, loudness, true_peak

MOST_LIMITED = 6.0
"""dB that the limiter may take from a segment's peaks before the common target goes down instead."""
MOST_LOWERED = 6.0
"""LU by which it may go down: one click must not make all others quiet."""
QUIETEST = -70.0
"""LUFS, the gate of BS.1770: what is under it is noise, and not raised."""
_ROUNDS, _CLOSE = 3, 0.2


@dataclass(frozen=True)
class Level:
    """Of a segment as it was spoken: integrated loudness (LUFS) and true peak (dBTP); -inf for silence."""

    loudness: float
    peak: float

    @classmethod
    def of(cls, samples: np.ndarray, rate: int) -> Level:
        """The level of `[n]` at `rate` Hz."""
        return cls(loudness(samples, rate), true_peak(samples, rate))

    @property
    def audible(self) -> bool:
        """Whether there is anything to bring to a loudness."""
        return self.loudness > QUIETEST

    def over(self, target: float, ceiling: float) -> float:
        """dB by which the peak passes `ceiling` (dBTP) with this at `target` (LUFS)."""
        return self.peak + target - self.loudness - ceiling if self.audible else -math.inf


def common_target(levels: Iterable[Level], target: float, ceiling: float) -> float:
    """`target` (LUFS), or as much lower, up to 6 LU, as leaves the limiter no more than 6 dB to take."""
    over = max((level.over(target, ceiling) for level in levels), default=-math.inf)
    return target - min(max(0.0, over - MOST_LIMITED), MOST_LOWERED)


def leveled(
    samples: np.ndarray, rate: int, level: Level, target: float, ceiling: float
) -> tuple[np.ndarray, float]:
    """`samples` (`[n]`) at `target` LUFS by one linear gain, and dB that the limiter took from its peaks.

    Only a peak over `ceiling` (dBTP) meets the limiter; the gain then makes up for what that takes from the
    loudness. Silence stays as it is.
    """
    if not level.audible:
        return samples, 0.0
    gain = target - level.loudness
    for _ in range(_ROUNDS):
        louder = samples * np.float32(10 ** (gain / 20))
        over = level.peak + gain - ceiling
        if over <= 0:
            return louder, 0.0
        louder = limit_peaks(louder, rate, ceiling)
        missing = target - loudness(louder, rate)
        if abs(missing) <= _CLOSE:
            break
        gain += missing
    return louder, over
