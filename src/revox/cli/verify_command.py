"""`revox verify`: is this file marked as synthetic, by whom, and was it changed since?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

EXIT_CODES = {"marked": 0, "broken": 1, "unmarked": 3}


def command(
    file: Annotated[Path, typer.Argument(help="An audio file.", show_default=False)],
    trust: Annotated[
        Path | None, typer.Option(help="PEM certificates of authorities to trust, besides this machine's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Read the mark of an audio file back: 0 marked and unchanged, 1 broken, 3 no mark."""
    from revox.marking import verify_file

    verdict = verify_file(file.expanduser(), trust)
    if as_json:
        print(json.dumps({"file": file.name, **asdict(verdict)}, indent=2))
    else:
        for sentence in verdict.sentences:
            print(sentence)
    raise typer.Exit(EXIT_CODES[verdict.state])
