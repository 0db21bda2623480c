"""The application: routes, errors, limits on bodies, and what lives as long as the server."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI

from revox import __version__
from revox.serving.engine import EngineThread
from revox.serving.errors import RESPONSES, install_handlers
from revox.serving.limits import BodyLimit, HostCheck, KeyCheck, OriginCheck
from revox.serving.metrics import Counted, Metrics
from revox.serving.settings import ServeSettings
from revox.serving.state import ServerState

if TYPE_CHECKING:
    from revox.api import Revox

log = logging.getLogger("revox.serving")


def create_app(settings: ServeSettings, tts: Revox) -> FastAPI:
    """The server of a loaded checkpoint. Its engine runs while the application does (its lifespan).

    Raises ServeError or MarkError when files that the settings name cannot be used.
    """
    from revox.serving import (
        model_routes,
        open_webui,
        page_routes,
        speech_routes,
        speech_socket,
        voice_routes,
    )
    from revox.serving.keys import open_keys
    from revox.serving.references import open_references
    from revox.serving.voice_jobs import open_voices

    app = FastAPI(
        title="revox",
        version=__version__,
        description="Speech in cloned and preset voices; OpenAI's and vllm-omni's shapes.",
        lifespan=_lifespan,
        responses=RESPONSES,
        # FastAPI's own pages load their scripts from another host; /docs is one of ours.
        docs_url=None,
        redoc_url=None,
    )
    metrics = Metrics()
    engine = EngineThread(tts.model, settings, metrics)
    state = ServerState(settings, tts, engine, metrics)
    app.state.revox = state
    state.keys = open_keys(settings)
    state.references = open_references(state)
    state.voices = open_voices(state)
    if settings.marking:
        from revox.marking import load_signer

        state.signer = load_signer(settings.sign_certificate, settings.sign_key)
    install_handlers(app)
    # The last one added is asked first.
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    app.add_middleware(KeyCheck, keys=state.keys)
    app.add_middleware(OriginCheck, allowed=settings.cors_origins)
    if settings.cors_origins:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type"],
        )
    if settings.api_keys is None and "*" not in settings.cors_origins:
        app.add_middleware(HostCheck, allowed=settings.allowed_hosts)
    app.add_middleware(Counted, metrics=metrics)
    app.include_router(model_routes.open_router)
    app.include_router(model_routes.router)
    app.include_router(speech_routes.router)
    app.include_router(speech_socket.router)
    app.include_router(voice_routes.router)
    app.include_router(open_webui.router)
    page_routes.mount(app)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: ServerState = app.state.revox
    if not state.settings.marking:
        log.warning("marking is off: what is spoken does not say that it is synthetic")
    state.engine.start()
    try:
        yield
    finally:
        state.draining = True
        await state.engine.drain(state.settings.drain_seconds)
        await state.voices.close()
        state.references.close()
        state.engine.close()
