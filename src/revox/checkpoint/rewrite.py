"""A weight file written anew from tensors that lie elsewhere: copied by the system, synced, read back.

The order of the data is kept, so that what lay side by side is one copy. Memory stays at a few blocks.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from revox.checkpoint.encoder_file import StoredTensor, sha256_in_file
from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.tensors import TensorHeader, read_header

_BLOCK = 64 << 20  # bytes that the system is asked to copy at once
_PAGE = 4096


@dataclass(frozen=True)
class Piece:
    """A tensor of the file to be written, and where its bytes come from."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    source: TensorHeader | StoredTensor

    @classmethod
    def of(cls, name: str, source: TensorHeader | StoredTensor) -> Piece:
        """The piece of this name with the bytes, shape and type of `source`."""
        if isinstance(source, TensorHeader):
            return cls(name, source.shape, source.dtype, source.end - source.start, source)
        width = {"F32": 4}.get(source.dtype, 2)
        return cls(name, source.lies.shape, source.dtype, source.lies.parameters * width, source)


@dataclass(frozen=True)
class Layout:
    """A file to be written: its first bytes (length and JSON) and its tensors in the order of their data."""

    header: bytes
    pieces: list[Piece]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(piece.size for piece in self.pieces)


def layout_of(pieces: list[Piece], metadata: Mapping[str, str], data: int = 0) -> Layout:
    """The file of these tensors, whose data begin where in a page `data` does: so blocks can be shared."""
    listed: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for piece in pieces:
        listed[piece.name] = {
            "dtype": piece.dtype,
            "shape": list(piece.shape),
            "data_offsets": [at, at + piece.size],
        }
        at += piece.size
    raw = json.dumps(listed, separators=(",", ":"), ensure_ascii=False).encode()
    align, rest = (_PAGE, data % _PAGE) if data and data % 8 == 0 else (8, 0)
    raw += b" " * ((rest - 8 - len(raw)) % align)
    return Layout(len(raw).to_bytes(8, "little") + raw, pieces)


def first_bytes(path: Path) -> bytes:
    """What stands before the data in a safetensors file: the length of its JSON, and the JSON."""
    with open(path, "rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))


def reached(step: str) -> None:
    """Called after every change to the disk; tests kill the process here."""


def write_layout(file: BinaryIO, layout: Layout, told: Callable[[int, int], None]) -> None:
    """Header and tensors into an open file, neighbours in one copy, and synced."""
    file.write(layout.header)
    file.flush()
    done, size = len(layout.header), layout.size
    pieces = list(layout.pieces)
    while pieces:
        source = pieces[0].source
        count = 1
        if isinstance(source, TensorHeader):
            start, end = source.start, source.end
            while count < len(pieces):
                following = pieces[count].source
                if (
                    not isinstance(following, TensorHeader)
                    or following.file != source.file
                    or following.start != end
                ):
                    break
                end = following.end
                count += 1
            for copied in copy_stretch(source.file, file.fileno(), start, end):
                done += copied
                told(done, size)
                reached("copied")
        else:
            for block in source.blocks():
                _write_all(file.fileno(), block)
                done += len(block)
                told(done, size)
            reached("added")
        pieces = pieces[count:]
    os.fsync(file.fileno())
    if os.fstat(file.fileno()).st_size != size:
        raise CheckpointError("a source changed while it was copied; nothing was changed: try again.")


def copy_stretch(path: Path, to: int, start: int, end: int) -> Iterator[int]:
    """Bytes `start` to `end` of a file behind what is written to `to`, copied by the system where it can."""
    at = start
    with open(path, "rb", buffering=0) as file:
        by_system = hasattr(os, "copy_file_range")
        while at < end:
            count = min(_BLOCK, end - at)
            if by_system:
                try:
                    copied = os.copy_file_range(file.fileno(), to, count, offset_src=at)
                except OSError as error:
                    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
                        raise
                    by_system = False
                    continue
            else:
                block = os.pread(file.fileno(), min(count, 4 << 20), at)
                _write_all(to, memoryview(block))
                copied = len(block)
            if not copied:
                raise CheckpointError(
                    f"{path} was cut short while it was read; nothing was changed: try again."
                )
            at += copied
            yield copied


def _write_all(to: int, block: memoryview) -> None:
    while block:
        block = block[os.write(to, block) :]


def verify_layout(path: Path, layout: Layout, told: Callable[[int, int], None]) -> dict[str, str]:
    """Read a written file back from the disk and compare every tensor's hash; gives the hashes.

    The other side is the source, read again, or for what was converted the hash taken when it was checked.
    Raises CheckpointError at the first that differs.
    """
    with open(path, "rb") as file, contextlib.suppress(OSError, AttributeError):
        # Out of the cache, so that the disk is what answers.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found = read_header(path)
    if first_bytes(path) != layout.header or list(found) != [piece.name for piece in layout.pieces]:
        raise CheckpointError(f"{path.name} reads back with another header than was written; {_DISK}")
    hashes = {}
    done, size = 0, layout.size - len(layout.header)
    # A second thread reads the sources: one tensor's source while the one before is read back.
    with ThreadPoolExecutor(1) as pool:
        try:
            for piece, there in zip(layout.pieces, pool.map(_hash_of, layout.pieces), strict=True):
                if sha256_in_file(found[piece.name]) != there:
                    raise CheckpointError(
                        f"tensor {piece.name} reads back with another hash than was written; {_DISK}"
                    )
                hashes[piece.name] = there
                done += piece.size
                told(done, size)
        finally:
            pool.shutdown(cancel_futures=True)
    return hashes


def _hash_of(piece: Piece) -> str:
    return piece.source.sha256 if isinstance(piece.source, StoredTensor) else sha256_in_file(piece.source)


_DISK = "nothing was changed: check the disk and try again."
