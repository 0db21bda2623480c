"""The lists that Open WebUI requests, in its format, below a base address of its own.

Open WebUI (backend/open_webui/routers/audio, 0.12.4) expects an OpenAI-like server to list voices as objects
with `id` and `name`, where vllm-omni's clients expect names; one response cannot be both. Give it the base
address http://HOST:8000/v1/open-webui.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from revox.serving.compatible import SpeechRoute
from revox.serving.speech_routes import AUDIO, speech
from revox.serving.state import State

router = APIRouter(prefix="/v1/open-webui/audio", tags=["open-webui"], route_class=SpeechRoute)

router.post("/speech", responses=AUDIO, response_class=Response)(speech)


@router.get("/models")
def models(state: State) -> dict[str, Any]:
    """The served model."""
    name = state.settings.served_name
    return {"models": [{"id": name, "name": name}]}


@router.get("/voices")
def voices(state: State) -> dict[str, Any]:
    """Every voice, presets and uploaded ones."""
    return {"voices": [{"id": name, "name": name} for name in sorted(state.voices.names())]}
