"""The parts of a server that has no more than its checkpoint: no keys, no recordings, its own voices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from revox.serving.errors import ApiError

if TYPE_CHECKING:
    from revox.api import Revox
    from revox.checkpoint.voices import Voice
    from revox.serving.state import Reference


class NoKeys:
    """Everybody may ask."""

    def admit(self, authorization: str | None) -> str:
        """Always "anonymous"."""
        return "anonymous"


class NoReferences:
    """No recordings."""

    async def resolve(self, ref_audio: str) -> Reference:
        """Always a refusal."""
        raise ApiError(
            400, "this server takes no ref_audio; use a voice of GET /v1/audio/voices", param="ref_audio"
        )


class PresetVoices:
    """The checkpoint's own voices."""

    def __init__(self, tts: Revox) -> None:
        self._tts = tts

    def names(self) -> list[str]:
        """The checkpoint's voices."""
        return self._tts.voices()

    def voice(self, name: str) -> Voice:
        """A voice of the checkpoint."""
        return self._tts.voice(name)

    async def one_off(
        self, reference: Reference, *, consent: str | None, ref_text: str | None, asked_by: str
    ) -> Voice:
        """Always a refusal."""
        raise ApiError(
            400, "this server takes no ref_audio; use a voice of GET /v1/audio/voices", param="ref_audio"
        )

    async def close(self) -> None:
        """Nothing is held."""
