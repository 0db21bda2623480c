"""What was marked, and what was not: one line of JSON each, only ever added to.

A line has the time, the voice, the model, the format and the SHA-256 of what was written. The text is in it
only where that was asked for. The log never leaves the machine.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from revox.marking.errors import MarkError
from revox.marking.record import MarkRecord
from revox.marking.signer import state_folder

NAME = "marked.jsonl"


def log_mark(
    record: MarkRecord,
    *,
    format: str,
    sha256: str,
    how: str,
    text: str | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Path:
    """Add a line to `folder`'s log (`state_folder()` unless given) and return its path.

    sha256: of the bytes that were written, in hexadecimal. how: "manifest", "tags", "headers" or "none".
    Raises MarkError, with a sentence, when the line cannot be written.
    """
    path = (Path(folder) if folder is not None else state_folder()) / NAME
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
    data = json.dumps(line).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            _append(descriptor, data)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise MarkError(
            f"{path} cannot be written ({error.strerror}); set REVOX_STATE to a folder of your own"
        ) from None
    return path


def _append(descriptor: int, data: bytes) -> None:
    """Whole lines, whatever other commands write at the time or were killed at."""
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX)
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        data = b"\n" + data
    while data:
        data = data[os.write(descriptor, data) :]


def sha256_of(data: bytes) -> str:
    """SHA-256 in hexadecimal, as the log keeps it."""
    return hashlib.sha256(data).hexdigest()
