"""The recovery experiment: the lab's encoder, put aside, is restored by several methods and compared with it.

Every method gets the same time. What trains runs in a process of its own, on a copy of the checkpoint (which
has no encoder) and on training speech; it cannot open the encoder put aside (`recover_process`,
`recover_guard`). Then this process scores what was found (`recover_scores`). Every result is a line of
OUT/recover.jsonl; what was stopped goes on from there, in the middle of a training run too.
"""

from __future__ import annotations

import contextlib
import errno
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
from revox.evaluation.cache import file_identity, folder_identity
from revox.progress import Progress
from revox.speech.files import replace_file
from revox.training.settings import EncoderTraining

if TYPE_CHECKING:
    from lab.recover_scores import Scoring
    from revox.coding import Coder

LOG_FILE = "recover.jsonl"
BEGUN_FILE = "begun.json"
TABLES_FILE = "recovery.md"

MEASURED_STEPS, WARM_STEPS = 14, 4
"""Of a run that is only timed; the first few pay for caches. The rest is even: discriminators learn in every
second step."""

FEWEST_STEPS = 10
REPORTS = 200  # of a run
EVALUATION_CLIPS = 4  # of each kind, at every evaluation
VERIFIER_STEPS = 300

KEY = ("what", "arm", "config", "seed", "kind", "clip", "step")
"""The entries that tell one line from another."""


@dataclass(frozen=True)
class Plan:
    """Seconds that a step takes `before` and `after` the discriminators begin (the same without them)."""

    before: float
    after: float

    def steps(self, seconds: float, discriminators: float | None) -> int:
        """So many that a run with `discriminators` from that share of its steps on takes `seconds`."""
        share = 1.0 if discriminators is None else discriminators
        return max(FEWEST_STEPS, int(seconds / (share * self.before + (1 - share) * self.after)))


class Log:
    """Results, one JSON object a line. A line cut short (a full disk, a killed process) is no result."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text and not text.endswith("\n"):
            with open(path, "a") as file:
                file.write("\n")
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
        """Keep a line; in one write, so that several processes may share the file."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            text = (json.dumps(line) + "\n").encode()
            if os.write(descriptor, text) < len(text):  # the disk is full; what follows would join it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        finally:
            os.close(descriptor)
        self._take(line)


def _place(line: Line) -> tuple[Any, ...]:
    return tuple(line.get(name) for name in KEY)


def recover(experiment: Experiment, arms: Sequence[Arm]) -> Path:
    """Run what is missing of `arms`, all seeds; gives the file with the tables.

    Ctrl-C and SIGTERM (KeyboardInterrupt) lose at most the clip in hand: a training run saves first. Several
    processes may work on different arms in the same folder. Raises LabError on what cannot be done.
    """
    with _stoppable():
        work = _Work(experiment, arms)
        work.prepare()
        _ = work.scoring.recognizer  # what is missing is said before hours of training
        for seed in range(experiment.seeds):
            for arm in arms:
                with work.mine(arm):
                    work.arm(arm, seed)
                made = work.write_tables()
        return made


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM is Ctrl-C here."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class _Work:
    experiment: Experiment
    arms: Sequence[Arm]
    log: Log = field(init=False)

    def __post_init__(self) -> None:
        self.out = self.experiment.out.absolute()
        self.checkpoint, self.speech = self.out / "checkpoint", self.out / "speech"

    @cached_property
    def scoring(self) -> Scoring:
        """Loaded when there is something to score."""
        import torch

        from lab.recover_scores import Scoring

        torch.set_num_threads(self.experiment.threads)
        experiment = self.experiment
        return Scoring(self.checkpoint, experiment.encoder, experiment.data, experiment.seconds)

    # What an arm stands on

    def prepare(self) -> None:
        """The folder: what it was begun with, a copy of the checkpoint, the speech for training."""
        self._check()
        self.out.mkdir(parents=True, exist_ok=True)
        self._begin()
        with self._locked("prepare"):
            if not self.checkpoint.is_dir():
                beside = self.out / "checkpoint.part"
                shutil.rmtree(beside, ignore_errors=True)
                shutil.copytree(self.experiment.checkpoint, beside)
                beside.rename(self.checkpoint)
            if not self.speech.is_dir():
                self._write_speech()
        self.log = Log(self.out / LOG_FILE)

    def _check(self) -> None:
        experiment = self.experiment
        if importlib.util.find_spec("matplotlib") is None:
            raise LabError("the curves need matplotlib: install it with `pip install 'revox[eval]'`")
        if not experiment.encoder.is_file():
            raise LabError(
                f"{experiment.encoder} is missing: name the file in which the lab's encoder was put aside "
                "with --encoder"
            )
        if not (experiment.checkpoint / WEIGHTS).is_file():
            raise LabError(f"{experiment.checkpoint} holds no checkpoint: name the lab's folder")
        held = [n for n in read_header(experiment.checkpoint / WEIGHTS) if n.startswith(ENCODER_PREFIXES)]
        if held:
            raise LabError(
                f"{experiment.checkpoint} has an encoder ({held[0]}), so nothing is to be restored: take "
                "it out with `revox inject --eject`"
            )
        aside = experiment.encoder.resolve()
        for root in (self.out.resolve(), experiment.checkpoint.resolve(), *readable_roots()):
            if root in aside.parents:
                raise LabError(
                    f"{experiment.encoder} lies in {root}, which a restoring process may read: put it "
                    "elsewhere"
                )
        if not (math.isfinite(experiment.minutes) and experiment.minutes > 0):
            raise LabError(f"{experiment.minutes:g} minutes leave no time to train: give a number above 0")
        for name in ("seeds", "clips", "evaluations"):
            if getattr(experiment, name) < 1:
                raise LabError(f"{name} is {getattr(experiment, name)}: give 1 or more")
        for kind in KINDS:
            for split in ("heldout", *(["train"] if kind == "human" else [])):
                if not (experiment.data / f"{kind}-{split}.json").is_file():
                    raise LabError(
                        f"{experiment.data} holds no {kind}-{split}.json: name the folder `data` of a lab "
                        "build"
                    )

    def _begin(self) -> None:
        from lab.recover_scores import TEXTS, data_identity

        experiment = self.experiment
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
        kept = self.out / BEGUN_FILE
        if kept.is_file():
            try:
                before = dict(json.loads(kept.read_text()))
            except (ValueError, TypeError):
                raise LabError(f"{kept} is damaged: name another folder") from None
            other = [name for name in now if before.get(name) != now[name]]
            if other:
                raise LabError(
                    f"{experiment.out} was begun with other {' and '.join(other)}: go on as it was begun, or "
                    "name another folder"
                )
        else:
            replace_file(kept, json.dumps(now, indent=1) + "\n")

    def _write_speech(self) -> None:
        """The human clips of the training split, one FLAC each; no other split is opened."""
        from revox.speech import Audio, write_audio

        beside = self.out / "speech.part"
        shutil.rmtree(beside, ignore_errors=True)
        speech = SpeechSet(self.experiment.data, "train", "human")
        for i, utterance in enumerate(speech.utterances):
            folder = beside / utterance.speaker
            folder.mkdir(parents=True, exist_ok=True)
            write_audio(folder / f"{i:05d}.flac", Audio(speech.waveform(i), RATE))
            self.experiment.progress(Progress("writing the training speech", i + 1, len(speech)))
        beside.rename(self.speech)

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        folder = self.out / "locks"
        folder.mkdir(exist_ok=True)
        with open(folder / name, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def mine(self, arm: Arm) -> Iterator[None]:
        """Nobody else works on this arm, nor on what it begins with. Raises LabError where somebody does."""
        names = [arm.name] if arm.of is None else [arm.of, arm.name]
        folder = self.out / "locks"
        with contextlib.ExitStack() as held:
            for name in names:
                file = held.enter_context(open(folder / f"arm-{name}", "w"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise LabError(
                        f"another process works on the arm {name} in {self.experiment.out}: wait for it, or "
                        "name other --arms"
                    ) from None
            self.log = Log(self.out / LOG_FILE)  # what others have added
            yield

    def config(self, arm: Arm) -> str:
        """A hash of everything an arm was told: lines of another are not its results."""
        base = self._base(arm)
        told = arm.model_dump_json() + (self.config(base) if base else "")
        return hashlib.sha256(told.encode()).hexdigest()[:8]

    def _base(self, arm: Arm) -> Arm | None:
        """The arm that a refinement begins with."""
        if arm.of is None:
            return None
        return next((one for one in self.arms if one.name == arm.of), None) or arm_named(arm.of)

    # An arm

    def arm(self, arm: Arm, seed: int) -> None:
        """Train what is to be trained, then score every clip, and every evaluation."""
        trains = arm if arm.by == "encoder" else self._base(arm)
        missing = [place for place in self._places() if not self._scored(arm, seed, *place)]
        if trains is not None and (missing or not self._evaluated(trains, seed)):
            self._train(trains, seed)
            self._evaluate(trains, seed)
        if not missing:
            return
        restored = self.scoring.restored(self._run(trains, seed) / ENCODER_FILE) if trains else None
        for done, (kind, i) in enumerate(missing):
            self.experiment.progress(Progress(f"{arm.title}, seed {seed}: scoring", done, len(missing)))
            self._score("score", arm, seed, kind, i, restored)
        self.experiment.progress(Progress(f"{arm.title}, seed {seed}: scoring", len(missing), len(missing)))

    def _places(self, most: int | None = None) -> list[tuple[str, int]]:
        from lab.recover_scores import evenly

        found = []
        for kind in KINDS:
            scored = evenly(self.experiment.clips, len(self.scoring.clips[kind]))
            # Looks are at some of these, so that curves stand beside the original's scores of the same clips.
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

    def _evaluated(self, arm: Arm, seed: int) -> bool:
        return self.log.find(self._key("evaluated", arm, seed)) is not None

    def _evaluate(self, arm: Arm, seed: int) -> None:
        """Score the encoders that a run kept on its way, on a few clips."""
        if self._evaluated(arm, seed):
            return
        run = self._run(arm, seed)
        clock = _clock(run, self.experiment.clock)
        kept = sorted((run / "checkpoints").glob("encoder-*.safetensors"))
        places = self._places(EVALUATION_CLIPS)
        for done, path in enumerate(kept):
            step = int(path.stem.split("-")[1])
            restored = self.scoring.restored(path)
            for kind, i in places:
                at = {"step": step, "seconds": round(clock(step), 1)}
                self._score("evaluation", arm, seed, kind, i, restored, **at)
            self.experiment.progress(Progress(f"{arm.title}, seed {seed}: evaluation", done + 1, len(kept)))
        self.log.add(self._key("evaluated", arm, seed))

    def _train(self, arm: Arm, seed: int) -> None:
        run, experiment = self._run(arm, seed), self.experiment
        if self.log.find(self._key("trained", arm, seed)) and (run / ENCODER_FILE).is_file():
            return
        plan = self._plan(arm)
        budget = 60 * experiment.minutes
        steps = plan.steps(budget, arm.discriminators_from)
        every = max(1, steps // REPORTS)
        steps = steps // every * every  # the last report is the end
        settings = self._settings(
            arm, steps, seed, report_every=every, save_every=-(-steps // experiment.evaluations),
            validate_every=every * max(1, REPORTS // 4), keep=experiment.evaluations + 1,
        )  # fmt: skip
        shared = self.out / "spoken" / f"{settings.sentences}-{settings.interpolated:g}-{seed}"
        spoken = run / "spoken"
        run.mkdir(parents=True, exist_ok=True)
        if shared.is_dir() and not spoken.is_dir():
            shutil.copytree(shared, spoken)  # the same sentences, said once
        told = self._work(f"{arm.title}, seed {seed}: training", run, settings.model_dump(mode="json"), seed)
        if spoken.is_dir() and not shared.is_dir():
            shutil.copytree(spoken, shared)
        last = _clock_lines(run)[-1]
        self.log.add(
            self._key("trained", arm, seed)
            | {
                "steps": steps, "budget": budget, "clock": experiment.clock,
                "cpu_seconds": last["cpu_seconds"], "seconds": last["seconds"],
                "step_before": plan.before, "step_after": plan.after, "confined": told["confined"],
            }
        )  # fmt: skip

    def _settings(self, arm: Arm, steps: int, seed: int, **changes: Any) -> EncoderTraining:
        if arm.training.get("verifier") == OWN_VERIFIER:
            changes["verifier"] = str(self._verifier())
        return arm.settings(steps, seed, **changes)

    def _verifier(self) -> Path:
        folder = self.out / "verifier"
        with self._locked("verifier"):
            if not (folder / "verifier.safetensors").is_file():
                self._work("the speaker loss's own network", folder, {"steps": VERIFIER_STEPS}, 0, "verifier")
        return folder / "verifier.safetensors"

    def _plan(self, arm: Arm) -> Plan:
        """Seconds a step, measured once for all seeds."""
        kept = self.out / "plans" / f"{arm.name}-{self.config(arm)}.json"
        if not kept.is_file():
            starts = [MEASURED_STEPS] + ([0] if arm.discriminators_from is not None else [])
            found = [self._measure(arm, kept.with_suffix(""), start) for start in starts]
            kept.parent.mkdir(exist_ok=True)
            replace_file(kept, json.dumps({"before": found[0], "after": found[-1]}) + "\n")
        return Plan(**json.loads(kept.read_text()))

    def _measure(self, arm: Arm, folder: Path, start: int) -> float:
        settings = self._settings(
            arm, MEASURED_STEPS, 0, report_every=1, save_every=MEASURED_STEPS, validate_every=10**9, keep=1,
            sentences=0,
        )  # fmt: skip
        judged = settings.discriminator.model_copy(update={"start": start})
        settings = settings.model_copy(update={"discriminator": judged})
        shutil.rmtree(folder, ignore_errors=True)
        self._work(f"{arm.title}: timing a step", folder, settings.model_dump(mode="json"), 0)
        times = [line[self.experiment.clock] for line in _clock_lines(folder)]
        shutil.rmtree(folder)
        return (times[-1] - times[WARM_STEPS - 1]) / (MEASURED_STEPS - WARM_STEPS)

    # The restoring process

    def _work(
        self, title: str, folder: Path, settings: dict[str, Any], seed: int, what: str = "train"
    ) -> dict[str, Any]:
        """Do a task in a process of its own; gives what it told of itself.

        Raises LabError, with its sentence, when it fails; KeyboardInterrupt when it was stopped, its state
        saved.
        """
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "task.json"
        replace_file(file, self.task(what, folder, settings, seed).model_dump_json(indent=1))
        told: dict[str, Any] = {}
        with open(folder / "stderr.txt", "w") as errors:
            process = subprocess.Popen(
                process_command(file), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                cwd=self.out, env=process_environment(self.experiment.threads, self.out), text=True,
            )  # fmt: skip
            try:
                self._listen(process, title, told)
            except BaseException:
                process.terminate()  # it saves; Ctrl-C in a terminal has told it already
                with contextlib.suppress(KeyboardInterrupt):
                    self._listen(process, title, told)
                raise
        if process.returncode == STOPPED:
            raise KeyboardInterrupt
        if process.returncode == REFUSED and "error" in told:
            raise LabError(f"{title}: {told['error']}")
        if process.returncode or not told.get("done"):
            last = (folder / "stderr.txt").read_text(errors="replace").strip().splitlines()[-1:]
            raise LabError(
                f"{title}: the process ended with code {process.returncode} ({''.join(last) or 'no word'}): "
                f"see {folder / 'stderr.txt'}"
            )
        return told

    def _listen(self, process: subprocess.Popen[str], title: str, told: dict[str, Any]) -> None:
        assert process.stdout is not None
        for text in process.stdout:
            try:
                line = json.loads(text)
            except ValueError:  # a library's own word
                continue
            told |= line
            if "step" in line:
                self.experiment.progress(Progress(title, line["step"], line["of"]))
            elif "what" in line and line.get("out_of"):
                self.experiment.progress(
                    Progress(f"{title}: {line['what']}", line["done_so_far"], line["out_of"])
                )
        process.wait()

    def task(self, what: str, folder: Path, settings: dict[str, Any], seed: int) -> Task:
        """What the restoring process is told. Of what it may not open it learns no name."""
        forbidden = [self.experiment.encoder, *sorted(self.experiment.data.glob("*.*"))]
        texts = islice(sentences("train", seed), max(1, settings.get("sentences", 0)))
        return Task(
            what=what, root=self.out, out=folder, checkpoint=self.checkpoint, speech=self.speech,
            forbidden=tuple(identity(path) for path in forbidden if path.is_file()), settings=settings,
            texts=tuple(texts), threads=self.experiment.threads, device=self.experiment.device,
        )  # fmt: skip

    def write_tables(self) -> Path:
        """OUT/recovery.md and its pictures, of what there is so far: of other arms too, which other commands
        ran here."""
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
            and line.get("seed", 0) < self.experiment.seeds
            and (line["what"] != "score" or (line["kind"], line["clip"]) in clips)
        ]
        return write_tables(self.out / TABLES_FILE, arms, lines, self.experiment)


def process_command(task: Path) -> list[str]:
    """How the restoring process is started."""
    return [sys.executable, "-m", "lab.recover_process", str(task)]


def process_environment(threads: int, own: Path) -> dict[str, str]:
    """Its environment: the same revox, its temporary files in its own folder."""
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
    """The times of a run's reports, each step once: the latest."""
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
