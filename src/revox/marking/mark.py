"""Mark audio as synthetic: a signed manifest where the container holds one, tags wherever there is room."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from revox.marking.manifest import MEDIA_TYPES, add_manifest
from revox.marking.record import MarkRecord
from revox.marking.signer import Signer
from revox.marking.tags import add_tags
from revox.speech import Audio, encode_audio, format_for
from revox.speech.write import Chapter, encode_parts, write_bytes

_IN_MEMORY = 16 << 20  # bytes of a file


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
    if how_marked(name, signer) == "none":
        return data
    marked = io.BytesIO()
    _mark_file(io.BytesIO(data), marked, name, record, signer)
    return marked.getvalue()


def _mark_file(
    encoded: BinaryIO, marked: BinaryIO, name: str, record: MarkRecord, signer: Signer | None
) -> None:
    signs = signer is not None and how_marked(name, signer) == "manifest"
    with _scratch(encoded) if signs else contextlib.nullcontext(marked) as tagged:
        add_tags(encoded, tagged, name, record, manifest=signs)
        if signer is not None and signs:
            add_manifest(tagged, marked, name, record, signer)  # last, since it covers the tags too


def _scratch(like: BinaryIO) -> BinaryIO:
    """An empty file, in memory where one of the size of `like` has room there."""
    size = like.seek(0, os.SEEK_END)
    return io.BytesIO() if size < _IN_MEMORY else cast(BinaryIO, tempfile.TemporaryFile())


def write_marked(
    target: str | os.PathLike[str] | BinaryIO,
    audio: Audio,
    format: str | None = None,
    *,
    record: MarkRecord | None,
    signer: Signer | None,
) -> tuple[bytes, int]:
    """Encode `audio`, mark it (unless `record` is None) and write it to a path or a binary file.

    A path is replaced in one step. Returns the bytes written and the number of samples clipped. Raises
    AudioError as `revox.speech.write_audio` does, and MarkError.
    """
    name = format_for(target, format)
    data, clipped = encode_audio(audio, name)
    if record is not None:
        data = mark_bytes(data, name, record=record, signer=signer)
    write_bytes(target, data)
    return data, clipped


def write_marked_parts(
    target: str | os.PathLike[str] | BinaryIO,
    parts: Iterable[Audio],
    format: str | None = None,
    *,
    record: MarkRecord | None,
    signer: Signer | None,
    chapters: Sequence[Chapter] = (),
) -> tuple[str, int]:
    """As `write_marked`, of parts of one audio that may come while it is made, in memory that does not grow.

    `chapters` are in the file where its container has a place for them.

    Returns the SHA-256 of what was written, in hexadecimal, and the number of samples clipped.
    """
    name = format_for(target, format)
    folder = _scratch_folder(target)
    with (
        tempfile.TemporaryFile(dir=folder) as encoded,
        tempfile.TemporaryFile(dir=folder) as marked,
    ):
        clipped = encode_parts(encoded, parts, name, chapters=chapters)
        written = encoded
        if record is not None and how_marked(name, signer) != "none":
            _mark_file(encoded, marked, name, record, signer)
            written = marked
        written.seek(0)
        digest = hashlib.sha256()
        while block := written.read(1 << 20):
            digest.update(block)
        written.seek(0)
        write_bytes(target, written)
    return digest.hexdigest(), clipped


def _scratch_folder(target: str | os.PathLike[str] | BinaryIO) -> Path | None:
    """The target's own where that is possible: the system's folder of temporary files may be in memory."""
    if not isinstance(target, str | os.PathLike):
        return None
    path = Path(target)
    special = path.exists() and not path.is_file()  # /dev/stdout, a named pipe
    return path.parent if os.access(path.parent, os.W_OK) and not special else None
