"""Loudness (ITU-R BS.1770-4, by pyloudnorm) and its normalization by one linear gain."""

from __future__ import annotations

import math

import numpy as np

_BLOCK = 0.4  # seconds, the gating block of BS.1770
REFERENCE_LUFS = -23.0  # EBU R 128


def loudness(samples: np.ndarray, rate: int) -> float:
    """Integrated loudness in LUFS of `[n]` or `[channels, n]` (up to 5) at `rate` Hz; -inf for silence.

    A clip shorter than the standard's 0.4 s block is measured repeated until it fills a block.
    """
    import pyloudnorm

    data = np.atleast_2d(np.asarray(samples, dtype=np.float64)).T
    if data.size == 0 or not data.any():
        return -math.inf
    needed = math.ceil(_BLOCK * rate) + 1
    if len(data) < needed:
        data = np.tile(data, (math.ceil(needed / len(data)), 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(pyloudnorm.Meter(rate).integrated_loudness(data))


def normalize_loudness(
    samples: np.ndarray, rate: int, lufs: float = REFERENCE_LUFS, peak: float = 0.98
) -> np.ndarray:
    """`samples` (`[n]`, float32) at `lufs`, or as near as a largest magnitude of `peak` allows.

    One linear gain: no compression, no limiter. Silence and anything under -70 LUFS, the standard's gate,
    stays as it is: noise is not pulled up.
    """
    samples, measured = np.asarray(samples, dtype=np.float32), loudness(samples, rate)
    if not math.isfinite(measured):
        return samples
    gain = min(10.0 ** ((lufs - measured) / 20.0), peak / float(np.abs(samples).max()))
    return samples * np.float32(gain)
