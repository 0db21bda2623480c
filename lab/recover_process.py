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
    """What to do (`what`: "train", "student" or "verifier"), with what, and where.

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
            {"train": _train, "student": _student, "verifier": _verifier}[task.what](task)
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
        _clock(task, {name: at.facts[name] for name in ("step", "seconds", "cpu_seconds")})
        say(of=settings.steps, **{k: v for k, v in at.facts.items() if isinstance(v, (int, float))})

    options = RunOptions(
        workers=0, device=task.device, cache=task.root / "cache", tensorboard=False,
        resume=(task.out / SETTINGS_FILE).is_file(), message=lambda sentence: say(message=sentence),
        progress=progress, sentences=task.texts,
    )  # fmt: skip
    restore_encoder(task.checkpoint, [str(task.speech)], task.out, settings, options)


def _clock(task: Task, timed: dict[str, Any]) -> None:
    with open(task.out / CLOCK_FILE, "a") as file:
        file.write(json.dumps(timed) + "\n")


def _student(task: Task) -> None:
    """Train a student on the sentences and voices that an encoder's pairs are of."""
    import torch

    from lab.recover_arms import StudentArmSettings
    from revox.checkpoint.encoder_file import decoder_sha256
    from revox.checkpoint.load import load_model
    from revox.checkpoint.voices import list_voices
    from revox.coding.find import MODEL_PARTS
    from revox.coding.presets import preset_codes
    from revox.coding.student import STUDENT_FILE, save_student
    from revox.progress import Progress
    from revox.training.restore import HELD_OUT_SENTENCES, hold_out_names
    from revox.training.spoken import SpokenSettings, spoken_utterances
    from revox.training.student import StudentTrainer

    settings = StudentArmSettings.model_validate(task.settings)
    training = settings.training
    presets = [entry.name for entry in list_voices(task.checkpoint) if entry.preset and not entry.problem]
    voices, _ = hold_out_names(presets, len(presets))
    texts, _ = hold_out_names(task.texts, HELD_OUT_SENTENCES)
    spoken = SpokenSettings(
        settings.sentences, texts, voices, interpolated=settings.interpolated, seed=training.seed
    )

    def progress(at: Progress) -> None:
        say(what=at.what, done_so_far=at.done, out_of=at.total)

    model = load_model(task.checkpoint, task.device, torch.float32, MODEL_PARTS)
    codes = preset_codes(task.checkpoint, model, only=voices)
    if settings.sentences:
        utterances = spoken_utterances(
            task.checkpoint, spoken, task.out / "spoken", device=task.device, progress=progress
        )
        codes += [one.codes for one in utterances]
    trainer = StudentTrainer(model.audio_tokenizer, codes, training, task.out, "lab")
    trainer.resume()

    def report(row: dict[str, float]) -> None:
        _clock(task, {"step": row["step"], "seconds": trainer.seconds, "cpu_seconds": trainer.cpu_seconds})
        say(of=training.steps, **row)

    trainer.run(report, report_every=settings.report_every, validate_every=settings.report_every)
    save_student(task.out / STUDENT_FILE, decoder_sha256(task.checkpoint), trainer.student)


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
