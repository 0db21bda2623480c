from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "synthesis.py"


def test_the_script_that_waits_for_a_card_runs(tmp_path):
    options = ["--parts", "streams", "--streams", "2", "--text-chars", "15", "--reference-seconds", "3"]
    command = [sys.executable, SCRIPT, *options, "--budget", "20", "--out", tmp_path / "found"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    [row] = json.loads((tmp_path / "found.json").read_text())["streams"]
    assert row["streams"] == 2
    assert 0 < row["first_audio_p50"] <= row["first_audio_p95"]
