"""What can go wrong in the demonstration through no fault of the code."""

from __future__ import annotations


class DemoError(ValueError):
    """A cause and its fix in one sentence, for the person who ran the demonstration."""
