"""What a user can ask for that cannot be spoken."""

from __future__ import annotations


class SpeakError(ValueError):
    """A request that cannot be spoken; the message is one sentence with the cause and the fix."""
