"""The error of this room."""


class MarkError(ValueError):
    """Audio cannot be marked, or its mark not read; the message is a sentence with cause and mend."""
