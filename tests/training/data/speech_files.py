"""Small real audio for these tests: tones, so that a clip can be told by its pitch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from revox.speech import Audio, write_audio
from revox.training.data import Manifest, SpeechSource
from revox.training.data.manifest import cut_record


def tone(hertz: float, seconds: float, rate: int = 24000) -> np.ndarray:
    """A sine of a tenth of full scale, float32 `[samples]`."""
    return (0.1 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def put(path: Path, hertz: float = 440.0, seconds: float = 1.0, rate: int = 24000) -> Path:
    """A tone as a file; its ending says the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_audio(path, Audio(tone(hertz, seconds, rate), rate))
    return path


def clip(
    path: object,
    speaker: str = "s",
    language: str | None = None,
    text: str | None = None,
    seconds: float = 0.0,
    rate: int = 0,
) -> dict:
    """The cut of a whole file, called by its path."""
    return cut_record(str(path), str(path), speaker, language, text, seconds=seconds, rate=rate)


def source(name: str, clips: list[dict], broken: tuple = ()) -> SpeechSource:
    """A source of cuts in memory."""
    return SpeechSource(name, Manifest.of(clips), broken)
