"""One report to share: Markdown for people, JSON for programs, without personal paths or names."""

from __future__ import annotations

import getpass
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from revox.doctor.findings import CheckResult, DoctorReport, Value, Verdict, plain
from revox.evaluation.report import markdown_table
from revox.speech.files import replace_file

LABELS = {
    Verdict.PASS: "pass",
    Verdict.WARN: "**warn**",
    Verdict.FAIL: "**FAIL**",
    Verdict.SKIPPED: "skipped",
}


def write_report(report: DoctorReport, out: Path, private: Sequence[Path]) -> tuple[Path, Path]:
    """Write doctor.md and doctor.json into `out` (created if missing); returns their paths.

    `private` are folders whose paths must not be in the report: each becomes its last name. Raises OSError.
    """
    out.mkdir(parents=True, exist_ok=True)
    markdown, data = out / "doctor.md", out / "doctor.json"
    replace_file(markdown, without_paths(to_markdown(report), private))
    text = json.dumps(report.to_json(), indent=1, ensure_ascii=False)
    replace_file(data, without_paths(text, private) + "\n")
    return markdown, data


def without_paths(text: str, private: Sequence[Path]) -> str:
    """`text` with every private folder as its last name, the home folder as ~ and other absolute paths gone.

    Of any other absolute path only the last name stays.
    """
    places = {str(path) for folder in private for path in (folder, folder.absolute(), folder.resolve())}
    for place in sorted(places, key=len, reverse=True):
        if len(place) > 1:
            text = text.replace(place, Path(place).name)
            text = text.replace(str(Path(place).parent) + "/", "") if len(Path(place).parts) > 2 else text
    text = text.replace(str(Path.home()) + "/", "~/")
    text = re.sub(r"(?<![\w.~:/])/(?:[\w.+@-]+/)+([\w.+@-]+)", r"\1", text)
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):
        return text
    return re.sub(rf"(?<=[/\\]){re.escape(user)}(?=[/\\])", "USER", text)


def to_markdown(report: DoctorReport) -> str:
    """The report as Markdown: the verdicts first, then each check with its figures."""
    counts = {v: sum(f.verdict is v for f in report.findings) for v in Verdict}
    summary = ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items() if count)
    lines = [
        f"# revox doctor: {report.checkpoint}",
        "",
        f"**{report.verdict.value.upper()}**: {summary}.",
        "",
    ]
    if report.stopped:
        lines += ["Interrupted: these are the results until then.", ""]
    lines += [", ".join(f"{key} {value}" for key, value in report.made_with.items()) + ".", ""]
    lines += table_of(
        [{"check": f.name, "": LABELS[f.verdict], "what it means": f.sentence} for f in report.findings]
    )
    for finding in report.findings:
        if finding.figures or finding.rows:
            lines += _section(finding)
    return "\n".join(lines) + "\n"


def _section(finding: CheckResult) -> list[str]:
    lines = ["", f"## {finding.name}: {finding.verdict.value}", "", finding.sentence, ""]
    if finding.figures:
        lines += table_of(
            [{"figure": f.name, "found": f.value, "expected": f.expected} for f in finding.figures]
        )
    if finding.rows:
        lines += ["", *table_of(finding.rows)]
    return lines


def table_of(rows: Sequence[Mapping[str, Value]]) -> list[str]:
    """Lines of a Markdown table of `rows`, whose keys are its columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return markdown_table(columns, [[_cell(row.get(column)) for column in columns] for row in rows])


def _cell(value: Value) -> str:
    value = plain(value)
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value).replace("|", "\\|").replace("\n", " ")
