"""What the endpoints share: `request.app.state.revox`, and the shapes of its exchangeable parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from starlette.requests import HTTPConnection

if TYPE_CHECKING:
    from revox.api import Revox
    from revox.checkpoint.voices import Voice
    from revox.marking import Signer
    from revox.serving.engine import EngineThread
    from revox.serving.metrics import Metrics
    from revox.serving.settings import ServeSettings
    from revox.speech import Audio


@dataclass(frozen=True)
class Reference:
    """A recording that came with a request: its bytes as they came, decoded, and where it came from.

    `origin` is fit for a log: "upload", "data", "https://host/..." or the file's name; never its content.
    """

    data: bytes
    audio: Audio
    origin: str


class ReferenceResolver(Protocol):
    """`ref_audio` -> a recording (`revox.serving.references.open_references(state)`)."""

    async def resolve(self, ref_audio: str) -> Reference:
        """A data URL, base64, an http(s) or file URL. Raises ApiError 400 (403, 413) on what may not be."""
        ...

    def close(self) -> None:
        """Give back what is held."""
        ...


class VoiceStore(Protocol):
    """Voices by name and one-off ones (`revox.serving.voice_jobs.open_voices(state)`)."""

    def names(self) -> list[str]:
        """Every voice that can be spoken with, presets first."""
        ...

    def voice(self, name: str) -> Voice:
        """A voice by name. Raises ApiError 404 with the nearest names. May read a file: call in a thread."""
        ...

    async def one_off(
        self, reference: Reference, *, consent: str | None, ref_text: str | None, asked_by: str
    ) -> Voice:
        """A voice for one request. Raises ApiError 400 without consent or without a way to clone.

        Every call is logged: who asked, the recording's hash, whose consent, the method.
        """
        ...

    async def close(self) -> None:
        """End jobs and give back what is held."""
        ...


class KeyRing(Protocol):
    """Who may ask, and how often (`revox.serving.keys.open_keys(settings)`)."""

    def admit(self, authorization: str | None) -> str:
        """The key's name ("anonymous" when no keys are set up).

        Raises ApiError 401, or 429 with Retry-After.
        """
        ...


@dataclass
class ServerState:
    """The parts of a running server."""

    settings: ServeSettings
    tts: Revox
    engine: EngineThread
    metrics: Metrics
    references: ReferenceResolver = field(init=False)
    voices: VoiceStore = field(init=False)
    keys: KeyRing = field(init=False)
    signer: Signer | None = None
    draining: bool = False


def state_of(connection: HTTPConnection) -> ServerState:
    """The state of the server that a request or a WebSocket came to."""
    return cast(ServerState, connection.app.state.revox)


def asked_by(connection: HTTPConnection) -> str:
    """The name of the key that asks, for logs; `revox.serving.limits.KeyCheck` has let it in."""
    return cast(Any, connection.state).asked_by
