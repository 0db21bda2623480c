"""`revox inspect`: what a checkpoint holds and can do, from its headers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from revox.cli.options import CheckpointArgument, CheckpointOption, Revision, chosen_checkpoint

if TYPE_CHECKING:
    from rich.console import Console

    from revox.checkpoint.inspect import Report


def command(
    checkpoint: CheckpointArgument = None,
    checkpoint_option: CheckpointOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    revision: Revision = None,
) -> None:
    """Say what a checkpoint holds, what it can do, and what each runtime does with it.

    Only headers are read. Exit code 2, with a sentence, if something in the folder must be fixed.
    """
    from revox.checkpoint.errors import CheckpointError
    from revox.checkpoint.inspect import inspect
    from revox.checkpoint.locate import locate

    report = inspect(locate(chosen_checkpoint(checkpoint, checkpoint_option), revision))
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        from rich.console import Console

        _print(report, Console())
    if report.problems:
        raise CheckpointError(report.problems[0])


def _print(report: Report, console: Console) -> None:
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    def table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
        made = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
            padding=(0, 2, 0, 0),
        )
        for column in columns:
            made.add_column(column, justify="right" if column in right else "left", overflow="fold")
        return made

    sizes = report.sizes
    console.print(f"[bold]{escape(str(report.folder))}[/]", soft_wrap=True, highlight=False)
    console.print(
        f"{report.parameters / 1e6:,.1f} M parameters, {decimal(report.bytes, precision=2)} of weights;"
        f" {sizes['sampling_rate']} Hz, {sizes['frame_rate']:g} frames a second,"
        f" {sizes['codebooks']} codebooks ({sizes['semantic_codes']} semantic codes,"
        f" {sizes['acoustic_levels']} acoustic levels); backbone {sizes['layers']} x {sizes['dim']}",
        highlight=False,
    )
    console.print()

    right = ("found", "expected", "parameters", "size", "rows", "seconds")
    tensors = table("Tensors", "component", "found", "expected", "parameters", "size", "types", right=right)
    for part in report.components:
        style = "" if part.found == part.expected else "yellow"
        found = f"{part.found} ({part.quantized} quantized)" if part.quantized else str(part.found)
        types = ", ".join(f"{dtype} x {count}" for dtype, count in sorted(part.dtypes.items()))
        parameters, size = f"{part.parameters / 1e6:,.2f} M", decimal(part.bytes, precision=2)
        tensors.add_row(part.name, found, str(part.expected), parameters, size, types, style=style)
    console.print(tensors)
    console.print()

    if report.voices:
        voices = table("Voices", "name", "rows", "seconds", "origin", right=right)
        for voice in report.voices:
            agree = voice.rows == voice.tekken_rows and voice.in_params
            rows = str(voice.rows) if voice.rows is not None else "missing"
            voices.add_row(
                voice.name,
                rows if agree else f"{rows} (tekken.json: {voice.tekken_rows})",
                "" if voice.seconds is None else f"{voice.seconds:.1f}",
                "added by revox" if voice.added_by_revox else "preset",
                style="" if agree else "yellow",
            )
        console.print(voices)
        console.print()

    capabilities = table("What it can do", "capability", "", "why")
    for capability in report.capabilities:
        mark = "[green]yes[/]" if capability.available else "[red]no[/]"
        capabilities.add_row(capability.name, mark, capability.detail)
    console.print(capabilities)
    console.print()

    runtimes = table("What each runtime does with it", "runtime", "presets", "ref_audio / cloning")
    for runtime in report.runtimes:
        runtimes.add_row(runtime.name, escape(runtime.preset_speech), escape(runtime.ref_audio))
    console.print(runtimes)
    for note in report.notes:
        console.print(f"note: {escape(note)}", style="yellow", highlight=False)
    for problem in report.problems[1:]:
        console.print(f"also: {escape(problem)}", style="red", highlight=False)
