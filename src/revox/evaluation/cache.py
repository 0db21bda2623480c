"""What was measured, kept by the content of what it was measured on: a second run takes it up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from revox.checkpoint.write import replace_file

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
    """A folder of results: small ones as JSON, codes as safetensors. Written in one step each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def record(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record under `key`, made if it is not there or is damaged."""
        found = self.find(key)
        if found is not None:
            return found
        made = make()
        replace_file(self.folder / f"{key}.json", json.dumps(made))
        return made

    def find(self, key: str) -> dict[str, Any] | None:
        """The record under `key`, or None."""
        try:
            found = json.loads((self.folder / f"{key}.json").read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def codes(self, key: str, make: Callable[[], tuple[Tensor, bool]]) -> tuple[Tensor, bool]:
        """Codes `[37, frames]` under `key` and whether their speech ended by itself, made if need be."""
        from safetensors import SafetensorError
        from safetensors.torch import load, save

        path = self.folder / f"{key}.safetensors"
        try:
            kept = load(path.read_bytes())
            return kept["codes"].long(), bool(kept["ended"])
        except (OSError, SafetensorError, KeyError):
            pass
        import torch

        codes, ended = make()
        stored = {"codes": codes.cpu().to(torch.int16).contiguous(), "ended": torch.tensor(ended)}
        replace_file(path, save(stored))
        return codes.cpu().long(), ended
