"""The process that restores an encoder: `python -m lab.recover_process TASK.json`.

It gets a copy of the checkpoint, training speech and a folder of its own, and nothing else; it cannot open
the reference encoder (`lab.recover_guard`). It reports in lines of JSON. When its parent ends, it saves and
ends too.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from lab.recover_guard import confine, forbid

CLOCK_FILE = "clock.jsonl"
STOPPED, REFUSED = 4, 3  # exit codes


class Task(BaseModel):
    """What to do (`what`: "train" or "verifier"), with what, and where.

    `forbidden` are devices and inodes of files that must not be opened.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: str
    root: Path
    out: Path
    checkpoint: Path
    speech: Path
    forbidden: tuple[tuple[int, int], ...]
    settings: dict[str, Any] = {}
    texts: tuple[str, ...] = ()
    threads: int = 1
    device: str = "cpu"


def say(**line: Any) -> None:
    """Report a line to the parent process."""
    print(json.dumps(line), flush=True)


def main(arguments: list[str]) -> int:
    """Do the task; returns the exit code."""
    task = Task.model_validate_json(Path(arguments[0]).read_bytes())
    forbid(task.forbidden)
    say(confined=confine(task.root))
    os.environ["OMP_NUM_THREADS"] = str(task.threads)
    import torch

    torch.set_num_threads(task.threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from revox.training.errors import TrainingError

    task.out.mkdir(parents=True, exist_ok=True)
    # An earlier process whose parent ended may still be saving.
    with open(task.out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            {"train": _train, "verifier": _verifier}[task.what](task)
        except KeyboardInterrupt:
            return STOPPED
        except TrainingError as error:
            say(error=str(error))
            return REFUSED
    say(done=True)
    return 0


def _end_with_parent() -> None:
    """Wait for the end of stdin, which ends with the parent, then save and stop as on SIGTERM."""
    while os.read(0, 1024):  # not sys.stdin, whose lock would block this process at exit
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _train(task: Task) -> None:
    from revox.progress import Progress
    from revox.training.restore import SETTINGS_FILE, TRAINING, RunOptions, restore_encoder
    from revox.training.settings import EncoderTraining

    settings = EncoderTraining.model_validate(task.settings)

    def progress(at: Progress) -> None:
        if at.what != TRAINING:
            say(what=at.what, done_so_far=at.done, out_of=at.total)
            return
        timed = {name: at.facts[name] for name in ("step", "seconds", "cpu_seconds")}
        with open(task.out / CLOCK_FILE, "a") as file:
            file.write(json.dumps(timed) + "\n")
        say(of=settings.steps, **{k: v for k, v in at.facts.items() if isinstance(v, (int, float))})

    options = RunOptions(
        workers=0, device=task.device, cache=task.root / "cache", tensorboard=False,
        resume=(task.out / SETTINGS_FILE).is_file(), message=lambda sentence: say(message=sentence),
        progress=progress, sentences=task.texts,
    )  # fmt: skip
    restore_encoder(task.checkpoint, [str(task.speech)], task.out, settings, options)


def _verifier(task: Task) -> None:
    from revox.speech import read_audio
    from revox.training.verifier import VerifierTraining, train_verifier

    files = sorted(task.speech.rglob("*.flac"))
    recordings = ((file.parent.name, read_audio(file)) for file in files)
    steps = int(task.settings["steps"])
    network = train_verifier(
        ((name, audio.at(24000).samples) for name, audio in recordings), 24000, VerifierTraining(steps=steps),
        progress=lambda at: say(step=at.done, of=steps, **at.facts),
    )  # fmt: skip
    network.save(task.out / "verifier.safetensors")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
