"""Requests that are refused before their body is read, and how many may wait for the same thing."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from revox.serving.error_responses import answer
from revox.serving.errors import BODY_TOO_LARGE, ApiError

PRIVATE_DOMAINS = ("localhost", "local", "internal", "lan", "home.arpa", "svc")
MONITORING_PATHS = ("/health", "/ready", "/metrics")


class Places:
    """At most `limit` at once: `with places:` raises ApiError 503 when all are taken.

    action: for the message, as in "32 recordings are being read already".
    """

    def __init__(self, limit: int, action: str, retry_after: int = 5) -> None:
        self.limit, self._action, self._retry_after = limit, action, retry_after
        self.taken = 0

    def __enter__(self) -> None:
        self.check(self.taken)
        self.taken += 1

    def __exit__(self, *_: object) -> None:
        self.taken -= 1

    def check(self, taken: int) -> None:
        """Raise ApiError 503 if `taken` places are all there are."""
        if taken >= self.limit:
            raise ApiError(
                503,
                f"{self.limit} {self._action} already; try again later",
                code="overloaded",
                headers={"Retry-After": str(self._retry_after)},
            )


class BodyLimit:
    """Answers 413 to a body above `limit` bytes, announced or not; no more than that is ever read."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request; other scopes pass."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        too_large = ApiError(
            413, f"the body is larger than {self.limit:,} bytes; send a shorter clip", code=BODY_TOO_LARGE
        )
        announced = HTTPConnection(scope).headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > self.limit:
            await refuse(too_large, scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:  # FastAPI raises it again, and the application's handler answers
                raise HTTPException(413, str(too_large), {"connection": "close"})
            return message

        await self.app(scope, counted, send)


class Check:
    """Calls `check` with every request and WebSocket before the application; its ApiError is the response."""

    def __init__(self, app: ASGIApp, check: Callable[[HTTPConnection], None]) -> None:
        self.app, self.check = app, check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request or a WebSocket; other scopes pass."""
        if scope["type"] in ("http", "websocket"):
            try:
                self.check(HTTPConnection(scope))
            except ApiError as error:
                await refuse(error, scope, receive, send)
                return
        await self.app(scope, receive, send)


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the error and close the connection, whose body was not read."""
    response = answer(error)
    response.headers["connection"] = "close"
    await response(scope, receive, send)


def check_origin(allowed: Collection[str], connection: HTTPConnection) -> None:
    """Refuse (403) what pages of other origins send, unless the operator allows that origin.

    A browser lets any page post a form or open a WebSocket to this machine without asking (CORS only keeps
    the page from reading answers) and names the page in Origin; programs send no Origin.
    """
    method = connection.scope.get("method")
    if connection.scope["type"] == "http" and method not in ("POST", "PUT", "PATCH", "DELETE"):
        return
    origin = connection.headers.get("origin", "")
    if not origin or origin in allowed or "*" in allowed:
        return
    with contextlib.suppress(ValueError):
        if urlsplit(origin).netloc.lower() == connection.headers.get("host", "").lower():
            return
    raise ApiError(
        403,
        "pages of another origin may not call this server; its operator can allow it (--cors-origin)",
        code="origin_not_allowed",
    )


def check_host(allowed: Collection[str], connection: HTTPConnection) -> None:
    """Refuse (403) requests to a host name that is not this server's.

    A page can point its own name at this machine (DNS rebinding); the browser then takes the server for the
    page's own origin. Addresses, names without a dot and names in `PRIVATE_DOMAINS` cannot be used for that,
    since public name servers do not resolve them. `allowed` are the operator's own names. Monitoring may use
    any name.
    """
    host = connection.headers.get("host", "")
    if connection.scope["path"] not in MONITORING_PATHS and not _is_own_name(host, allowed):
        raise ApiError(
            403,
            f"this server does not answer to the name {host[:100]!r}; its operator can allow it "
            "(--allow-host)",
            code="host_not_allowed",
        )


def _is_own_name(host: str, allowed: Collection[str]) -> bool:
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    if name in allowed or "." not in name:
        return True
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return name.endswith(tuple(f".{domain}" for domain in PRIVATE_DOMAINS))


def check_key(admit: Callable[[str | None], str], connection: HTTPConnection) -> None:
    """Refuse (401, 429) requests below /v1/ that `admit` (authorization header -> name of the key) refuses.

    As a middleware, since a route would read and parse the whole upload first; `revox.serving.state.asked_by`
    gives the name.
    """
    if connection.scope["path"].startswith("/v1/"):
        connection.state.asked_by = admit(connection.headers.get("authorization"))
