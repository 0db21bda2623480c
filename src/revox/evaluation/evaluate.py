"""A checkpoint and a folder of clips -> a report: codec, cloning or acceptance."""

from __future__ import annotations

import dataclasses
import datetime
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from revox.api import find_device
from revox.checkpoint.inspect import inspect
from revox.evaluation import acceptance_table, cloning_table, codec_table
from revox.evaluation.clips import Clip, partners
from revox.evaluation.errors import EvaluationError
from revox.evaluation.report import ClipScores, Report
from revox.evaluation.subject import Setup, open_subject
from revox.evaluation.tables import Table
from revox.evaluation.workers import Progress, for_each
from revox.speech import AudioError
from revox.speech.read import MAX_SECONDS

KINDS = ("codec", "cloning", "acceptance")
DEFAULT_TEXTS = (
    "The next train to the city leaves at half past seven.",
    "Please come to the library at quarter to nine.",
    "Today is Monday the third of June.",
)
"""Plain English that the lab's narrow domain knows too."""

Measured = list[tuple[Clip, dict[str, Any]]]


def evaluate(
    kind: str, setup: Setup, clips: Sequence[Clip], jobs: int = 1, progress: Progress | None = None
) -> Report:
    """Measure `clips` and make the tables of `kind`, one set for each group of clips.

    What is measured is kept under `setup.out`: after Ctrl-C, or with more clips, the same call goes on where
    it was. `jobs` processes share the work. Clips that cannot be measured are left out, with the reason.
    Raises EvaluationError when nothing can be measured, MetricError when a judge is missing, CheckpointError
    when the checkpoint cannot be used, SpeakError for a device that is not there.
    """
    if kind not in KINDS:
        raise EvaluationError(f"{kind!r} cannot be evaluated; choose one of {', '.join(KINDS)}")
    setup = _checked(setup, kind)
    _judges_are_there(setup)
    clips, left_out = _codes(setup, clips, jobs, progress)
    others = partners(clips)
    if kind == "codec":
        measured = _each(codec_table.measure, setup, clips, lambda c: (others[c.name],), jobs, progress)
        make: Callable[[Measured, str], list[Table]] = lambda group, title: codec_table.codec_tables(  # noqa: E731
            setup, group, title
        )
    elif kind == "cloning":
        presets: Sequence[str | None] = acceptance_table.preset_names(setup) or [None]
        turn = {clip.name: presets[i % len(presets)] for i, clip in enumerate(clips)}
        measured = _each(
            cloning_table.measure, setup, clips, lambda c: (others[c.name], turn[c.name]), jobs, progress
        )
        make = lambda group, title: cloning_table.cloning_tables(setup, group, title)  # noqa: E731
    else:
        names = acceptance_table.preset_names(setup)
        acceptance_table.preset_rows(setup)  # says what is missing before any work
        tasks = [(setup, name, text) for name in names for text in setup.texts]
        own = for_each(acceptance_table.measure_preset, tasks, jobs, progress, "the model's own speech")
        voices = {clip.name: _voice_of(clip, clips) for clip in clips}
        measured = _each(
            acceptance_table.measure_clip,
            setup,
            clips,
            lambda c: (voices[c.name], others[c.name]),
            jobs,
            progress,
        )
        make = lambda group, title: acceptance_table.acceptance_tables(setup, own, group, title)  # noqa: E731
    tables = []
    for name in dict.fromkeys(clip.group for clip in clips):
        group = [(clip, record) for clip, record in measured if clip.group == name]
        tables += make(group, f"{name or 'all clips'} ({_count(group)})")
    return Report(f"revox evaluate {kind}", _facts(setup, clips), tables, _by_clip(measured), left_out)


def _checked(setup: Setup, kind: str) -> Setup:
    has_encoder = setup.encoder is not None or inspect(setup.checkpoint).encoder == "complete"
    setup.coding.ways(has_encoder)
    if setup.seeds < 1:
        raise EvaluationError(f"{setup.seeds} seeds measure nothing; give 1 or more")
    if not 1 <= setup.seconds <= MAX_SECONDS:  # nor is nan
        raise EvaluationError(
            f"{setup.seconds:g} seconds of each clip cannot be taken; give 1 to {MAX_SECONDS:g}"
        )
    if setup.device is not None:
        find_device(setup.device)
    if not setup.texts:
        setup = dataclasses.replace(setup, texts=DEFAULT_TEXTS)
    return setup.identified()


def _judges_are_there(setup: Setup) -> None:
    """Raises MetricError now, not after an hour, when a judge cannot be had."""
    subject = open_subject(setup)
    _ = subject.recognizer
    _ = subject.speakers


def _code(setup: Setup, clip: Clip) -> str | None:
    """A clip's codes into the cache; why not, if they cannot be had."""
    try:
        open_subject(setup).codes(clip)
    except (AudioError, EvaluationError) as error:
        return str(error)
    return None


def _codes(
    setup: Setup, clips: Sequence[Clip], jobs: int, progress: Progress | None
) -> tuple[list[Clip], list[str]]:
    problems = for_each(_code, [(setup, clip) for clip in clips], jobs, progress, f"codes by {setup.method}")
    kept = [clip for clip, problem in zip(clips, problems, strict=True) if problem is None]
    left_out = [problem for problem in problems if problem is not None]
    if not kept:
        why = left_out[0] if left_out else "there are no clips"
        raise EvaluationError(f"none of {len(clips)} clips can be measured: {why}")
    return kept, left_out


def _each(
    measure: Callable[..., dict[str, Any]],
    setup: Setup,
    clips: Sequence[Clip],
    more: Callable[[Clip], tuple[Any, ...]],
    jobs: int,
    progress: Progress | None,
) -> Measured:
    tasks = [(setup, clip, *more(clip)) for clip in clips]
    return list(zip(clips, for_each(measure, tasks, jobs, progress, "scores"), strict=True))


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
        method += f" (reference: {setup.encoder.name})"
    if setup.steps is not None:
        method += f", {setup.steps} steps"
    if setup.refine:
        method += f", {setup.refine} steps of refinement"
    grammar = ", with a grammar" if setup.grammar else ""
    return {
        "checkpoint": f"{setup.checkpoint.name}, {setup.identity[:12]}",
        "codes found by": method,
        "clips": f"{len(clips)}, up to {setup.seconds:g} s of each",
        "seeds": str(setup.seeds),
        "recognizer": f"{Path(setup.recognizer).name}{grammar}",
        "speaker judge": "Resemblyzer; it is in no objective",
        "date": datetime.date.today().isoformat(),
        "revox": f"{__version__}, Python {platform.python_version()}, {platform.machine()}",
    }


def _by_clip(measured: Measured) -> list[ClipScores]:
    found = []
    for clip, record in measured:
        rows = {
            # An embedding is 256 numbers that nobody reads.
            name: [{k: v for k, v in scores.items() if k != "voice"} for scores in seeds]
            for name, seeds in {**record["rows"]}.items()
        }
        for name, seeds in record.get("voice_embedding", {}).items():
            rows.setdefault(name, [{} for _ in seeds])
            rows[name] = [a | b for a, b in zip(rows[name], seeds, strict=False)] or seeds
        found.append(
            ClipScores(clip.name, clip.speaker, clip.group, clip.text, rows, record.get("sounds", {}))
        )
    return found
