"""The server itself: models, health, readiness, metrics."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from revox.serving.compatible import served_name
from revox.serving.errors import ApiError
from revox.serving.state import ServerState, State

router = APIRouter()

STARTED = int(time.time())


@router.get("/health", response_class=PlainTextResponse, tags=["server"])
async def health(state: State) -> PlainTextResponse:
    """200 while the process works."""
    if not state.engine.running:
        raise ApiError(503, "the engine is not running", code="not_ready")
    return PlainTextResponse("ok")


@router.get("/ready", tags=["server"])
async def ready(state: State) -> JSONResponse:
    """200 while the server accepts new requests: not while it drains."""
    if state.draining or not state.engine.running:
        raise ApiError(503, "the server accepts no new requests", code="not_ready")
    return JSONResponse({"status": "ready", "active": state.engine.active, "waiting": state.engine.waiting})


@router.get("/metrics", response_class=PlainTextResponse, tags=["server"])
async def metrics(state: State) -> Response:
    """Metrics in Prometheus' text format."""
    state.metrics.tasks.set(len(asyncio.all_tasks()))
    return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models", tags=["models"])
async def models(state: State) -> dict[str, Any]:
    """The served model, as OpenAI lists models."""
    served = state.settings.served_name
    aliases = [name for name, target in state.settings.aliases.items() if target == served]
    return {"object": "list", "data": [_card(name) for name in (served, *aliases)]}


@router.get("/v1/models/{model:path}", tags=["models"])
async def model(state: State, model: str) -> dict[str, Any]:
    """The served model by its id."""
    check_model(state, model)
    return _card(model)


def check_model(state: ServerState, name: str | None) -> None:
    """Raise ApiError 404 when a request names a model that is not served; None is the served one."""
    served = state.settings.served_name
    if name is not None and served_name(state.settings, name) != served:
        raise ApiError(
            404,
            f"there is no model {name[:200]!r} here; this server serves {served!r} (--model-name renames it, "
            f"and --alias {name[:200]}={served} gives it that name too)",
            param="model",
            code="model_not_found",
        )


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": STARTED, "owned_by": "revox"}
