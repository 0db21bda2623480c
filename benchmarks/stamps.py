"""What the figures in a benchmark's folder are of: hashes of weights, and a stamp that resuming compares."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

STAMP = "asked.json"


def refuse(sentence: str) -> NoReturn:
    """End with a sentence and the exit code of a user's mistake."""
    print(sentence, file=sys.stderr)
    raise SystemExit(2)


def _identity(path: Path) -> str:
    from revox.evaluation.cache import file_identity

    if not path.is_file():
        refuse(f"{path} is missing")
    return file_identity(path)


def weights_identity(checkpoint: Path) -> str:
    """A hash of the weights in the folder `checkpoint`."""
    from revox.checkpoint.tensors import WEIGHTS

    return _identity(checkpoint / WEIGHTS)


def encoder_identity(encoder: Path) -> str:
    """A hash of an encoder's file, or of the one in a run's folder."""
    from revox.checkpoint.encoder_file import find_encoder

    return _identity(find_encoder(encoder))


def origin(checkpoint: Path) -> dict[str, str | None]:
    """What results in a log are of: hashes of a checkpoint's weights and of its trained student, if any."""
    from revox.coding.student import STUDENT_FILE, student_folder

    student = student_folder(checkpoint) / STUDENT_FILE
    return {
        "checkpoint": weights_identity(checkpoint),
        "student": _identity(student) if student.is_file() else None,
    }


def rows_of(log: Path, origin: dict[str, str | None]) -> list[dict[str, Any]]:
    """The rows of the file `log` that are of `origin`; says how many others it has."""
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    mine = [row for row in rows if all(name in row and row[name] == origin[name] for name in origin)]
    if others := len(rows) - len(mine):
        print(f"{log}: {others} rows are of another checkpoint or student and do not count", file=sys.stderr)
    return mine


def stamp(out: Path, asked: dict[str, Any]) -> None:
    """Write into the folder `out` what was asked, or refuse where it was begun with something else.

    A folder of before there were stamps is taken to be of what is asked now.
    """
    path = out / STAMP
    if path.is_file():
        before = json.loads(path.read_text())
        if other := [name for name in before | asked if before.get(name) != asked.get(name)]:
            refuse(f"{out} was begun with other {' and '.join(other)}: give the same, or name another OUT")
        return
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asked, indent=1) + "\n")
