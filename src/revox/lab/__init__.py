"""The small Voxtral that ships with the project: its speech, its training, its folder."""

from __future__ import annotations

from pathlib import Path

from revox.lab.errors import LabError

__all__ = ["LabError", "checkpoint_folder"]


def checkpoint_folder() -> Path:
    """The folder of the small checkpoint that ships with the project.

    Raises LabError if this copy of the project came without it.
    """
    folder = Path(__file__).parent / "checkpoint"
    if not (folder / "params.json").is_file():
        raise LabError(
            f"{folder} holds no checkpoint: install revox again, or make one with `revox lab build`"
        )
    return folder
