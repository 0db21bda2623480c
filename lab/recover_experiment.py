"""Settings and results of the recovery experiment."""

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

    `encoder` is the file of the reference encoder. `minutes` is the training time of each arm and seed;
    `clips` of each kind are scored, human ones up to `seconds`; `evaluations` is how often a run is evaluated
    on the way. `whisper` is the folder of a Whisper, of transformers or CTranslate2, for the arms that
    distill it. `recognizer` is the folder of a Whisper, of CTranslate2, that counts wrong words; without one,
    pocketsphinx does with the lab's grammar, of synthetic clips only.
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
    whisper: Path | None = None
    recognizer: Path | None = None
    progress: ProgressCallback = ignore_progress

    @property
    def clock(self) -> str:
        """The time that counts: CPU seconds, which other processes do not affect; on a GPU, seconds."""
        return "cpu_seconds" if self.device == "cpu" else "seconds"
