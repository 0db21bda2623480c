"""Mark audio as synthetic: a signed manifest where the container holds one, tags wherever there is room."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import BinaryIO

from revox.marking.manifest import MEDIA_TYPES, add_manifest
from revox.marking.record import MarkRecord
from revox.marking.signer import Signer
from revox.marking.tags import add_tags
from revox.speech import Audio, encode_audio, format_for
from revox.speech.write import encode_parts, write_bytes


def how_marked(format: str, signer: Signer | None) -> str:
    """How `mark_bytes` marks a format: "manifest" (and tags), "tags" or "none"."""
    name = format_for(None, format)
    if name == "pcm":  # without any place for a mark; headers and the log are what is left
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


def write_marked(
    target: str | os.PathLike[str] | BinaryIO,
    audio: Audio | Iterable[Audio],
    format: str | None = None,
    *,
    record: MarkRecord | None,
    signer: Signer | None,
) -> tuple[bytes, int]:
    """Encode `audio`, mark it (unless `record` is None) and write it to a path or a binary file.

    Parts of one audio, which may come while it is made, are encoded as they come. A path is replaced in one
    step. Returns the bytes written and the number of samples clipped. Raises AudioError as
    `revox.speech.write_audio` does, and MarkError.
    """
    name = format_for(target, format)
    if isinstance(audio, Audio):
        data, clipped = encode_audio(audio, name)
    else:
        data, clipped = encode_parts(audio, name)
    if record is not None:
        data = mark_bytes(data, name, record=record, signer=signer)
    write_bytes(target, data)
    return data, clipped
