"""Requests as clients of other servers send them: names of theirs, and fields that have no effect here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from revox.serving.errors import NO_EFFECT, ApiError, ServeError, client_gone
from revox.serving.settings import ServeSettings
from revox.serving.speech_request import SpeechRequest
from revox.serving.state import state_of

IGNORED = "x-revox-ignored"
"""The header that names what of a request was ignored (`--compatible`)."""


class SpeechRoute(APIRoute):
    """A route whose body must be JSON.

    With `--compatible`, fields that would have no effect are left out of it and named in the response.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of requests. Raises ApiError 415 on a body that is not said to be JSON."""
        handle = super().get_route_handler()
        kind = None if self.body_field is None else self.body_field.field_info.annotation

        async def handler(request: Request) -> Response:
            try:
                body = await request.body()
            except ClientDisconnect:
                raise client_gone() from None
            _check_content_type(request, body)
            ignored: list[str] = []
            request.state.ignored = ignored
            if state_of(request).settings.compatible:
                request = _Rewritten(request, _without_ignored(kind, body, ignored))
            response = await handle(request)
            if ignored:
                response.headers[IGNORED] = ", ".join(map(_for_a_header, list(dict.fromkeys(ignored))[:50]))
            return response

        return handler


def _for_a_header(name: str) -> str:
    """A client's own field name, cut, in characters that a header may have."""
    return "".join(one if " " < one <= "~" and one != "," else "?" for one in name[:100])


class _Rewritten(Request):
    """A request with another body."""

    def __init__(self, request: Request, body: bytes) -> None:
        super().__init__(request.scope, request.receive)
        self._body = body


def _check_content_type(request: Request, body: bytes) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if body and not re.fullmatch(r"application/(.+\+)?json", kind):
        raise ApiError(
            415,
            f"the body's Content-Type is {kind[:100] or 'missing'!r}; send JSON with the header "
            "Content-Type: application/json",
            code="unsupported_media_type",
        )


def _without_ignored(kind: Any, body: bytes, ignored: list[str]) -> bytes:
    try:
        data = json.loads(body)
    except ValueError:
        return body  # which is refused with its reason
    if not isinstance(data, dict):
        return body
    ignored += drop_ignored(kind, data)
    if kind is SpeechRequest and data.get("response_format") is None:
        data["response_format"] = "mp3"  # OpenAI's default
    return json.dumps(data).encode()


def drop_ignored(kind: Any, data: dict[str, Any]) -> list[str]:
    """Take out of `data` what `kind`, a model of requests, refuses as without effect; returns the names."""
    try:
        kind.model_validate(data)
    except ValidationError as error:
        found = [one["loc"] for one in error.errors() if one["type"] in ("extra_forbidden", NO_EFFECT)]
    else:
        return []
    names = []
    for path in found:
        holder: Any = data
        for step in path[:-1]:
            holder = holder.get(step) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and holder.pop(path[-1], None) is not None:
            names.append(".".join(map(str, path)))
    return names


def served_name(settings: ServeSettings, name: str) -> str:
    """What a name of a model or a voice stands for: the name itself, or the target of its alias."""
    return settings.aliases.get(name) or settings.aliases.get(name.lower()) or name


def check_aliases(settings: ServeSettings, voices: list[str]) -> None:
    """Raise ServeError when an alias stands for nothing that is served, or hides a voice."""
    for name, target in settings.aliases.items():
        if name in voices:
            raise ServeError(f"--alias {name}={target}: {name} is a voice already; choose another name")
        if target != settings.served_name and target not in voices:
            raise ServeError(
                f"--alias {name}={target}: {target} is neither the served model ({settings.served_name}) nor "
                f"a voice; there are {', '.join(voices[:8]) or 'no voices'}{' ...' if voices[8:] else ''}"
            )
