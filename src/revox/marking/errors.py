"""The error of this room."""


class MarkError(ValueError):
    """Audio cannot be marked, or its mark cannot be read; the message says why and how to fix it."""
