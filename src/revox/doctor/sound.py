"""Is this sound speech? Figures that need no trained model, with ranges for any language.

White noise is steady, flat and never voiced; hum and tones are steady and voiced throughout. Speech is
different: its level rises and falls by tens of decibels at the rate of syllables (the modulation spectrum of
speech peaks at 3 to 5 Hz: Houtgast and Steeneken, JASA 77, 1985; Greenberg et al., J. Phonetics 31, 2003),
part of it is voiced, and most of its power is under 4 kHz.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from revox.speech import Audio
from revox.speech.activity import HOP, frame_levels
from revox.speech.pitch import pitch_track

LEVEL = (-50.0, -6.0)
"""dBFS, of the whole sound. Presets of the release are near -25."""
SWING = 15.0
"""dB between the 95th and the 10th percentile of 10 ms levels; white noise has 2, untrained decoders 6 to 10,
read speech 35 to 55. Without it nothing is speech."""
SYLLABIC = 0.2
"""Least share of the envelope's modulation (0.5 to 50 Hz) at 2 to 8 Hz; white noise has 0.14."""
VOICED = (0.08, 0.97)
"""Share of the loud 10 ms frames with a pitch; white noise has 0, hum 1, speech 0.3 to 0.8."""
LOW = 0.5
"""Least share of the power under 4 kHz (white noise at 24 kHz: 0.33, speech above 0.9)."""
ALLOWED_FAULTS = 1
"""So many faults are allowed if the level swings, as for a whisper or a song."""

_LOUD = 25.0  # dB under the loudest frames; softer frames do not count for voicing


@dataclass(frozen=True)
class SoundFigures:
    """Measurements of one sound; see the module's ranges."""

    seconds: float
    level: float
    swing: float
    active: float
    voiced: float
    pitch: float
    syllabic: float
    low: float
    finite: bool = True

    @property
    def faults(self) -> list[str]:
        """How it differs from speech, in words; empty for speech."""
        if not self.finite:
            return ["values that are not numbers"]
        if self.level < LEVEL[0]:
            return ["silence"]
        found = []
        if self.level > LEVEL[1]:
            found.append("too loud")
        if self.swing < SWING:
            found.append("a steady level")
        if self.syllabic < SYLLABIC:
            found.append("no rhythm of syllables")
        if self.voiced < VOICED[0]:
            found.append("hardly voiced, as noise is")
        elif self.voiced > VOICED[1]:
            found.append("voiced throughout, as hum is")
        if self.low < LOW:
            found.append("most power above 4 kHz")
        return found

    @property
    def is_speech(self) -> bool:
        """Whether it is like speech: silence and a steady level are not allowed."""
        if not self.finite or self.level < LEVEL[0] or self.swing < SWING:
            return False
        return len(self.faults) <= ALLOWED_FAULTS

    def as_row(self) -> dict[str, float | str | None]:
        """The figures, rounded, for a table."""
        return {
            "seconds": round(self.seconds, 2),
            "level dBFS": round(self.level, 1),
            "swing dB": round(self.swing, 1),
            "active": round(self.active, 2),
            "voiced": round(self.voiced, 2),
            "pitch Hz": round(self.pitch) if np.isfinite(self.pitch) else None,
            "syllabic": round(self.syllabic, 2),
            "under 4 kHz": round(self.low, 2),
        }


def measure(audio: Audio) -> SoundFigures:
    """The figures of a sound, of any rate and number of channels."""
    samples, rate = audio.samples, audio.rate
    seconds = audio.seconds
    nothing = SoundFigures(seconds, -120.0, 0.0, 0.0, 0.0, float("nan"), 0.0, 0.0)
    if not np.all(np.isfinite(samples)):
        return SoundFigures(seconds, 0.0, 0.0, 0.0, 0.0, float("nan"), 0.0, 0.0, finite=False)
    if len(samples) < rate // 5 or not np.any(samples):
        return nothing
    level = 10 * np.log10(max(1e-12, float(np.mean(np.square(samples, dtype=np.float64)))))
    frames = frame_levels(samples, rate)
    loudest, soft = np.percentile(frames, 95), np.percentile(frames, 10)
    loud = frames > max(loudest - _LOUD, -70.0)
    pitch = pitch_track(samples, rate, hop=HOP)
    count = min(len(loud), len(pitch.f0))
    voiced = pitch.voiced[:count] & loud[:count]
    median = float(np.median(pitch.f0[:count][voiced])) if voiced.any() else float("nan")
    return SoundFigures(
        seconds=seconds,
        level=float(level),
        # Everything under -80 dBFS counts as digital silence.
        swing=float(loudest - max(soft, -80.0)),
        active=float(loud.mean()),
        voiced=float(voiced.sum() / max(1, loud[:count].sum())),
        pitch=median,
        syllabic=_syllabic(frames),
        low=_share(samples, 1 / rate, 60.0, (60.0, 4000.0)),
    )


def _syllabic(levels: np.ndarray) -> float:
    """Share of the amplitude envelope's modulation power at 2 to 8 Hz, of 0.5 Hz and above."""
    envelope = 10 ** (levels / 20)
    return _share((envelope - envelope.mean()) * np.hanning(len(envelope)), HOP, 0.5, (2.0, 8.0))


def _share(signal: np.ndarray, step: float, above: float, band: tuple[float, float]) -> float:
    """Share of a signal's power at frequencies in `band`, of those from `above` (Hz); `step` in seconds."""
    power = np.square(np.abs(np.fft.rfft(signal)))
    frequency = np.fft.rfftfreq(len(signal), step)
    everything = float(power[frequency >= above].sum())
    inside = float(power[(frequency >= band[0]) & (frequency <= band[1])].sum())
    return inside / everything if everything else 0.0
