"""The error of this room."""


class AudioError(ValueError):
    """Audio that cannot be read, written or used; the message is one sentence with the cause and the mend."""
