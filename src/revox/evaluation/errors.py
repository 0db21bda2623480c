"""The error of this room."""

from __future__ import annotations


class EvaluationError(ValueError):
    """Nothing can be measured as asked; the message says why and how to fix it."""
