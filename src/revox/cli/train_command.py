"""`revox train`: the missing encoder, from the checkpoint as released and speech."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from revox.cli.progress import duration

app = typer.Typer(help="Train what the release leaves out.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command("encoder")
def encoder_command(
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", "-c", help="The checkpoint's folder, or a hub id.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder: log, state, encoder.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", "-d", help="Folders of speech, or hf:OWNER/NAME[:config][:split]; repeatable."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Settings (YAML or JSON); see docs/training.md.")
    ] = None,
    validation: Annotated[
        list[str] | None, typer.Option(help="Speech to look at and not to learn from (else some speakers).")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Sentences for the model to say, one a line; else the data's own.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps in all, in place of the config's.")] = None,
    seed: Annotated[int | None, typer.Option(help="In place of the config's.")] = None,
    refuse_below: Annotated[
        int | None, typer.Option(help="Leave out speech sampled below this many Hz.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode speech.")] = 2,
    device: Annotated[str | None, typer.Option(help="cuda, cpu; found by itself.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in OUT stopped.")] = False,
) -> None:
    """Train the codec's encoder; `accelerate launch -m revox.cli train encoder ...` does it on several GPUs.

    Ctrl-C or SIGTERM ends the step in hand and saves; `--resume` goes on exactly there. The encoder so far is
    always in OUT/encoder.safetensors, ready for `revox inject`.
    """
    from rich.console import Console

    from revox.api import find_device
    from revox.checkpoint.locate import locate
    from revox.training.restore import RunOptions, restore_encoder
    from revox.training.settings import read_settings
    from revox.training.spoken import read_sentences

    console = Console(stderr=True, highlight=False)
    if device is not None:
        find_device(device)
    settings = read_settings(config, steps=steps, seed=seed)

    def report(row: dict[str, float]) -> None:
        shown = ("mel", "semantic", "acoustic", "agreement", "perplexity", "valid_mel", "valid_agreement",
                 "valid_levels", "valid_saturated", "audio_seconds_per_second", "memory_gb")  # fmt: skip
        figures = "  ".join(f"{name} {row[name]:.4g}" for name in shown if name in row)
        console.print(
            f"step {row['step']} of {settings.steps}, {duration(row['seconds_left'])} left  {figures}",
            soft_wrap=True,
        )

    last = [0.0]

    def progress(what: str, done: int, of: int | None) -> None:
        now = time.monotonic()
        if now - last[0] > 2 or done == of:
            last[0] = now
            console.print(f"{what}: {done}" + (f" of {of}" if of else ""))

    options = RunOptions(
        validation=validation or (), refuse_below=refuse_below, workers=workers, device=device, resume=resume,
        sentences=read_sentences(texts) if texts else (), say=console.print, progress=progress,
        report=report,
    )  # fmt: skip
    try:
        made = restore_encoder(locate(checkpoint), data or (), out, settings, options)
    except KeyboardInterrupt:
        # Asked to stop, it has: nothing failed.
        console.print(
            f"stopped and saved; go on with --resume. The encoder so far: {out}/encoder.safetensors"
        )
        raise typer.Exit(0) from None
    console.print(f"the encoder is {made}; try it: revox inject --checkpoint {checkpoint} --encoder {out}")
