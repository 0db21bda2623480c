"""Tables and plots of `benchmarks/inversion.py`'s results.

    python benchmarks/inversion_report.py [--results benchmarks/results/inversion]

Of the checkpoint and student of the last result: medians over clips and seeds, synthetic and human speakers
apart, and how much sooner ours is where the recipe is at its best.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

SERIES = {"recipe": "#c44", "inversion": "#48c", "student + inversion": "#284", "student + words": "#a4a"}
LEVELS = {"true encoder": "#000", "a preset's codes": "#999", "student encoder alone": "#8b8"}
FIGURES = {
    "similarity": "similarity of cloned speech",
    "word_errors": "word error rate of cloned speech",
    "decoded_similarity": "similarity of decoded codes",
    "mel": "mel distance of decoded codes",
    "semantic_agreement": "semantic agreement with the true encoder",
    "level_error": "acoustic error, levels of 20",
}
COLUMNS = ("seconds", "similarity", "first", "word_errors", "ended", *list(FIGURES)[2:])


def of_one_lab(rows: list[dict]) -> list[dict]:
    """Rows of the last one's checkpoint and student; says how many others there are."""

    def origin(row: dict) -> tuple[str | None, str | None]:
        return row.get("checkpoint"), row.get("student")  # none in rows of before 2026-12

    mine = [row for row in rows if origin(row) == origin(rows[-1])]
    if len(mine) < len(rows):
        print(f"{len(rows) - len(mine)} rows are of another checkpoint or student and are left out")
    return mine


def medians(rows: list[dict]) -> dict[str, dict[str, float]]:
    """By method: medians (means where a median would be coarse) over clips and seeds."""
    by_method: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        by_method[row["method"]].append(row)
    found = {}
    for method, mine in by_method.items():
        line = {
            k: float(np.median([r[k] if r[k] is not None else 0.0 for r in mine]))
            for k in (
                "seconds", "similarity", "decoded_similarity", "mel", "semantic_agreement", "level_error",
            )
        }  # fmt: skip
        line["word_errors"] = float(np.mean([r["word_errors"] for r in mine]))
        line["ended"] = float(np.mean([r["ended"] for r in mine]))
        line["first"] = float(np.mean([r["rank"] == 1 for r in mine]))
        line["results"], line["clips"] = len(mine), len({r["clip"] for r in mine})
        found[method] = line
    return found


def series_of(method: str) -> tuple[str, int | None]:
    """("student + inversion", 40) of "student + inversion 40"; (method, None) of one without steps."""
    name, _, steps = method.rpartition(" ")
    return (name, int(steps)) if steps.isdigit() else (method, None)


def sooner(table: dict[str, dict[str, float]]) -> dict[str, object] | None:
    """Where the recipe is at its best by the speech cloned with it, and when each of ours first is there."""
    every = max(r["clips"] for r in table.values())
    recipe = {m: r for m, r in table.items() if series_of(m)[0] == "recipe" and r["clips"] == every}
    if not recipe:
        return None
    best = max(recipe, key=lambda m: recipe[m]["similarity"])
    goal, spent = recipe[best]["similarity"], recipe[best]["seconds"]
    ours: dict[str, dict[str, object]] = {}
    for name in [*list(SERIES)[1:], "student encoder alone"]:
        mine = {m: r for m, r in table.items() if series_of(m)[0] == name}
        there = [m for m, r in mine.items() if r["similarity"] >= goal]
        if mine:
            first = min(there, key=lambda m: mine[m]["seconds"]) if there else None
            ours[name] = {
                "first there": first,
                "share of its time": mine[first]["seconds"] / spent if first else None,
                "best similarity": max(r["similarity"] for r in mine.values()),
            }
    return {"recipe's best": best, "similarity": goal, "seconds": spent, "ours": ours}


def markdown(tables: dict[str, dict[str, dict[str, float]]]) -> str:
    """One table for each kind of speaker."""
    lines = []
    for kind, table in tables.items():
        some = next(iter(table.values()))
        lines += [f"### {kind} speakers ({some['clips']:g} clips, {some['results']:g} results a row)", ""]
        heads = ("seconds", "similarity", "first of 20", "word errors", "ended", "decoded similarity", "mel",
                 "semantic agreement", "level error")  # fmt: skip
        lines += ["| codes by | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
        for method, row in sorted(table.items(), key=lambda item: _order(item[0])):
            cells = [f"{row[c]:.2f}" if c != "seconds" else f"{row[c]:.1f}" for c in COLUMNS]
            for c in ("first", "word_errors", "ended", "semantic_agreement"):
                cells[COLUMNS.index(c)] = f"{100 * row[c]:.0f} %"
            name = method if row["clips"] == some["clips"] else f"{method} ({row['clips']} clips)"
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _order(method: str) -> tuple[int, int]:
    name, steps = series_of(method)
    names = ["true encoder", "a preset's codes", "student encoder alone", *SERIES]
    return names.index(name), steps or 0


def plot(tables: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Every figure against seconds of the processor, a row of pictures for each kind of speaker."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # What was tried on a few clips only cannot stand in one line with the rest.
    tables = {
        kind: {m: r for m, r in table.items() if r["clips"] == max(x["clips"] for x in table.values())}
        for kind, table in tables.items()
    }
    figure, axes = plt.subplots(
        len(FIGURES), len(tables), figsize=(5.2 * len(tables), 2.7 * len(FIGURES)), squeeze=False
    )
    for column, (kind, table) in enumerate(tables.items()):
        for row, (key, title) in enumerate(FIGURES.items()):
            axis = axes[row][column]
            for name, colour in SERIES.items():
                points = sorted((r["seconds"], r[key]) for m, r in table.items() if series_of(m)[0] == name)
                if points:
                    axis.plot(*zip(*points, strict=True), "o-", color=colour, label=name, markersize=3)
            for name, colour in LEVELS.items():
                if name in table:
                    axis.axhline(table[name][key], color=colour, linestyle="--", label=name, linewidth=1)
            axis.set_xscale("log")
            axis.set_xlim(1.5, 100)
            axis.set_title(f"{title}, {kind}", fontsize=9)
            axis.grid(alpha=0.3)
            if row == len(FIGURES) - 1:
                axis.set_xlabel("seconds of one core")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/inversion"))
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in (arguments.results / "inversion.jsonl").read_text().splitlines()]
    rows = of_one_lab(rows)
    tables = {
        kind: medians([r for r in rows if r["kind"] == kind])
        for kind in ("synthetic", "human")
        if any(r["kind"] == kind for r in rows)
    }
    verdict = {kind: sooner(table) for kind, table in tables.items()}
    (arguments.results / "inversion.json").write_text(
        json.dumps({"tables": tables, "at the recipe's best": verdict}, indent=1) + "\n"
    )
    (arguments.results / "inversion.md").write_text(markdown(tables))
    plot(tables, arguments.results / "inversion.png")
    print(markdown(tables))
    print(json.dumps(verdict, indent=1))


if __name__ == "__main__":
    main()
