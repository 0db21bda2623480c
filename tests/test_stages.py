"""Stages of a long job: each is done once, failures are recorded, and the job goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from revox.stages import Facts, Stage, StageLog

BEGUN = {"data": ["/home/ada/speech"], "steps": 3}


class Job:
    """Stages that note that they ran, and raise what they are told to."""

    def __init__(self, **errors: BaseException) -> None:
        self.errors, self.ran = errors, []

    def stages(self) -> list[Stage]:
        needs = {"b": ("a",), "c": ("b",), "d": ()}
        return [Stage(name, lambda name=name: self.do(name), needs.get(name, ())) for name in "abcd"]

    def do(self, name: str) -> Facts:
        self.ran.append(name)
        if name in self.errors:
            raise self.errors[name]
        return {"figure": 0.12345}


def run(path: Path, job: Job) -> tuple[StageLog, list[str]]:
    log = StageLog(path, BEGUN)
    return log, log.run(job.stages(), lambda line: None)


def test_a_failed_stage_holds_up_those_that_need_it_and_no_other(tmp_path):
    path = tmp_path / "log.json"
    failing = Job(b=OSError(28, "No space left on device"))
    log, missing = run(path, failing)
    assert missing == ["b", "c"]
    assert failing.ran == ["a", "b", "d"]
    rows = {row["stage"]: row for row in log.rows("abcde")}
    assert rows["a"]["done"] == "yes"
    assert rows["a"]["what came of it"] == "figure 0.1235"
    assert "No space left on device" in rows["b"]["what came of it"]
    assert rows["c"] == {"stage": "c", "done": "**no**", "seconds": None, "what came of it": "waits for: b"}
    assert rows["e"]["done"] == "left"

    again = Job()
    _, missing = run(path, again)
    assert missing == []
    assert again.ran == ["b", "c"]


def test_a_stage_that_is_stopped_or_has_a_bug_is_not_done(tmp_path):
    for error in (KeyboardInterrupt(), AssertionError()):
        path = tmp_path / type(error).__name__
        with pytest.raises(type(error)):
            run(path, Job(b=error))
        assert [row["done"] for row in StageLog(path, BEGUN).rows("abc")] == ["yes", "**no**", "left"]
        assert run(path, Job())[1] == []


def test_the_seconds_of_all_sittings_count(tmp_path, monkeypatch):
    path = tmp_path / "log.json"
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("revox.stages.time.perf_counter", lambda: next(clock))
    run(path, Job(a=ValueError("one\nand more")))
    log, _ = run(path, Job())
    assert log.stages["a"]["seconds"] == 20
    assert log.stages["d"]["seconds"] == 10


def test_another_job_is_told_by_what_differs_and_the_file_holds_hashes_only(tmp_path):
    path = tmp_path / "log.json"
    run(path, Job())
    assert "ada" not in path.read_text()
    assert StageLog(path, BEGUN).other == []
    assert StageLog(path, BEGUN | {"steps": 4}).other == ["steps"]
    assert StageLog(path, BEGUN | {"seed": 0}).other == ["seed"]
    path.write_text(json.dumps([1]))
    damaged = StageLog(path, BEGUN)
    assert (damaged.stages, damaged.other) == ({}, [])
