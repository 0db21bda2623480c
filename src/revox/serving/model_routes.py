"""The server itself: models, health, readiness, metrics."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from revox.serving.errors import ApiError
from revox.serving.state import ServerState, state_of

router = APIRouter()

STARTED = int(time.time())


@router.get("/health", response_class=PlainTextResponse, tags=["server"])
async def health(request: Request) -> PlainTextResponse:
    """200 while the process works."""
    if not state_of(request).engine.running:
        raise ApiError(503, "the engine is not running", code="not_ready")
    return PlainTextResponse("ok")


@router.get("/ready", tags=["server"])
async def ready(request: Request) -> JSONResponse:
    """200 while the server accepts new requests: not while it drains."""
    state = state_of(request)
    if state.draining or not state.engine.running:
        raise ApiError(503, "the server accepts no new requests", code="not_ready")
    return JSONResponse({"status": "ready", "active": state.engine.active, "waiting": state.engine.waiting})


@router.get("/metrics", response_class=PlainTextResponse, tags=["server"])
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    shown = state_of(request).metrics
    shown.tasks.set(len(asyncio.all_tasks()))
    return Response(shown.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models", tags=["models"])
async def models(request: Request) -> dict[str, Any]:
    """The served model, as OpenAI lists models."""
    return {"object": "list", "data": [_card(state_of(request))]}


@router.get("/v1/models/{model:path}", tags=["models"])
async def model(request: Request, model: str) -> dict[str, Any]:
    """The served model by its id."""
    state = state_of(request)
    check_model(state, model)
    return _card(state)


def check_model(state: ServerState, name: str | None) -> None:
    """Raise ApiError 404 when a request names a model that is not served; None is the served one."""
    served = state.settings.served_name
    if name is not None and name != served:
        raise ApiError(
            404,
            f"there is no model {name!r} here; this server serves {served!r} (--model-name renames it)",
            param="model",
            code="model_not_found",
        )


def _card(state: ServerState) -> dict[str, Any]:
    name = state.settings.served_name
    return {"id": name, "object": "model", "created": STARTED, "owned_by": "revox"}
