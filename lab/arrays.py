"""Arrays cached on disk."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from revox.speech.files import load_or_build

Arrays = dict[str, np.ndarray]


def cached_arrays(path: Path, stamp: str, build: Callable[[], Arrays]) -> Arrays:
    """The arrays cached at `path` for `stamp`, built and saved first if they are not there."""
    return read_npz(load_or_build(path, stamp, lambda: npz_bytes(build())))


def npz_bytes(arrays: Arrays) -> bytes:
    """The bytes of a .npz file that holds `arrays`."""
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's own option could have an array's name
    return file.getvalue()


def read_npz(content: bytes) -> Arrays:
    """What `npz_bytes` was given."""
    with np.load(io.BytesIO(content)) as arrays:
        return dict(arrays)
