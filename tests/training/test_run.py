"""A run keeps whole steps: stopped, diverged or finished."""

from __future__ import annotations

import json
import os
import resource
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from revox.training.errors import TrainingDivergedError, TrainingError
from revox.training.run import Run


@dataclass(frozen=True)
class Settings:
    steps: int = 8
    learning_rate: float = 1.0
    warmup: int = 2
    decay_steps: int = 4
    save_every: int = 3
    seed: int = 0


class Walk(Run):
    """A random walk; what it has drawn is its state."""

    def __init__(self, folder: Path, *, signal_at: int = -1, diverge_at: int = -1) -> None:
        super().__init__("walk", Settings(), folder, "cpu")
        self.place = torch.zeros(1)
        self.signal_at, self.diverge_at = signal_at, diverge_at

    def take_step(self) -> dict[str, float]:
        if self.step_count == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        self.place = self.place + torch.randn(1, generator=self.rng) + self.numpy_rng.random()
        return {"loss": float("nan") if self.step_count == self.diverge_at else float(self.place)}

    def state(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state(self, state: dict[str, Any]) -> None:
        self.place = state["place"]

    def go(self, reported: list[dict[str, float]]) -> None:
        self.run(reported.append, lambda: {"checked": 1.0}, report_every=2, validate_every=4)


def test_a_run_told_to_stop_finishes_its_step_saves_and_goes_on_to_the_same_end(tmp_path: Path):
    whole = Walk(tmp_path / "whole")
    whole.go([])
    stopped = Walk(tmp_path / "stopped", signal_at=4)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        stopped.go([])
    assert stopped.step_count == 5
    assert signal.getsignal(signal.SIGTERM) is before
    again = Walk(tmp_path / "stopped")
    assert again.resume()
    assert again.step_count == 5
    again.go([])
    assert torch.equal(again.place, whole.place)


def test_a_validation_that_fails_costs_no_step(tmp_path: Path):
    walk = Walk(tmp_path)
    walk.schedule = replace(walk.schedule, save_every=4)

    def fails() -> dict[str, float]:
        raise RuntimeError("no memory for it")

    with pytest.raises(RuntimeError):
        walk.run(lambda row: None, fails, report_every=2, validate_every=4)
    again = Walk(tmp_path)
    assert again.resume()
    assert again.step_count == 4


def test_a_diverged_run_keeps_the_last_good_state(tmp_path: Path):
    run = Walk(tmp_path, diverge_at=4)
    with pytest.raises(TrainingDivergedError, match="step 5"):
        run.go([])
    again = Walk(tmp_path)
    assert again.resume()
    assert again.step_count == 3


def test_reports_are_lines_of_the_log_with_means_and_validation_when_due(tmp_path: Path):
    reported: list[dict[str, float]] = []
    run = Walk(tmp_path)
    run.go(reported)
    assert [row["step"] for row in reported] == [2, 4, 6, 8]
    assert ["checked" in row for row in reported] == [False, True, False, True]
    assert [json.loads(line) for line in run.log_path.read_text().splitlines()] == reported


def test_the_time_left_is_at_the_pace_of_the_steps_taken(tmp_path: Path):
    run = Walk(tmp_path)
    run.step_count, run.seconds = 2, 9.0
    assert run.seconds_left() == round(4.5 * (run.schedule.steps - 2))


def test_the_learning_rate_warms_up_stays_and_falls_to_a_hundredth(tmp_path: Path):
    run = Walk(tmp_path)
    rates = []
    for run.step_count in range(9):
        rates.append(run.learning_rate())
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.01])


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: b"no state at all"]
)
def test_a_state_that_cannot_be_read_is_a_sentence_and_stays(tmp_path: Path, damage):
    Walk(tmp_path).save()
    path = tmp_path / "walk-state.pt"
    path.write_bytes(damage(path.read_bytes()))
    damaged = path.read_bytes()
    with pytest.raises(TrainingError, match=r"walk-state\.pt cannot be read"):
        Walk(tmp_path).resume()
    assert path.read_bytes() == damaged


def test_a_state_of_another_network_is_a_sentence(tmp_path: Path):
    class Wide(Walk):
        def load_state(self, state: dict[str, Any]) -> None:
            torch.nn.Linear(3, 3).load_state_dict({"weight": state["place"]})

    class Elsewhere(Walk):
        def load_state(self, state: dict[str, Any]) -> None:
            raise torch.OutOfMemoryError("full")

    Walk(tmp_path).save()
    with pytest.raises(TrainingError, match="other sizes or parts"):
        Wide(tmp_path).resume()
    with pytest.raises(torch.OutOfMemoryError):
        Elsewhere(tmp_path).resume()


@pytest.mark.parametrize("room", [0.0, 0.5, 0.99])
def test_a_state_that_cannot_be_written_is_the_systems_sentence_and_the_one_before_stays(
    tmp_path: Path, room: float
):
    run = Walk(tmp_path)
    run.save()
    before = (tmp_path / "walk-state.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(len(before) * room), hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            run.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path / "walk-state.pt")
    assert (tmp_path / "walk-state.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["walk-state.pt"]
