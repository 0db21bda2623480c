"""What a check found, in a form that a person and a program can read."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Value = float | int | str | bool | None

NO_RANGE = "no range known"
"""In place of an expected range: the figure is there to be compared with other people's."""


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
class Finding:
    """The outcome of one check.

    `sentence` says what it means and what to do. `rows` is a table (one dict of plain values a line), for
    figures of each voice.
    """

    name: str
    verdict: Verdict
    sentence: str
    figures: tuple[Figure, ...] = ()
    rows: Sequence[Mapping[str, Value]] = ()
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "verdict": self.verdict.value,
            "sentence": self.sentence,
            "figures": [
                {"name": f.name, "value": plain(f.value), "expected": f.expected} for f in self.figures
            ],
            "rows": [{key: plain(value) for key, value in row.items()} for row in self.rows],
            "seconds": round(self.seconds, 2),
        }


@dataclass
class Report:
    """All findings about one checkpoint, and what they were made with."""

    checkpoint: str
    made_with: dict[str, Value]
    findings: list[Finding] = field(default_factory=list)
    stopped: bool = False

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of all: fail, warn or pass."""
        found = {finding.verdict for finding in self.findings}
        return next((v for v in (Verdict.FAIL, Verdict.WARN) if v in found), Verdict.PASS)

    def finding(self, name: str) -> Finding:
        """The finding of this name. Raises KeyError when there is none."""
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(name)

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
    """A value that JSON can hold: floats to four significant places, no nan."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if abs(value) < float("inf") else None
    return value
