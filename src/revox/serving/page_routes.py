"""The page at `/`: a few files of this package, and the one endpoint that it needs beside the API.

The page is made by hand: no framework, no build step, nothing from another host. It may load scripts, styles
and pictures from here only and put no text into itself as HTML (Content-Security-Policy with Trusted Types,
www.w3.org/TR/CSP3 and w3c.github.io/trusted-types), whatever a voice is called.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from functools import lru_cache
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any, cast

from fastapi import APIRouter, FastAPI, File, Request, UploadFile
from fastapi.responses import Response

from revox.metrics.errors import MetricError
from revox.serving.errors import ApiError
from revox.serving.state import state_of

if TYPE_CHECKING:
    from revox.metrics.speaker import SpeakerVerifier
    from revox.serving.references import References
    from revox.serving.state import Reference
    from revox.speech import Audio

open_router = APIRouter(include_in_schema=False)
"""Open to everybody: there is nothing in the page that is not in the package."""
router = APIRouter(prefix="/v1/audio", tags=["voices"])

_SCRIPTS = ("main", "api", "dom", "player", "sound", "voices", "clone", "speak", "compare", "trials")
FILES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    **{f"{name}.js": "text/javascript; charset=utf-8" for name in _SCRIPTS},
}
"""What is sent, and as what; no other file is."""

JUDGED_SECONDS = 30.0
MAX_WAITING = 8

_ORIGIN = re.compile(r"https?://(?:[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")


def mount(app: FastAPI) -> None:
    """Add the page and its endpoint to a server."""
    app.state.listener = Listener()
    app.include_router(open_router)
    app.include_router(router)


def policy(other: str | None = None) -> str:
    """The page's Content-Security-Policy. `other`: the origin of a second server that it may ask too."""
    connect = "'self'" if other is None else f"'self' {other}"
    return "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            "media-src blob:",
            f"connect-src {connect}",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def other_server(given: str | None) -> str | None:
    """The origin to compare with (`/?with=http://host:8001`); None for anything that is not one."""
    return given if given is not None and _ORIGIN.fullmatch(given) else None


@open_router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    """The page."""
    return _answer("index.html", other_server(request.query_params.get("with")))


@open_router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def page_file(name: str) -> Response:
    """A file of the page."""
    if name not in FILES:
        raise ApiError(404, "the page has no such file", code="not_found")
    return _answer(name)


@open_router.get("/docs")
async def docs(request: Request) -> Response:
    """What can be asked; all about it is in /openapi.json."""
    paths: dict[str, dict[str, Any]] = request.app.openapi()["paths"]
    rows = [
        f"<dt><code>{escape(method.upper())} {escape(path)}</code></dt>"
        f"<dd>{escape(told.get('description') or told.get('summary', ''))}</dd>"
        for path, methods in sorted(paths.items())
        for method, told in methods.items()
    ]
    text = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>revox: API</title>'
        '<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="/page/style.css">'
        "<main><h1>API</h1><p>Fields, types and answers are in <a href='/openapi.json'>/openapi.json</a>, "
        "for any OpenAPI client; <code>/v1/audio/speech/stream</code> is a WebSocket too. The page is at "
        f"<a href='/'>/</a>.</p><dl>{''.join(rows)}</dl></main></html>"
    )
    return _guarded(text.encode(), FILES["index.html"])


def _answer(name: str, other: str | None = None) -> Response:
    return _guarded(_content(name), FILES[name], other)


def _guarded(content: bytes, kind: str, other: str | None = None) -> Response:
    headers = {
        "Content-Security-Policy": policy(other),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
    return Response(content, media_type=kind, headers=headers)


@lru_cache(maxsize=len(FILES))
def _content(name: str) -> bytes:
    return (files("revox.serving") / "page" / name).read_bytes()


@router.post("/similarity")
async def similarity(
    request: Request,
    reference: Annotated[UploadFile, File(description="A recording of a speaker.")],
    result: Annotated[UploadFile, File(description="Another, to compare with it.")],
) -> dict[str, Any]:
    """How alike two recordings' speakers are to Resemblyzer: the cosine of their embeddings, 1 for the same.

    The first 30 s of each are judged. 501 where Resemblyzer is not installed.
    """
    state = state_of(request)
    unknown = sorted(set(await request.form()) - {"reference", "result"})
    if unknown:
        raise ApiError(
            400,
            f"the field {unknown[0][:100]!r} is not taken: it would do nothing; leave it out",
            param=unknown[0],
            code="unsupported_parameter",
        )
    listener: Listener = request.app.state.listener
    listener.check_room()
    references = cast("References", state.references)
    heard = []
    for upload, name in ((reference, "reference"), (result, "result")):
        data = await upload.read(state.settings.max_body_bytes + 1)
        try:
            heard.append(await references.read(data, "upload"))
        except ApiError as error:
            raise ApiError(
                error.status, error.message, param=name, code=error.code, headers=error.headers
            ) from None
    return {"similarity": round(await listener.similarity(*heard), 4), "judge": "Resemblyzer"}


class Listener:
    """Resemblyzer, loaded when it is first asked, and asked by one request at a time."""

    def __init__(self) -> None:
        self._judge: SpeakerVerifier | None = None
        self._turn = asyncio.Lock()
        self._waiting = 0

    def check_room(self) -> None:
        """Raise ApiError 503 when too many wait already."""
        if self._waiting >= MAX_WAITING:
            raise ApiError(
                503,
                f"{MAX_WAITING} recordings are being judged already; try again in a moment",
                code="overloaded",
                headers={"Retry-After": "5"},
            )

    async def similarity(self, reference: Reference, result: Reference) -> float:
        """The cosine of two speakers. Raises ApiError: 501 without Resemblyzer, 503 when too many wait."""
        self.check_room()
        self._waiting += 1
        try:
            async with self._turn:
                return await asyncio.to_thread(self._judged, reference.audio, result.audio)
        except MetricError as error:
            raise ApiError(501, str(error), code="not_installed") from None
        finally:
            self._waiting -= 1

    def _judged(self, reference: Audio, result: Audio) -> float:
        from revox.metrics.speaker import SpeakerVerifier

        if self._judge is None:
            self._judge = SpeakerVerifier()
        return self._judge.similarity(_first_seconds(reference), _first_seconds(result))


def _first_seconds(audio: Audio) -> Audio:
    return replace(audio, samples=audio.samples[..., : round(JUDGED_SECONDS * audio.rate)])
