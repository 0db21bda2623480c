"""Fundamental frequency, by YIN (de Cheveigné and Kawahara, JASA 111, 2002)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from revox.speech.audio import resample

_RATE = 8000  # Hz; pitch lies below 600 Hz, and parabolic interpolation makes up for the coarse lags
_BLOCK = 2000  # frames worked on at a time, to bound memory


@dataclass(frozen=True, eq=False)
class Pitch:
    """A pitch track: `f0` `[frames]` in Hz (nan where unvoiced), one frame each `hop` seconds."""

    f0: np.ndarray
    hop: float

    @property
    def voiced(self) -> np.ndarray:
        """True where a pitch was found, `[frames]`."""
        return np.isfinite(self.f0)

    @property
    def median(self) -> float:
        """The median pitch of the voiced frames in Hz; nan when there are none."""
        voiced = self.f0[self.voiced]
        return float(np.median(voiced)) if voiced.size else float("nan")


def pitch_track(
    samples: np.ndarray,
    rate: int,
    fmin: float = 60.0,
    fmax: float = 500.0,
    hop: float = 0.01,
    threshold: float = 0.15,
    voiced_below: float = 0.3,
) -> Pitch:
    """The pitch of mono `[n]` at `rate` Hz: frame i is centered on i * `hop` seconds.

    The first lag whose normalized difference dips under `threshold` is taken, else the deepest; a frame is
    voiced when that dip is under `voiced_below` and the frame is not silent. `fmin` and `fmax` in Hz.
    """
    x = _band(resample(np.asarray(samples, dtype=np.float32), rate, _RATE).astype(np.float64))
    longest = int(np.ceil(_RATE / fmin)) + 1
    shortest = max(2, int(_RATE / fmax))
    window = max(2 * shortest, longest)  # samples compared at every lag
    span = window + longest
    hop_samples = hop * _RATE
    frames = int(len(x) / hop_samples) + 1
    padded = np.pad(x, (span // 2, span))
    starts = np.round(np.arange(frames) * hop_samples).astype(np.int64)
    f0 = np.full(frames, np.nan)
    aperiodicity = np.ones(frames)  # 0 for a periodic frame, about 1 for noise
    power = np.zeros(frames)
    for first in range(0, frames, _BLOCK):
        rows = padded[starts[first : first + _BLOCK, None] + np.arange(span)]
        block_f0, block_ap = _yin(rows, window, shortest, longest, threshold)
        f0[first : first + _BLOCK] = block_f0
        aperiodicity[first : first + _BLOCK] = block_ap
        power[first : first + _BLOCK] = np.square(rows).mean(1)
    # Hum between the words is periodic too: silent is what lies 30 dB under the loud parts (or -80 dBFS).
    silent = power < max(1e-8, 1e-3 * float(np.percentile(power, 95)))
    aperiodicity[silent] = 1.0
    f0[aperiodicity >= voiced_below] = np.nan
    return Pitch(f0, hop)


def _band(x: np.ndarray) -> np.ndarray:
    """About 100 Hz to 1.2 kHz of `[n]` at 8 kHz: without hum and breath, what is periodic stays periodic.

    The fundamental itself may go with the hum (-17 dB at 60 Hz): its harmonics carry the period.
    """
    return _moving_mean(x, 4) - _moving_mean(x, 40)


def _moving_mean(x: np.ndarray, width: int) -> np.ndarray:
    sums = np.cumsum(np.pad(x, (width // 2 + 1, width - width // 2 - 1)))
    return (sums[width:] - sums[:-width]) / width if len(x) else x


def _yin(
    rows: np.ndarray, window: int, shortest: int, longest: int, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """`[frames, window + longest]` -> f0 in Hz and the normalized difference, `[frames]` each."""
    size = 1 << (rows.shape[1] + window - 1).bit_length()
    head = np.fft.rfft(rows[:, :window], size)
    correlation = np.fft.irfft(np.conj(head) * np.fft.rfft(rows, size), size)[:, : longest + 1]
    power = np.concatenate([np.zeros((len(rows), 1)), np.cumsum(np.square(rows), 1)], 1)
    energy = power[:, window : window + longest + 1] - power[:, : longest + 1]
    difference = np.maximum(energy[:, :1] + energy - 2 * correlation, 0.0)  # YIN eq. 7
    mean = np.cumsum(difference[:, 1:], 1) / np.arange(1, longest + 1)
    normalized = np.ones_like(difference)
    normalized[:, 1:] = difference[:, 1:] / np.maximum(mean, 1e-12)  # eq. 8

    inner = normalized[:, shortest : longest + 1]
    dips = np.zeros(inner.shape, dtype=bool)  # local minima inside the range
    dips[:, 1:-1] = (inner[:, 1:-1] <= inner[:, :-2]) & (inner[:, 1:-1] < inner[:, 2:])
    good = dips & (inner < threshold)
    deepest = np.where(dips, inner, 2.0).argmin(1)
    lag = np.where(good.any(1), good.argmax(1), deepest) + shortest

    row = np.arange(len(rows))
    before, at, after = (normalized[row, np.clip(lag + d, 0, longest)] for d in (-1, 0, 1))
    curve = before - 2 * at + after
    shift = np.where(curve > 1e-12, 0.5 * (before - after) / np.maximum(curve, 1e-12), 0.0)
    found = dips.any(1)
    return _RATE / (lag + np.clip(shift, -0.5, 0.5)), np.where(found, at, 1.0)
