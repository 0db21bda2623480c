"""A training run that can be stopped at any moment and goes on exactly where it was."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from revox.speech.files import replace_file
from revox.training.errors import TrainingDivergedError, TrainingError


class RunSettings(Protocol):
    """What the settings of every run have, frozen or not."""

    @property
    def steps(self) -> int:
        """Steps in all."""

    @property
    def learning_rate(self) -> float:
        """The highest."""

    @property
    def warmup(self) -> int:
        """Steps until it is reached."""

    @property
    def decay_steps(self) -> int:
        """Steps at the end over which it falls."""

    @property
    def save_every(self) -> int:
        """Steps between states."""

    @property
    def seed(self) -> int:
        """Of everything that is drawn."""


@contextlib.contextmanager
def saved_state(path: Path, device: str = "cpu", *, mmap: bool = False) -> Iterator[dict[str, Any]]:
    """The state that a run saved in the file `path`, for a body that takes it up.

    Raises TrainingError if the file cannot be read or belongs to another network.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
        if not isinstance(state, dict):
            raise EOFError(f"a {type(state).__name__}")
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise TrainingError(f"{path} cannot be read: begin again without it, or put back a copy") from error
    try:
        yield state
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, KeyError) as error:
        raise TrainingError(
            f"{path} is of a network of other sizes or parts: go on with the settings that it was begun "
            "with, or in another folder"
        ) from error


class Run(ABC):
    """Steps, a log and resumable state in `folder`, as `NAME-state.pt` and `NAME-log.jsonl`.

    A subclass takes steps and says what its state is. Two generators, `rng` and `numpy_rng`, are part of it.
    """

    def __init__(self, name: str, schedule: RunSettings, folder: Path, device: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.schedule, self.device = schedule, device
        self.state_path, self.log_path = folder / f"{name}-state.pt", folder / f"{name}-log.jsonl"
        self.rng = torch.Generator().manual_seed(schedule.seed)
        self.numpy_rng = np.random.default_rng(schedule.seed)
        self.step_count, self.seconds = 0, 0.0
        self.cpu_seconds = 0.0  # of this process: what steps cost on a machine that others use too

    @abstractmethod
    def take_step(self) -> dict[str, float]:
        """One update; gives the losses, `loss` among them."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a later `load_state` needs: tensors, numbers and strings only."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""

    def agreed(self, stop: bool) -> bool:
        """Whether to stop, given whether this process was asked to: processes that train together agree."""
        return stop

    def step(self) -> dict[str, float]:
        """`take_step`, counted and timed. Raises TrainingDivergedError when the loss is not finite."""
        began, cpu_began = time.perf_counter(), time.process_time()
        losses = self.take_step()
        self.step_count += 1
        self.seconds += time.perf_counter() - began
        self.cpu_seconds += time.process_time() - cpu_began
        if not math.isfinite(losses["loss"]):
            raise TrainingDivergedError(
                f"the loss is {losses['loss']} at step {self.step_count}: lower the learning rate and go on "
                f"from the last state, {self.state_path}"
            )
        return losses

    def seconds_left(self) -> int:
        """For the steps still to take, at the mean time of those taken, earlier sittings included."""
        # Not from a row of the log, whose seconds are rounded: to 0 on a fast machine.
        return round(self.seconds / self.step_count * (self.schedule.steps - self.step_count))

    def learning_rate(self) -> float:
        """Warm-up, constant, then linear to a hundredth over the last `decay_steps`."""
        schedule = self.schedule
        warm = min(1.0, (self.step_count + 1) / schedule.warmup)
        cool = min(1.0, max(0.0, (schedule.steps - self.step_count) / schedule.decay_steps))
        return schedule.learning_rate * warm * max(cool, 0.01)

    def save(self) -> None:
        """Replace the saved state by the present one."""
        self.write_state(self.state())

    def write_state(self, state: dict[str, Any]) -> None:
        """Save `state` with what every run has: steps, seconds, generators.

        Raises OSError; the state saved before is then still there.
        """
        state = state | {
            "step": self.step_count,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "rng": self.rng.get_state(),
            "numpy_rng": json.dumps(self.numpy_rng.bit_generator.state),
        }
        try:
            replace_file(self.state_path, partial(torch.save, state))
        except (OSError, RuntimeError) as error:
            # When a write fails, torch raises its own error over the system's.
            first = error if isinstance(error, OSError) else error.__context__
            if not isinstance(first, OSError):
                raise
            raise OSError(first.errno, first.strerror, str(self.state_path)) from error

    def resume(self) -> bool:
        """Go on from the saved state; False when there is none.

        Raises TrainingError if it cannot be read or belongs to another network.
        """
        if not self.state_path.is_file():
            return False
        with saved_state(self.state_path, self.device) as state:
            self.load_state(state)
            self.rng.set_state(state["rng"].cpu())
            self.numpy_rng.bit_generator.state = json.loads(state["numpy_rng"])
            self.step_count, self.seconds = state["step"], state["seconds"]
            self.cpu_seconds = state.get("cpu_seconds", 0.0)
        return True

    def run(
        self,
        report: Callable[[dict[str, float]], None],
        validate: Callable[[], dict[str, float]] | None = None,
        *,
        report_every: int,
        validate_every: int,
    ) -> None:
        """Step to the end of the schedule. Each report is also a line of the log.

        The state is saved every `save_every` steps and at the end. SIGINT and SIGTERM let the step in hand
        finish, save, and raise KeyboardInterrupt: a state is never half a step. Raises
        TrainingDivergedError, and then saves nothing over the last good state.
        """
        sums: dict[str, list[float]] = {}
        with _asked_to_stop() as stop:
            while self.step_count < self.schedule.steps and not self.agreed(stop.is_set()):
                for key, value in self.step().items():
                    sums.setdefault(key, []).append(value)
                if self.step_count % self.schedule.save_every == 0:
                    self.save()  # before a validation, which may fail
                if self.step_count % report_every == 0:
                    row: dict[str, float] = {"step": self.step_count, "seconds": round(self.seconds, 1)}
                    row |= {key: round(float(np.mean(values)), 5) for key, values in sums.items()}
                    sums = {}
                    if validate is not None and self.step_count % validate_every == 0:
                        row |= validate()
                    with self.log_path.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    report(row)
            self.save()
            if self.step_count < self.schedule.steps:
                raise KeyboardInterrupt


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield stop
        return
    before = {
        number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
