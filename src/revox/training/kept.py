"""What was made before a run's first step, kept in a file and taken from there when it is wanted again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from revox.speech.files import replace_file


def write_kept(path: Path, stamp: str, tensors: Mapping[str, Tensor]) -> None:
    """Keep `tensors`; `stamp` says what they were made from."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    replace_file(path, save(whole, metadata={"stamp": stamp}))


def read_kept(path: Path, stamp: str) -> dict[str, Tensor]:
    """What was kept under that stamp; nothing from a file that is missing, damaged, or of another stamp."""
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("stamp") != stamp:
                return {}
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return {}
