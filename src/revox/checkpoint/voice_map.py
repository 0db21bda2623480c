"""A low-rank linear map of voice embeddings, learned over many speakers and baked into voices one by one.

Every row e of an embedding becomes e + up down e, the end frame excepted. The file is safetensors with
`down` `[rank, dim]` and `up` `[dim, rank]`, float32, as `revox train adapt --adapt map` writes it. The
weights and the presets stay as they are, and an engine that makes a voice of ref_audio does not apply it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revox.checkpoint.encoder_file import RECORD_KEY, read_record
from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.params import read_params
from revox.checkpoint.release import EMBEDDING_TABLE
from revox.checkpoint.tensors import (
    folder_tensors,
    open_tensors,
    read_header,
    tensor_sha256,
    write_safetensors_stream,
)

MAP_FILE = "voice_map.safetensors"
"""The map's name in a run's folder."""
_TABLE = "table_sha256"


@dataclass(frozen=True)
class VoiceMap:
    """`up` `[dim, rank]` and `down` `[rank, dim]`, float32; how they were learned; the file's SHA-256."""

    up: Tensor
    down: Tensor
    record: dict[str, Any]
    sha256: str

    def applied(self, embedding: Tensor) -> Tensor:
        """The voice embedding `[N, dim]` mapped, bf16. Raises CheckpointError if it does not stay finite."""
        mapped = map_embedding(embedding, self.up, self.down).to(torch.bfloat16)
        if not bool(mapped.isfinite().all()):
            raise CheckpointError("the map takes this voice out of the range of bf16; train it again.")
        return mapped


def map_embedding(embedding: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A voice embedding `[N, dim]` mapped, in float32, its last row as it is; differentiable."""
    rows = embedding.float()
    return torch.cat((rows[:-1] + rows[:-1] @ down.T @ up.T, rows[-1:]))


def read_map(path: Path, checkpoint: Path) -> VoiceMap:
    """The map in the file `path`, or in the run's folder `path`, for the folder `checkpoint`.

    Raises CheckpointError when it is missing, damaged, of another size or of another checkpoint.
    """
    path = path.expanduser()
    path = path / MAP_FILE if path.is_dir() else path
    dim, header = read_params(checkpoint).dim, read_header(path)
    rank = header["down"].shape[0] if "down" in header and header["down"].shape else 0
    found = {name: (entry.shape, entry.dtype) for name, entry in header.items()}
    if not rank or found != {"up": ((dim, rank), "F32"), "down": ((rank, dim), "F32")}:
        raise CheckpointError(
            f"{path} holds no map of this checkpoint's voices, float32 `down` [rank, {dim}] and `up` "
            f"[{dim}, rank]; name what `revox train adapt --adapt map` wrote for it."
        )
    record = read_record(path)
    if record.get(_TABLE) != _table_sha256(checkpoint):
        raise CheckpointError(
            f"{path} was learned on embeddings of another table of audio codes than {checkpoint} has; train "
            "it on this checkpoint."
        )
    with open_tensors(path) as file:
        up, down = file.get_tensor("up"), file.get_tensor("down")
    if not bool(up.isfinite().all() & down.isfinite().all()):
        raise CheckpointError(f"{path} holds values that are not finite; the run diverged: train it again.")
    return VoiceMap(up, down, record, hashlib.sha256(path.read_bytes()).hexdigest())


def write_map(path: Path, up: Tensor, down: Tensor, checkpoint: Path, record: Mapping[str, Any]) -> None:
    """Write a map learned on the folder `checkpoint`. Raises OSError."""
    entries = [(name, tuple(t.shape), "F32", t.float()) for name, t in (("down", down), ("up", up))]
    about = json.dumps({**record, _TABLE: _table_sha256(checkpoint)})
    write_safetensors_stream(path, entries, {"format": "pt", RECORD_KEY: about})


def _table_sha256(checkpoint: Path) -> str | None:
    entry = folder_tensors(checkpoint).get(EMBEDDING_TABLE)
    return None if entry is None else tensor_sha256(entry)
