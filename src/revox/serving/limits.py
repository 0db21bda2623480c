"""What is refused before it is read: bodies too large, pages of other origins, other names, whoever may not
ask."""

from __future__ import annotations

import contextlib
import ipaddress
import json
from collections.abc import Collection
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from revox.serving.errors import ApiError

if TYPE_CHECKING:
    from revox.serving.state import KeyRing


class BodyLimit:
    """Answers 413 to a body above `limit` bytes, announced or not; no more than that is ever read."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request; other scopes pass."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.limit:
            await _refuse(send, self._too_large)
            return
        read, started, refused = 0, False, False

        async def counted() -> Message:
            nonlocal read, refused
            message = await receive()
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                if read > self.limit:
                    refused = True
                    raise _TooLargeError
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            if refused and not started:
                return  # what the application makes of a body that broke off is not the answer
            started = True
            await send(message)

        with contextlib.suppress(_TooLargeError):
            await self.app(scope, counted, watched)
        if refused and not started:
            await _refuse(send, self._too_large)

    @property
    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is larger than {self.limit:,} bytes; send a shorter clip", code="body_too_large"
        )


class OriginCheck:
    """Answers 403 to what a page of another origin sends, unless the operator named that origin.

    A browser lets any page post a form or open a WebSocket to this machine without asking (CORS only keeps
    the page from reading answers), and tells of it in Origin; programs send none.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str]) -> None:
        self.app, self.allowed = app, frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request or a WebSocket."""
        changes = scope["type"] == "websocket" or scope.get("method") in ("POST", "PUT", "PATCH", "DELETE")
        if scope["type"] in ("http", "websocket") and changes and not self._welcome(dict(scope["headers"])):
            error = ApiError(
                403,
                "pages of another origin may not call this server; its operator can allow it (--cors-origin)",
                code="origin_not_allowed",
            )
            await _refuse(send, error, scope["type"])
            return
        await self.app(scope, receive, send)

    def _welcome(self, headers: dict[bytes, bytes]) -> bool:
        origin = headers.get(b"origin", b"").decode("latin-1")
        if not origin or origin in self.allowed or "*" in self.allowed:
            return True
        try:
            netloc = urlsplit(origin).netloc.lower()
        except ValueError:
            return False
        return netloc == headers.get(b"host", b"").decode("latin-1").lower()


class HostCheck:
    """Answers 403 to what was sent to a name that is not this server's.

    A page can have its own name lead to this machine (DNS rebinding); to the browser the server is then of
    the page's own origin. Addresses, names without a dot and those below `PRIVATE` cannot be had for that:
    public name servers lead them nowhere. `allowed` are the operator's own names. Whoever watches over the
    server may call it as he likes.
    """

    PRIVATE = ("localhost", "local", "internal", "lan", "home.arpa", "svc")
    WATCHED = ("/health", "/ready", "/metrics")

    def __init__(self, app: ASGIApp, allowed: Collection[str]) -> None:
        self.app, self.allowed = app, frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request or a WebSocket."""
        if scope["type"] in ("http", "websocket") and scope["path"] not in self.WATCHED:
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            if not self._ours(host):
                error = ApiError(
                    403,
                    f"this server does not go by the name {host[:100]!r}; its operator can allow it "
                    "(--allow-host)",
                    code="host_not_allowed",
                )
                await _refuse(send, error, scope["type"])
                return
        await self.app(scope, receive, send)

    def _ours(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if name in self.allowed or "." not in name:
            return True
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name)
            return True
        return name.endswith(tuple(f".{one}" for one in self.PRIVATE))


class KeyCheck:
    """Answers 401 or 429 to requests and WebSockets below /v1/ whose key may not ask, or not so often.

    Here and not in the routes, which would read and take apart a whole upload first.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request or a WebSocket; `revox.serving.state.asked_by` tells who was let in."""
        if scope["type"] in ("http", "websocket") and scope["path"].startswith("/v1/"):
            given = dict(scope["headers"]).get(b"authorization")
            try:
                name = self.keys.admit(None if given is None else given.decode("latin-1"))
            except ApiError as error:
                await _refuse(send, error, scope["type"])
                return
            scope.setdefault("state", {})["asked_by"] = name
        await self.app(scope, receive, send)


async def _refuse(send: Send, error: ApiError, kind: str = "http") -> None:
    body = json.dumps(error.body()).encode()
    prefix = "websocket." if kind == "websocket" else ""
    headers = [
        *((name.lower().encode(), value.encode()) for name, value in error.headers.items()),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": f"{prefix}http.response.start", "status": error.status, "headers": headers})
    await send({"type": f"{prefix}http.response.body", "body": body})


class _TooLargeError(Exception):
    pass
