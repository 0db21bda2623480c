"""The table of adaptations: every row is a setting that exists, and its rule says no where it should."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from revox.training.adapt import AdaptTraining

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        found = runpy.run_path(str(BENCHMARKS / "adaptation_rows.py"))
        for name in ("voice_tuning", "stamps"):
            sys.modules.pop(name, None)
        return found


def row(name: str = "speech lora 4", **changes: Any) -> dict[str, Any]:
    """Four speakers, of whom each gains 0.05 over `nothing`."""
    found = {
        "encoder": "original", "row": name, "seed": 0, "minutes": 2.0, "scale": 1.0,
        "speakers": ["synthetic-a", "synthetic-b", "human-c", "human-d"],
        "similarity": [0.55, 0.65, 0.75, 0.87], "first": [1, 0, 1, 1], "words": [0.1, 0.2, 0.3, 0.4],
        "semantic": [5.0] * 4, "flow": [0.3] * 4, "guard": {"agreement": 0.99, "nats": 0.0},
    }  # fmt: skip
    return found | changes


NOTHING = row("nothing", similarity=[0.5, 0.6, 0.7, 0.8], minutes=None)


def test_every_row_is_a_setting_of_an_adaptation(benchmark):
    for name, given in benchmark["ROWS"].items():
        if name != "nothing":
            published = "faults" in given
            changes = {k: v for k, v in given.items() if k != "faults"}
            AdaptTraining(**{**(benchmark["PUBLISHED"] if published else {}), **changes})


@pytest.mark.parametrize(
    ("changes", "worth"),
    [
        ({}, True),
        ({"similarity": [0.9, 0.2, 0.75, 0.76]}, False),  # gains as much, but not of all
        ({"similarity": [0.505, 0.605, 0.705, 0.805]}, False),  # too little to matter
        ({"words": [0.2, 0.2, 0.3, 0.4]}, False),
        ({"guard": {"agreement": 0.97, "nats": 0.0}}, False),
        ({"guard": {"agreement": 0.99, "nats": 0.03}}, False),
        ({"row": "nothing"}, False),
    ],
)
def test_a_row_is_worth_having_only_by_the_rule(benchmark, changes, worth):
    assert benchmark["compared"](row() | changes, [NOTHING])[2] is worth


def test_the_table_has_both_kinds_of_speakers_in_every_row(benchmark):
    lines = benchmark["as_markdown"]([row(), NOTHING]).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["nothing", "speech lora 4"]
    assert "| 0.600, 0.810 | +0.055 (0.005) | 1, 2 | 15.0, 35.0 |" in lines[3]
    assert lines[3].endswith("| yes |")
