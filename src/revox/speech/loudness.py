"""Loudness (ITU-R BS.1770-4, by pyloudnorm), true peaks, normalization by one linear gain, and a limiter."""

from __future__ import annotations

import contextlib
import math

import numpy as np

from revox.speech.audio import resample
from revox.speech.errors import AudioError

_BLOCK = 0.4  # seconds, the gating block of BS.1770
REFERENCE_LUFS = -23.0  # EBU R 128
_PEAK_RATE = 192_000  # Hz at which true peaks are read: BS.1770-4, annex 2, asks for four times 48 kHz
_ATTACK_MS, _RELEASE_MS = 5, 50
_SLACK_DB = 0.1  # what coming back from the higher rate may add to a peak


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


def true_peak(samples: np.ndarray, rate: int) -> float:
    """The true peak of `[n]` at `rate` Hz in dBTP (ITU-R BS.1770-4, annex 2); -inf for silence."""
    samples = np.asarray(samples, dtype=np.float32)
    between = resample(samples, rate, rate * _oversampling(rate))
    peak = max(float(np.abs(samples).max(initial=0.0)), float(np.abs(between).max(initial=0.0)))
    return 20 * math.log10(peak) if peak else -math.inf


def limit_peaks(samples: np.ndarray, rate: int, ceiling: float) -> np.ndarray:
    """`samples` (`[n]`, float32) with true peaks held under `ceiling` (dBTP, -24 to 0), `[n]`.

    FFmpeg's look-ahead limiter (`alimiter`, 5 ms attack, 50 ms release, no make-up gain) runs at 192 kHz or
    more, where samples show true peaks. What lies under the ceiling stays as it is; nothing is delayed.
    Raises AudioError when `ceiling` is out of range.
    """
    if not -24.0 <= ceiling <= 0.0:
        raise AudioError(f"a ceiling of {ceiling:g} dBTP is out of range; give -24 to 0")
    samples = np.asarray(samples, dtype=np.float32)
    if true_peak(samples, rate) <= ceiling:
        return samples
    high = rate * _oversampling(rate)
    limited = resample(_alimiter(resample(samples, rate, high), high, ceiling - _SLACK_DB), high, rate)
    limited = np.pad(limited[: len(samples)], (0, max(0, len(samples) - len(limited))))
    # The resampler's ripple is all that may be left above.
    over = true_peak(limited, rate) - ceiling
    return limited * np.float32(10 ** (-over / 20)) if over > 0 else limited


def _oversampling(rate: int) -> int:
    return max(4, math.ceil(_PEAK_RATE / rate))


def _alimiter(samples: np.ndarray, rate: int, ceiling: float) -> np.ndarray:
    import av

    graph = av.filter.Graph()
    source = graph.add("abuffer", f"sample_rate={rate}:sample_fmt=dbl:channel_layout=mono:time_base=1/{rate}")
    limiter = graph.add(
        "alimiter",
        f"limit={10 ** (ceiling / 20)}:level=disabled:attack={_ATTACK_MS}:release={_RELEASE_MS}:latency=1",
    )
    sink = graph.add("abuffersink")
    source.link_to(limiter)
    limiter.link_to(sink)
    graph.configure()
    limited: list[np.ndarray] = []
    for start in (*range(0, len(samples), rate), None):
        frame = None  # the end
        if start is not None:
            block = samples[None, start : start + rate].astype(np.float64)
            frame = av.AudioFrame.from_ndarray(block, format="dbl", layout="mono")
            frame.sample_rate, frame.pts = rate, start
        graph.push(frame)
        with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
            while True:
                limited.append(graph.pull().to_ndarray()[0].astype(np.float32))
    return np.concatenate(limited)
