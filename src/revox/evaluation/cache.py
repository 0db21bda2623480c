"""Measurements, cached by the content of what they were made from: a second run uses them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from revox.speech.files import load_or_build, stamp_of

if TYPE_CHECKING:
    from torch import Tensor

WHOLE = 1 << 30
"""Files up to this size are hashed whole; of larger ones evenly spread blocks and the time of change."""
BLOCKS, BLOCK = 64, 1 << 20


def file_identity(path: Path) -> str:
    """A hash that tells a file from any other."""
    size = path.stat().st_size
    if size <= WHOLE:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:24]
    digest = hashlib.sha256(f"{size} {path.stat().st_mtime_ns}".encode())
    with open(path, "rb") as file:
        for i in range(BLOCKS):
            file.seek((size - BLOCK) * i // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()[:24]


def folder_identity(folder: Path) -> str:
    """A hash of a checkpoint's files: parameters, tokenizer, weights and voices."""
    patterns = ("*.json", "*.safetensors", "voice_embedding/*.pt", "voice_embedding/*.safetensors")
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return stamp_of({path.relative_to(folder).as_posix(): file_identity(path) for path in paths})


class Cache:
    """A folder of results by key; one that is damaged is measured again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def record(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record (JSON values) under `key`, made and saved if it is missing or damaged."""
        return json.loads(
            load_or_build(self.folder / f"{key}.record", key, lambda: json.dumps(make()).encode())
        )

    def codes(self, key: str, make: Callable[[], tuple[Tensor, bool]]) -> tuple[Tensor, bool]:
        """Codes `[37, frames]` under `key` and whether their speech ended by itself, made if need be."""
        import torch

        def record() -> dict[str, Any]:
            codes, ended = make()
            return {"codes": codes.tolist(), "ended": ended}

        found = self.record(key, record)
        return torch.tensor(found["codes"], dtype=torch.int64), found["ended"]
