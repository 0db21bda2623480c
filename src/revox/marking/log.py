"""The log of what was marked and what was not: one JSON object a line, only ever added to.

A line has the time, the voice, the model, the format and the SHA-256 of what was written. The text is in it
only if the user asked for that. The log never leaves the machine.
"""

from __future__ import annotations

import json
from pathlib import Path

from revox.marking.errors import MarkError
from revox.marking.record import MarkRecord
from revox.marking.signer import state_folder
from revox.speech.files import append_line

NAME = "marked.jsonl"


def log_mark(
    record: MarkRecord,
    *,
    format: str,
    sha256: str,
    how: str,
    text: str | None = None,
) -> Path:
    """Add a line to the log in `state_folder()` and return the log's path.

    sha256: of the bytes that were written, in hexadecimal. how: "manifest", "tags", "headers" or "none".
    Raises MarkError when the line cannot be written.
    """
    path = state_folder() / NAME
    line = {
        "time": record.created_at.isoformat(),
        "mark": how,
        "voice": record.voice,
        "model": record.model,
        "software": record.software,
        "format": format,
        "sha256": sha256,
        **({} if text is None else {"text": text}),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        append_line(path, json.dumps(line).encode())
    except OSError as error:
        raise MarkError(
            f"{path} cannot be written ({error.strerror}); set REVOX_STATE to a folder that you can write to"
        ) from None
    return path
