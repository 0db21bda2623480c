"""What measures the cost of marking finds the clips that ship."""

from __future__ import annotations

import runpy
from pathlib import Path


def test_the_bundled_clips_are_where_the_benchmark_looks():
    found = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "marking.py"))
    assert sorted(found["EXAMPLES"].glob("*.flac"))
