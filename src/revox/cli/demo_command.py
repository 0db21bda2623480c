"""`revox demo`: clone and speak with the small checkpoint that ships with revox."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from revox.cli.marked import say
from revox.cli.progress import show_progress

console = Console(stderr=True)


def command(
    out: Annotated[Path, typer.Option(help="Where the sounds, the picture and the figures go.")] = Path(
        "demo-output"
    ),
    steps: Annotated[int | None, typer.Option(help="Steps of the search for codes.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same result.")] = 0,
    path: Annotated[
        bool, typer.Option("--path", help="Only print the folder of the small checkpoint.")
    ] = False,
) -> None:
    """Clone the voice of a bundled human clip with the small checkpoint, and speak two sentences with it."""
    from revox.demo import checkpoint_folder
    from revox.demo.demo import Stages, run_demo

    if path:
        print(checkpoint_folder())
        return

    with show_progress(console) as cloning:
        summary = run_demo(out, steps=steps, seed=seed, stages=Stages(say, cloning))
    _print_demo(out, summary)


def _print_demo(out: Path, summary: dict[str, Any]) -> None:
    result = Console(highlight=False)
    if summary["similarity"]:
        decoded, speech = summary["similarity"]["decoded"], summary["similarity"]["speech"]
        table = Table(title="How alike the voices are (Resemblyzer; 1 is the same)", title_justify="left")
        table.add_column("compared with")
        table.add_column("decoded.wav", justify="right")
        table.add_column("speech.wav", justify="right")
        table.add_row(
            f"the reference, speaker {summary['reference']['speaker']}",
            f"{decoded['to_reference']:.2f}",
            f"{speech['to_reference']:.2f}",
            style="bold",
        )
        for name, score in decoded["to_others"].items():
            table.add_row(f"another, speaker {name}", f"{score:.2f}", f"{speech['to_others'][name]:.2f}")
        result.print(table)
    result.print(
        "This small model takes after a person in part: new speech of ten people that it never heard, cloned "
        "in this way, is 0.65 like them and 0.58 like strangers, a quarter of its words wrong (docs/lab.md).",
        soft_wrap=True,
    )
    took = summary["seconds"]
    result.print(
        f"cloned from {summary['reference']['seconds']:.1f} s in {took['clone']:.0f} s; spoke "
        f"{summary['speech_seconds']:.1f} s in {took['speak']:.1f} s, real-time factor "
        f"{summary['real_time_factor']:.2f}; {summary['cpu_seconds']:.0f} s of CPU time in all",
        soft_wrap=True,
    )
    for note in summary["notes"]:
        result.print(f"note: {note}", markup=False, soft_wrap=True)
    result.print(f"in {out}/: reference.wav, decoded.wav, speech.wav, mel.png, summary.json", soft_wrap=True)
