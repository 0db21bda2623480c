"""Mark audio as synthetic: a signed manifest where the container takes one, tags wherever there is room."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from revox.checkpoint.write import replace_file
from revox.marking.errors import MarkError
from revox.marking.manifest import MEDIA_TYPES, add_manifest
from revox.marking.record import MarkRecord
from revox.marking.signer import Signer
from revox.marking.tags import add_tags
from revox.speech import Audio, encode_audio, format_for

UNMARKABLE = ("pcm",)
"""Formats without any place for a mark; headers and the log are what is left."""


@dataclass(frozen=True)
class Marked:
    """What `write_marked` wrote: its bytes, the samples that were clipped, and how it is marked."""

    data: bytes
    clipped: int
    manifest: bool
    tags: bool


def mark_bytes(data: bytes, format: str, *, record: MarkRecord, signer: Signer | None) -> bytes:
    """The encoded audio `data`, marked; its samples are unchanged bit for bit.

    `format` is a name of `revox.speech.FORMATS`. Without a signer, and in opus and aac, the mark is tags
    only; pcm has no place for a mark and comes back as it is. Raises MarkError, with a sentence, on data that
    is not audio of that format.
    """
    name = format_for(None, format)
    if name in UNMARKABLE:
        return data
    signed = signer is not None and name in MEDIA_TYPES
    tagged = add_tags(data, name, record, manifest=signed)
    # Last, since the manifest covers the tags too.
    return add_manifest(tagged, name, record, signer) if signer is not None and signed else tagged


def mark_file(
    path: str | os.PathLike[str],
    *,
    record: MarkRecord,
    signer: Signer | None,
    format: str | None = None,
) -> None:
    """Mark an audio file in its place (written beside, then renamed). Raises as `mark_bytes` does."""
    path = Path(path)
    name = format_for(path, format)
    if name in UNMARKABLE:
        raise MarkError(f"{path.name}: raw samples have no place for a mark; write another format")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MarkError(f"{path} cannot be read ({error.strerror}); check the path") from None
    marked = mark_bytes(data, name, record=record, signer=signer)
    try:
        replace_file(path, marked)
    except OSError as error:
        raise MarkError(f"{path} cannot be written ({error.strerror}); it is left as it was") from None


def write_marked(
    target: str | os.PathLike[str] | BinaryIO,
    audio: Audio,
    format: str | None = None,
    *,
    record: MarkRecord,
    signer: Signer | None,
) -> Marked:
    """`revox.speech.write_audio`, marked: encode `audio`, mark it, write it to a path or a binary file.

    A path is written beside and renamed. Raises AudioError as `write_audio` does, and MarkError.
    """
    path = Path(target) if isinstance(target, str | os.PathLike) else None
    name = format_for(path, format)
    data, clipped = encode_audio(audio, name)
    data = mark_bytes(data, name, record=record, signer=signer)
    if path is None:
        target.write(data)  # type: ignore[union-attr]
    elif path.exists() and not path.is_file():  # /dev/stdout, a named pipe
        path.write_bytes(data)
    else:
        replace_file(path, data)
    tags = name not in UNMARKABLE
    return Marked(data, clipped, tags and signer is not None and name in MEDIA_TYPES, tags)
