"""`revox doctor`: examine a checkpoint and write a report to share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from revox.cli.marked import who_signs
from revox.cli.options import (
    CheckpointArgument,
    CheckpointOption,
    Device,
    Dtype,
    Revision,
    Seed,
    chosen_checkpoint,
)

if TYPE_CHECKING:
    from rich.console import Console

    from revox.doctor.findings import CheckResult, DoctorReport
    from revox.marking import Signer

OLD_NAMES = {"--recogniser": "--recognizer"}


def command(
    checkpoint: CheckpointArgument = None,
    checkpoint_option: CheckpointOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the report; else revox-doctor-DATE here (--first-hour: -CHECKPOINT)."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Four voices, and no trial of cloning.")] = False,
    voices: Annotated[str | None, typer.Option(help="Examine only these, separated by commas.")] = None,
    recognizer: Annotated[
        str, typer.Option(help="What checks the words: none, whisper:FOLDER_OR_HUB_ID, or pocketsphinx.")
    ] = "none",
    sounds: Annotated[
        bool,
        typer.Option("--sounds", help="Also write each voice's reference and speech, as marked .wav."),
    ] = False,
    hour: Annotated[
        bool,
        typer.Option(
            "--first-hour",
            help="Also train a student, clone a bundled clip and speak: one folder to send back.",
        ),
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="With --first-hour: of the student's learning; else 15.")
    ] = None,
    sentences: Annotated[
        int | None, typer.Option(min=1, help="With --first-hour: that the student hears; else 2000.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    revision: Revision = None,
) -> None:
    """Examine a checkpoint (files, weights, voices, speech, cloning, speed) and write a report to share.

    Exit code 1 if a check failed. Ctrl-C writes the results so far. The report holds no personal paths.
    """
    from datetime import datetime

    from rich.console import Console

    from revox.api import find_dtype
    from revox.checkpoint.errors import CheckpointError
    from revox.checkpoint.locate import locate
    from revox.cli.progress import show_progress

    given = chosen_checkpoint(checkpoint, checkpoint_option)
    console = Console(stderr=True, highlight=False)
    arithmetic = find_dtype(dtype)
    folder = locate(given, revision)
    # The first hour goes on where it was stopped, so that its folder is the same tomorrow.
    called = folder.resolve().name if Path(given).expanduser().is_dir() else given
    target = _target(out, called.replace("/", "-") if hour else f"{datetime.now():%Y-%m-%d}")
    if hour:
        if voices or sounds or seed:
            raise CheckpointError(
                "--first-hour examines four voices with seed 0 and writes its own sounds: leave --voices, "
                "--sounds and --seed out"
            )
        budget = {"sentences": sentences, "minutes": minutes}
        wanted: dict[str, Any] = {name: value for name, value in budget.items() if value is not None}
        wanted |= {"recognizer": recognizer, "device": device, "dtype": arithmetic}
        return _first_hour(console, called, folder, target, wanted)
    if minutes is not None or sentences is not None:
        raise CheckpointError("--minutes and --sentences are of --first-hour: add it, or leave them out")
    from revox.doctor.examine import DoctorSettings, examine
    from revox.doctor.report import write_report

    names = tuple(name.strip() for name in (voices or "").split(",") if name.strip())
    signer = who_signs() if sounds else None
    settings = DoctorSettings(names, quick, recognizer, device, arithmetic, seed)
    with show_progress(console) as progress:
        report = examine(
            folder,
            settings,
            name=called,
            progress=progress,
            on_finding=lambda finding: _print(console, finding),
        )
    markdown, _ = write_report(report, target, [folder, target])
    if sounds:
        _write_sounds(report, target / "sounds", given, signer)
    _end(report, markdown, console)


def _first_hour(console: Console, name: str, folder: Path, out: Path, wanted: dict[str, Any]) -> None:
    from revox.cli.progress import duration, show_progress
    from revox.demo.demo import CONSENT, EXAMPLES, REFERENCE
    from revox.doctor.first_hour import FirstHour, first_hour

    with show_progress(console) as progress:
        request = FirstHour(
            folder, name, EXAMPLES / REFERENCE, CONSENT, progress=progress,
            report=lambda line: console.print(line, markup=False), **wanted,
        )  # fmt: skip
        console.print(
            f"about {duration(request.estimate())} for the student here, and some minutes for the rest; "
            "Ctrl-C stops, and the same command goes on",
            soft_wrap=True,
        )  # fmt: skip
        path, failed = first_hour(request, out)
    console.print(f"the report is {path}; send the folder {out} as it is", markup=False, soft_wrap=True)
    if failed:
        console.print(f"failed: {', '.join(failed)}; the same command tries what was not done", markup=False)
        raise typer.Exit(1)


def _end(report: DoctorReport, markdown: Path, console: Console) -> None:
    from rich.markup import escape

    from revox.doctor.findings import Verdict

    verdict = report.verdict.value.upper() + (" so far, interrupted" if report.stopped else "")
    console.print(f"[bold]{verdict}[/]: the report is {escape(str(markdown))}, and doctor.json beside it")
    if report.stopped:
        raise typer.Exit(130)
    if report.verdict is Verdict.FAIL:
        raise typer.Exit(1)


def _target(out: Path | None, which: str) -> Path:
    """The report's folder, made before anything is computed. Raises OSError."""
    target = (out or Path(f"revox-doctor-{which}")).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    return target


def _write_sounds(report: DoctorReport, folder: Path, checkpoint: str, signer: Signer | None) -> None:
    from revox.cli.marked import write_synthetic

    folder.mkdir(parents=True, exist_ok=True)
    for kind, sounds in report.sounds.items():
        for name, audio in sounds.items():
            if audio.samples.size:
                write_synthetic(folder / f"{name}.{kind}.wav", audio, checkpoint, name, signer)


_STYLES = {"pass": "green", "warn": "yellow", "fail": "red", "skipped": "dim"}


def _print(console: Console, finding: CheckResult) -> None:
    from rich.markup import escape

    verdict = finding.verdict.value
    console.print(
        f"[{_STYLES[verdict]}]{verdict:7}[/] [bold]{finding.name}[/] ({finding.seconds:.1f} s): "
        f"{escape(finding.sentence)}"
    )
