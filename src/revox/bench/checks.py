"""Is what came back a sound recording of its text? Checks that need neither a reference nor a recognizer."""

from __future__ import annotations

import numpy as np

from revox.endpoints import SpeechAnswer
from revox.endpoints.endpoint import PCM_BYTES
from revox.speech import Audio, AudioError
from revox.speech.activity import runs
from revox.speech.read import audio_layout
from revox.synthesis.split import expected_seconds
from revox.synthesis.takes import LONGEST, SHORTEST, SILENCE_SECONDS, SPARE_SECONDS

RATES = {"opus": 48_000}
"""Hz of formats that have a rate of their own."""
_SILENT = -50.0  # dBFS
_FULL_SCALE, _CLIPPED_RUN = 0.999, 3
_END_SECONDS, _END_BELOW = 0.01, -15.0  # dB below the loud parts
_FRAME_SECONDS = 0.02


def check_answer(answer: SpeechAnswer, text: str, rate: int | None) -> tuple[Audio | None, list[str]]:
    """The speech of an answer, None where there is none, and what is wrong with it, in words.

    rate: Hz that were promised, None for any. Checked: the status, that it decodes, rate, channels, and
    `check_speech`.
    """
    if not answer.ok:
        return None, [f"status {answer.status}: {answer.message}" if answer.status else answer.message]
    problems = []
    try:
        audio = answer.audio()
        if answer.response_format not in PCM_BYTES:
            own_rate, channels = audio_layout(answer.content)
            expected = RATES.get(answer.response_format, rate)
            if expected and own_rate != expected:
                problems.append(f"{own_rate} Hz, promised {expected}")
            if channels != 1:
                problems.append(f"{channels} channels, expected 1")
    except AudioError as error:
        return None, [f"does not decode: {error}"]
    return audio, problems + check_speech(audio, text)


def check_speech(audio: Audio, text: str) -> list[str]:
    """What is wrong with speech, in words: silence, clipping, a length that does not fit the text, a cut end.

    Lengths are compared with `expected_seconds` by the bounds that takes have. Clipped: three samples at full
    scale in a row. The end is clean when its last 10 ms are 15 dB below the loud parts: a
    vowel that is cut off and faded in 10 ms is 5 dB below.
    """
    samples, problems = audio.samples, []
    levels = _levels(audio)
    if not len(levels) or levels.max() < _SILENT:
        return ["silent"]
    loud = float(np.percentile(levels, 95))
    clipped = sum(b - a for a, b in runs(np.abs(samples) >= _FULL_SCALE) if b - a >= _CLIPPED_RUN)
    if clipped:
        problems.append(f"clipped: {clipped} samples at full scale")
    expected = expected_seconds(text)
    if audio.seconds < SHORTEST * expected:
        problems.append(f"too short: {audio.seconds:.1f} s, its text takes about {expected:.1f} s")
    elif audio.seconds > LONGEST * expected + SPARE_SECONDS:
        problems.append(f"too long: {audio.seconds:.1f} s, its text takes about {expected:.1f} s")
    sounding = np.flatnonzero(levels > max(_SILENT, loud - 35))
    silent = [b - a for a, b in runs(levels[sounding[0] : sounding[-1]] <= max(_SILENT, loud - 35))]
    pause = max(silent, default=0) * _FRAME_SECONDS
    if pause >= SILENCE_SECONDS:
        problems.append(f"{pause:.1f} s of silence inside")
    end = samples[-max(1, round(_END_SECONDS * audio.rate)) :]
    if _decibels(np.sqrt(np.mean(end**2))) > loud + _END_BELOW:
        problems.append("ends in the middle of a sound")
    return problems


def _levels(audio: Audio) -> np.ndarray:
    """dBFS of each 20 ms `[frames]`."""
    size = max(1, round(_FRAME_SECONDS * audio.rate))
    whole = audio.samples[: len(audio.samples) // size * size].reshape(-1, size)
    return _decibels(np.sqrt(np.mean(whole**2, axis=1)))


def _decibels(amplitude: np.ndarray) -> np.ndarray:
    return 20 * np.log10(np.maximum(amplitude, 1e-9))
