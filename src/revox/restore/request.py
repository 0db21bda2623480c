"""What a restoration is asked for, and the settings of a quick one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from revox.api import find_dtype
from revox.progress import ProgressCallback, ignore_progress
from revox.training.adapt import AdaptTraining
from revox.training.restore import RunOptions
from revox.training.settings import EncoderTraining

QUICK_TRAINING: dict[str, Any] = {
    "clips": 2, "pairs": 5, "seconds": 1.6, "sentences": 3200, "learning_rate": 1e-3, "betas": (0.9, 0.98),
    "resolutions": ((1024, 100), (512, 60), (256, 30)), "pair": {"shortest": 16, "longest": 20},
    "weights": {"waveform": 1.0},
}  # fmt: skip
"""The lab's recipe for its small checkpoint (lab/recovery/pairs-and-human.yaml)."""
QUICK_MINUTES = 15.0
FEWEST_STEPS = 10
REPORTS = 50  # of a run whose steps follow from its minutes


@dataclass(frozen=True)
class RestoreRequest:
    """What to restore and how.

    `checkpoint` is the folder, `name` what the report calls it. `data` and `validation` are specs of
    `revox.training.data.find_sources`; without `validation` some speakers are held out. `settings` are the
    training's; with `minutes` its steps are those that fit into them, of the processor's time on a CPU.
    `quick` measures with one seed, adapts for fewer steps and examines fewer voices. `adapt` is "auto" or
    "never". In the end `clip` is cloned, with `consent`. `texts` are what the model says, one of the data's
    or our own where there are none. `message` gets sentences for the user.
    """

    checkpoint: Path
    name: str
    data: Sequence[str]
    settings: EncoderTraining
    clip: Path
    consent: str
    validation: Sequence[str] = ()
    texts: Sequence[str] = ()
    minutes: float | None = None
    quick: bool = False
    adapt: str = "auto"
    device: str = "cpu"
    dtype: str | None = None
    workers: int = 2
    cache: Path | None = None
    message: Callable[[str], None] = lambda sentence: None
    progress: ProgressCallback = ignore_progress

    @property
    def seeds(self) -> int:
        """Of speech that is measured."""
        return 1 if self.quick else 3

    @property
    def arithmetic(self) -> torch.dtype | None:
        """The type that was asked for."""
        return find_dtype(self.dtype)

    @property
    def adaptation(self) -> AdaptTraining:
        """The settings of an adaptation."""
        seed = self.settings.seed
        return (
            AdaptTraining(steps=90, warmup=6, decay_steps=30, seed=seed)
            if self.quick
            else AdaptTraining(seed=seed)
        )

    def options(self, **changes: Any) -> RunOptions:
        """The training's options."""
        given: dict[str, Any] = {
            "validation": self.validation, "workers": self.workers, "sentences": self.texts,
            "device": self.device, "cache": self.cache, "message": self.message, "progress": self.progress,
        }  # fmt: skip
        return RunOptions(**given | changes)

    def scheduled(self, steps: int) -> EncoderTraining:
        """The training's settings for so many steps; where `minutes` decide, in the lab's shares of them."""
        if self.minutes is None:
            return self.settings
        every = max(1, steps // REPORTS)
        return self.settings.model_copy(
            update={
                "steps": steps, "warmup": max(1, round(0.02 * steps)), "decay_steps": max(1, steps // 2),
                "report_every": every, "validate_every": max(1, steps // 2),
                "save_every": max(1, steps // 10),
            }
        )  # fmt: skip

    def fitting(self, seconds_a_step: float) -> int:
        """The steps to take, if one takes so long."""
        if self.minutes is None:
            return self.settings.steps
        steps = max(FEWEST_STEPS, int(60 * self.minutes / seconds_a_step))
        return steps - steps % REPORTS if steps > REPORTS else steps  # so that the last one is validated
