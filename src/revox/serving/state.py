"""What the endpoints share: `request.app.state.revox`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

from fastapi import Depends
from starlette.requests import HTTPConnection

from revox.marking import MarkRecord, new_record

if TYPE_CHECKING:
    from revox.api import Revox
    from revox.checkpoint.voices import Voice
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
    lexicon: Mapping[str, str] | None = None
    draining: bool = False

    def new_record(self, voice: Voice) -> MarkRecord | None:
        """What the mark of speech in a voice says; None when marking is off."""
        if not self.settings.marking:
            return None
        return new_record(self.settings.served_name[:200], voice.name[:200])


def state_of(connection: HTTPConnection) -> ServerState:
    """The state of the server that a request or a WebSocket came to."""
    return cast("ServerState", connection.app.state.revox)


def asked_by(connection: HTTPConnection) -> str:
    """The name of the request's key, for logs; `revox.serving.limits.check_key` has admitted it."""
    return cast(Any, connection.state).asked_by


State = Annotated[ServerState, Depends(state_of)]
"""A route's parameter: the state of the server."""

AskedBy = Annotated[str, Depends(asked_by)]
"""A route's parameter: the name of the request's key."""
