"""How many kernels would one training step of each stage start on a GPU? Counted on the CPU.

    python benchmarks/lab_operations.py RUN --config benchmarks/lab-build.json --whisper DIR

RUN is a finished build, DIR the Whisper that taught it. Counted are the operations that a step dispatches,
forward, backward and update, without views and allocations: at the lab's sizes a GPU spends its time on
starting them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lab.build import BuildRun, encoded_language_data, finish_trainer, half_trainer, teacher_trainer
from lab.language_training import LanguageTrainer
from lab.settings import read_settings
from revox.training.run import Run

STAGES = ("teacher", "encoder", "decoder", "finish", "language")


class Counter(TorchDispatchMode):
    """Counts operations that write memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = [value.alias_info for value in op._schema.returns]
        view = bool(returns) and returns[0] is not None and not returns[0].is_write
        if not view and not op.__name__.startswith(("detach", "empty", "_local")):
            self.count += 1
        return op(*args, **(kwargs or {}))


def trainer(stage: str, run: Path, config: Path, whisper: Path, fresh: Path) -> Run:
    """The run of `stage`, at its first step, in `fresh`, with the speech and codes of `run`."""
    settings = read_settings(config)
    if stage == "language":
        build = BuildRun(run, settings)
        data = encoded_language_data(build)
        sizes = build.params.voxtral_config()
        return LanguageTrainer(sizes, settings.language, data, fresh, autocast=True)
    for part in ("data", "folder", "teacher", "encoder", "decoder"):
        (fresh / part).mkdir()
        for file in (run / part).iterdir():
            if file.name != f"{stage}-state.pt":
                (fresh / part / file.name).symlink_to(file.resolve())
    build = BuildRun(fresh, settings, autocast=True, whisper=whisper)
    if stage == "teacher":
        return teacher_trainer(build)
    return finish_trainer(build) if stage == "finish" else half_trainer(stage, build)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--whisper", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for stage in STAGES:
        with tempfile.TemporaryDirectory() as fresh:
            one = trainer(stage, asked.run, asked.config, asked.whisper, Path(fresh))
            one.step()
            one.step_count = one.schedule.steps - 1  # where every loss counts
            with Counter() as counted:
                one.take_step()
            print(f"{stage}: {counted.count} operations a step", flush=True)


if __name__ == "__main__":
    main()
