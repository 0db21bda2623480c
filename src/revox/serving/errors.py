"""Errors of requests in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from revox.checkpoint.errors import CheckpointError, VoiceError
from revox.coding.errors import CodingError
from revox.speech.errors import AudioError
from revox.synthesis.errors import SpeakError

log = logging.getLogger("revox.serving")

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
"""OpenAI's types of errors (platform.openai.com/docs/guides/error-codes) for statuses; others of 4xx are
invalid_request_error, 5xx are server_error."""

BODY_TOO_LARGE = "body_too_large"
"""The code of a 413."""

NO_EFFECT = "no_effect"
"""The type of pydantic errors that are a 400 and not a 422: the value would have no effect."""

USER_ERRORS: dict[type[Exception], tuple[int, str, str | None]] = {
    SpeakError: (400, "input", None),
    AudioError: (400, "ref_audio", "bad_audio"),
    CodingError: (400, "ref_audio", None),
    VoiceError: (404, "voice", "voice_not_found"),
}
"""Status, param and code for the errors that revox raises for its users."""

_FOLDERS = re.compile(r"(?<![\w:/.])/(?:[^\s/'\":]+/)+")
"""Folders of the server, which clients should not see; a file's own name stays in the message."""


class ServeError(ValueError):
    """The server cannot be started as asked; the message is one sentence with the cause and the fix."""


class ApiError(Exception):
    """A request that is refused. The message is one sentence with the cause and the fix.

    `param` is the field at fault, `code` a short word for programs, `type` OpenAI's type for the status.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        message = _encodable(message)
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.type = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.param = None if param is None else _encodable(param)[:200]
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def is_disk_full(error: BaseException | None) -> bool:
    """Whether nothing more can be written."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def client_gone() -> ApiError:
    """The error of a client that closed the connection; 499 is what servers log for it."""
    return ApiError(499, "the client closed the connection", code="client_closed_request")


def _encodable(text: str) -> str:
    """A quoted part of the request may be a lone surrogate, which cannot be sent back."""
    return text.encode("utf-8", "backslashreplace").decode()


def as_api_error(error: BaseException) -> ApiError:
    """Any exception as the response to a request.

    Errors that revox raises for its users are a 400 (an unknown voice a 404), a full disk is a 507. Anything
    else is a 500 that reveals nothing of the server; the log has the traceback.
    """
    if isinstance(error, ApiError):
        return error
    for kind, (status, param, code) in USER_ERRORS.items():
        if isinstance(error, kind):
            return ApiError(status, _FOLDERS.sub("", str(error)), param, code)
    if isinstance(error, CheckpointError):
        log.error("the checkpoint cannot be used: %s", error)
        return ApiError(500, "the checkpoint on the server cannot be used; the server's log says why")
    log.error("a request failed", exc_info=error)
    if is_disk_full(error):
        return ApiError(507, "the server's disk is full: nothing was saved", code="disk_full")
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


def validation_error(errors: Sequence[Any]) -> ApiError:
    """pydantic's list of errors as one: 400 for fields without effect and for invalid JSON, 422 for wrong
    types and values out of range. The first field at fault is `param`."""
    parts, param = [], None
    for error in errors[:5]:
        steps = [str(step) for step in error.get("loc", ()) if step not in ("body", "query", "path")]
        # The branch of a union is not part of the field's name.
        where = ".".join(step for step in steps if step.isidentifier() or step.isdigit())
        message = str(error.get("msg", "not valid")).removeprefix("Value error, ")
        if error.get("type") == "extra_forbidden":
            message = "unknown field, which would have no effect; leave it out"
        if error.get("type") == "json_invalid":
            where, steps = "", []
            message = f"the body is not JSON ({error.get('ctx', {}).get('error', message)})"
        param = param or (steps[0] if steps else None)
        parts.append(f"{where}: {message}" if where else message)
    types = {error.get("type") for error in errors}
    without_effect = bool(types) and types <= {"extra_forbidden", "no_effect", "json_invalid"}
    code = "unsupported_parameter" if without_effect and "json_invalid" not in types else None
    return ApiError(400 if without_effect else 422, "; ".join(dict.fromkeys(parts)), param=param, code=code)
