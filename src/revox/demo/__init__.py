"""The small checkpoint that ships with revox, and the demonstration that runs on it."""

from __future__ import annotations

from pathlib import Path

from revox.demo.errors import DemoError

__all__ = ["DemoError", "checkpoint_folder", "grammar_file"]


def checkpoint_folder() -> Path:
    """The folder of the small checkpoint that ships with revox.

    Raises DemoError if this installation came without it.
    """
    folder = Path(__file__).parent / "checkpoint"
    if not (folder / "params.json").is_file():
        raise DemoError(f"{folder} holds no checkpoint; install revox again")
    return folder


def grammar_file() -> Path:
    """The sentences that the small checkpoint speaks, as a JSGF grammar for a recognizer."""
    return Path(__file__).parent / "grammar.jsgf"
