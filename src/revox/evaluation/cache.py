"""What was measured, kept by the content of what it was measured on: a second run takes it up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from revox.speech.files import replace_file

if TYPE_CHECKING:
    from torch import Tensor

WHOLE = 1 << 30
"""Files up to this size are hashed whole; of larger ones evenly spread blocks and the time of change."""
BLOCKS, BLOCK = 64, 1 << 20


def content_hash(data: bytes) -> str:
    """SHA-256 of `data`, shortened to 24 hex digits."""
    return hashlib.sha256(data).hexdigest()[:24]


def key_of(**parts: Any) -> str:
    """A key from everything that a result depends on: plain JSON values."""
    return content_hash(json.dumps(parts, sort_keys=True, default=str).encode())


def file_identity(path: Path) -> str:
    """A hash by which a file is told from any other."""
    size = path.stat().st_size
    if size <= WHOLE:
        return content_hash(path.read_bytes())
    digest = hashlib.sha256(f"{size} {path.stat().st_mtime_ns}".encode())
    with open(path, "rb") as file:
        for i in range(BLOCKS):
            file.seek((size - BLOCK) * i // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()[:24]


def folder_identity(folder: Path) -> str:
    """A hash of a checkpoint's files: parameters, tokenizer, weights and voices."""
    names = sorted(
        path
        for pattern in ("*.json", "*.safetensors", "voice_embedding/*.pt", "voice_embedding/*.safetensors")
        for path in folder.glob(pattern)
    )
    return key_of(files={p.relative_to(folder).as_posix(): file_identity(p) for p in names})


class Cache:
    """A folder of results, each a line with its checksum and a line of JSON, written in one step.

    What does not match its checksum (a disk that was full, an edit, an older revox) is measured again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def record(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record under `key`, made if it is not there or is damaged."""
        found = self.find(key)
        if found is not None:
            return found
        made = make()
        body = json.dumps(made).encode()
        replace_file(self._path(key), content_hash(body).encode() + b"\n" + body)
        return made

    def find(self, key: str) -> dict[str, Any] | None:
        """The record under `key`, or None when it is not there or is damaged."""
        try:
            checksum, _, body = self._path(key).read_bytes().partition(b"\n")
        except OSError:
            return None
        return json.loads(body) if checksum == content_hash(body).encode() else None

    def codes(self, key: str, make: Callable[[], tuple[Tensor, bool]]) -> tuple[Tensor, bool]:
        """Codes `[37, frames]` under `key` and whether their speech ended by itself, made if need be."""
        import torch

        def made() -> dict[str, Any]:
            codes, ended = make()
            return {"codes": codes.tolist(), "ended": ended}

        kept = self.record(key, made)
        return torch.tensor(kept["codes"], dtype=torch.int64), kept["ended"]

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.record"
