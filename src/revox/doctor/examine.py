"""All checks in order; an error in one does not stop the others."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

import revox
from revox.api import find_device
from revox.checkpoint.errors import CheckpointError
from revox.doctor import clone_checks, folder_checks, layout, speech_checks, speed, text_checks, voice_checks
from revox.doctor.checkpoint_under_test import CheckpointUnderTest, choose_voices
from revox.doctor.findings import CheckResult, DoctorReport, Value, Verdict
from revox.metrics.errors import MetricError
from revox.progress import Progress, ProgressCallback, ignore_progress

Check = Callable[[CheckpointUnderTest], CheckResult]

ON_DISK: dict[str, Check] = {
    "inventory": folder_checks.inventory,
    "tokenizer": folder_checks.tokenizer,
    "weights": folder_checks.weights,
}
LOADED: dict[str, Check] = {
    "voice embeddings": voice_checks.voice_embedding,
    "decoded presets": voice_checks.decoded_presets,
    "pitch and names": voice_checks.pitch_and_names,
    "speaking": speech_checks.speaking,
    "similarity": speech_checks.similarity,
    "words": speech_checks.words,
    "text": text_checks.follows_text,
    "q/k layout": layout.query_key_layout,
    "cloning by inversion": clone_checks.clone,
    "encoder": clone_checks.encoder,
    "speed": speed.speed,
}


@dataclass(frozen=True)
class DoctorSettings:
    """What to examine and how.

    Args:
        voices: the voices to examine; by default all presets, or four when `quick`.
        quick: fewer voices, no inversion.
        recognizer: "none", "pocketsphinx", or "whisper:" and a faster-whisper model's folder or hub id.
        device, dtype: as in `revox.load`.
        seed: of everything random.
    """

    voices: tuple[str, ...] = ()
    quick: bool = False
    recognizer: str = "none"
    device: str | None = None
    dtype: torch.dtype | None = None
    seed: int = 0


def examine(
    folder: str | Path,
    settings: DoctorSettings | None = None,
    *,
    name: str | None = None,
    progress: ProgressCallback = ignore_progress,
    on_finding: Callable[[CheckResult], None] | None = None,
) -> DoctorReport:
    """Examine a checkpoint folder; KeyboardInterrupt ends it early, with the results so far.

    The report calls the checkpoint `name`, by default the folder's last name. `on_finding` is called with
    each result at once, skipped checks included, but for those that an interruption leaves. Raises
    CheckpointError when the folder is not a Voxtral TTS checkpoint, VoiceError for an unknown voice,
    MetricError for a recognizer that cannot be loaded, SpeakError for a device that is not there.
    """
    settings = settings or DoctorSettings()
    folder = Path(folder).resolve()
    count, at = len(ON_DISK) + len(LOADED), "inventory"

    def update(what: str | None = None) -> None:
        facts = {"check": at} if what is None else {"check": at, "now": what}
        progress(Progress("examining", len(report.findings), count, facts))

    subject = CheckpointUnderTest(folder, None, settings.seed, settings.quick, progress=update)
    _ = subject.params
    subject.names = choose_voices(folder, settings.voices, settings.quick)
    device = find_device(settings.device)
    subject.recognizer = speech_checks.find_recognizer(settings.recognizer, settings.device or "cpu")
    report = DoctorReport(name or folder.name, _made_with(subject, device, settings))

    def found(result: CheckResult) -> None:
        report.findings.append(result)
        if on_finding is not None:
            on_finding(result)

    try:
        problem: str | None = None
        for label, check in (ON_DISK | LOADED).items():
            at = label
            update()
            if label in LOADED and subject.tts is None and problem is None:
                result, problem = _load(subject, device, settings.dtype, report)
                if result is not None:
                    found(dataclasses.replace(result, name="loading"))
            if problem is not None:
                found(CheckResult(Verdict.SKIPPED, problem, name=label))
                continue
            started = time.perf_counter()
            result = _guarded(check, subject)
            took = time.perf_counter() - started
            found(dataclasses.replace(result, name=label, seconds=took))
    except KeyboardInterrupt:
        report.stopped = True
        known = {finding.name for finding in report.findings}
        skipped = CheckResult(Verdict.SKIPPED, "Interrupted before this check.")
        missing = [label for label in ON_DISK | LOADED if label not in known]
        report.findings += [dataclasses.replace(skipped, name=label) for label in missing]
    report.sounds = subject.sounds()
    return report


def _guarded(check: Check, subject: CheckpointUnderTest) -> CheckResult:
    try:
        return check(subject)
    except MetricError as error:  # a library that is not installed says nothing about the checkpoint
        return CheckResult(Verdict.SKIPPED, str(error))
    except Exception as error:  # a broken checkpoint may break anything, and the other checks go on
        return _failed(error)


def _failed(error: Exception) -> CheckResult:
    if isinstance(error, ValueError):  # all of the project's own errors are
        return CheckResult(Verdict.FAIL, str(error))
    text = (str(error) or type(error).__name__).splitlines()[0]
    return CheckResult(Verdict.FAIL, f"The check itself failed: {type(error).__name__}: {text}")


def _load(
    subject: CheckpointUnderTest, device: torch.device, dtype: torch.dtype | None, report: DoctorReport
) -> tuple[CheckResult | None, str | None]:
    """Load the model. Gives what to report of that, where the checks on disk do not explain it already, and
    why the checks that need the model are skipped; None where there is nothing to say."""
    if not subject.names:
        sentence = (
            "There is no voice to examine, so the model was not loaded: nothing is known of how it speaks. "
            "Copy the folder voice_embedding too, or add a voice with `revox clone`."
        )
        return CheckResult(Verdict.WARN, sentence), "There is no voice to examine."
    try:
        subject.tts = revox.load(subject.folder, device, dtype)
    except Exception as error:  # too little memory, say, must not cost the report
        explained = report.verdict is Verdict.FAIL and isinstance(error, CheckpointError)
        why = "The model could not be loaded; fix what the checks above name first."
        return None if explained else _failed(error), why
    report.made_with["dtype"] = str(subject.tts.model.dtype).removeprefix("torch.")
    return None, None


def _made_with(
    subject: CheckpointUnderTest, device: torch.device, settings: DoctorSettings
) -> dict[str, Value]:
    """Versions, settings and the kind of machine; nothing that names a person or a host."""
    dtype, recognizer = settings.dtype, settings.recognizer
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "revox": revox.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch.") if dtype is not None else "default",
        "voices": len(subject.names),
        "quick": subject.quick,
        "recognizer": recognizer if recognizer in ("none", "pocketsphinx") else "whisper",
        "seed": subject.seed,
    }
