"""A recording of any length as a stream: what is measured of each 10 ms is kept, the sound is not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from revox.find.errors import FindError
from revox.metrics.speaker import SpeakerVerifier, VoiceFrames
from revox.speech import pitch_track, stream_audio
from revox.speech.activity import HOP, frame_levels, runs

RATE = 16000
_CHUNK = 512  # samples that silero-vad takes at a time
_BLOCK = 20 * RATE  # a whole number of its chunks and of frames
_SPEECH = 0.5  # probability
_LEAST_BURST = 0.1  # seconds
_QUIET, _RAISED = 0.05, 0.5  # peaks: a recording below the first is brought to the second
_FADE = 0.5  # of the peak that is remembered, a block


@dataclass(frozen=True, eq=False)
class Track:
    """A recording by frames of 10 ms: where somebody speaks (bool), level in dBFS between 100 Hz and 4 kHz,
    pitch in Hz (nan where unvoiced), `[frames]` each, and what the speaker-verification model takes in."""

    speaking: np.ndarray
    level: np.ndarray
    f0: np.ndarray
    frames: VoiceFrames

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return len(self.speaking) * HOP


class SpeechDetector:
    """silero-vad, a stream at a time. Raises FindError when it is not installed."""

    def __init__(self) -> None:
        import torch

        threads = torch.get_num_threads()
        try:
            from silero_vad import load_silero_vad
        except ImportError:
            raise FindError(
                "finding speech needs silero-vad, which is not installed; install it with "
                "`pip install 'revox[find]'`"
            ) from None
        finally:
            torch.set_num_threads(threads)  # importing it sets one thread for everybody
        self._model: Any = load_silero_vad()

    def start(self) -> None:
        """Forget what came before: a new recording begins."""
        self._model.reset_states()

    def probabilities(self, samples: np.ndarray) -> np.ndarray:
        """The probability of speech in each 32 ms of `[n]` at 16 kHz, which follows what was given before."""
        import torch

        padded = np.pad(samples, (0, -len(samples) % _CHUNK)).reshape(-1, _CHUNK)
        with torch.no_grad():
            return np.array([float(self._model(chunk[None], RATE)) for chunk in torch.from_numpy(padded)])


def listen(
    source: str | os.PathLike[str],
    detector: SpeechDetector,
    verifier: SpeakerVerifier,
    report: Callable[[float], None],
) -> Track:
    """The track of a recording; memory grows by 0.07 GB an hour. Raises AudioError.

    report: called with the seconds that are done.
    """
    detector.start()
    parts: list[Track] = []
    peak, done = 0.0, 0.0
    for samples in _blocks(source):
        loudest = float(np.abs(samples).max())
        peak = max(loudest, _FADE * peak)
        gain = np.float32(_RAISED / peak if 0 < peak < _QUIET else 1.0)
        parts.append(_measure(samples * gain, float(gain), detector, verifier))
        done += len(samples) / RATE
        report(done)
    whole = Track(
        np.concatenate([part.speaking for part in parts]),
        np.concatenate([part.level for part in parts]),
        np.concatenate([part.f0 for part in parts]),
        VoiceFrames(
            np.concatenate([part.frames.mel for part in parts]),
            np.concatenate([part.frames.power for part in parts]),
        ),
    )
    for first, last in runs(whole.speaking):
        if (last - first) * HOP < _LEAST_BURST:
            whole.speaking[first:last] = False
    return whole


def _blocks(source: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    """Blocks of 20 s at 16 kHz; the last one is as long as it is, in whole frames."""
    pending: list[np.ndarray] = []
    length = 0
    for audio in stream_audio(source, RATE):
        pending.append(audio.samples)
        length += len(audio.samples)
        if length >= _BLOCK:
            joined = np.concatenate(pending)
            yield joined[:_BLOCK]
            pending, length = [joined[_BLOCK:]], length - _BLOCK
    rest = np.concatenate(pending)
    if len(rest) >= RATE // 100:
        yield rest[: len(rest) // 160 * 160]


def _measure(samples: np.ndarray, gain: float, detector: SpeechDetector, verifier: SpeakerVerifier) -> Track:
    count = len(samples) // (RATE // 100)
    speech = detector.probabilities(samples) > _SPEECH
    at = (np.arange(count) * (RATE // 100) + RATE // 200) // _CHUNK
    level = frame_levels(samples, RATE)[:count] - 20 * np.log10(gain)
    return Track(
        speech[at],
        level.astype(np.float32),
        pitch_track(samples, RATE, hop=HOP).f0[:count].astype(np.float32),
        verifier.frames(samples),
    )
