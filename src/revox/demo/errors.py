"""Errors of the demonstration that a user can cause."""

from __future__ import annotations


class DemoError(ValueError):
    """A cause and its fix in one sentence, for the user of `revox demo`."""
