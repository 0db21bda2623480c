"""The first hour with a checkpoint: examine it, train a student, clone a clip, speak; and one folder to send.

Each step's facts are written when it is done, so that an interrupted hour goes on with the next step. Nothing
in the folder names a person or a path, and no weights are in it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import revox
from revox.api import find_device
from revox.checkpoint.encoder_file import decoder_sha256
from revox.checkpoint.inspect import inspect
from revox.doctor.examine import DoctorSettings, examine
from revox.doctor.report import table_of, without_paths, write_report
from revox.marking import load_signer, new_record, write_marked
from revox.metrics.errors import MetricError
from revox.metrics.speaker import SpeakerVerifier
from revox.progress import ProgressCallback, ignore_progress
from revox.speech import Audio, read_audio
from revox.speech.files import replace_file, stamp_of
from revox.training.student import StudentRequest, StudentTraining, make_student
from revox.training.student_plan import plan_student

FACTS_FILE = "first-hour.json"
REPORT_FILE = "first-hour.md"
SENTENCES = (
    "Please open the window in the kitchen.",
    "The next plane to the city leaves at quarter past four.",
)
MAX_SECONDS = 15.0

Facts = dict[str, Any]


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
    device: str | None = None
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

    Gives the report's path and the steps that failed: they are in the report with their sentence, and the
    next ones go on. Raises CheckpointError when
    the folder is not a checkpoint, KeyboardInterrupt when stopped: the same call goes on.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / FACTS_FILE
    stamp = stamp_of(revox.__version__, decoder_sha256(request.folder), request.sentences, request.steps)
    facts: Facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if facts.get("stamp") != stamp:
        facts = {"stamp": stamp, "steps": {}}
    private = [request.folder, out]
    hour = _Hour(request, out)
    for name, step in hour.steps():
        if facts["steps"].get(name, {}).get("done"):
            request.report(f"{name}: done before")
            continue
        request.report(name)
        began = time.perf_counter()
        try:
            found = {"done": True, **step()}
        except (ValueError, RuntimeError) as error:  # the project's own errors, and torch's
            found = {"done": False, "error": (str(error) or type(error).__name__).splitlines()[0]}
            request.report(f"{name}: {found['error']}")
        facts["steps"][name] = {**found, "seconds": round(time.perf_counter() - began, 1)}
        replace_file(path, without_paths(json.dumps(facts, indent=1), private) + "\n")
    replace_file(out / REPORT_FILE, without_paths(_markdown(request.name, facts["steps"]), private))
    return out / REPORT_FILE, [name for name, step in facts["steps"].items() if not step["done"]]


class _Hour:
    def __init__(self, request: FirstHour, out: Path) -> None:
        self.request, self.out = request, out
        self.device = str(find_device(request.device))

    def steps(self) -> Iterator[tuple[str, Callable[[], Facts]]]:
        """The steps in order."""
        yield "inspect", self.inspect
        yield "doctor", self.doctor
        yield "student", self.student
        yield "clone and speak", self.clone_and_speak

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
        settings = DoctorSettings(quick=True, device=request.device)
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
        asked = StudentRequest(request.sentences, (), training, self.device)
        _, student, scores = make_student(request.folder, asked, request.progress)
        return {"record": student.record, "agreement": scores.agreement, "levels": scores.levels}

    def clone_and_speak(self) -> Facts:
        """The clip through the student, two sentences in its voice and in a preset's, and their speed."""
        tts = revox.load(self.request.folder, self.device)
        began = time.perf_counter()
        voice = tts.clone(self.request.clip, consent=self.request.consent)
        took, signer = time.perf_counter() - began, load_signer()
        sounds = {"decoded": voice.decoded}
        rows = []
        for name, who in (("clone", voice), ("preset", tts.voice(tts.voices()[0]))):
            for i, text in enumerate(SENTENCES):
                began = time.perf_counter()
                audio = tts.synthesize(text, who, max_seconds=MAX_SECONDS).audio
                spent = time.perf_counter() - began
                sounds[f"{name}-{i}"] = audio
                rows.append(
                    {
                        "voice": name, "text": text, "seconds": round(audio.seconds, 2),
                        "ended": not audio.truncated,
                        "times real time": round(audio.seconds / spent, 2) if spent else None,
                    }
                )  # fmt: skip
        for name, audio in sounds.items():
            if audio.samples.size:
                write_marked(
                    self.out / f"{name}.wav", audio, record=new_record(self.request.name, name), signer=signer
                )
        return {
            "method": voice.coding.method, "clone_seconds": round(took, 2),
            "distance": round(voice.distance, 4), "spoken": rows,
            "similarity": _similarity(self.request.clip, sounds),
            "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if "cuda" in self.device else None,
        }  # fmt: skip


def _similarity(clip: Path, sounds: dict[str, Audio]) -> dict[str, float] | None:
    """Resemblyzer's cosine of each sound to the clip; None without it."""
    try:
        verifier = SpeakerVerifier()
    except MetricError:
        return None
    own = verifier.embed(read_audio(clip))
    return {
        name: round(verifier.similarity(verifier.embed(audio), own), 3)
        for name, audio in sounds.items()
        if audio.seconds > 0.5
    }


def _markdown(name: str, steps: dict[str, Facts]) -> str:
    rows = [
        {
            "step": step, "done": "yes" if facts["done"] else "**no**", "seconds": facts["seconds"],
            "what came of it": facts.get("error") or _summary(facts),
        }
        for step, facts in steps.items()
    ]  # fmt: skip
    lines = [f"# The first hour with {name}", "", *table_of(rows)]
    spoken = steps.get("clone and speak", {}).get("spoken")
    if spoken:
        lines += ["", "## Speed", "", *table_of(spoken)]
    return "\n".join([*lines, "", "The examination: doctor/doctor.md. All figures: first-hour.json.", ""])


def _summary(facts: Facts) -> str:
    shown = {
        key: value
        for key, value in facts.items()
        if key not in ("done", "seconds") and isinstance(value, str | int | float)
    }
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
