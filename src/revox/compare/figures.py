"""Scores of samples, human ratings, and their statistics with bootstrap intervals."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from revox.compare.artifacts import count_clicks, repeats_itself
from revox.compare.errors import CompareError
from revox.compare.rule import Measured, RuleFigure
from revox.compare.samples import Sample
from revox.evaluation.tables import RESAMPLES
from revox.metrics.errors import MetricError
from revox.metrics.intelligibility import Recognizer, normalize_text, word_errors
from revox.metrics.naturalness import NaturalnessModel
from revox.metrics.speaker import SpeakerVerifier
from revox.speech import Audio, loudness, pitch_track
from revox.speech.files import read_text
from revox.synthesis.split import expected_seconds
from revox.synthesis.takes import LONGEST, REPEATED, SHORTEST, SILENCE_SECONDS, SPARE_SECONDS

ALWAYS = (
    "loudness", "pitch", "pitch_spread", "clicks", "repeats", "early_stops", "missing_stops", "silences",
    "failures",
)  # fmt: skip
_WINDOW = 0.02


@dataclass
class SampleScorer:
    """What scores a sample besides what always does; None: not measured."""

    reference: Audio | None = None
    recognizer: Recognizer | None = None
    naturalness: NaturalnessModel | None = None

    def __post_init__(self) -> None:
        if find_spec("scipy") is None:
            raise MetricError("comparing needs scipy; install it with `pip install 'revox[eval]'`")
        self._verifier = None if self.reference is None else SpeakerVerifier()
        self._voice = None
        if self._verifier is not None and self.reference is not None:
            self._voice = self._verifier.embed(self.reference)

    @property
    def figures(self) -> set[str]:
        """The names of what it measures."""
        measured = set(ALWAYS)
        measured |= {"similarity"} if self.reference is not None else set()
        measured |= {"word_error_rate"} if self.recognizer is not None else set()
        return measured | ({"naturalness"} if self.naturalness is not None else set())

    def score(self, sample: Sample, audio: Audio | None) -> None:
        """Add the figures of a sample's sound; of one without sound only that it failed.

        pitch: the median in Hz; pitch_spread: its standard deviation in semitones. early_stops,
        missing_stops: shorter or longer than takes may be for the text. silences: 1.5 s or more inside. Each
        0 or 1, as repeats and failures are; clicks are counted.
        """
        found = sample.figures
        found["failures"] = float(audio is None)
        if audio is None:
            return
        expected = expected_seconds(sample.text)
        found["early_stops"] = float(audio.seconds < SHORTEST * expected)
        found["missing_stops"] = float(audio.seconds > LONGEST * expected + SPARE_SECONDS)
        found["silences"] = float(_longest_silence(audio) >= SILENCE_SECONDS)
        found["clicks"] = float(count_clicks(audio))
        found["repeats"] = float(REPEATED.search(sample.text) is None and repeats_itself(audio))
        _keep(found, "loudness", loudness(audio.samples, audio.rate))
        pitch = pitch_track(audio.samples, audio.rate)
        _keep(found, "pitch", pitch.median)
        voiced = pitch.f0[np.isfinite(pitch.f0)]
        if len(voiced) > 1:
            found["pitch_spread"] = float(np.std(12 * np.log2(voiced)))
        if self._verifier is not None and self._voice is not None:
            found["similarity"] = self._verifier.similarity(self._voice, audio)
        if self.naturalness is not None:
            found["naturalness"] = self.naturalness.score(audio)
        if self.recognizer is not None and normalize_text(sample.text):
            sample.transcript = self.recognizer.transcribe(audio)
            errors, words = word_errors(sample.text, sample.transcript)
            found["word_errors"], found["words"] = float(errors), float(words)


def statistic(figure: RuleFigure, samples: Sequence[Mapping[str, float]]) -> Measured:
    """A figure over samples, with its 95 % percentile bootstrap interval over them (2,000 resamples, seed 0).

    The mean of word error rates is that of all words together. Without a sample it is nan.
    """
    values: tuple[np.ndarray, ...]
    if figure.name == "word_error_rate":
        pairs = [(one["word_errors"], one["words"]) for one in samples if "words" in one]
        values = np.array([errors for errors, _ in pairs]), np.array([words for _, words in pairs])
        if figure.statistic != "mean":
            values = (values[0] / values[1],)
    else:
        values = (np.array([one[figure.name] for one in samples if figure.name in one]),)
    count = len(values[0])
    if not count:
        return Measured(math.nan, math.nan, math.nan, 0)
    if figure.statistic == "n":
        return Measured(float(count), float(count), float(count), count)
    compute = _STATISTICS["ratio" if len(values) == 2 else figure.statistic]
    value = low = high = float(compute(*values))
    if count > 1:
        from scipy.stats import bootstrap

        interval = bootstrap(
            values,
            compute,
            n_resamples=RESAMPLES,
            paired=True,
            vectorized=True,
            method="percentile",
            rng=0,
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return Measured(value, low, high, count)


_STATISTICS: dict[str, Callable[..., Any]] = {
    "mean": lambda x, axis=-1: np.mean(x, axis=axis),
    "p50": lambda x, axis=-1: np.percentile(x, 50, axis=axis),
    "p95": lambda x, axis=-1: np.percentile(x, 95, axis=axis),
    "min": lambda x, axis=-1: np.min(x, axis=axis),
    "max": lambda x, axis=-1: np.max(x, axis=axis),
    "ratio": lambda errors, words, axis=-1: errors.sum(axis=axis) / np.maximum(words.sum(axis=axis), 1e-9),
}


@dataclass(frozen=True)
class Rating:
    """One trial of a blind test: 1 to 5 for both sides, and when; None where the file does not say."""

    a: float
    b: float
    time: datetime | None


def read_ratings(path: Path, voices: tuple[str | None, str | None] = (None, None)) -> list[Rating]:
    """Ratings of a CSV with the columns rating_a and rating_b, 1 to 5, as the page's blind test saves it.

    `voices` are those of A and B, where they are known: a test of them in the other order is turned around.
    Raises CompareError on another file, on one with ratings of several pairs, and of other voices.
    """
    rows = list(csv.DictReader(io.StringIO(read_text(path, CompareError))))
    names = ("server_a", "voice_a", "server_b", "voice_b")
    pairs = {tuple(row.get(key) or "" for key in names) for row in rows}
    if len(pairs) > 1:
        raise CompareError(f"{path} has ratings of {len(pairs)} pairs of voices; keep the rows of one")
    ratings, turned = [], bool(pairs) and _turned(path, next(iter(pairs)), voices)
    for number, row in enumerate(rows, 2):
        try:
            a, b = float(row["rating_a"]), float(row["rating_b"])
            when = _time(row.get("time"))
        except (KeyError, TypeError, ValueError):
            a = b = math.nan
            when = None
        if not (1 <= a <= 5 and 1 <= b <= 5):
            raise CompareError(
                f"{path}, line {number}: expected rating_a and rating_b from 1 to 5, and a time such as "
                "2026-11-29T12:00:00Z or none"
            )
        ratings.append(Rating(b, a, when) if turned else Rating(a, b, when))
    return ratings


def _turned(path: Path, pair: tuple[str, ...], voices: tuple[str | None, str | None]) -> bool:
    """Whether the test's A is the comparison's B."""
    rated, wanted = (pair[1], pair[3]), tuple((one or "").lower() for one in voices)
    if not all(rated) or not all(wanted):
        return False
    given = tuple(one.lower() for one in rated)
    if given == wanted:
        return False
    if given == wanted[::-1]:
        return True
    raise CompareError(
        f"{path} has ratings of {rated[0]} and {rated[1]}, and {voices[0]} and {voices[1]} are compared"
    )


def _time(text: str | None) -> datetime | None:
    if not text:
        return None
    when = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return when if when.tzinfo else when.replace(tzinfo=timezone.utc)


def _keep(found: dict[str, float], name: str, value: float) -> None:
    if math.isfinite(value):
        found[name] = float(value)


def _longest_silence(audio: Audio) -> float:
    """Seconds of the longest stretch inside the speech that is 35 dB below its loud parts."""
    size = max(1, round(_WINDOW * audio.rate))
    frames = audio.samples[: len(audio.samples) // size * size].reshape(-1, size)
    levels = np.sqrt(np.mean(np.square(frames), axis=1))
    loud = np.percentile(levels, 95) if len(levels) else 0.0
    sounding = np.flatnonzero(levels > 10 ** (-35 / 20) * loud)
    if not len(sounding):
        return audio.seconds
    return float(np.diff(sounding).max(initial=1) - 1) * _WINDOW
