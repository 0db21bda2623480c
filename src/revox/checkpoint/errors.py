"""Errors of a checkpoint on disk: each message says what was found, what was expected, and the fix."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint folder, or a file in it, cannot be used as it is."""


class VoiceError(CheckpointError):
    """A voice of a checkpoint cannot be read, added, exported or removed as asked."""
