"""Figures of each level: statistics over its requests, and the limits that they must keep."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from revox.bench.errors import BenchError
from revox.bench.plan import STATISTICS, BenchResult, RequestResult

TIMES = ("latency", "first_audio", "real_time_factor")
SHARES = ("failed", "faulty", "ran_dry")
RATES = ("characters_per_second", "word_errors_percent")
APART = ("warm-up", "formats")
"""Modes that are in no level."""


@dataclass(frozen=True)
class LevelSummary:
    """An endpoint at a number of streams. figures: by name, `latency.p95` and so on; None: not measured.

    statuses: how often each came.
    """

    endpoint: str
    mode: str
    streams: int
    requests: int
    figures: dict[str, float | None]
    statuses: dict[str, int]


def summarize_levels(result: BenchResult) -> list[LevelSummary]:
    """A summary of each level that has a request, in the order in which they were measured."""
    groups: dict[tuple[str, str, int], list[RequestResult]] = {}
    for one in result.requests:
        if one.mode not in APART:
            groups.setdefault((one.endpoint, one.mode, one.streams), []).append(one)
    return [_summary(*key, group, result.walls.get(key)) for key, group in groups.items()]


def _summary(
    endpoint: str, mode: str, streams: int, group: list[RequestResult], wall: float | None
) -> LevelSummary:
    spoken = [one for one in group if not one.failed]
    columns: dict[str, list[float | None]] = {
        "latency": [one.seconds for one in spoken],
        "first_audio": [one.first_audio for one in spoken],
        "real_time_factor": [one.real_time_factor for one in spoken],
    }
    figures: dict[str, float | None] = {}
    for name, values in columns.items():
        figures |= {f"{name}.{key}": value for key, value in statistics(values).items()}
    figures["failed"] = 1 - len(spoken) / len(group)
    figures["faulty"] = float(np.mean([bool(one.problems) for one in spoken])) if spoken else None
    dry = [one.ran_dry for one in spoken if one.ran_dry is not None]
    figures["ran_dry"] = float(np.mean(dry)) if dry else None
    characters = sum(len(one.text) for one in spoken)
    figures["characters_per_second"] = characters / wall if wall and spoken else None
    figures["word_errors_percent"] = _word_errors(spoken)
    statuses: dict[str, int] = {}
    for one in group:
        key = str(one.status or "no answer")
        statuses[key] = statuses.get(key, 0) + 1
    return LevelSummary(endpoint, mode, streams, len(group), figures, statuses)


def statistics(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean, min, p50, p95 and max of what is there (percentiles interpolated linearly); None of nothing."""
    there = np.array([value for value in values if value is not None])
    if not len(there):
        return dict.fromkeys(STATISTICS)
    p50, p95 = np.percentile(there, [50, 95])
    found = (there.mean(), there.min(), p50, p95, there.max())
    return dict(zip(STATISTICS, map(float, found), strict=True))


def _word_errors(spoken: list[RequestResult]) -> float | None:
    pairs = [(one.text, one.transcript) for one in spoken if one.transcript is not None]
    if not pairs:
        return None
    from revox.metrics.intelligibility import normalize_text, word_errors

    pairs = [(text, found) for text, found in pairs if normalize_text(text)]
    if not pairs:
        return None
    errors, words = word_errors([text for text, _ in pairs], [found or "" for _, found in pairs])
    return 100 * errors / words


@dataclass(frozen=True)
class BenchLimit:
    """`figure` of every level (or of those with `streams`) must be at most, or at least, `value`.

    A limit for every level leaves out those with `but` streams.
    """

    figure: str
    value: float
    at_most: bool
    streams: int | None = None
    but: frozenset[int] = frozenset()

    @classmethod
    def parse(cls, text: str, at_most: bool) -> BenchLimit:
        """Read `FIGURE[@STREAMS]=NUMBER`. Raises BenchError for anything else and for unknown figures."""
        found = re.fullmatch(r"([a-z_0-9.]+)(?:@(\d+))?=(\d+(?:\.\d+)?)", text.strip())
        if not found:
            form = "FIGURE[@STREAMS]=NUMBER, such as first_audio.p95@4=0.5"
            raise BenchError(f"{text!r} is not a limit; write {form}.")
        known = [*(f"{time}.{statistic}" for time in TIMES for statistic in STATISTICS), *SHARES, *RATES]
        if found[1] not in known:
            raise BenchError(f"{found[1]!r} is not measured; take one of {', '.join(known)}.")
        return cls(found[1], float(found[3]), at_most, int(found[2]) if found[2] else None)

    def broken(self, levels: Sequence[LevelSummary]) -> list[str]:
        """A sentence for each level that breaks it; one where no level has the figure."""
        relation = "at most" if self.at_most else "at least"
        wanted = [
            level
            for level in levels
            if self.streams in (None, level.streams) and level.streams not in self.but
        ]
        if self.but and not wanted:
            return []
        values = [(level, level.figures[self.figure]) for level in wanted]
        there = [(level, value) for level, value in values if value is not None]
        if not there:
            return [f"{self} was not measured"]
        return [
            f"{level.endpoint}, {level.mode}, {level.streams} streams: {self.figure} is {value:.3g}, "
            f"{relation} {self.value:g} was asked for"
            for level, value in there
            if (value > self.value if self.at_most else value < self.value)
        ]

    def __str__(self) -> str:
        return self.figure + (f"@{self.streams}" if self.streams else "")


def default_limits(given: Sequence[BenchLimit]) -> list[BenchLimit]:
    """The limits given, and that no request fails and no file is faulty where they say nothing of it."""
    found = list(given)
    for name in ("failed", "faulty"):
        levels = [limit.streams for limit in given if limit.figure == name]
        if None not in levels:
            others = frozenset(level for level in levels if level is not None)
            found.append(BenchLimit(name, 0.0, True, but=others))
    return found


def failures(result: BenchResult, limits: Sequence[BenchLimit]) -> list[str]:
    """Why the run did not pass, in sentences; nothing where it did."""
    levels = summarize_levels(result)
    found = [sentence for limit in limits for sentence in limit.broken(levels)] if levels else []
    if not levels:
        found.append("nothing was measured")
    if result.stopped:
        found.append(result.stopped)
    neighbor = result.neighbor or {}
    if neighbor.get("harmed"):
        times = [1000 * neighbor[key] for key in ("before_p50", "after_p50")]
        found.append(f"the neighbor's median was {times[0]:.1f} ms before and is {times[1]:.1f} ms after")
    for one in result.requests:
        if one.mode == "formats" and one.problems:
            found.append(f"{one.endpoint}, format {one.response_format}: {'; '.join(one.problems)}")
    return found


def as_json(result: BenchResult, limits: Sequence[BenchLimit], cards: dict[str, Any]) -> dict[str, Any]:
    """Everything but single requests, which are in requests.jsonl."""
    from dataclasses import asdict

    return {
        "environment": result.environment,
        "endpoints": result.endpoints,
        "levels": [asdict(level) for level in summarize_levels(result)],
        "formats": [asdict(one) for one in result.requests if one.mode == "formats"],
        "warm_up": [asdict(one) for one in result.requests if one.mode == "warm-up"],
        "models": cards,
        "neighbor": result.neighbor,
        "stopped": result.stopped,
        "failures": failures(result, limits),
    }
