"""The first hour with a checkpoint: examine it, train a student, clone a clip, speak; and one folder to send.

Each step's facts are written when it is done, so that an interrupted hour goes on with the next step. Nothing
in the folder names a person or a path, and no weights are in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import revox
from revox.api import find_device
from revox.checkpoint.inspect import inspect
from revox.checkpoint.params import read_params
from revox.doctor.examine import DoctorSettings, examine
from revox.doctor.findings import Verdict
from revox.doctor.report import table_of, without_paths, write_report
from revox.doctor.speed import reset_memory
from revox.doctor.trial import CloneTrial
from revox.evaluation.cache import file_identity, folder_identity
from revox.progress import ProgressCallback, ignore_progress
from revox.speech.files import replace_file
from revox.stages import Facts, Stage, StageLog
from revox.training.student import StudentRequest, StudentTraining, make_student
from revox.training.student_plan import plan_student

FACTS_FILE = "first-hour.json"
REPORT_FILE = "first-hour.md"


@dataclass(frozen=True)
class FirstHour:
    """What to do: the checkpoint's `folder` and the `name` that the report gives it, the `clip` to clone and
    whose it is, `sentences` that the student hears and its `steps`, at most `minutes` of learning."""

    folder: Path
    name: str
    clip: Path
    consent: str
    sentences: int = 2000
    steps: int = 4000
    minutes: float = 15.0
    recognizer: str = "none"
    device: str | None = None
    dtype: torch.dtype | None = None
    progress: ProgressCallback = ignore_progress
    report: Callable[[str], None] = field(default=lambda line: None)

    def estimate(self) -> float:
        """Seconds that student and speaking will take here, counted (`revox.training.student_plan`)."""
        training = StudentTraining(steps=self.steps, seconds=60 * self.minutes)
        device = str(find_device(self.device))
        plan = plan_student(self.folder, self.sentences, training, device)
        return plan.speaking + min(plan.learning, 60 * self.minutes)


def first_hour(request: FirstHour, out: Path) -> tuple[Path, list[str]]:
    """Do what is not yet done, each step once, and write the report into the folder `out`.

    Gives the report's path and the steps that failed, and those whose checks did ("doctor" with a verdict of
    FAIL): they are in the report with their sentence, and the next ones go on. Raises CheckpointError when
    the folder is not a checkpoint, KeyboardInterrupt when stopped: the same call goes on.
    """
    out.mkdir(parents=True, exist_ok=True)
    private, clip = [request.folder, out], request.clip
    read_params(request.folder)  # a CheckpointError before the rest
    begun = {
        "version": revox.__version__, "checkpoint": folder_identity(request.folder),
        "sentences": request.sentences, "steps": request.steps, "minutes": request.minutes,
        "recognizer": request.recognizer, "device": request.device, "dtype": request.dtype,
        "clip": file_identity(clip) if clip.is_file() else None,
    }  # fmt: skip
    log = StageLog(out / FACTS_FILE, begun, lambda text: without_paths(text, private))
    if log.other and log.other != ["clip"]:
        log.stages.clear()
    if log.other or not log.done("student"):  # without it the clip was cloned in another way
        log.stages.pop("clone and speak", None)
    stages = _Hour(request, out).stages()
    failed = log.run(stages, request.report)
    if log.stages.get("doctor", {}).get("verdict") == Verdict.FAIL.value:
        failed.append("doctor (a check failed)")
    text = _markdown(request.name, log, [stage.name for stage in stages])
    replace_file(out / REPORT_FILE, without_paths(text, private))
    return out / REPORT_FILE, failed


class _Hour:
    def __init__(self, request: FirstHour, out: Path) -> None:
        self.request, self.out = request, out
        self.device = str(find_device(request.device))

    def stages(self) -> list[Stage]:
        """The steps in order; none waits for another."""
        steps = {
            "inspect": self.inspect, "doctor": self.doctor, "student": self.student,
            "clone and speak": self.clone_and_speak,
        }  # fmt: skip
        return [Stage(name, step) for name, step in steps.items()]

    def inspect(self) -> Facts:
        """What is in the folder."""
        found = inspect(self.request.folder)
        return {
            "parameters": found.parameters, "bytes": found.bytes, "encoder": found.encoder,
            "voices": len(found.voices), "problems": found.problems,
        }  # fmt: skip

    def doctor(self) -> Facts:
        """The quick examination; its report is in `doctor/`."""
        request = self.request
        settings = DoctorSettings((), True, request.recognizer, request.device, request.dtype)
        found = examine(request.folder, settings, name=request.name, progress=request.progress)
        if found.stopped:
            raise KeyboardInterrupt
        write_report(found, self.out / "doctor", [request.folder, self.out])
        verdicts = {one.name: one.verdict.value for one in found.findings}
        return {"verdict": found.verdict.value, "checks": verdicts, "made_with": found.made_with}

    def student(self) -> Facts:
        """A student encoder, kept in the user's cache for this checkpoint."""
        request = self.request
        training = StudentTraining(steps=request.steps, seconds=60 * request.minutes)
        asked = StudentRequest(request.sentences, (), training, self.device, request.dtype)
        _, student, scores = make_student(request.folder, asked, request.progress)
        return {"record": student.record, "agreement": scores.agreement, "levels": scores.levels}

    def clone_and_speak(self) -> Facts:
        """The clip through the student, two sentences in its voice and in a preset's, and their speed."""
        request = self.request
        trial = CloneTrial(request.clip, request.consent, request.name)
        reset_memory(torch.device(self.device))  # the student's is not of this step
        found, _ = trial.run(revox.load(request.folder, self.device, request.dtype), self.out)
        on_gpu = "cuda" in self.device
        return found | {"memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if on_gpu else None}


def _markdown(name: str, log: StageLog, stages: list[str]) -> str:
    lines = [f"# The first hour with {name}", "", *table_of(log.rows(stages))]
    spoken = log.stages.get("clone and speak", {}).get("spoken")
    if spoken:
        lines += ["", "## Speed", "", *table_of(spoken)]
    return "\n".join([*lines, "", "The examination: doctor/doctor.md. All figures: first-hour.json.", ""])
