"""The result of a check and the report of all, for people and for programs."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from revox.speech import Audio

Value = float | int | str | bool | None

NO_RANGE = "no range known"
"""In place of an expected range: the figure can only be compared with other people's reports."""


class Verdict(str, enum.Enum):
    """How a check ended."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Figure:
    """One measured number (or word), and the range it should be in, in words."""

    name: str
    value: Value
    expected: str = NO_RANGE


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    `sentence` says what it means and what to do. `rows` is a table (one mapping of plain values a line), for
    figures of each voice. `name` and `seconds` are set by `examine`.
    """

    verdict: Verdict
    sentence: str
    figures: Sequence[Figure] = ()
    rows: Sequence[Mapping[str, Value]] = ()
    name: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        figures = [vars(figure) | {"value": plain(figure.value)} for figure in self.figures]
        rows = [{key: plain(value) for key, value in row.items()} for row in self.rows]
        return vars(self) | {"figures": figures, "rows": rows, "seconds": round(self.seconds, 2)}


@dataclass(frozen=True)
class TextDependence:
    """How the speech depends on the text, over several sentences (nats a frame).

    `own` is the negative log-likelihood of the model's speech given its own text, `other` given another
    sentence. `error` is the standard error of `difference`, `frames` the mean length of a sentence.
    """

    own: float
    other: float
    error: float
    frames: float

    @property
    def difference(self) -> float:
        """Nats a frame by which another text fits worse."""
        return self.other - self.own


@dataclass
class DoctorReport:
    """The results of all checks of one checkpoint, and what they were made with.

    `sounds` are what was decoded and spoken: kind -> voice -> audio; they are not part of the JSON.
    """

    checkpoint: str
    made_with: dict[str, Value]
    findings: list[CheckResult] = field(default_factory=list)
    stopped: bool = False
    sounds: dict[str, dict[str, Audio]] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of all: fail, warn or pass."""
        found = {finding.verdict for finding in self.findings}
        return next((v for v in (Verdict.FAIL, Verdict.WARN) if v in found), Verdict.PASS)

    def finding(self, name: str) -> CheckResult:
        """The result of the check of this name. Raises KeyError when there is none."""
        return {finding.name: finding for finding in self.findings}[name]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "checkpoint": self.checkpoint,
            "verdict": self.verdict.value,
            "stopped": self.stopped,
            "made_with": self.made_with,
            "findings": [finding.to_json() for finding in self.findings],
        }


def plain(value: Value) -> Value:
    """A value that JSON can hold: floats to four significant digits, no nan."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if abs(value) < float("inf") else None
    return value
