"""The error of this room."""

from __future__ import annotations


class EndpointError(ValueError):
    """An endpoint cannot be asked as it should be; the message names cause and fix."""
