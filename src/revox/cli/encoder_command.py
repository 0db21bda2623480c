"""`revox encoder`: the codec encoder alone, to keep and to share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from revox.cli.options import ENVIRONMENT, with_old_names

app = typer.Typer(
    help="The codec encoder alone, in a file for others to inject; see docs/injecting.md.",
    no_args_is_help=True,
)


@app.command("export", cls=with_old_names({"--out": "--output"}))
def export_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="The .safetensors file to write.")],
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", "-c", envvar=ENVIRONMENT, help="A checkpoint that has an encoder."),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="A training run; with --checkpoint too, it is checked against that one's decoder."),
    ] = None,
) -> None:
    """Write the encoder of a checkpoint or of a training run alone, in bf16, with its card beside it."""
    from revox.checkpoint.locate import locate
    from revox.checkpoint.share import export_encoder

    report = export_encoder(output, checkpoint=None if checkpoint is None else locate(checkpoint), run=run)
    print(f"{report.path}: {report.tensors} tensors, {report.bytes / 1e6:,.1f} MB")
    print(f"SHA-256 of the tensors: {report.sha256}")
    print(f"{report.card}: its card; look it over before you share it")


@app.command("push")
def push_command(
    file: Annotated[Path, typer.Argument(help="A file that `revox encoder export` wrote.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="If the repository is made now.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
) -> None:
    """Upload an exported encoder with its card (`hf auth login` first)."""
    from revox.checkpoint.share import push_encoder

    print(push_encoder(file, repository, private=private, message=message))
