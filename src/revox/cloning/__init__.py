"""A recording becomes a voice: inversion without an encoder, encoding with one, refinement of both."""

from __future__ import annotations

from revox.cloning.errors import CloneError

__all__ = ["CloneError"]
