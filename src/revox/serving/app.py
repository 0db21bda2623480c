"""The application: routes, errors, limits, and what lives as long as the server."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from revox import __version__
from revox.marking import load_signer
from revox.serving import model_routes, open_webui, page_routes, speech_routes, speech_socket, voice_routes
from revox.serving.compatible import check_aliases
from revox.serving.engine import EngineThread
from revox.serving.error_responses import RESPONSES, install_handlers
from revox.serving.keys import Keys
from revox.serving.limits import BodyLimit, Check, check_host, check_key, check_origin
from revox.serving.metrics import Counted, Metrics
from revox.serving.references import References
from revox.serving.settings import ServeSettings
from revox.serving.state import ServerState
from revox.serving.voices import Voices
from revox.serving.wyoming import WyomingServer
from revox.synthesis.normalize import load_lexicon

if TYPE_CHECKING:
    import socket

    from revox.api import Revox

log = logging.getLogger("revox.serving")


def create_app(settings: ServeSettings, tts: Revox, wyoming: socket.socket | None = None) -> FastAPI:
    """The server of a loaded checkpoint. Its engine runs while the application does (its lifespan).

    wyoming: a bound socket on which that protocol is served as well.

    Raises ServeError or MarkError when files that the settings name cannot be used.
    """
    app = FastAPI(
        title="revox",
        version=__version__,
        description="Speech in cloned and preset voices; compatible with OpenAI's and vllm-omni's clients.",
        lifespan=_lifespan,
        responses=RESPONSES,
        # FastAPI's own pages load their scripts from another host; /docs is one of ours.
        docs_url=None,
        redoc_url=None,
    )
    metrics = Metrics()
    references = References(settings, tts.sampling_rate)
    app.state.revox = state = ServerState(
        settings=settings,
        tts=tts,
        engine=EngineThread(tts.model, settings, metrics),
        metrics=metrics,
        keys=Keys(settings.api_keys, settings.rate_limit),
        references=references,
        voices=Voices(settings, tts, references),
        signer=load_signer(settings.sign_certificate, settings.sign_key) if settings.marking else None,
        lexicon=None if settings.lexicon is None else load_lexicon(settings.lexicon),
    )
    app.state.wyoming = wyoming
    check_aliases(settings, state.voices.names())
    app.state.comparisons = page_routes.Comparisons()
    install_handlers(app)
    # The middleware added last runs first.
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    app.add_middleware(Check, check=partial(check_key, state.keys.admit))
    app.add_middleware(Check, check=partial(check_origin, settings.cors_origins))
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type"],
        )
    if settings.api_keys is None and "*" not in settings.cors_origins:
        app.add_middleware(Check, check=partial(check_host, settings.allowed_hosts))
    app.add_middleware(Counted, metrics=metrics)
    for routes in (model_routes, speech_routes, speech_socket, voice_routes, open_webui, page_routes):
        app.include_router(routes.router)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: ServerState = app.state.revox
    if not state.settings.marking:
        log.warning("marking is off: speech is not marked as synthetic")
    state.engine.start()
    wyoming = None if app.state.wyoming is None else WyomingServer(state, app.state.wyoming)
    if wyoming is not None:
        await wyoming.start()
    try:
        yield
    finally:
        state.draining = True
        await state.engine.drain(state.settings.drain_seconds)
        if wyoming is not None:
            await wyoming.close()
        await state.voices.close()
        state.references.close()
        state.engine.close()
