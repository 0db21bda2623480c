"""Mark audio as synthetic: a signed manifest where the container holds one, tags wherever there is room."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from revox.marking.errors import MarkError
from revox.marking.manifest import MEDIA_TYPES, add_manifest
from revox.marking.record import MarkRecord
from revox.marking.signer import Signer
from revox.marking.tags import add_tags
from revox.speech import Audio, encode_audio, format_for
from revox.speech.files import replace_file

UNMARKABLE = ("pcm",)
"""Formats without any place for a mark; headers and the log are what is left."""


@dataclass(frozen=True)
class Marked:
    """What `write_marked` wrote: its bytes, how many samples were clipped, and how it is marked."""

    data: bytes
    clipped: int
    how: str


def how_marked(format: str, signer: Signer | None) -> str:
    """How `mark_bytes` marks a format: "manifest" (and tags), "tags" or "none"."""
    name = format_for(None, format)
    if name in UNMARKABLE:
        return "none"
    return "manifest" if signer is not None and name in MEDIA_TYPES else "tags"


def mark_bytes(data: bytes, format: str, *, record: MarkRecord, signer: Signer | None) -> bytes:
    """The encoded audio `data`, marked; its samples are unchanged bit for bit.

    `format` is a name of `revox.speech.FORMATS`. Without a signer, and in opus and aac, the mark is tags
    only; pcm has no place for a mark and is returned as it is. Raises MarkError on data that is not audio of
    that format.
    """
    name = format_for(None, format)
    how = how_marked(name, signer)
    if how == "none":
        return data
    tagged = add_tags(data, name, record, manifest=how == "manifest")
    if signer is None or how != "manifest":
        return tagged
    return add_manifest(tagged, name, record, signer)  # last, since it covers the tags too


def mark_file(
    path: str | os.PathLike[str], *, record: MarkRecord, signer: Signer | None, format: str | None = None
) -> None:
    """Mark an audio file in place, in one step. Raises as `mark_bytes` does."""
    path = Path(path)
    name = format_for(path, format)
    if name in UNMARKABLE:
        raise MarkError(f"{path.name}: raw samples have no place for a mark; write another format")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MarkError(f"{path} cannot be read ({error.strerror}); check the path") from None
    _write(path, mark_bytes(data, name, record=record, signer=signer))


def write_marked(
    target: str | os.PathLike[str] | BinaryIO,
    audio: Audio,
    format: str | None = None,
    *,
    record: MarkRecord | None,
    signer: Signer | None,
) -> Marked:
    """Encode `audio`, mark it (unless `record` is None) and write it to a path or a binary file.

    A path is replaced in one step. Raises AudioError as `revox.speech.write_audio` does, and MarkError.
    """
    path = Path(target) if isinstance(target, str | os.PathLike) else None
    name = format_for(path, format)
    data, clipped = encode_audio(audio, name)
    how = "none"
    if record is not None:
        data, how = mark_bytes(data, name, record=record, signer=signer), how_marked(name, signer)
    _write(target, data)
    return Marked(data, clipped, how)


def _write(target: str | os.PathLike[str] | BinaryIO, data: bytes) -> None:
    if not isinstance(target, str | os.PathLike):
        target.write(data)
        return
    path = Path(target)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # /dev/stdout, a named pipe
            path.write_bytes(data)
        else:
            replace_file(path, data)
    except FileNotFoundError:
        raise MarkError(f"there is no folder {path.parent}; create it or choose another path") from None
    except OSError as error:
        raise MarkError(f"{path} cannot be written ({error.strerror}); choose another path") from None
