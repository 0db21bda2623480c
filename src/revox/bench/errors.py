"""The error of this room."""

from __future__ import annotations


class BenchError(ValueError):
    """A benchmark cannot be run as asked; the message says why and how to fix it."""
