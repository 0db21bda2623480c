"""The error of this room."""

from __future__ import annotations


class RestoreError(ValueError):
    """A checkpoint cannot be restored as asked; the message says why and how to fix it."""
