"""What can go wrong in training, and the libraries that may be missing."""

from __future__ import annotations

import importlib
from typing import Any


class TrainingError(ValueError):
    """A training cannot be done as asked: the sentence says why, and what would do."""


class TrainingDivergedError(TrainingError):
    """The loss is not finite. The state that was saved before stays."""


def library(name: str) -> Any:
    """A module of the extra `train`, imported when it is needed. Raises TrainingError when it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        root = name.partition(".")[0]
        raise TrainingError(
            f"this training needs the library `{root}`; install it with `pip install 'revox[train]'`"
        ) from None
