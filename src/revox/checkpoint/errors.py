"""What can be wrong with a checkpoint on disk: each message names the file, the expected and the mend."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint folder, or a file in it, cannot be used as it is."""


class VoiceError(CheckpointError):
    """A voice of a checkpoint cannot be read, added, exported or removed as asked."""
