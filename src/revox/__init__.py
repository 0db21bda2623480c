"""Voice cloning for Voxtral-4B-TTS: clone, restore the codec encoder, speak, serve and measure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from revox.api import Revox, load

__all__ = ["Revox", "__version__", "load"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    # torch is imported only when something is loaded: `revox inspect` and `--help` stay quick.
    if name in {"load", "Revox"}:
        from revox import api

        return getattr(api, name)
    raise AttributeError(f"module 'revox' has no attribute {name!r}")
