"""Silence at the ends of an utterance and its level: every recording of the lab is brought to the same."""

from __future__ import annotations

import numpy as np

LEVEL_DB = -23.0  # root mean square of the active parts, in dB below full scale
MARGIN_SECONDS = 0.06  # silence left before the first and after the last sound


def sounding(samples: np.ndarray, rate: int, margin: float = MARGIN_SECONDS) -> tuple[int, int]:
    """Where `samples` [n] begin and end without the silence at their ends beyond `margin` s; (0, 0) if all is
    silence.

    Silence is 40 dB below the loudest 10 ms.
    """
    hop = rate // 100
    frames = samples[: len(samples) // hop * hop].reshape(-1, hop)
    power = (frames.astype(np.float64) ** 2).mean(axis=1)
    if not power.size or power.max() == 0:
        return 0, 0
    active = np.flatnonzero(power > power.max() * 1e-4)
    start = max(0, active[0] * hop - round(margin * rate))
    return start, min(len(samples), (active[-1] + 1) * hop + round(margin * rate))


def level(samples: np.ndarray, rate: int, decibels: float = LEVEL_DB) -> np.ndarray:
    """`samples` [n] scaled so that the RMS of its active parts is `decibels`, less where that would clip."""
    hop = rate // 50
    frames = samples[: len(samples) // hop * hop].reshape(-1, hop).astype(np.float64)
    power = (frames**2).mean(axis=1)
    if not power.size or power.max() == 0:
        return samples
    active = power[power > power.max() * 1e-3]
    gain = 10 ** (decibels / 20) / np.sqrt(active.mean())
    peak = float(np.abs(samples).max())
    return (samples * min(gain, 0.99 / peak)).astype(np.float32)
