"""What can go wrong in training."""

from __future__ import annotations


class TrainingDivergedError(ValueError):
    """The loss is no longer a number. What was saved before is kept."""
