"""Speech of a synthetic speaker: flite's output with its formants, tilt and resonances changed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import soxr

from lab.errors import LabError
from lab.flite import Flite, find_flite
from lab.speakers import SyntheticSpeaker

LEVEL_DB = -23.0  # root mean square of the active parts, in dB below full scale
MARGIN_SECONDS = 0.06  # silence left before the first and after the last sound


def _wav_samples(data: bytes) -> tuple[np.ndarray, int]:
    """Samples [n] in [-1, 1] and rate of 16-bit mono WAV bytes; the length in their header may be wrong."""
    start = data.find(b"data", 12) + 8
    rate = int.from_bytes(data[24:28], "little")
    body = data[start : start + (len(data) - start) // 2 * 2]
    return np.frombuffer(body, "<i2").astype(np.float32) / 32768, rate


def _arguments(speaker: SyntheticSpeaker, text: str) -> list[str]:
    # Raising all frequencies by resampling also speeds speech up, so flite speaks slower by the same factor.
    settings = {
        "duration_stretch": speaker.speed * speaker.formants,
        "f0_shift": speaker.pitch / speaker.formants,
    }
    options = [part for name, value in settings.items() for part in ("--setf", f"{name}={value:.3f}")]
    return ["-voice", speaker.voice, *options, "-psdur", "-t", text, "-o", "/dev/stderr"]


def active_span(samples: np.ndarray, rate: int, margin: float = MARGIN_SECONDS) -> tuple[int, int]:
    """First and last sample (exclusive) of `samples` [n] but for the silence at its ends beyond `margin` s.

    Silence is 40 dB below the loudest 10 ms. (0, 0) if everything is silence.
    """
    hop = rate // 100
    frames = samples[: len(samples) // hop * hop].reshape(-1, hop)
    power = (frames.astype(np.float64) ** 2).mean(axis=1)
    if not power.size or power.max() == 0:
        return 0, 0
    active = np.flatnonzero(power > power.max() * 1e-4)
    start = max(0, active[0] * hop - round(margin * rate))
    return start, min(len(samples), (active[-1] + 1) * hop + round(margin * rate))


def trim(samples: np.ndarray, rate: int, margin: float = MARGIN_SECONDS) -> np.ndarray:
    """`samples` [n] cut to their `active_span`."""
    start, end = active_span(samples, rate, margin)
    return samples[start:end]


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


def _color(samples: np.ndarray, rate: int, speaker: SyntheticSpeaker) -> np.ndarray:
    """The speaker's tilt and resonances, as a zero-phase filter over the whole utterance."""
    padded = np.pad(samples, (0, rate // 10))
    spectrum = np.fft.rfft(padded)
    hertz = np.maximum(np.fft.rfftfreq(len(padded), 1 / rate), 100.0)
    octaves = np.log2(hertz / 1000)
    decibels = speaker.tilt * octaves
    for center, gain in speaker.resonances:
        decibels += gain * np.exp(-0.5 * ((np.log2(hertz / center)) / 0.5) ** 2)
    return np.fft.irfft(spectrum * 10 ** (decibels / 20), len(padded))[: len(samples)].astype(np.float32)


@dataclass(frozen=True)
class SynthesizedSpeech:
    """One utterance: `samples` float32 [n], and its `phones` as (name, end in seconds), in order."""

    samples: np.ndarray
    phones: tuple[tuple[str, float], ...]


def synthesize(
    speaker: SyntheticSpeaker, text: str, rate: int = 24000, flite: Flite | None = None
) -> SynthesizedSpeech:
    """`text` spoken by `speaker` at `rate` Hz, leveled to -23 dB, trimmed, with flite's times of the phones.

    Uses the installed flite if none is given. Deterministic for a version of flite. Raises LabError if flite
    is missing or produces no sound.
    """
    done = (flite or find_flite()).run(_arguments(speaker, text))
    samples, source_rate = _wav_samples(done.stderr)
    if done.returncode or not len(samples):
        message = done.stderr[:200].decode(errors="replace").strip()
        raise LabError(
            f"flite produced no sound with the voice {speaker.voice!r} ({message}): check its installation"
        )
    samples = soxr.resample(samples, source_rate * speaker.formants, rate)
    colored = _color(samples, rate, speaker)
    start, end = active_span(colored, rate)
    phones = []
    for pair in done.stdout.decode().split():
        name, _, ends = pair.partition(":")
        seconds = float(ends) / speaker.formants - start / rate
        if seconds > 0:
            phones.append((name, round(min(seconds, (end - start) / rate), 3)))
    return SynthesizedSpeech(level(colored[start:end], rate), tuple(phones))
