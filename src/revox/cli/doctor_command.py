"""`revox doctor`: examine a checkpoint and write a report to share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from revox.doctor.findings import Finding, Report
    from revox.doctor.patient import Patient

OLD_NAMES = {"--recognizer": "--recognizer"}


def command(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint's folder, or a hub id (owner/name).")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report; else revox-doctor-DATE here.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Four voices, and no trial of cloning.")] = False,
    voices: Annotated[str | None, typer.Option(help="Examine only these, separated by commas.")] = None,
    recognizer: Annotated[
        str,
        typer.Option(help="What transcribes the speech: none, pocketsphinx, or whisper:FOLDER_OR_HUB_ID."),
    ] = "none",
    sounds: Annotated[
        bool, typer.Option("--sounds", help="Also write what each voice decodes to and says, as marked .wav.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps; else the accelerator if there is one.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; else as `revox speak`.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="For everything left to chance.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
) -> None:
    """Examine CHECKPOINT (files, weights, voices, speech, cloning, speed) and write a report to share.

    Exit code 1 if a check failed. Ctrl-C writes what was found until then. The report holds no personal
    paths.
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    arithmetic = _dtype(dtype)
    from revox.checkpoint.locate import locate

    folder = locate(checkpoint, revision)
    target = _target(out)
    from revox.doctor.examine import examine
    from revox.doctor.report import write_report

    kept: list[Patient] = []
    named = Path(checkpoint).expanduser()
    with _Progress(console) as progress:
        report = examine(
            folder,
            name=named.resolve().name if named.is_dir() else checkpoint,
            voices=[name.strip() for name in voices.split(",") if name.strip()] if voices else None,
            quick=quick, recognizer=recognizer, device=device, dtype=arithmetic, seed=seed,
            on_start=progress.start, on_progress=progress.say, on_finding=progress.found,
            on_patient=kept.append,
        )  # fmt: skip
    markdown, _ = write_report(report, target, [folder, target])
    if sounds and kept:
        _write_sounds(kept[0], target / "sounds", checkpoint)
    _end(report, markdown, console)


def _end(report: Report, markdown: Path, console: Console) -> None:
    from rich.markup import escape

    from revox.doctor.findings import Verdict

    verdict = report.verdict.value.upper() + (" so far, stopped by hand" if report.stopped else "")
    console.print(f"[bold]{verdict}[/]: the report is {escape(str(markdown))}, and doctor.json beside it")
    if report.stopped:
        raise typer.Exit(130)
    if report.verdict is Verdict.FAIL:
        raise typer.Exit(1)


def _dtype(name: str | None) -> Any:
    if name is None:
        return None
    import torch

    from revox.synthesis.errors import SpeakError

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
    if name not in known:
        raise SpeakError(f"the dtype {name!r} is not offered; give float32 or bfloat16")
    return known[name]


def _target(out: Path | None) -> Path:
    """The report's folder; what cannot be written is said before anything is computed. Raises OSError."""
    from datetime import datetime

    target = (out or Path(f"revox-doctor-{datetime.now():%Y-%m-%d}")).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    return target


def _write_sounds(patient: Patient, folder: Path, checkpoint: str) -> None:
    from revox.cli.marked import who_signs, write_synthetic

    folder.mkdir(parents=True, exist_ok=True)
    signer = who_signs()
    for kind, sounds in patient.sounds().items():
        for name, audio in sounds.items():
            if audio.samples.size:
                write_synthetic(folder / f"{name}.{kind}.wav", audio, checkpoint, name, signer)


_STYLES = {"pass": "green", "warn": "yellow", "fail": "red", "skipped": "dim"}


class _Progress:
    """The check at work on one line, and a line for each finding."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("")
        self._check = ""

    def __enter__(self) -> _Progress:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def start(self, check: str) -> None:
        """A check begins."""
        self._check = check
        self._status.update(check)

    def say(self, what: str) -> None:
        """What it is doing."""
        from rich.markup import escape

        self._status.update(f"{self._check}: {escape(what)}")

    def found(self, finding: Finding) -> None:
        """What it found."""
        from rich.markup import escape

        verdict = finding.verdict.value
        self._console.print(
            f"[{_STYLES[verdict]}]{verdict:7}[/] [bold]{finding.name}[/] ({finding.seconds:.1f} s): "
            f"{escape(finding.sentence)}"
        )
