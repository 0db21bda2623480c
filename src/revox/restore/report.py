"""A restoration's report: Markdown, the same as a page with sounds, and its pictures."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

from revox.doctor.report import table_of, without_paths
from revox.evaluation.evaluate import KINDS
from revox.evaluation.mel_picture import mel_picture
from revox.evaluation.report import HOW_TO_READ
from revox.restore.rule import RULE
from revox.speech import AudioError, read_audio
from revox.speech.files import replace_file
from revox.stages import StageLog

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem}"
    "table{border-collapse:collapse;display:block;overflow-x:auto}img{max-width:100%}"
    "th,td{text-align:left;padding:.3rem .7rem;border-bottom:1px solid #8884;vertical-align:top}"
)
_PANELS = (
    ("losses", ("mel", "semantic", "acoustic")),
    ("validation: distance", ("valid_mel", "valid_levels")),
    ("validation: share of equal semantic codes", ("valid_agreement", "trained_agreement")),
)


def write_report(out: Path, name: str, log: StageLog, stages: Sequence[str], private: Sequence[Path]) -> Path:
    """Write report.md, report.html and the pictures that can be drawn into `out`; returns the first."""
    text = without_paths("\n".join(_markdown(out, name, log, stages)) + "\n", private)
    replace_file(out / "report.md", text)
    replace_file(out / "report.html", _page(text, name))
    return out / "report.md"


def _markdown(out: Path, name: str, log: StageLog, stages: Sequence[str]) -> list[str]:
    missing = [stage for stage in stages if not log.done(stage)]
    verdict = f"**Not done: {', '.join(missing)}.** The same command goes on." if missing else "**Done.**"
    plan = {one["stage"]: one for one in log.stages.get("plan", {}).get("estimates", ())}
    rows = []
    for row in log.rows(stages):
        about = plan.get(row["stage"], {})
        rows.append(
            {
                "stage": row["stage"], "done": row["done"], "seconds": row["seconds"],
                "of the processor": log.stages.get(row["stage"], {}).get("cpu_seconds"),
                "estimated": round(about["seconds"], 1) if about else None,
                "what came of it": row["what came of it"],
            }
        )  # fmt: skip
    lines = [f"# Restoring {name}", "", verdict, "", *table_of(rows)]
    if plan:
        lines += ["", "## Plan", "", *table_of(plan_rows(list(plan.values()))), "", RULE]
    lines += _training(out)
    if log.done("measure"):
        lines += ["", "## What the encoder is worth", "", HOW_TO_READ]
        pages = ", ".join(f"[{kind}](measure/{kind}/report.html)" for kind in KINDS)
        lines += ["", f"Sounds of every clip: {pages}."]
        for kind in KINDS:
            _, found, tables = (out / "measure" / kind / "report.md").read_text().partition("\n## ")
            lines += ["", *f"{found}{tables}".strip().replace("## ", "### ").splitlines()]
    if log.done("adapt"):
        facts = log.stages["adapt"]
        verdict = "The model was adapted" if facts["adapted"] else "The model was left alone"
        lines += ["", "## Adaptation", "", f"{verdict}: {facts['why']}."]
        figures = {k: v for k, v in facts.items() if isinstance(v, float) and "seconds" not in k}
        lines += ["", *table_of([figures])] if figures else []
    if log.done("doctor"):
        checks = [{"check": k, "": v} for k, v in log.stages["doctor"]["checks"].items()]
        lines += ["", "## Examination", "", *table_of(checks), "", "Figures: [doctor](doctor/doctor.md)."]
    if log.done("clone and speak"):
        lines += _sounds(out, log)
    return lines


def plan_rows(estimates: Sequence[dict]) -> list[dict]:
    """The lines of a plan's table, in units that people read."""
    return [
        {
            "stage": one["stage"], "minutes": f"{one['seconds'] / 60:,.1f}",
            "disk": f"{one['disk'] / 1e9:.2f} GB",
            "memory": "–" if one["memory"] is None else f"{one['memory'] / 1e9:.1f} GB",
            "how that is known": one["how"],
        }
        for one in estimates
    ]  # fmt: skip


def _training(out: Path) -> list[str]:
    try:
        text = (out / "encoder" / "encoder-log.jsonl").read_text()
    except OSError:
        return []
    picture = _curves([json.loads(line) for line in text.splitlines()])
    if picture is None:
        return []
    replace_file(out / "training.png", picture)
    return ["", "## Training", "", "![Losses and validation against steps](training.png)"]


def _curves(rows: Sequence[dict[str, float]]) -> bytes | None:
    """Figures of the training against its steps as a PNG; None without rows or matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not rows:
        return None
    figure = Figure(figsize=(12, 3.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, names) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), ".-", label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        if axis.lines:
            axis.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _sounds(out: Path, log: StageLog) -> list[str]:
    facts, folder = log.stages["clone and speak"], out / "sounds"
    similarity = facts["similarity"] or {}
    texts = {f"{one['voice']}-{i % 2}": one["text"] for i, one in enumerate(facts["spoken"])}
    names = [path.stem for path in sorted(folder.glob("*.wav"))]
    order = sorted(names, key=["reference", "decoded", *texts].index)
    rows = [
        {
            "sound": f"[{stem}](sounds/{stem}.wav)", "text": texts.get(stem),
            "similarity to the clip": similarity.get(stem),
        }
        for stem in order
    ]  # fmt: skip
    consent = facts["provenance"]["consent"]["statement"]
    lines = ["", "## Sounds", "", f"Whose voice was cloned: {consent}.", "", *table_of(rows)]
    lines += ["", *table_of(facts["spoken"])]
    try:
        mel_picture(out / "mel.png", [(stem, read_audio(folder / f"{stem}.wav")) for stem in order[:3]])
    except AudioError:  # no matplotlib
        return lines
    return [*lines, "", "![Mel spectrograms](mel.png)"]


def _page(text: str, name: str) -> str:
    """The Markdown as a page on which links to sounds are players."""
    from html import escape

    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    player = r'\2 <audio controls preload="none" src="\1"></audio>'
    body = re.sub(r'<a href="([^"]+\.wav)">(.*?)</a>', player, body)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}</body></html>\n"
    )
