"""Scores of single clips -> tables: medians over clips, bootstrap intervals, ceilings and floors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

RESAMPLES = 2000
Scores = Mapping[str, float | None]


@dataclass(frozen=True)
class Column:
    """A figure of a table.

    `better` is "more", "less" or "" (neither). `statistic` over clips: "median"; "mean" for shares; "ratio",
    100 times the sum of `key` over the sum of `per`, for error rates. `unavailable` says why nobody has it.
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
    """A figure over clips: its value, the 95 % bootstrap interval, how many clips had it, and by how much it
    moved between seeds (largest less smallest; None where there is no chance in it)."""

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


def summarise(clips: Sequence[Sequence[Scores]], column: Column) -> Cell | None:
    """One figure of one row: `clips` holds, for each clip, its scores with each seed.

    A clip counts once, with the mean over its seeds: clips, not seeds, are what a table generalises over. The
    interval is the percentile bootstrap's over clips (Efron and Tibshirani 1993, chapter 13), 2,000 resamples
    with a fixed seed; of one clip it is the value itself.
    """
    names = [column.key, *([column.per] if column.per else [])]
    found = ([_figures(scores, names) for scores in seeds] for seeds in clips)
    usable = [kept for seeds in found if (kept := [figures for figures in seeds if figures is not None])]
    if not usable:
        return None
    statistic = _STATISTICS[column.statistic]
    values = np.array([np.mean(seeds, axis=0) for seeds in usable])  # [clips, 1 or 2]
    if column.statistic == "ratio" and not values[:, 1].sum():
        return None
    value = float(statistic(values[None])[0])
    low, high = bootstrap(values, statistic)
    count = min(map(len, usable))
    seed_range = None
    if count > 1:
        each = np.array([[seeds[i] for seeds in usable] for i in range(count)])
        medians = statistic(each)
        seed_range = float(medians.max() - medians.min())
    return Cell(value, low, high, len(usable), seed_range)


def _figures(scores: Scores, names: Sequence[str]) -> list[float] | None:
    figures = [scores.get(name) for name in names]
    return None if None in figures else [float(figure) for figure in figures if figure is not None]


def bootstrap(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of `statistic` over the clips of `values` `[clips, n]`.

    `statistic` maps `[resamples, clips, n]` to `[resamples]`.
    """
    rng = np.random.default_rng(seed)
    drawn = values[rng.integers(len(values), size=(RESAMPLES, len(values)))]
    low, high = np.nanquantile(statistic(drawn), (0.025, 0.975))
    return float(low), float(high)


def _ratio(values: np.ndarray) -> np.ndarray:
    sums = values.sum(axis=1)
    return 100 * sums[:, 0] / np.where(sums[:, 1] > 0, sums[:, 1], np.nan)


_STATISTICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "median": lambda values: np.median(values[..., 0], axis=1),
    "mean": lambda values: np.mean(values[..., 0], axis=1),
    "ratio": _ratio,
}


def make_row(name: str, kind: str, clips: Sequence[Sequence[Scores]], columns: Sequence[Column]) -> Row:
    """A row of a table from the scores of its clips."""
    cells = {column.key: summarise(clips, column) for column in columns if not column.unavailable}
    return Row(name, kind, {key: cell for key, cell in cells.items() if cell is not None})


def rank(
    judged: np.ndarray, references: np.ndarray, speakers: Sequence[str], own: int, among: int = 20
) -> int:
    """The place of `references[own]` `[clips, dim]` by similarity to `judged` `[dim]`, 1 is the nearest.

    It competes with one clip of each of up to `among` - 1 other speakers: those that follow it in the list,
    around its end, so always the same ones. No voice at all (zeros) takes the last place.
    """
    others: dict[str, int] = {}
    for step in range(1, len(references)):
        i = (own + step) % len(references)
        if speakers[i] != speakers[own] and len(others) < among - 1:
            others.setdefault(speakers[i], i)
    if not np.any(judged):
        return 1 + len(others)
    scores = references @ judged
    return 1 + int(sum(scores[i] > scores[own] for i in others.values()))


def candidates(speakers: Sequence[str], among: int = 20) -> int:
    """How many a rank is among."""
    return min(among, len(set(speakers)))
