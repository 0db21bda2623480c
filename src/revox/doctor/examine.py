"""All checks in order, each by itself: what one of them trips over does not stop the others."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

import revox
from revox.checkpoint.errors import CheckpointError
from revox.doctor import (
    clone_checks,
    folder_checks,
    layout,
    speech_checks,
    voice_checks,
)
from revox.doctor import speed as speed_check
from revox.doctor.findings import Finding, Report, Value, Verdict
from revox.doctor.patient import Patient, choose_voices
from revox.metrics.errors import MetricError

Check = Callable[[Patient], Finding]

ON_DISK: tuple[tuple[str, Check], ...] = (
    ("inventory", folder_checks.inventory),
    ("tokenizer", folder_checks.tokenizer),
    ("weights", folder_checks.weights),
)
LOADED: tuple[tuple[str, Check], ...] = (
    ("voice rows", voice_checks.voice_embedding),
    ("decoded presets", voice_checks.decoded_presets),
    ("pitch and names", voice_checks.pitch_and_names),
    ("speaking", speech_checks.speaking),
    ("similarity", speech_checks.similarity),
    ("words", speech_checks.words),
    ("text", speech_checks.follows_text),
    ("q/k layout", layout.query_key_layout),
    ("cloning by inversion", clone_checks.clone),
    ("encoder", clone_checks.encoder),
    ("speed", speed_check.speed),
)

RECOGNIZERS = ("none", "pocketsphinx", "whisper")


def examine(
    folder: str | Path,
    *,
    name: str | None = None,
    voices: list[str] | None = None,
    quick: bool = False,
    recognizer: str = "none",
    device: str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    on_start: Callable[[str], None] | None = None,
    on_progress: Callable[[str], None] | None = None,
    on_finding: Callable[[Finding], None] | None = None,
    on_patient: Callable[[Patient], None] | None = None,
) -> Report:
    """Examine a checkpoint folder; KeyboardInterrupt ends it early, with what was found (`Report.stopped`).

    Args:
        folder: the checkpoint's folder.
        name: what the report calls it; by default the folder's last name.
        voices: the voices to examine; by default all presets, or four when `quick`.
        quick: fewer voices, no inversion.
        recognizer: "none", "pocketsphinx", or "whisper:" and a folder or hub id.
        device, dtype: as in `revox.load`.
        seed: of everything left to chance.
        on_start, on_progress, on_finding: told the check's name, what it does, what it found.
        on_patient: given what was decoded and spoken, at the end.

    Raises CheckpointError when the folder is no Voxtral TTS checkpoint at all, VoiceError for a voice that
    does not exist, MetricError for a recognizer that does not, SpeakError for a device that is not there.
    """
    folder = Path(folder).resolve()
    if recognizer.partition(":")[0] not in RECOGNIZERS:
        raise MetricError(f"there is no recognizer {recognizer!r}; give none, pocketsphinx or whisper:MODEL")
    patient = Patient(folder, seed=seed, quick=quick, recognizer=recognizer, progress=on_progress)
    _ = patient.params
    patient.names = choose_voices(folder, voices, quick)
    from revox.api import find_device

    place = find_device(device)
    report = Report(name or folder.name, made_with(patient, place, dtype))

    def run(label: str, check: Check) -> Finding:
        if on_start is not None:
            on_start(label)
        started = time.perf_counter()
        finding = _guarded(label, check, patient)
        took = time.perf_counter() - started
        finding = Finding(
            finding.name, finding.verdict, finding.sentence, finding.figures, finding.rows, took
        )
        report.findings.append(finding)
        if on_finding is not None:
            on_finding(finding)
        return finding

    try:
        for label, check in ON_DISK:
            run(label, check)
        why = _load(patient, place, dtype, on_start, report)
        for label, check in LOADED:
            if why is not None:
                report.findings.append(Finding(label, Verdict.SKIPPED, why))
            else:
                run(label, check)
    except KeyboardInterrupt:
        report.stopped = True
        known = {finding.name for finding in report.findings}
        for label, _check in (*ON_DISK, *LOADED):
            if label not in known:
                report.findings.append(Finding(label, Verdict.SKIPPED, "Stopped by hand before this check."))
    if on_patient is not None:
        on_patient(patient)
    return report


def _guarded(label: str, check: Check, patient: Patient) -> Finding:
    try:
        return check(patient)
    except MetricError as error:  # a judge that is not installed says nothing about the checkpoint
        return Finding(label, Verdict.SKIPPED, str(error))
    except Exception as error:  # a broken checkpoint may break anything; the other checks still say something
        return _refused(label, error)


def _refused(label: str, error: Exception) -> Finding:
    if isinstance(error, ValueError):  # all of the project's own errors are
        return Finding(label, Verdict.FAIL, str(error))
    text = (str(error) or type(error).__name__).splitlines()[0]
    return Finding(label, Verdict.FAIL, f"The check itself broke off: {type(error).__name__}: {text}")


def _load(
    patient: Patient,
    place: torch.device,
    dtype: torch.dtype | None,
    on_start: Callable[[str], None] | None,
    report: Report,
) -> str | None:
    """Load the model; None, or why it could not be loaded (which the checks on disk explain)."""
    if on_start is not None:
        on_start("loading")
    if not patient.names:
        return "There is no voice to examine."
    try:
        patient.tts = revox.load(patient.folder, place, dtype)
    except Exception as error:  # too little memory, say, must not cost the report
        if report.verdict is not Verdict.FAIL or not isinstance(error, CheckpointError):
            report.findings.append(_refused("loading", error))
        return "The model could not be loaded; mend what the checks above name first."
    report.made_with["dtype"] = str(patient.tts.model.dtype).removeprefix("torch.")
    return None


def made_with(patient: Patient, place: torch.device, dtype: torch.dtype | None) -> dict[str, Value]:
    """Versions, settings and the kind of machine; nothing that names a person or a host."""
    device = torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "revox": revox.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch.") if dtype is not None else "default",
        "voices": len(patient.names),
        "quick": patient.quick,
        "recognizer": patient.recognizer.partition(":")[0],
        "seed": patient.seed,
    }
