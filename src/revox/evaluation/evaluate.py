"""A checkpoint and a folder of clips -> a report: codec, cloning or acceptance."""

from __future__ import annotations

import dataclasses
import datetime
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from revox.api import find_device
from revox.checkpoint.inspect import inspect
from revox.coding.student import has_trained_student
from revox.evaluation import acceptance_table, cloning_table, codec_table
from revox.evaluation.clips import Clip, partners
from revox.evaluation.errors import EvaluationError
from revox.evaluation.report import ClipScores, EvaluationReport
from revox.evaluation.subject import Setup, measured, open_subject
from revox.evaluation.tables import Table
from revox.metrics.naturalness import can_score_naturalness
from revox.progress import ProgressCallback, ignore_progress
from revox.speech import AudioError, audio_header, read_audio
from revox.speech.read import MAX_SECONDS
from revox.workers import for_each

KINDS = ("codec", "cloning", "acceptance")
DEFAULT_TEXTS = (
    "The next train to the city leaves at half past seven.",
    "Please come to the library at quarter to nine.",
    "Today is Monday the third of June.",
)
"""Plain English, also in the lab's domain."""

Measured = list[tuple[Clip, dict[str, Any]]]


def evaluate(
    kind: str,
    setup: Setup,
    clips: Sequence[Clip],
    jobs: int = 1,
    progress: ProgressCallback = ignore_progress,
) -> EvaluationReport:
    """Measure `clips` and make the tables of `kind`, one set for each group of clips.

    Measurements are saved under `setup.out`: after Ctrl-C, or with more clips, the same call resumes. `jobs`
    processes share the work. Clips that cannot be measured are left out, with the reason. Raises
    EvaluationError when nothing can be measured, CodingError for a method that the checkpoint cannot use,
    MetricError when a library is missing, CheckpointError when the checkpoint cannot be used, SpeakError for
    a device that is not there.
    """
    if kind not in KINDS:
        raise EvaluationError(f"{kind!r} cannot be evaluated; choose one of {', '.join(KINDS)}")
    setup = _checked(setup)
    subject = open_subject(setup)
    # A library that is missing shows now, not after an hour.
    _ = subject.recognizer, subject.verifier, subject.naturalness
    clips, left_out = _with_codes(setup, clips, jobs, progress)
    if cut := [clip.name for clip in clips if clip.text and _is_longer(clip, setup.seconds)]:
        # Words that are not in the part that is measured would count as errors of whoever speaks it.
        clips = [dataclasses.replace(clip, text=None) if clip.name in cut else clip for clip in clips]
        left_out.append(
            f"transcripts of {len(cut)} clips that are longer than the {setup.seconds:g} s measured of each "
            f"(--seconds): {', '.join(cut[:3])}{', ...' if len(cut) > 3 else ''}"
        )
    others = partners(clips)

    def each(measure: Callable[..., dict[str, Any]], more: Callable[[Clip], tuple[Any, ...]]) -> Measured:
        tasks = [(kind, measure, setup, clip, *more(clip)) for clip in clips]
        return list(zip(clips, for_each(measured, tasks, jobs, progress, "scores"), strict=True))

    make: Callable[[Measured, str], list[Table]]
    if kind == "codec":
        found = each(codec_table.measure, lambda c: (others[c.name],))
        make = partial(codec_table.codec_tables, setup)
    elif kind == "cloning":
        presets: Sequence[str | None] = acceptance_table.preset_names(setup) or [None]
        turn = {clip.name: presets[i % len(presets)] for i, clip in enumerate(clips)}
        found = each(cloning_table.measure, lambda c: (others[c.name], turn[c.name]))
        make = partial(cloning_table.cloning_tables, setup)
    else:
        acceptance_table.preset_embeddings(setup)  # what is missing shows before any work
        names = acceptance_table.preset_names(setup)
        speech = ("own speech", acceptance_table.measure_preset, setup)
        tasks = [(*speech, name, text) for name in names for text in setup.texts]
        own = for_each(measured, tasks, jobs, progress, "the model's own speech")
        found = each(acceptance_table.measure, lambda c: (_voice_of(c, clips), others[c.name]))
        make = partial(acceptance_table.acceptance_tables, setup, own)
    tables = []
    for name in dict.fromkeys(clip.group for clip in clips):
        group = [(clip, record) for clip, record in found if clip.group == name]
        tables += make(group, f"{name or 'all clips'} ({_count(group)})")
    scores = [_clip_scores(clip, record) for clip, record in found]
    return EvaluationReport(f"revox evaluate {kind}", _facts(setup, clips), tables, scores, left_out)


def _is_longer(clip: Clip, seconds: float) -> bool:
    known, rate = audio_header(clip.path)
    if known is None:
        return read_audio(clip.path, max_seconds=seconds).truncated
    return known > seconds + 1 / rate


def _checked(setup: Setup) -> Setup:
    if setup.seeds < 1:
        raise EvaluationError(f"{setup.seeds} seeds measure nothing; give 1 or more")
    if not 1 <= setup.seconds <= MAX_SECONDS:  # nor is nan
        raise EvaluationError(
            f"{setup.seconds:g} seconds of each clip cannot be used; give 1 to {MAX_SECONDS:g}"
        )
    if setup.device is not None:
        find_device(setup.device)
    if setup.encoder is not None and not setup.encoder.is_file():
        raise EvaluationError(
            f"{setup.encoder} is not a file; give the encoder's .safetensors file, as `revox encoder export` "
            "and training runs write it"
        )
    has_encoder = setup.encoder is not None or inspect(setup.checkpoint).encoder == "complete"
    has_student = has_trained_student(setup.checkpoint)
    setup.coding.ways(has_encoder, has_student)
    if setup.method == "auto":
        method = "encoder" if has_encoder else "student" if has_student else "inversion"
        setup = dataclasses.replace(setup, method=method)
    if not setup.texts:
        setup = dataclasses.replace(setup, texts=DEFAULT_TEXTS)
    if setup.naturalness is None:
        setup = dataclasses.replace(setup, naturalness=can_score_naturalness())
    return setup.identified()


def _code(setup: Setup, clip: Clip) -> str | None:
    """Find a clip's codes, into the cache; returns why not if that fails."""
    try:
        open_subject(setup).codes(clip)
    except (AudioError, EvaluationError) as error:
        return str(error)
    return None


def _with_codes(
    setup: Setup, clips: Sequence[Clip], jobs: int, progress: ProgressCallback
) -> tuple[list[Clip], list[str]]:
    problems = for_each(_code, [(setup, clip) for clip in clips], jobs, progress, f"codes by {setup.method}")
    usable = [clip for clip, problem in zip(clips, problems, strict=True) if problem is None]
    left_out = [problem for problem in problems if problem is not None]
    if not usable:
        why = left_out[0] if left_out else "there are no clips"
        raise EvaluationError(f"none of {len(clips)} clips can be measured: {why}")
    return usable, left_out


def _voice_of(clip: Clip, clips: Sequence[Clip]) -> Clip:
    """Another clip of the same speaker, or the clip itself when there is none."""
    return next((c for c in clips if c.speaker == clip.speaker and c.name != clip.name), clip)


def _count(group: Measured) -> str:
    speakers = len({clip.speaker for clip, _ in group})
    clips = f"{len(group)} clip{'s' if len(group) != 1 else ''}"
    return clips if speakers == len(group) else f"{clips}, {speakers} speakers"


def _facts(setup: Setup, clips: Sequence[Clip]) -> dict[str, str]:
    from revox import __version__

    method = setup.method
    if setup.encoder is not None:
        method += f" (encoder: {setup.encoder.name})"
    if setup.steps is not None:
        method += f", {setup.steps} steps"
    if setup.refine:
        method += f", {setup.refine} steps of refinement"
    grammar = ", with a grammar" if setup.grammar else ""
    naturalness = {"naturalness": "DistillMOS, which is in no objective"} if setup.naturalness else {}
    return {
        "checkpoint": f"{setup.checkpoint.name}, {setup.identity[:12]}",
        "codes found by": method,
        "clips": f"{len(clips)}, up to {setup.seconds:g} s of each",
        "seeds": str(setup.seeds),
        "recognizer": f"{Path(setup.recognizer_model).name}{grammar}",
        "speaker verification": "Resemblyzer, which is in no objective",
        **naturalness,
        "date": datetime.date.today().isoformat(),
        "revox": f"{__version__}, Python {platform.python_version()}, {platform.machine()}",
    }


def _clip_scores(clip: Clip, record: dict[str, Any]) -> ClipScores:
    # An embedding is 256 numbers that nobody reads.
    rows = {
        name: [{k: v for k, v in scores.items() if k != "voice"} for scores in seeds]
        for name, seeds in record["rows"].items()
    }
    for name, seeds in record.get("embeddings", {}).items():
        rows[name] = [a | b for a, b in zip(rows.get(name) or [{}] * len(seeds), seeds, strict=False)]
    return ClipScores(clip.name, clip.speaker, clip.group, clip.text, rows, record.get("sounds", {}))
