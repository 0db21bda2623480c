"""The error of this room."""

from __future__ import annotations

from revox.training.errors import TrainingError


class DataError(TrainingError):
    """Training speech cannot be found or read; the message is one sentence with the cause and the fix."""
