"""Scores of single clips -> tables: medians over clips, bootstrap intervals, ceilings and floors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RESAMPLES = 2000
Scores = Mapping[str, float | None]


@dataclass(frozen=True)
class Column:
    """A figure of a table.

    `better` is "more", "less" or "" (neither). `statistic` over clips: "median"; "mean" for shares; "ratio",
    100 times the sum of `key` over the sum of `per`, for error rates. `unavailable` says why it is missing.
    """

    key: str
    title: str
    better: str = ""
    digits: int = 2
    statistic: str = "median"
    per: str = ""
    unavailable: str = ""


@dataclass(frozen=True)
class Cell:
    """A figure over clips: its value, the 95 % bootstrap interval, how many clips had it, and its range over
    seeds (largest less smallest; None where nothing is random)."""

    value: float
    low: float
    high: float
    clips: int
    seed_range: float | None = None


@dataclass
class Row:
    """A line of a table: `kind` is "ceiling", "subject" or "floor"."""

    name: str
    kind: str
    cells: dict[str, Cell] = field(default_factory=dict)


@dataclass
class Table:
    """A table, its columns and rows, with notes that belong under it."""

    title: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def cell(self, row: str, key: str) -> Cell | None:
        """A cell by its row's name and its column's key."""
        return next((r.cells.get(key) for r in self.rows if r.name == row), None)


def summarize(clips: Sequence[Sequence[Scores]], column: Column) -> Cell | None:
    """One figure of one row: `clips` holds, for each clip, its scores with each seed.

    A clip counts once, with the mean over its seeds: a table generalizes over clips, not over seeds. The
    interval is scipy's percentile bootstrap over clips (Efron and Tibshirani 1993, chapter 13), 2,000
    resamples with a fixed seed; of one clip it is the value itself.
    """
    from scipy.stats import bootstrap

    keys = [column.key, *([column.per] if column.per else [])]
    usable = [figures for seeds in clips if (figures := _figures(seeds, keys))]
    values = np.array([np.mean(seeds, axis=0) for seeds in usable])  # [clips, 1 or 2]
    if not usable or (column.per and not values[:, 1].sum()):
        return None
    statistic = _STATISTICS[column.statistic]
    value = low = high = float(statistic(*values.T))
    if len(usable) > 1:
        interval = bootstrap(
            values.T,
            statistic,
            n_resamples=RESAMPLES,
            paired=True,
            vectorized=True,
            method="percentile",
            rng=0,
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    by_seed = [statistic(*np.array(one).T) for one in zip(*usable, strict=False)]
    seed_range = float(max(by_seed) - min(by_seed)) if len(by_seed) > 1 else None
    return Cell(value, low, high, len(usable), seed_range)


def _figures(seeds: Sequence[Scores], keys: Sequence[str]) -> list[list[float]]:
    """The figures of each seed that has them all."""
    found = ([scores.get(key) for key in keys] for scores in seeds)
    return [[float(x) for x in figures if x is not None] for figures in found if None not in figures]


def _ratio(errors: np.ndarray, counts: np.ndarray, axis: int = -1) -> np.ndarray:
    return 100 * errors.sum(axis=axis) / np.maximum(counts.sum(axis=axis), 1e-9)


_STATISTICS: dict[str, Callable[..., Any]] = {
    "median": lambda x, axis=-1: np.median(x, axis=axis),
    "mean": lambda x, axis=-1: np.mean(x, axis=axis),
    "ratio": _ratio,
}


def make_row(name: str, kind: str, clips: Sequence[Sequence[Scores]], columns: Sequence[Column]) -> Row:
    """A row of a table from the scores of its clips."""
    cells = {column.key: summarize(clips, column) for column in columns if not column.unavailable}
    return Row(name, kind, {key: cell for key, cell in cells.items() if cell is not None})


def rank(
    voice: np.ndarray, references: np.ndarray, speakers: Sequence[str], own: int, among: int = 20
) -> int:
    """The place of `references[own]` `[clips, dim]` by similarity to `voice` `[dim]`; 1 is the nearest.

    It competes with one clip of each of up to `among` - 1 other speakers: those that follow it in the list,
    cyclically, so always the same ones. Zeros, which are no voice, take the last place.
    """
    others: dict[str, int] = {}
    for step in range(1, len(references)):
        i = (own + step) % len(references)
        if speakers[i] != speakers[own] and len(others) < among - 1:
            others.setdefault(speakers[i], i)
    if not np.any(voice):
        return 1 + len(others)
    scores = references @ voice
    return 1 + int(sum(scores[i] > scores[own] for i in others.values()))


def candidates(speakers: Sequence[str], among: int = 20) -> int:
    """How many voices a rank is among."""
    return min(among, len(set(speakers)))
