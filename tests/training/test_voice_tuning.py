"""The benchmark of tuned voices: whom it learns from, what a folder is of, and what is left to do."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from revox.checkpoint.tensors import WEIGHTS
from revox.speech import Audio, write_audio

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        found = runpy.run_path(str(BENCHMARKS / "voice_tuning.py"))
        sys.modules.pop("stamps", None)
        return found


def speech(folder: Path, *speakers: str) -> Path:
    (folder / "audio").mkdir(parents=True)
    lines = []
    for n, speaker in enumerate(speakers):
        write_audio(folder / "audio" / f"{n}.flac", Audio(np.full(4800, 0.1, np.float32), 24000))
        lines.append(json.dumps({"file": f"{n}.flac", "speaker": speaker, "written": "Words."}))
    (folder / "index.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_a_speaker_that_the_lab_learned_from_is_not_held_out(benchmark, tmp_path: Path, capsys):
    assert list(benchmark["held_out_synthetic"](speech(tmp_path / "a", "af_heart", "h000f"))) == ["h000f"]
    with pytest.raises(SystemExit) as ended:
        benchmark["held_out_synthetic"](speech(tmp_path / "b", "af_heart"))
    assert ended.value.code == 2
    assert "learned from every speaker" in capsys.readouterr().err


def test_a_voice_that_is_asked_for_later_is_made_later(benchmark):
    rows = {"human-a-8": {"rows": {"before": {}, "tuned": {}}}}
    lacking = benchmark["lacking"]
    assert lacking(rows, "human-a-8", ["tuned"]) == []
    assert lacking(rows, "human-a-8", ["tuned", "adapted"]) == ["adapted"]
    assert lacking(rows, "human-b-8", ["wrong speaker"]) == ["before", "wrong speaker"]


def test_a_folder_is_of_one_checkpoint_and_length(benchmark, tmp_path: Path, capsys):
    stamp, identity = benchmark["stamp"], benchmark["weights_identity"]
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / WEIGHTS).write_text(name)
    asked = {"checkpoint": identity(tmp_path / "a"), "minutes": 10.0}
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text("{}")  # of before there were stamps
    stamp(out, asked)
    stamp(out, asked)
    for other in ({"checkpoint": identity(tmp_path / "b")}, {"minutes": 5.0}):
        with pytest.raises(SystemExit) as ended:
            stamp(out, asked | other)
        assert ended.value.code == 2
        assert f"was begun with other {next(iter(other))}:" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        identity(tmp_path / "nowhere")


def test_the_command_refuses_another_encoder_before_it_computes(
    benchmark, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / WEIGHTS).write_text("weights")
    (tmp_path / "encoder").write_text("encoder")
    options = {name: str(tmp_path / name) for name in ("encoder", "data", "speech", "multi", "out")}
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    benchmark["stamp"](tmp_path / "out", {"checkpoint": "0", "encoder": "0", "minutes": 10.0})
    monkeypatch.setattr(sys, "argv", ["voice_tuning.py", "speak", "--checkpoint", str(tmp_path), *given])
    with pytest.raises(SystemExit) as ended:
        benchmark["main"]()
    assert ended.value.code == 2
    assert "other checkpoint and encoder" in capsys.readouterr().err
