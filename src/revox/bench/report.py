"""A benchmark's report: Markdown, JSON, and a picture where matplotlib is installed."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from revox.bench.models import ModelEntry, model_entry
from revox.bench.plan import STATISTICS, BenchResult
from revox.bench.summary import SHARES, BenchLimit, LevelSummary, as_json, summarize_levels
from revox.evaluation.report import markdown_table
from revox.speech.files import replace_file

_TITLES = {
    "first_audio": "First audio (ms)",
    "latency": "Whole answer (ms)",
    "real_time_factor": "Real-time factor (seconds a second of speech)",
}


def write_bench(
    result: BenchResult,
    limits: Sequence[BenchLimit],
    models: list[ModelEntry],
    out: Path,
    usd_per_hour: float | None = None,
) -> list[Path]:
    """Write report.md, report.json and, with matplotlib, report.png; returns their paths."""
    levels = summarize_levels(result)
    cards = {
        name: _card([one for one in levels if one.endpoint == name], model_entry(models, facts), usd_per_hour)
        for name, facts in result.endpoints.items()
    }
    found = as_json(result, limits, cards)
    written = [out / "report.md", out / "report.json"]
    picture = _picture(levels)
    if picture:
        replace_file(out / "report.png", picture)
        written.append(out / "report.png")
    replace_file(out / "report.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    replace_file(out / "report.md", markdown(result, found, levels, picture is not None))
    return written


def _card(
    levels: Sequence[LevelSummary], entry: ModelEntry | None, usd_per_hour: float | None
) -> dict[str, Any]:
    """What the table of models has of an endpoint, and what its machine costs at its best level."""
    card: dict[str, Any] = entry.model_dump(exclude={"kind", "model"}) if entry else {}
    rates = [rate for one in levels if (rate := one.figures["characters_per_second"])]
    if card.get("usd_per_1000_characters") is None and usd_per_hour is not None and rates:
        card["usd_per_1000_characters"] = 1000 * usd_per_hour / 3600 / max(rates)
        card["cost_of"] = f"{usd_per_hour:g} USD an hour, {max(rates):.0f} characters/s"
    errors = (one.figures["word_errors_percent"] for one in levels)
    card["own_word_errors_percent"] = next((one for one in errors if one is not None), None)
    return card


def markdown(
    result: BenchResult, found: dict[str, Any], levels: Sequence[LevelSummary], picture: bool
) -> str:
    """The report as Markdown."""
    verdict = ["Passed."] if not found["failures"] else [f"- {_plain(one)}" for one in found["failures"]]
    lines = ["# Benchmark of speech endpoints", "", *verdict, ""]
    lines += markdown_table(("", ""), [(k, _plain(str(v))) for k, v in result.environment.items()])
    lines += ["", "## Endpoints", "", *_endpoints(result, found["models"]), ""]
    for name, title in _TITLES.items():
        lines += _times(name, title, levels)
    lines += _counts(levels)
    lines += _formats(found["formats"])
    if result.neighbor:
        lines += ["## Neighbor", "", *_neighbor(result.neighbor), ""]
    if picture:
        lines += ["![first audio and real-time factor over streams](report.png)", ""]
    lines += ["Single requests: requests.jsonl. Warm-up requests are in none of the tables."]
    return "\n".join(lines) + "\n"


def _endpoints(result: BenchResult, cards: dict[str, dict[str, Any]]) -> list[str]:
    figures = ("USD for 1000 characters", "license", "cloning", "word errors (%)")
    head = ("endpoint", "kind", "model", "voices", *figures)
    rows, sources = [], []
    for name, facts in result.endpoints.items():
        card = cards[name]
        price, published = card.get("usd_per_1000_characters"), card.get("word_errors_percent")
        errors = card["own_word_errors_percent"]
        own = f"{errors:.2f}" if errors is not None else "not measured"
        if published is not None:
            own += f" (published {published:g}: {card['word_errors_of']})"
        cost = (
            "–" if price is None else f"{price:.4g}" + (f" ({card['cost_of']})" if "cost_of" in card else "")
        )
        cells = (name, facts["kind"], facts.get("model", ""), facts["voices"], cost)
        more = (card.get("license", "not in the table"), card.get("cloning", "–"), own)
        rows.append([_plain(str(cell)) for cell in (*cells, *more)])
        if card.get("sources"):
            sources.append(f"- {_plain(name)}: {', '.join(card['sources'])}")
        if "left out" in facts:
            sources.append(f"- {_plain(name)} was left out: {facts['left out']}")
    return [*markdown_table(head, rows), "", *sources]


def _times(name: str, title: str, levels: Sequence[LevelSummary]) -> list[str]:
    scale, digits = (1, 3) if name == "real_time_factor" else (1000, 0)
    rows = []
    for level in levels:
        values = [level.figures[f"{name}.{statistic}"] for statistic in STATISTICS]
        if values[0] is not None:
            cells = [f"{scale * value:.{digits}f}" if value is not None else "–" for value in values]
            rows.append([_plain(level.endpoint), level.mode, str(level.streams), *cells])
    if not rows:
        return []
    return [f"## {title}", "", *markdown_table(("endpoint", "mode", "streams", *STATISTICS), rows), ""]


def _counts(levels: Sequence[LevelSummary]) -> list[str]:
    shares = ("failed", "faulty", "ran dry")
    head = ("endpoint", "mode", "streams", "requests", "status", *shares, "characters/s")
    rows = []
    for level in levels:
        found = [level.figures[key] for key in SHARES]
        rate = level.figures["characters_per_second"]
        rows.append(
            [
                _plain(level.endpoint),
                level.mode,
                str(level.streams),
                str(level.requests),
                ", ".join(f"{count} x {status}" for status, count in level.statuses.items()),
                *("–" if share is None else f"{100 * share:.0f} %" for share in found),
                "–" if rate is None else f"{rate:.0f}",
            ]
        )
    return ["## Requests", "", *markdown_table(head, rows), ""] if rows else []


def _formats(found: list[dict[str, Any]]) -> list[str]:
    rows = [
        [
            _plain(one["endpoint"]),
            one["response_format"],
            str(one["status"] or "no answer"),
            f"{one['size'] / 1000:.0f} kB",
            _plain("; ".join(one["problems"])) or "sound",
        ]
        for one in found
    ]
    head = ("endpoint", "format", "status", "size", "found")
    return ["## Formats", "", *markdown_table(head, rows), ""] if rows else []


def _neighbor(found: dict[str, Any]) -> list[str]:
    def shown(value: float | None) -> str:
        return "–" if value is None else f"{1000 * value:.1f}"

    keys = ("before_p50", "during_p50", "during_max", "after_p50", "abort_above")
    head = ("URL", "median before (ms)", "during", "slowest during", "after", "limit during", "unanswered")
    row = [_plain(found["url"]), *(shown(found[key]) for key in keys), str(found["unanswered"])]
    return markdown_table(head, [row])


def _picture(levels: Sequence[LevelSummary]) -> bytes | None:
    """First audio and real-time factor over streams, p50 as a line and p95 as a dashed one; None if nothing
    is there to draw, or nothing to draw with."""
    names = list(dict.fromkeys(level.endpoint for level in levels if level.mode == "stream"))
    if not names:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("first_audio", "first audio (s)"), ("real_time_factor", "real-time factor"))
    for axis, (figure_name, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for i, name in enumerate(names):
            for statistic, style in (("p50", "o-"), ("p95", ".--")):
                points = [
                    (level.streams, value)
                    for level in levels
                    if level.endpoint == name and level.mode == "stream"
                    if (value := level.figures[f"{figure_name}.{statistic}"]) is not None
                ]
                title = f"{name}, {statistic}".replace("$", r"\$")
                axis.plot(*zip(*points, strict=True), style, color=f"C{i}", label=title) if points else None
        axis.set_xlabel("streams")
        axis.set_xticks(sorted({level.streams for level in levels if level.mode == "stream"}))
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _plain(text: str) -> str:
    """Text without Markdown's own marks, on one line."""
    escaped = "".join(f"\\{c}" if c in "\\|`*_<>[]#" else c for c in text)
    return " ".join(escaped.split())
