"""Results in a log are of one checkpoint and one student."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NOW = {"checkpoint": "a", "student": None}
ROWS = [
    {"method": "inversion 10"},  # of before rows said it
    {"method": "inversion 20", "checkpoint": "b", "student": None},
    {"method": "inversion 30", "checkpoint": "a", "student": "c"},
    {"method": "inversion 40", **NOW},
]


def test_rows_of_another_checkpoint_or_student_do_not_count(tmp_path: Path, capsys):
    rows_of = runpy.run_path(str(BENCHMARKS / "stamps.py"))["rows_of"]
    log = tmp_path / "log.jsonl"
    assert rows_of(log, NOW) == []
    log.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    assert rows_of(log, NOW) == ROWS[3:]
    assert "3 rows are of another checkpoint or student" in capsys.readouterr().err


def test_the_report_is_of_the_last_rows_checkpoint(capsys):
    of_one_lab = runpy.run_path(str(BENCHMARKS / "inversion_report.py"))["of_one_lab"]
    assert of_one_lab(ROWS) == ROWS[3:]
    assert "3 rows" in capsys.readouterr().out
    assert of_one_lab(ROWS[:1]) == ROWS[:1]
