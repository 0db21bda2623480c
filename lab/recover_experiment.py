"""What the recovery experiment compares, and the form of its results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revox.progress import ProgressCallback, ignore_progress

Line = dict[str, Any]
"""One result: a JSON object of OUT/recover.jsonl."""


@dataclass(frozen=True)
class Experiment:
    """What is compared, where, and for how long.

    `encoder` is the file put aside. `minutes` of training for each arm and seed; `clips` of each kind that
    are scored, human ones up to `seconds`; a run is evaluated on the way so many times (`evaluations`).
    """

    out: Path
    data: Path
    checkpoint: Path
    encoder: Path
    minutes: float = 30.0
    seeds: int = 3
    clips: int = 20
    seconds: float = 5.0
    evaluations: int = 8
    threads: int = 1
    device: str = "cpu"
    progress: ProgressCallback = ignore_progress

    @property
    def clock(self) -> str:
        """What time is: the process's own seconds, which others on the machine do not change; on a GPU, those
        that pass."""
        return "cpu_seconds" if self.device == "cpu" else "seconds"
