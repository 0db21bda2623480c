"""The benchmark of `revox find` judges by the thresholds of its recipes."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(("most", "passed"), [(0.2, False), (0.6, True)])
def test_the_thresholds_are_those_of_the_recipes(monkeypatch: pytest.MonkeyPatch, most: float, passed: bool):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    find = runpy.run_path(str(BENCHMARKS / "find.py"))
    sys.modules.pop("conversations", None)
    ranked = {name: {"right": True, "others_s": 0.5} for name in find["RANKINGS"]}
    rows = [
        ranked | {"name": "a", "seconds": 1.0, "speakers": 2, "background": "", "processor_share": {"": 0.01}}
    ]
    limits = {
        "right_speaker_first_of_20": 1, "seconds_of_others_in_the_winner": most, "processor_share": 0.1
    }  # fmt: skip
    totals = find["totals"](rows, limits)
    assert totals["passed"] is passed
    table = find["table"]({"thresholds": limits, "totals": totals, "conversations": rows})
    assert f"over {most:g} s of others" in table
