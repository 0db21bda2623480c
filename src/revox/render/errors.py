"""The error of this room."""

from __future__ import annotations


class RenderError(ValueError):
    """A script that cannot be rendered as given; the message says why and how to fix it."""
