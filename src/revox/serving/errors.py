"""What goes wrong with a request, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse

log = logging.getLogger("revox.serving")

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
"""OpenAI's words for the statuses in use (platform.openai.com/docs/guides/error-codes)."""


_FOLDERS = re.compile(r"(?<![\w:/.])/(?:[^\s/'\":]+/)+")
"""Where things lie on the server is nobody's business; a file's own name stays in the message."""


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail


RESPONSES: dict[int | str, dict[str, Any]] = {
    422: {"model": ErrorAnswer, "description": "Wrong types, or values out of range."},
    "4XX": {"model": ErrorAnswer, "description": "A request that is refused; the message says why."},
    "5XX": {"model": ErrorAnswer, "description": "The server failed, stops or is not ready."},
}
"""Errors in the OpenAPI document, the same for every route."""


class ServeError(ValueError):
    """The server cannot be started as asked; the message is one sentence with the cause and the mend."""


class ApiError(Exception):
    """A request that is refused. The message is one sentence with the cause and the ways out.

    `param` is the field that is to blame, `code` a short word for programs, `type` OpenAI's word for the
    status unless another is given.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # What came with the request may be quoted: a lone half of a character cannot be sent back.
        message = message.encode("utf-8", "backslashreplace").decode()
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.param = None if param is None else param.encode("utf-8", "backslashreplace").decode()[:200]
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def as_api_error(error: BaseException) -> ApiError:
    """Any exception as the answer to a request.

    What revox says to its users is a 400 (an unknown voice a 404), a disk without room a 507. Anything else
    is a 500 that tells nothing of the inside; it stands in the log, with its traceback.
    """
    from revox.checkpoint.errors import CheckpointError, VoiceError
    from revox.coding.errors import CodingError
    from revox.speech.errors import AudioError
    from revox.synthesis.errors import SpeakError

    if isinstance(error, ApiError):
        return error
    said = _FOLDERS.sub("", str(error))
    if isinstance(error, SpeakError):
        return ApiError(400, said, param="input")
    if isinstance(error, AudioError):
        return ApiError(400, said, param="ref_audio", code="bad_audio")
    if isinstance(error, CodingError):
        return ApiError(400, said, param="ref_audio")
    if isinstance(error, VoiceError):
        return ApiError(404, said, param="voice", code="voice_not_found")
    if isinstance(error, CheckpointError):
        log.error("the checkpoint cannot be used: %s", error)
        return ApiError(500, "the checkpoint on the server cannot be used; its log says why")
    log.error("a request failed", exc_info=error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ApiError(507, "the server's disk is full: nothing was kept", code="disk_full")
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


def validation_error(errors: Sequence[Any]) -> ApiError:
    """pydantic's list of errors as one: 400 for fields that would have no effect and for what is no JSON.

    Wrong types and values out of range are a 422. The first field that is to blame is `param`.
    """
    parts, param = [], None
    for error in errors[:5]:
        steps = [str(step) for step in error.get("loc", ()) if step not in ("body", "query", "path")]
        # The branch of a union is no part of the field's name.
        where = ".".join(step for step in steps if step.isidentifier() or step.isdigit())
        param = param or (steps[0] if steps and error.get("type") != "json_invalid" else None)
        said = str(error.get("msg", "not valid")).removeprefix("Value error, ")
        if error.get("type") == "extra_forbidden":
            said = "not known here, it would have no effect; leave it out"
        if error.get("type") == "json_invalid":
            where, said = "", f"the body is not JSON ({error.get('ctx', {}).get('error', said)})"
        parts.append(f"{where}: {said}" if where else said)
    kinds = {error.get("type") for error in errors}
    useless = bool(kinds) and kinds <= {"extra_forbidden", "no_effect", "json_invalid"}
    code = "unsupported_parameter" if useless and "json_invalid" not in kinds else None
    return ApiError(400 if useless else 422, "; ".join(dict.fromkeys(parts)), param=param, code=code)


def answer(error: ApiError) -> JSONResponse:
    """The error as a response."""
    from fastapi.responses import JSONResponse

    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def install_handlers(app: FastAPI) -> None:
    """Every error of `app` in OpenAI's shape: refusals, wrong types, unknown addresses, own failures."""
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import Response

    async def invalid(request: Request, error: Exception) -> Response:
        return answer(validation_error(error.errors() if isinstance(error, RequestValidationError) else []))

    async def http(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 500)
        message = str(getattr(error, "detail", error))
        if status == 404:
            message = f"there is no {request.url.path} here; /docs lists what there is"
        elif status == 405:
            message = f"{request.url.path} does not take {request.method}"
        return answer(ApiError(status, message, headers=getattr(error, "headers", None)))

    async def anything(request: Request, error: Exception) -> Response:
        # A WebSocket that is refused before it is accepted gets the same answer as a request.
        return answer(as_api_error(error))

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    for kind in _own_errors():
        app.add_exception_handler(kind, anything)
    app.add_exception_handler(Exception, anything)


def _own_errors() -> tuple[type[Exception], ...]:
    from revox.checkpoint.errors import CheckpointError
    from revox.coding.errors import CodingError
    from revox.speech.errors import AudioError
    from revox.synthesis.errors import SpeakError

    return (ApiError, CheckpointError, CodingError, AudioError, SpeakError)
