"""`revox inject`: a codec encoder into a checkpoint's weights, and out again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from revox.cli.options import Checkpoint
from revox.cli.progress import show_progress

if TYPE_CHECKING:
    from revox.checkpoint.inject import InjectionReport

OLD_NAMES = {"-o": "--out"}


def command(
    checkpoint: Checkpoint,
    encoder: Annotated[
        Path | None, typer.Option(help="A training run's folder, or a safetensors file of the encoder.")
    ] = None,
    eject: Annotated[bool, typer.Option("--eject", help="Take the encoder out again.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Make a new folder, and leave this one as it is.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="With --out: weights and encoder in one file.")
    ] = False,
    adaptation: Annotated[
        Path | None, typer.Option(help="With --merge: merged weights that take the place of the release's.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="In the place of an encoder that is there already.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Even if it was trained against another decoder, or adapted on another model."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and write nothing.")] = False,
    in_place: Annotated[
        bool, typer.Option("--in-place", hidden=True, help="The default since 0.2; ignored.")
    ] = False,
) -> None:
    """Add a codec encoder to a checkpoint, which then clones from ref_audio in any engine of the format.

    The encoder becomes a file of its own, consolidated.encoder.safetensors; the release's files stay as they
    are, and deleting that file takes the encoder out again. Everything is checked before a byte is written.
    """
    from rich.console import Console

    from revox.checkpoint.errors import CheckpointError

    if eject == (encoder is not None or adaptation is not None):
        raise CheckpointError("say either --encoder RUN-or-FILE, to add one, or --eject, to take it out.")
    if in_place and out is not None:
        raise CheckpointError("say either --out FOLDER, for a new folder, or --in-place, to change this one.")
    if eject and (out is not None or replace or force or merge):
        raise CheckpointError(
            "--out, --merge, --replace and --force are for adding an encoder; leave them out."
        )
    from revox.checkpoint import inject as library
    from revox.checkpoint.locate import locate

    if in_place:
        print("revox: --in-place is the default and will be removed; leave it out", file=sys.stderr)
    folder = locate(checkpoint)
    with show_progress(Console(stderr=True, highlight=False), "bytes") as progress:
        if eject:
            report = library.eject(folder, dry_run=dry_run)
        else:
            options = library.InjectionOptions(out, merge, adaptation, replace, force, dry_run)
            report = library.inject(folder, encoder, options, progress)
    _print(report)


def _print(report: InjectionReport) -> None:
    def done(what: str) -> str:
        return f"would be {what}" if report.dry_run else what

    if report.removed:
        print(f"{report.removed} tensors of an encoder {done('taken out')}")
    if report.added:
        print(f"{report.added} tensors of the encoder {done('added')} in {report.file}")
    if report.adapted:
        print(f"{len(report.adapted)} tensors {done('replaced')} by the adaptation's")
    if report.encoder_sha256:
        print(f"SHA-256 of the encoder's tensors: {report.encoder_sha256}")
    if report.decoder_agrees is not None:
        which = "this checkpoint's" if report.decoder_agrees else "another"
        print(f"it was trained against {which} decoder")
    if report.rebuilt:
        print(f"made again from their codes, for the adapted table: {', '.join(report.rebuilt)}")
    if report.outdated:
        print(
            f"still of the table before, since they are no sums of codes: {', '.join(report.outdated)}; make "
            "them again"
        )
    if report.left_out:
        print(f"not copied: {', '.join(report.left_out)}")
    if report.dry_run:
        print(f"nothing was written; {report.folder} would take {report.written / 1e6:,.1f} MB more")
    else:
        print(f"{report.folder} is ready; {report.written / 1e6:,.1f} MB of weights were written")
