"""`revox keys`: the API keys of a server: add, list, remove."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Add, list or remove the API keys of a server.", no_args_is_help=True)

File = Annotated[
    Path, typer.Option("--file", help="The file of hashed keys, as in `revox serve --api-keys`.")
]
Name = Annotated[str, typer.Argument(help="The owner of the key; appears in logs and records of consent.")]


@app.command("add")
def add_command(
    name: Name,
    file: File,
    rate_limit: Annotated[
        int | None, typer.Option(min=1, help="Requests a minute; default: the server's limit.")
    ] = None,
) -> None:
    """Create a key and print it once; the file stores only its hash. A running server notices."""
    from revox.serving.keys import add_key

    print(add_key(file, name, rate_limit))
    print(f"revox: this is the key of {name}; it is not stored and cannot be shown again", file=sys.stderr)


@app.command("list")
def list_command(file: File) -> None:
    """List the names of the keys, their dates, and their limits."""
    from revox.serving.keys import read_keys

    for key in read_keys(file).keys:
        limit = "" if key.rate_limit is None else f"  {key.rate_limit} requests a minute"
        print(f"{key.name}  {key.created_at:%Y-%m-%d}{limit}")


@app.command("remove")
def remove_command(name: Name, file: File) -> None:
    """Remove a key from the file. A running server notices."""
    from revox.serving.keys import remove_key

    remove_key(file, name)
    print(f"revox: the key of {name} is removed", file=sys.stderr)
