"""What can go wrong in training."""

from __future__ import annotations


class TrainingError(ValueError):
    """A training cannot be done as asked: the sentence says why, and what would do."""


class TrainingDivergedError(TrainingError):
    """The loss is not finite. The state that was saved before stays."""
