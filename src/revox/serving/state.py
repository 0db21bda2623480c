"""What the endpoints share: `request.app.state.revox`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from starlette.requests import HTTPConnection

if TYPE_CHECKING:
    from revox.api import Revox
    from revox.marking import Signer
    from revox.serving.engine import EngineThread
    from revox.serving.keys import Keys
    from revox.serving.metrics import Metrics
    from revox.serving.references import References
    from revox.serving.settings import ServeSettings
    from revox.serving.voices import Voices


@dataclass
class ServerState:
    """The parts of a running server."""

    settings: ServeSettings
    tts: Revox
    engine: EngineThread
    metrics: Metrics
    keys: Keys
    references: References
    voices: Voices
    signer: Signer | None = None
    draining: bool = False


def state_of(connection: HTTPConnection) -> ServerState:
    """The state of the server that a request or a WebSocket came to."""
    return cast("ServerState", connection.app.state.revox)


def asked_by(connection: HTTPConnection) -> str:
    """The name of the request's key, for logs; `revox.serving.limits.check_key` has admitted it."""
    return cast(Any, connection.state).asked_by
