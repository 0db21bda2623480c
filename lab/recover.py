"""The recovery experiment: the lab's encoder is restored by several methods and compared with the reference.

Every method gets the same time. Training runs in a separate process, on training speech and a copy of the
checkpoint, which has no encoder; it cannot open the reference encoder (`recover_process`, `recover_guard`).
This process then scores the result (`recover_scores`). Every result is a line of OUT/recover.jsonl. An
interrupted experiment resumes from there, in the middle of a training run too.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.data import KINDS, RATE, SpeechSet
from lab.errors import LabError
from lab.recover_arms import OWN_VERIFIER, Arm, arm_named, in_order, known_arms
from lab.recover_experiment import Experiment, Line
from lab.recover_guard import identity, readable_roots
from lab.recover_process import CLOCK_FILE, REFUSED, STOPPED, Task
from lab.sentences import sentences
from revox.checkpoint.encoder_file import ENCODER_FILE
from revox.checkpoint.release import ENCODER_PREFIXES
from revox.checkpoint.tensors import WEIGHTS, read_header
from revox.coding.student import STUDENT_FILE
from revox.evaluation.cache import file_identity, folder_identity
from revox.progress import Progress
from revox.speech.files import append_line, replace_file

if TYPE_CHECKING:
    from lab.recover_scores import Scoring
    from revox.coding import Coder

LOG_FILE = "recover.jsonl"
BEGUN_FILE = "begun.json"
WHISPER = "whisper"
TABLES_FILE = "recovery.md"

MEASURED_STEPS, WARM_STEPS = 14, 4
"""Steps of a run that is only timed, and those at its start that fill caches. The difference is even, because
discriminators are updated in every second step."""

FEWEST_STEPS = 10
REPORTS = 200  # in a run
EVALUATION_CLIPS = 4  # of each kind, at every evaluation
VERIFIER_STEPS = 300

KEY = ("what", "arm", "config", "seed", "kind", "clip", "step")
"""The entries that identify a line."""


@dataclass(frozen=True)
class Plan:
    """Seconds a step takes `before` and `after` the discriminators start (equal if there are none)."""

    before: float
    after: float

    def steps(self, seconds: float, discriminators: float | None) -> int:
        """Steps of a run that takes `seconds`, if discriminators start at that share of its steps."""
        share = 1.0 if discriminators is None else discriminators
        return max(FEWEST_STEPS, int(seconds / (share * self.before + (1 - share) * self.after)))


class Log:
    """Results, one JSON object a line. Incomplete lines (a full disk, a killed process) are ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        self.lines: list[Line] = []
        self._found: dict[tuple[Any, ...], Line] = {}
        for one in text.splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(one)
                if isinstance(line, dict) and "what" in line:
                    self._take(line)

    def _take(self, line: Line) -> None:
        self.lines.append(line)
        self._found[_place(line)] = line

    def find(self, key: Line) -> Line | None:
        """The latest line with this key's entries (`KEY`)."""
        return self._found.get(_place(key))

    def add(self, line: Line) -> None:
        """Append a line; several processes can share the file. Raises OSError."""
        append_line(self.path, json.dumps(line).encode())
        self._take(line)


def _place(line: Line) -> tuple[Any, ...]:
    return tuple(line.get(name) for name in KEY)


def recover(experiment: Experiment, arms: Sequence[Arm]) -> Path:
    """Run what is missing of `arms`, for all seeds; returns the file with the tables.

    Ctrl-C and SIGTERM (KeyboardInterrupt) lose at most the current clip: a training run saves first. Several
    processes can work on different arms in the same folder. Raises LabError if the experiment cannot run, and
    after all other arms if one of them failed.
    """
    failed = []
    with _stoppable():
        work = _Recovery(experiment, arms)
        work.prepare()
        _ = work.scoring.recognizer  # so that a missing one is reported before hours of training
        for seed in range(experiment.seeds):
            for arm in arms:
                try:
                    with work.mine(arm):
                        work.arm(arm, seed)
                except LabError as error:  # the others go on: nobody may be watching
                    failed.append(str(error))
                    experiment.progress(Progress(f"failed: {error}", 1, 1))
                made = work.write_tables()
        if failed:
            raise LabError(f"{'; '.join(failed)}. The other arms are in {made}")
        return made


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM acts as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class _Recovery:
    experiment: Experiment
    arms: Sequence[Arm]
    log: Log = field(init=False)

    def __post_init__(self) -> None:
        self.out = self.experiment.out.absolute()
        self.checkpoint, self.speech = self.out / "checkpoint", self.out / "speech"

    @cached_property
    def scoring(self) -> Scoring:
        """Loaded on first use."""
        import torch

        from lab.recover_scores import Scoring

        torch.set_num_threads(self.experiment.threads)
        experiment = self.experiment
        return Scoring(
            self.checkpoint, experiment.encoder, experiment.data, experiment.seconds, experiment.recognizer
        )

    # The folder

    def prepare(self) -> None:
        """Set up the folder: what it was begun with, a copy of the checkpoint, the training speech."""
        self._check()
        self.out.mkdir(parents=True, exist_ok=True)
        self._begin()
        with self._locked("prepare"):
            if not self.checkpoint.is_dir():
                temporary = self.out / "checkpoint.part"
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.copytree(self.experiment.checkpoint, temporary)
                temporary.rename(self.checkpoint)
            if not self.speech.is_dir():
                self._write_speech()
            if self.experiment.whisper is not None and not (self.out / WHISPER).is_dir():
                _copy_whisper(self.experiment.whisper, self.out / WHISPER)
        self.log = Log(self.out / LOG_FILE)

    def _check(self) -> None:
        experiment = self.experiment
        if importlib.util.find_spec("matplotlib") is None:
            raise LabError("the curves need matplotlib: install it with `pip install 'revox[eval]'`")
        if not experiment.encoder.is_file():
            raise LabError(
                f"{experiment.encoder} is missing: name the lab's reference encoder with --encoder"
            )
        if not (experiment.checkpoint / WEIGHTS).is_file():
            raise LabError(f"{experiment.checkpoint} holds no checkpoint: name the lab's with --checkpoint")
        present = [n for n in read_header(experiment.checkpoint / WEIGHTS) if n.startswith(ENCODER_PREFIXES)]
        if present:
            raise LabError(
                f"{experiment.checkpoint} has an encoder ({present[0]}), so there is nothing to restore: "
                "remove it with `revox inject --eject`"
            )
        reference = experiment.encoder.resolve()
        for root in (self.out.resolve(), experiment.checkpoint.resolve(), *readable_roots()):
            if root in reference.parents:
                raise LabError(
                    f"{experiment.encoder} is in {root}, which the restoring process can read: move it"
                )
        if experiment.recognizer is not None and not (experiment.recognizer / "model.bin").is_file():
            raise LabError(
                f"{experiment.recognizer} holds no Whisper of CTranslate2: see lab/speech/README.md"
            )
        if experiment.whisper is None and (arm := next((a for a in self.arms if a.needs_whisper), None)):
            raise LabError(f"the arm {arm.name} distills a Whisper: name its folder with --whisper")
        if not (math.isfinite(experiment.minutes) and experiment.minutes > 0):
            raise LabError(f"{experiment.minutes:g} minutes is no time to train: give a number above 0")
        for name in ("seeds", "clips", "evaluations"):
            if getattr(experiment, name) < 1:
                raise LabError(f"{name} is {getattr(experiment, name)}: give 1 or more")
        for kind in KINDS:
            for split in ("heldout", *(["train"] if kind == "human" else [])):
                if not (experiment.data / f"{kind}-{split}.json").is_file():
                    raise LabError(
                        f"{experiment.data} holds no {kind}-{split}.json: name the folder `data` of a build"
                    )

    def _begin(self) -> None:
        from lab.recover_scores import TEXTS, data_identity
        from lab.semantic import whisper_identity

        experiment, copied = self.experiment, (self.out / WHISPER).is_dir()
        named_folder = experiment.whisper
        if named_folder is not None and copied and not named_folder.exists():
            named_folder = None  # the copy is what is used
        if named_folder is not None and not (named_folder / "config.json").is_file():
            raise LabError(
                f"{named_folder} holds no Whisper: name a folder with its config.json with --whisper"
            )
        now = {
            "minutes": experiment.minutes,
            "seconds": experiment.seconds,
            "evaluations": experiment.evaluations,
            "device": experiment.device,
            "checkpoint": folder_identity(experiment.checkpoint),
            "encoder": file_identity(experiment.encoder),
            "data": data_identity(experiment.data),
            "texts": list(TEXTS),
        }
        if experiment.recognizer is not None:
            now["recognizer"] = file_identity(experiment.recognizer / "model.bin")
        path = self.out / BEGUN_FILE
        begun, before = path.is_file(), {}
        if begun:
            try:
                before = dict(json.loads(path.read_text()))
            except (ValueError, TypeError):
                raise LabError(f"{path} is damaged: name another folder with --out") from None
        # A Whisper is copied when the first is named, and commands for other arms name none.
        whisper = before.pop("whisper", None)
        if begun:
            other = [name for name in now | before if before.get(name) != now.get(name)]
            if other:
                raise LabError(
                    f"{experiment.out} was begun with other {' and '.join(other)}: continue it with "
                    "the same, or name another folder with --out"
                )
        named = whisper_identity(named_folder) if named_folder is not None else whisper
        if whisper not in (None, named) and copied:
            raise LabError(
                f"{experiment.out} was begun with another whisper: continue it with the same, or name "
                "another folder with --out"
            )
        if not begun or named != whisper:
            replace_file(path, json.dumps(now | ({"whisper": named} if named else {}), indent=1) + "\n")

    def _write_speech(self) -> None:
        """Write the human clips of the training split, one FLAC each; no other split is opened."""
        from revox.speech import Audio, write_audio

        temporary = self.out / "speech.part"
        shutil.rmtree(temporary, ignore_errors=True)
        speech = SpeechSet(self.experiment.data, "train", "human")
        for i, utterance in enumerate(speech.utterances):
            folder = temporary / utterance.speaker
            folder.mkdir(parents=True, exist_ok=True)
            write_audio(folder / f"{i:05d}.flac", Audio(speech.waveform(i), RATE))
            self.experiment.progress(Progress("writing the training speech", i + 1, len(speech)))
        temporary.rename(self.speech)

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        folder = self.out / "locks"
        folder.mkdir(exist_ok=True)
        with open(folder / name, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def mine(self, arm: Arm) -> Iterator[None]:
        """Lock this arm and the one it starts from. Raises LabError if another process has one of them."""
        names = [arm.name] if arm.of is None else [arm.of, arm.name]
        folder = self.out / "locks"
        with contextlib.ExitStack() as locks:
            for name in names:
                file = locks.enter_context(open(folder / f"arm-{name}", "w"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise LabError(
                        f"another process is running the arm {name} in {self.experiment.out}: wait for it, "
                        "or name other arms with --arms"
                    ) from None
            self.log = Log(self.out / LOG_FILE)  # what others have added
            yield

    def config(self, arm: Arm) -> str:
        """A hash of an arm's settings: only lines with the same hash are its results."""
        base = self._base(arm)
        settings = arm.model_dump_json() + (self.config(base) if base else "")
        return hashlib.sha256(settings.encode()).hexdigest()[:8]

    def _base(self, arm: Arm) -> Arm | None:
        """The arm that a refinement starts from."""
        if arm.of is None:
            return None
        return next((one for one in self.arms if one.name == arm.of), None) or arm_named(arm.of)

    # An arm

    def arm(self, arm: Arm, seed: int) -> None:
        """Train the arm if it trains, then score every clip and every intermediate evaluation."""
        trains = arm if arm.trains else self._base(arm)
        missing = [place for place in self._places() if not self._scored(arm, seed, *place)]
        if trains is not None and (missing or not self._evaluated(trains, seed)):
            for one in (self._base(trains), trains):
                if one is not None:
                    self._train(one, seed)
                    self._evaluate(one, seed)
        if not missing:
            return
        restored = None
        if trains is not None:
            restored = self.scoring.restored(self._made(trains, seed))
        elif arm.by == "transposed":
            restored = self.scoring.transposed()
        for done, (kind, i) in enumerate(missing):
            self.experiment.progress(Progress(f"{arm.title}, seed {seed}: scoring", done, len(missing)))
            self._score("score", arm, seed, kind, i, restored)
        self.experiment.progress(Progress(f"{arm.title}, seed {seed}: scoring", len(missing), len(missing)))

    def _places(self, most: int | None = None) -> list[tuple[str, int]]:
        from lab.recover_scores import evenly

        found = []
        for kind in KINDS:
            scored = evenly(self.experiment.clips, len(self.scoring.clips[kind]))
            # Intermediate evaluations use some of these, so that curves and the original have the same clips.
            found += [(kind, scored[j]) for j in evenly(most or len(scored), len(scored))]
        return found

    def _key(self, what: str, arm: Arm, seed: int, **more: Any) -> Line:
        return {"what": what, "arm": arm.name, "config": self.config(arm), "seed": seed, **more}

    def _scored(self, arm: Arm, seed: int, kind: str, i: int) -> bool:
        speaker = self.scoring.clips[kind][i].speaker
        return self.log.find(self._key("score", arm, seed, kind=kind, clip=speaker)) is not None

    def _score(
        self, what: str, arm: Arm, seed: int, kind: str, i: int, restored: Coder | None, **at: Any
    ) -> None:
        line = self._key(what, arm, seed, kind=kind, clip=self.scoring.clips[kind][i].speaker, **at)
        if self.log.find(line) is None:
            scores = self.scoring.score(arm, kind, i, seed, restored, whole=what == "score")
            self.log.add(line | {"scores": scores})

    def _run(self, arm: Arm, seed: int) -> Path:
        return self.out / "runs" / f"{arm.name}-{self.config(arm)}-{seed}"

    def _made(self, arm: Arm, seed: int) -> Path:
        """The file that its training makes."""
        return self._run(arm, seed) / (STUDENT_FILE if arm.by == "student" else ENCODER_FILE)

    def _evaluated(self, arm: Arm, seed: int) -> bool:
        return self.log.find(self._key("evaluated", arm, seed)) is not None

    def _evaluate(self, arm: Arm, seed: int) -> None:
        """Score a run's intermediate encoders on a few clips."""
        if self._evaluated(arm, seed):
            return
        run = self._run(arm, seed)
        clock = _clock(run, self.experiment.clock)
        saved = sorted((run / "checkpoints").glob("encoder-*.safetensors"))
        places = self._places(EVALUATION_CLIPS)
        for done, path in enumerate(saved):
            step = int(path.stem.split("-")[1])
            restored = self.scoring.restored(path)
            for kind, i in places:
                at = {"step": step, "seconds": round(clock(step), 1)}
                self._score("evaluation", arm, seed, kind, i, restored, **at)
            self.experiment.progress(Progress(f"{arm.title}, seed {seed}: evaluation", done + 1, len(saved)))
        self.log.add(self._key("evaluated", arm, seed))

    def _train(self, arm: Arm, seed: int) -> None:
        run, experiment = self._run(arm, seed), self.experiment
        if self.log.find(self._key("trained", arm, seed)) and self._made(arm, seed).is_file():
            return
        plan = self._plan(arm)
        budget = 60 * experiment.minutes
        steps = plan.steps(budget, arm.discriminators_from)
        every = max(1, steps // REPORTS)
        steps = steps // every * every  # the last report is at the end
        settings = self._settings(
            arm, steps, seed, report_every=every, save_every=-(-steps // experiment.evaluations),
            validate_every=every * max(1, REPORTS // 4), keep=experiment.evaluations + 1,
        )  # fmt: skip
        shared = self.out / "spoken" / f"{settings['sentences']}-{settings['interpolated']:g}-{seed}"
        spoken = run / "spoken"
        run.mkdir(parents=True, exist_ok=True)
        if shared.is_dir() and not spoken.is_dir():
            shutil.copytree(shared, spoken)  # the same sentences are spoken once
        what = "student" if arm.by == "student" else "train"
        result = self._work(f"{arm.title}, seed {seed}: training", run, settings, seed, what)
        if spoken.is_dir() and not shared.is_dir():
            shutil.copytree(spoken, shared)
        last = _clock_lines(run)[-1]
        self.log.add(
            self._key("trained", arm, seed)
            | {
                "steps": steps, "budget": budget, "clock": experiment.clock,
                "cpu_seconds": last["cpu_seconds"], "seconds": last["seconds"],
                "step_before": plan.before, "step_after": plan.after, "confined": result["confined"],
            }
        )  # fmt: skip

    def _settings(self, arm: Arm, steps: int, seed: int, **changes: Any) -> dict[str, Any]:
        if arm.by == "student":
            given = {name: changes[name] for name in ("report_every", "sentences") if name in changes}
            return arm.student_settings(steps, seed).model_dump(mode="json") | given
        if arm.training.get("verifier") == OWN_VERIFIER:
            changes["verifier"] = str(self._verifier())
        if arm.needs_whisper:
            changes["whisper"] = str(self.out / WHISPER)
        if (base := self._base(arm)) is not None:
            changes["encoders"] = [str(self._made(base, seed))]
        return arm.settings(steps, seed, **changes).model_dump(mode="json")

    def _verifier(self) -> Path:
        folder = self.out / "verifier"
        with self._locked("verifier"):
            if not (folder / "verifier.safetensors").is_file():
                self._work("the speaker loss's own network", folder, {"steps": VERIFIER_STEPS}, 0, "verifier")
        return folder / "verifier.safetensors"

    def _plan(self, arm: Arm) -> Plan:
        """Seconds a step, measured once for all seeds."""
        path = self.out / "plans" / f"{arm.name}-{self.config(arm)}.json"
        if not path.is_file():
            starts = [MEASURED_STEPS] + ([0] if arm.discriminators_from is not None else [])
            found = [self._measure(arm, path.with_suffix(""), start) for start in starts]
            path.parent.mkdir(exist_ok=True)
            replace_file(path, json.dumps({"before": found[0], "after": found[-1]}) + "\n")
        return Plan(**json.loads(path.read_text()))

    def _measure(self, arm: Arm, folder: Path, start: int) -> float:
        settings = self._settings(
            arm, MEASURED_STEPS, 0, report_every=1, save_every=MEASURED_STEPS, validate_every=10**9, keep=1,
            sentences=0,
        )  # fmt: skip
        what = "student" if arm.by == "student" else "train"
        if arm.by == "encoder":
            settings["discriminator"]["start"] = start
            settings["student_steps"] = 1  # untrained ones take as long for a step
        shutil.rmtree(folder, ignore_errors=True)
        self._work(f"{arm.title}: timing a step", folder, settings, 0, what)
        times = [line[self.experiment.clock] for line in _clock_lines(folder)]
        shutil.rmtree(folder)
        return (times[-1] - times[WARM_STEPS - 1]) / (MEASURED_STEPS - WARM_STEPS)

    # The restoring process

    def _work(
        self, title: str, folder: Path, settings: dict[str, Any], seed: int, what: str = "train"
    ) -> dict[str, Any]:
        """Run a task in a separate process; returns what it reported.

        Raises LabError with its message if it fails, KeyboardInterrupt if it was stopped, its state saved.
        """
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "task.json"
        replace_file(file, self.task(what, folder, settings, seed).model_dump_json(indent=1))
        reported: dict[str, Any] = {}
        with open(folder / "stderr.txt", "w") as errors:
            process = subprocess.Popen(
                process_command(file), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                cwd=self.out, env=process_environment(self.experiment.threads, self.out), text=True,
            )  # fmt: skip
            try:
                self._listen(process, title, reported)
            except BaseException:
                process.terminate()  # it saves first; Ctrl-C in a terminal reached it already
                with contextlib.suppress(KeyboardInterrupt):
                    self._listen(process, title, reported)
                raise
        if process.returncode == STOPPED:
            raise KeyboardInterrupt
        if process.returncode == REFUSED and "error" in reported:
            raise LabError(f"{title}: {reported['error']}")
        if process.returncode or not reported.get("done"):
            last = (folder / "stderr.txt").read_text(errors="replace").strip().splitlines()[-1:]
            raise LabError(
                f"{title}: the process ended with code {process.returncode} ({''.join(last) or 'silent'}): "
                f"see {folder / 'stderr.txt'}"
            )
        return reported

    def _listen(self, process: subprocess.Popen[str], title: str, reported: dict[str, Any]) -> None:
        assert process.stdout is not None
        for text in process.stdout:
            try:
                line = json.loads(text)
            except ValueError:  # a library's own output
                continue
            reported |= line
            if "step" in line:
                self.experiment.progress(Progress(title, line["step"], line["of"]))
            elif "what" in line and line.get("out_of"):
                self.experiment.progress(
                    Progress(f"{title}: {line['what']}", line["done_so_far"], line["out_of"])
                )
        process.wait()

    def task(self, what: str, folder: Path, settings: dict[str, Any], seed: int) -> Task:
        """The restoring process's task. Files that it must not open are given by inode, not by name."""
        forbidden = [self.experiment.encoder, *sorted(self.experiment.data.glob("*.*"))]
        texts = islice(sentences("train", seed), max(1, settings.get("sentences", 0)))
        return Task(
            what=what, root=self.out, out=folder, checkpoint=self.checkpoint, speech=self.speech,
            forbidden=tuple(identity(path) for path in forbidden if path.is_file()), settings=settings,
            texts=tuple(texts), threads=self.experiment.threads, device=self.experiment.device,
        )  # fmt: skip

    def write_tables(self) -> Path:
        """Write OUT/recovery.md and its figures from all results so far, of other commands' arms too."""
        from lab.recover_tables import write_tables

        self.log = Log(self.out / LOG_FILE)
        asked = {arm.name for arm in self.arms}
        scored = {(line["arm"], line["config"]) for line in self.log.lines if line["what"] == "score"}
        others = [arm for arm in known_arms() if arm.name not in asked]
        arms = in_order([*self.arms, *(one for one in others if (one.name, self.config(one)) in scored)])
        configs = {arm.name: self.config(arm) for arm in arms}
        clips = {(kind, self.scoring.clips[kind][i].speaker) for kind, i in self._places()}
        lines = [
            line
            for line in self.log.lines
            if configs.get(line.get("arm", "")) == line.get("config")
            and (line["what"] != "score" or (line["kind"], line["clip"]) in clips)
        ]
        return write_tables(self.out / TABLES_FILE, arms, lines, self.experiment)


def _copy_whisper(source: Path, target: Path) -> None:
    """Put a Whisper where restoring can read it, in the format of transformers."""
    temporary = target.with_name(f"{target.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    if (source / "model.bin").is_file() and not (source / "model.safetensors").is_file():
        from lab.speech.whisper_ct2 import convert

        convert(source, temporary)
    else:
        shutil.copytree(source, temporary)
    temporary.rename(target)


def process_command(task: Path) -> list[str]:
    """The command that starts the restoring process."""
    return [sys.executable, "-m", "lab.recover_process", str(task)]


def process_environment(threads: int, own: Path) -> dict[str, str]:
    """Its environment: the same revox, temporary files in its own folder."""
    import revox

    temporary = own / "tmp"
    sources = (Path(revox.__file__).resolve().parents[1], Path(__file__).resolve().parents[1])
    temporary.mkdir(parents=True, exist_ok=True)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, sources)),
        "OMP_NUM_THREADS": str(threads),
        "TMPDIR": str(temporary),
    }


def _clock_lines(run: Path) -> list[dict[str, float]]:
    """The times of a run's reports, the latest of each step."""
    found: dict[float, dict[str, float]] = {}
    for text in (run / CLOCK_FILE).read_text().splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            found[line["step"]] = line
    return [found[step] for step in sorted(found)]


def _clock(run: Path, name: str) -> Callable[[int], float]:
    """Seconds of training at a step."""
    import numpy as np

    lines = _clock_lines(run)
    steps, seconds = [0.0, *(line["step"] for line in lines)], [0.0, *(line[name] for line in lines)]
    return lambda step: float(np.interp(step, steps, seconds))
