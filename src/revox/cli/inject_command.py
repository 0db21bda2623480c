"""`revox inject`: a codec encoder into a checkpoint's weights, and out again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from revox.checkpoint.inject import InjectionReport


def command(
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", "-c", help="The checkpoint's folder, or a hub id.")
    ],
    encoder: Annotated[
        Path | None, typer.Option(help="A training run's folder, or a safetensors file of the encoder.")
    ] = None,
    eject: Annotated[bool, typer.Option("--eject", help="Take the encoder out again.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The new folder to make.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Change the checkpoint itself.")] = False,
    adaptation: Annotated[
        Path | None, typer.Option(help="Merged weights that take the place of the checkpoint's.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="In the place of an encoder that is there already.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Even if it was trained against another decoder.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and write nothing.")] = False,
) -> None:
    """Add a codec encoder to a checkpoint, which then clones from ref_audio in any engine of the format.

    Everything is checked before a byte is written; the weights are written beside the old ones, read back,
    and renamed: killed at any moment, the checkpoint is as it was.
    """
    from rich.console import Console

    from revox.checkpoint.errors import CheckpointError

    if eject == (encoder is not None):
        raise CheckpointError("say either --encoder RUN-or-FILE, to add one, or --eject, to take it out.")
    if in_place == (out is not None):
        raise CheckpointError("say either --out FOLDER, for a new folder, or --in-place, to change this one.")
    if eject and (adaptation is not None or replace or force):
        raise CheckpointError(
            "--adaptation, --replace and --force are for adding an encoder; leave them out."
        )
    from revox.checkpoint import inject as library
    from revox.checkpoint.locate import locate

    folder = locate(checkpoint)
    with _Progress(Console(stderr=True, highlight=False)) as progress:
        if eject:
            report = library.eject(folder, out, dry_run=dry_run, progress=progress)
        else:
            assert encoder is not None
            report = library.inject(
                folder, encoder, out, adaptation=adaptation, replace=replace, force=force, dry_run=dry_run,
                progress=progress,
            )  # fmt: skip
    _print(Console(highlight=False), report)


class _Progress:
    """A bar on stderr for each stage: checking, writing, verifying."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description:9}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
            console=console,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, stage: str, done: int, of: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=of)
        self._bar.update(self._tasks[stage], completed=done, total=of)


def _print(console: Console, report: InjectionReport) -> None:
    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    def done(what: str, would: str) -> str:
        return would if report.dry_run else what

    if report.added:
        say(f"{report.added} tensors of the encoder {done('added', 'would be added')}")
    if report.removed:
        say(f"{report.removed} tensors of an encoder {done('taken out', 'would be taken out')}")
    if report.adapted:
        say(f"{len(report.adapted)} tensors {done('replaced', 'would be replaced')} by the adaptation's")
    if report.restored:
        say(f"{len(report.restored)} tensors {done('restored', 'would be restored')} after an adaptation")
    if report.encoder_sha256:
        say(f"SHA-256 of the encoder's tensors: {report.encoder_sha256}")
    if report.decoder_agrees:
        say("it was trained against this checkpoint's decoder")
    if report.byte_for_byte:
        say("the weights are the original's, byte for byte: header and hashes agree")
    if report.left_out:
        say(f"not taken over: {', '.join(report.left_out)}")
    for note in report.notes:
        say(f"note: {note}")
    if report.dry_run:
        say(f"nothing was written; {report.folder} would take {report.written / 1e6:,.1f} MB")
        return
    took = report.seconds
    say(
        f"wrote {report.written / 1e6:,.1f} MB in {took['writing']:.1f} s; {report.verified} tensors' hashes "
        f"read back in {took['verifying']:.1f} s"
    )
    say(f"{report.folder} is ready" + (f"; {report.card.name} tells what it is" if report.card else ""))
