"""The stages of a restoration, each done once; a folder that holds all that came of them."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import revox
from revox.checkpoint.encoder_file import ENCODER_FILE, decoder_sha256, read_encoder
from revox.checkpoint.inject import InjectionOptions, inject
from revox.checkpoint.inspect import inspect
from revox.checkpoint.params import read_params
from revox.checkpoint.release import expected_tensors
from revox.checkpoint.share import injection_of
from revox.checkpoint.tensors import ENCODER_WEIGHTS, WEIGHTS
from revox.cloning.consent import sha256_of
from revox.doctor.examine import DoctorSettings, examine
from revox.doctor.findings import Verdict
from revox.doctor.report import without_paths
from revox.doctor.report import write_report as write_examination
from revox.doctor.trial import CloneTrial
from revox.evaluation.clips import Clip, find_clips
from revox.evaluation.evaluate import KINDS, evaluate
from revox.evaluation.report import write_report as write_evaluation
from revox.evaluation.subject import Setup, open_subject
from revox.metrics.speaker import SpeakerVerifier
from revox.restore.errors import RestoreError
from revox.restore.plan import plan_restore
from revox.restore.report import write_report
from revox.restore.request import RestoreRequest
from revox.restore.rule import wants_adaptation
from revox.speech import Audio, write_audio
from revox.speech.files import replace_file
from revox.stages import Facts, Stage, StageLog
from revox.training.adapt_model import ADAPTATION_FILE, AdaptRequest, adapt_model
from revox.training.data import find_sources
from revox.training.errors import TrainingError
from revox.training.restore import (
    HELD_OUT_SECONDS,
    SETTINGS_FILE,
    divided_sources,
    restore_encoder,
    validation_clips,
)

FACTS_FILE = "restore.json"
MANIFEST = "manifest.jsonl"
ADAPT = ("auto", "never")
_FREE = {"save_every", "report_every", "validate_every", "keep", "compile", "likelihood", "whisper_cache_gb"}
"""Settings with which a run may go on that was begun with others."""


class Restoration:
    """A restoration of `request` in the folder `out`, which is made; what was done there before is known.

    Raises RestoreError for what cannot be restored as asked, CheckpointError, DataError or MetricError when
    the checkpoint, the speech or Resemblyzer is missing; nothing long was computed then.
    """

    def __init__(self, request: RestoreRequest, out: Path) -> None:
        self.request, self.out = request, out
        self.folder = out / "checkpoint"
        self.private = [request.checkpoint, out, *map(Path, (*request.data, *request.validation))]
        self._check()
        settings = {k: v for k, v in request.settings.model_dump(mode="json").items() if k not in _FREE}
        begun = {
            "checkpoint": decoder_sha256(request.checkpoint), "data": list(request.data),
            "validation": list(request.validation), "settings": settings, "minutes": request.minutes,
            "quick": request.quick, "texts": list(request.texts), "clip": sha256_of(request.clip),
            "consent": request.consent,
        }  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        self.log = StageLog(out / FACTS_FILE, begun, lambda text: without_paths(text, self.private))
        if self.log.other:
            raise RestoreError(
                f"{out} was begun with other {' and '.join(self.log.other)}: go on with the same, or name "
                "another folder with --out"
            )
        asked = self.log.stages["adapt"].get("asked") if self.log.done("adapt") else None
        if asked not in (None, request.adapt):
            raise RestoreError(
                f"{out} is past the adaptation, with --adapt {asked}: go on with that, or name another "
                "folder with --out"
            )
        self.clips = self._held_out_clips()

    def plan(self) -> Facts | None:
        """The first stage: what the others will take here (`plan_restore`). None if that failed."""
        self._run(self._stages()[:1])
        return self.log.stages["plan"] if self.log.done("plan") else None

    def run(self) -> list[str]:
        """After the plan, do what is not done; gives the stages that failed or wait for those.

        The report is written whatever happens. Raises KeyboardInterrupt when stopped: a later call goes on.
        """
        return self._run(self._stages()[1:])

    def _run(self, stages: list[Stage]) -> list[str]:
        try:
            return self.log.run(stages, self.request.message)
        finally:
            names = [stage.name for stage in self._stages()]
            write_report(self.out, self.request.name, self.log, names, self.private)

    def _stages(self) -> list[Stage]:
        return [
            Stage("plan", lambda: plan_restore(self.request, self.out / "timed")),
            Stage("train", self.train, ("plan",)),
            Stage("measure", self.measure, ("train",)),
            Stage("adapt", self.adapt, ("measure",)),
            Stage("inject", self.inject, ("adapt",)),
            Stage("doctor", self.doctor, ("inject",)),
            Stage("clone and speak", self.clone_and_speak, ("inject",)),
        ]

    def _check(self) -> None:
        request, out = self.request, self.out.resolve()
        if request.adapt not in ADAPT:
            raise RestoreError(f"--adapt {request.adapt} is not offered; give one of {', '.join(ADAPT)}")
        if request.minutes is not None and not request.minutes > 0:
            raise RestoreError(f"{request.minutes:g} minutes are no time to train; give more than 0")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RestoreError(
                "a restoration is one process: train on several GPUs with `accelerate launch -m revox.cli "
                f"train encoder ... --out {self.out / 'encoder'}`, then restore with the same settings"
            )
        source, copy = request.checkpoint.resolve(), self.folder.resolve()
        if source in (copy, out, *out.parents):
            raise RestoreError(f"{self.out} would change the checkpoint itself; name a folder elsewhere")
        found = inspect(request.checkpoint)
        if found.encoder != "absent":
            raise RestoreError(
                f"{request.checkpoint} has an encoder already ({found.encoder}): measure it with `revox "
                "evaluate`, or take it out with `revox inject --eject`"
            )
        SpeakerVerifier()  # what is missing shows now, not after the training
        try:
            import jinja2  # noqa: F401
            import scipy  # noqa: F401
        except ImportError as error:
            raise RestoreError(
                f"the measurements need {error.name}: install it with `pip install 'revox[eval]'`"
            ) from None

    def _held_out_clips(self) -> list[Clip]:
        """What the encoder is measured on and does not learn from: written once, as the training divides."""
        request, folder = self.request, self.out / "clips"
        if not (folder / MANIFEST).is_file():
            sources = find_sources(
                request.data, cache=request.cache, workers=request.workers, progress=request.progress
            )
            _, held = divided_sources(sources, request.options())
            rate = read_params(request.checkpoint).voxtral_config().codec.sampling_rate
            lines = []
            for i, clip in enumerate(validation_clips(held, rate)):
                folder.mkdir(exist_ok=True)
                file = f"{i:03d}.flac"
                write_audio(folder / file, Audio(clip.samples.numpy(), rate))
                lines.append(json.dumps({"file": file, "speaker": clip.speaker, "text": clip.transcript}))
            if not lines:
                raise RestoreError(
                    "no source of the data has ten speakers, so none is held out to measure on: name other "
                    "speech with --validation"
                )
            replace_file(folder / MANIFEST, "\n".join(lines) + "\n")
        return find_clips(folder)

    # The stages

    @property
    def encoder(self) -> Path:
        """The encoder that was trained."""
        return self.out / "encoder" / ENCODER_FILE

    def train(self) -> Facts:
        """The encoder, from its last state where there is one; the figures of its last validation."""
        request, folder = self.request, self.out / "encoder"
        settings = request.scheduled(self.log.stages["plan"]["steps"])
        options = request.options(resume=(folder / SETTINGS_FILE).is_file())
        restore_encoder(request.checkpoint, request.data, folder, settings, options)
        rows = [json.loads(line) for line in (folder / "encoder-log.jsonl").read_text().splitlines()]
        validated = [row for row in rows if any(name.startswith("valid_") for name in row)][-1:]
        figures = {k: v for row in validated for k, v in row.items() if k.startswith(("valid_", "own_"))}
        return {"steps": settings.steps, **figures}

    def measure(self) -> Facts:
        """The three evaluations of the encoder on the held-out clips, and what the rule says of them."""
        request, tables = self.request, {}
        for kind in KINDS:
            setup = Setup(
                request.checkpoint, self.out / "measure" / kind, "encoder", self.encoder,
                seconds=HELD_OUT_SECONDS, seeds=request.seeds, device=request.device, dtype=request.dtype,
            )  # fmt: skip
            try:
                report = evaluate(kind, setup, self.clips, progress=request.progress)
            finally:
                open_subject.cache_clear()  # the model's memory is for the next stage
            write_evaluation(report, setup.out)
            tables[kind] = report.tables
        return wants_adaptation(tables["cloning"][0])

    def adapt(self) -> Facts:
        """An adaptation of the model if the rule asks for one; its own guard decides whether it stays."""
        request, measured = self.request, self.log.stages["measure"]
        if request.adapt == "never":
            return {"asked": "never", "tried": False, "adapted": False, "why": "--adapt never"}
        if not measured["try"]:
            return {"asked": "auto", "tried": False, "adapted": False, "why": measured["why"]}

        def report(run: str, row: dict[str, float]) -> None:
            request.message(f"{run}: step {row['step']:.0f} of {request.adaptation.steps}")

        asked = AdaptRequest(
            request.adaptation, texts=request.texts, encoder=self.encoder,
            verifier=request.settings.verifier, device=request.device,
            dtype=request.arithmetic, progress=request.progress, report=report,
        )  # fmt: skip
        try:
            decision, path = adapt_model(request.checkpoint, self.out / "adaptation", asked)
        except TrainingError as error:
            raise TrainingError(f"{error} (the same command with --adapt never goes on without)") from None
        figures: dict[str, Any] = {
            name: getattr(decision, name) for name in ("scale", "before", "after", "control", "spread")
        }
        guard = {f"presets_{name}": value for name, value in asdict(decision.guard).items()}
        why = "the presets are unharmed, and it gains more over its control than seeds differ"
        return {
            "asked": "auto", "tried": True, "adapted": path is not None, **figures, **guard,
            "why": why if path else "nothing better was found that leaves the presets as they are",
        }  # fmt: skip

    def inject(self) -> Facts:
        """A copy of the checkpoint with the encoder, and with the adaptation merged if there is one."""
        adapted = self.log.stages["adapt"]["adapted"]
        file = WEIGHTS if adapted else ENCODER_WEIGHTS
        if (self.folder / file).is_file():  # the copy appears whole: a kill came before it was recorded
            expected = expected_tensors(read_params(self.request.checkpoint).voxtral_config())
            sha256 = read_encoder(self.encoder, expected).sha256
            if injection_of(self.folder / file).get("encoder_sha256") == sha256:
                return {"encoder_sha256": sha256, "adapted": adapted}
        path = self.out / "adaptation" / ADAPTATION_FILE if adapted else None
        options = InjectionOptions(self.folder, merge=adapted, adaptation=path)
        report = inject(self.request.checkpoint, self.encoder, options, self.request.progress)
        return {"encoder_sha256": report.encoder_sha256, "adapted": adapted}

    def doctor(self) -> Facts:
        """The examination of the restored folder. Raises RestoreError if a check failed."""
        request = self.request
        settings = DoctorSettings(quick=request.quick, device=request.device, dtype=request.arithmetic)
        found = examine(self.folder, settings, name=request.name, progress=request.progress)
        if found.stopped:
            raise KeyboardInterrupt
        write_examination(found, self.out / "doctor", self.private)
        failed = [one.name for one in found.findings if one.verdict is Verdict.FAIL]
        if failed:
            raise RestoreError(f"checks that failed: {', '.join(failed)}; doctor/doctor.md says what to do")
        return {
            "verdict": found.verdict.value, "checks": {one.name: one.verdict.value for one in found.findings}
        }  # fmt: skip

    def clone_and_speak(self) -> Facts:
        """The clip through the restored folder, two sentences in its voice and in a preset's."""
        request, sounds = self.request, self.out / "sounds"
        shutil.rmtree(sounds, ignore_errors=True)
        sounds.mkdir()
        tts = revox.load(self.folder, request.device, request.arithmetic)
        found, voice = CloneTrial(request.clip, request.consent, request.name).run(tts, sounds)
        write_audio(sounds / "reference.wav", voice.reference)
        return found | {"provenance": voice.provenance}
