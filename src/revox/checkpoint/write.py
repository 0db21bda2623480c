"""Files are written beside their place, synced and renamed, so a reader sees the old file or the new one."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def replace_file(path: str | os.PathLike[str], content: bytes | str | Callable[[BinaryIO], None]) -> None:
    """Put `content` at `path` in one step, never through a link.

    A path that is a link (a hub cache's files point into blobs shared by revisions) becomes a real file, and
    what it pointed to stays as it was. Text is written as UTF-8; a callable is given the open binary file.
    Whatever goes wrong while writing, `path` is left untouched and nothing is left beside it.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        mode = path.stat().st_mode & 0o777
    except OSError:
        mode = None
    try:
        with open(beside, "xb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode | 0o200)
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    sync_folder(path.parent)


def pt_bytes(value: object) -> bytes:
    """What `torch.save` writes of `value`, to be put into a file, which tells a full disk as an OSError
    (torch in words of its own)."""
    import torch

    whole = io.BytesIO()
    torch.save(value, whole)
    return whole.getvalue()


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the folder's list of names durable, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
