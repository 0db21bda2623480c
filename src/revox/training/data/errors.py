"""The error of this room, and the libraries that it needs."""

from __future__ import annotations

import importlib
from typing import Any

from revox.training.errors import TrainingError


class DataError(TrainingError):
    """Training speech cannot be found or read; the message is one sentence with the cause and the fix."""


def library(name: str) -> Any:
    """A module of the extra `train`, imported when it is needed. Raises DataError when it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        root = name.partition(".")[0]
        raise DataError(
            f"training on speech needs the library `{root}`; install it with `pip install 'revox[train]'`"
        ) from None
