"""The page at `/`: a few files of this package, and the one endpoint that it needs in addition to the API.

The page is plain HTML, CSS and JavaScript: no framework, no build step, nothing from other hosts. Its
Content-Security-Policy allows scripts, styles and images from here only, and Trusted Types keep it from
inserting text as HTML (www.w3.org/TR/CSP3, w3c.github.io/trusted-types), whatever the name of a voice is.
"""

from __future__ import annotations

import asyncio
import re
import threading
from dataclasses import replace
from functools import lru_cache
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Form, Request, UploadFile
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from revox.metrics.errors import MetricError
from revox.serving.errors import ApiError
from revox.serving.limits import Places
from revox.serving.state import State

if TYPE_CHECKING:
    from revox.metrics.speaker import SpeakerVerifier
    from revox.speech import Audio

router = APIRouter()

_SCRIPTS = ("main", "api", "dom", "player", "sound", "voices", "clone", "speak", "compare", "trials")
FILES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    **{f"{name}.js": "text/javascript; charset=utf-8" for name in _SCRIPTS},
}
"""The files of the page and their media types; no other file is sent."""

COMPARED_SECONDS = 30.0
MAX_COMPARISONS = 8

_ORIGIN = re.compile(r"https?://(?:[A-Za-z0-9._-]{1,253})(?::[0-9]{1,5})?")


def policy(other: str | None = None) -> str:
    """The page's Content-Security-Policy. `other`: the origin of a second server that it may call."""
    return "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            "media-src blob:",
            "connect-src 'self'" + (f" {other}" if other is not None else ""),
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def other_server(origin: str | None) -> str | None:
    """The origin to compare with (`/?with=http://host:8001`); None for anything that is not an origin."""
    return origin if origin is not None and _ORIGIN.fullmatch(origin) else None


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page(request: Request) -> Response:
    """The page."""
    name = "index.html"
    return _response(_content(name), FILES[name], other_server(request.query_params.get("with")))


@router.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
async def page_file(name: str) -> Response:
    """A file of the page."""
    if name not in FILES:
        raise ApiError(404, "the page has no such file", code="not_found")
    return _response(_content(name), FILES[name])


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """The list of endpoints; /openapi.json has the details."""
    paths: dict[str, dict[str, Any]] = request.app.openapi()["paths"]
    rows = [
        f"<dt><code>{escape(method.upper())} {escape(path)}</code></dt>"
        f"<dd>{escape(operation.get('description') or operation.get('summary', ''))}</dd>"
        for path, methods in sorted(paths.items())
        for method, operation in methods.items()
    ]
    text = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>revox: API</title>'
        '<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="/page/style.css">'
        "<main><h1>API</h1><p>Fields, types and responses are in <a href='/openapi.json'>/openapi.json</a>, "
        "for any OpenAPI client. <code>/v1/audio/speech/stream</code> is also a WebSocket. The page is at "
        f"<a href='/'>/</a>.</p><dl>{''.join(rows)}</dl></main></html>"
    )
    return _response(text.encode(), FILES["index.html"])


def _response(content: bytes, media_type: str, other: str | None = None) -> Response:
    headers = {
        "Content-Security-Policy": policy(other),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
    return Response(content, media_type=media_type, headers=headers)


@lru_cache(maxsize=len(FILES))
def _content(name: str) -> bytes:
    return (files("revox.serving") / "page" / name).read_bytes()


class Comparison(BaseModel):
    """The form of POST /v1/audio/similarity."""

    model_config = ConfigDict(extra="forbid")

    reference: UploadFile = Field(description="A recording of a speaker.")
    result: UploadFile = Field(description="Another, to compare with it.")


@router.post("/v1/audio/similarity", tags=["voices"])
async def similarity(
    request: Request, state: State, form: Annotated[Comparison, Form(media_type="multipart/form-data")]
) -> dict[str, Any]:
    """The similarity of two recordings' speakers by Resemblyzer: the cosine of their embeddings, 1 for equal.

    The first 30 s of each are compared. 501 if Resemblyzer is not installed.
    """
    comparisons: Comparisons = request.app.state.comparisons
    with comparisons.places:
        recordings = []
        for name, upload in (("reference", form.reference), ("result", form.result)):
            try:
                recordings.append((await state.references.read(await upload.read())).audio)
            except ApiError as error:
                error.param = name
                raise
        try:
            found = await asyncio.to_thread(comparisons.compare, *map(_start, recordings))
        except MetricError as error:
            raise ApiError(501, str(error), code="not_installed") from None
    return {"similarity": round(found, 4), "judge": "Resemblyzer"}


class Comparisons:
    """Resemblyzer, loaded at first use and used by one request at a time."""

    def __init__(self) -> None:
        self.places = Places(MAX_COMPARISONS, "comparisons are running")
        self._model: SpeakerVerifier | None = None
        self._lock = threading.Lock()

    def compare(self, reference: Audio, result: Audio) -> float:
        """The cosine of two speakers' embeddings. Raises MetricError without Resemblyzer."""
        from revox.metrics.speaker import SpeakerVerifier

        with self._lock:
            self._model = self._model or SpeakerVerifier()
            return self._model.similarity(reference, result)


def _start(audio: Audio) -> Audio:
    return replace(audio, samples=audio.samples[..., : round(COMPARED_SECONDS * audio.rate)])
