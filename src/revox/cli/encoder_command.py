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
    run: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Write the encoder of a checkpoint alone, in bf16, with its card beside it."""
    from revox.checkpoint.errors import CheckpointError

    if checkpoint is None or run is not None:
        raise CheckpointError(
            "name a checkpoint with an encoder (--checkpoint); for a run, `revox inject --encoder RUN` "
            "writes consolidated.encoder.safetensors and its card, which can be shared as they are."
        )
    from revox.checkpoint.locate import locate
    from revox.checkpoint.share import export_encoder

    encoder = export_encoder(locate(checkpoint), output)
    print(f"{output}: {len(encoder.tensors)} tensors, {output.stat().st_size / 1e6:,.1f} MB")
    print(f"SHA-256 of the tensors: {encoder.sha256}")
    print(f"{output.with_suffix('.md')}: its card; look it over before you share it")


@app.command(
    "push",
    hidden=True,
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def push_command() -> None:
    """Gone in 0.2: names what to do instead."""
    from revox.checkpoint.errors import CheckpointError

    raise CheckpointError(
        "`revox encoder push` is gone; upload the file with `hf upload OWNER/NAME encoder.safetensors` and "
        "its card with `hf upload OWNER/NAME encoder.md README.md`."
    )
