"""Tables as Markdown, JSON, and an HTML page with sounds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from revox.evaluation.tables import Cell, Column, Table, make_row
from revox.speech.files import replace_file

ARROWS = {"more": " ↑", "less": " ↓", "": ""}
LABELS = {"ceiling": " (ceiling)", "floor": " (floor)", "subject": ""}
HOW_TO_READ = (
    "Medians over clips (shares: means; word errors: all errors over all words) with 95 % bootstrap "
    "intervals over clips; with several seeds a clip counts with its mean. ↑ more is better, ↓ less is "
    "better. A ceiling is the best possible score, a floor that of something wrong."
)


@dataclass
class ClipScores:
    """One clip in the report: its sounds and scores by row (`rows`: {row: [scores of each seed]})."""

    name: str
    speaker: str
    group: str
    text: str | None
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    sounds: dict[str, str] = field(default_factory=dict)


@dataclass
class EvaluationReport:
    """What was measured, of which clips, and what was left out."""

    title: str
    facts: dict[str, str]
    tables: list[Table]
    clips: list[ClipScores]
    left_out: list[str]


def shown(cell: Cell | None, column: Column) -> str:
    """A figure of a table as text: `0.61 [0.55, 0.66]`, or why there is none."""
    if column.unavailable:
        return column.unavailable
    if cell is None:
        return "–"
    value, low, high = (f"{x:.{column.digits}f}" for x in (cell.value, cell.low, cell.high))
    return value if cell.clips == 1 else f"{value} [{low}, {high}]"


def markdown(report: EvaluationReport) -> str:
    """The report's tables as Markdown."""
    facts = [(_plain(key), _plain(value)) for key, value in report.facts.items()]
    lines = [f"# {_plain(report.title)}", "", *markdown_table(("", ""), facts), "", HOW_TO_READ]
    for table in report.tables:
        head = ["", *(_plain(c.title) + ARROWS[c.better] for c in table.columns)]
        rows = [
            [_plain(row.name) + LABELS[row.kind], *(shown(row.cells.get(c.key), c) for c in table.columns)]
            for row in table.rows
        ]
        lines += ["", f"## {_plain(table.title)}", "", *markdown_table(head, rows)]
        for note in table.notes:
            lines += ["", _plain(note)]
    if report.left_out:
        lines += ["", "## Left out", "", *(f"- {_plain(reason)}" for reason in report.left_out)]
    return "\n".join(lines) + "\n"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; cells are Markdown already."""
    cells = [list(head), ["---"] * len(head), *map(list, rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def as_json(report: EvaluationReport) -> str:
    """Everything as JSON, including single clips and seeds."""
    plain = {**dataclasses.asdict(report), "how_to_read": HOW_TO_READ}
    return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"


def html(report: EvaluationReport) -> str:
    """One page; its sounds are files in the same folder. Names and texts are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("revox.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2")
    return page.render(
        report=report, how_to_read=HOW_TO_READ, shown=shown, arrows=ARROWS, labels=LABELS, means=_means
    )


def write_report(report: EvaluationReport, folder: Path) -> list[Path]:
    """Write report.md, report.json and report.html into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"report.md": markdown(report), "report.json": as_json(report), "report.html": html(report)}
    for name, content in contents.items():
        replace_file(folder / name, content)
    return [folder / name for name in contents]


def _means(scores: list[dict[str, Any]], table: Table) -> list[str]:
    """A clip's scores of one row in the table's columns: means over seeds."""
    cells = make_row("", "", [scores], table.columns).cells
    return [shown(cells.get(c.key), c) if c.key in cells else "" for c in table.columns]


def _plain(text: str) -> str:
    """Text without Markdown's own marks, on one line: one cell of a table."""
    escaped = "".join(f"\\{c}" if c in "\\|`*_<>[]#" else c for c in text)
    return " ".join(escaped.split())
