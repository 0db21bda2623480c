"""`revox lab`, as it was called before 0.2.0: says the new name, and does what ships with the wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from revox.cli import demo_command
from revox.cli.marked import say

app = typer.Typer(help="Renamed: `revox demo`, and `python -m lab` in a clone.", no_args_is_help=True)


@app.command("path")
def path_command() -> None:
    """Renamed: `revox demo --path`."""
    say("`revox lab path` is now `revox demo --path`")
    demo_command.command(path=True)


@app.command("demo")
def lab_demo_command(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo-output"),
    steps: Annotated[int | None, typer.Option(help="Steps of the search for codes.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same result.")] = 0,
) -> None:
    """Renamed: `revox demo`."""
    say("`revox lab demo` is now `revox demo`")
    demo_command.command(out, steps, seed)


def _moved(name: str) -> None:
    def command(context: typer.Context) -> None:
        say(f"revox: `revox lab {name}` is now `python -m lab {name}`, run in a clone of the project")
        raise typer.Exit(2)

    command.__doc__ = f"Renamed: `python -m lab {name}` in a clone of the project."
    app.command(name, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(command)


for _name in ("fullsize", "pack", "state", "build", "recover"):
    _moved(_name)
