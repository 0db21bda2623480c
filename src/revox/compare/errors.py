"""The error of this room."""

from __future__ import annotations


class CompareError(ValueError):
    """A comparison that cannot be made as asked; the message says why and how to fix it."""
