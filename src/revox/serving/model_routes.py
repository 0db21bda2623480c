"""What the server is and how it fares: models, health, readiness, metrics."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from revox.serving.errors import ApiError
from revox.serving.metrics import CONTENT_TYPE
from revox.serving.state import ServerState, state_of

open_router = APIRouter(tags=["server"])
"""Open to everybody, for those who watch the server."""
router = APIRouter(prefix="/v1", tags=["models"])

STARTED = int(time.time())


@open_router.get("/health", response_class=PlainTextResponse)
async def health(request: Request) -> PlainTextResponse:
    """200 while the process works."""
    if not state_of(request).engine.running:
        raise ApiError(503, "the engine is not running", code="not_ready")
    return PlainTextResponse("ok")


@open_router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """200 while new requests are taken: not while the server drains."""
    state = state_of(request)
    if state.draining or not state.engine.running:
        raise ApiError(503, "the server takes no new requests", code="not_ready")
    return JSONResponse({"status": "ready", "active": state.engine.active, "waiting": state.engine.waiting})


@open_router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Numbers in Prometheus' text format."""
    shown = state_of(request).metrics
    shown.tasks.set(len(asyncio.all_tasks()))
    return Response(shown.text(), media_type=CONTENT_TYPE)


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model that is served, as OpenAI lists models."""
    return {"object": "list", "data": [_card(state_of(request))]}


@router.get("/models/{model:path}")
async def model(request: Request, model: str) -> dict[str, Any]:
    """The served model by its id."""
    state = state_of(request)
    check_model(state, model)
    return _card(state)


def check_model(state: ServerState, name: str | None) -> None:
    """Raise ApiError 404 when a request asks for a model that is not served; without a name it is the one."""
    served = state.settings.served_name
    if name is not None and name != served:
        raise ApiError(
            404,
            f"the model {name!r} does not exist here; this server speaks with {served!r} "
            "(--model-name gives it another name)",
            param="model",
            code="model_not_found",
        )


def _card(state: ServerState) -> dict[str, Any]:
    return {
        "id": state.settings.served_name,
        "object": "model",
        "created": STARTED,
        "owned_by": "revox",
    }
