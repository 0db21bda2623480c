"""The lists that Open WebUI requests, in its format, below a base address of its own.

Open WebUI (backend/open_webui/routers/audio, 0.12.4) expects an OpenAI-like server to list voices as objects
with `id` and `name`, where vllm-omni's clients expect names; one response cannot be both. Give it the base
address http://HOST:8000/v1/open-webui.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from revox.serving.speech_routes import AUDIO, speech
from revox.serving.state import state_of

router = APIRouter(prefix="/v1/open-webui/audio", tags=["open-webui"])

router.post("/speech", responses=AUDIO, response_class=Response)(speech)


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The served model."""
    name = state_of(request).settings.served_name
    return {"models": [{"id": name, "name": name}]}


@router.get("/voices")
async def voices(request: Request) -> dict[str, Any]:
    """Every voice, presets and uploaded ones."""
    names = await asyncio.to_thread(state_of(request).voices.names)
    return {"voices": [{"id": name, "name": name} for name in sorted(names)]}
