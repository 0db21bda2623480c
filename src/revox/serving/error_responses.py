"""Errors as HTTP responses, and in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request

from revox.checkpoint.errors import CheckpointError
from revox.serving.errors import (
    BODY_TOO_LARGE,
    USER_ERRORS,
    ApiError,
    as_api_error,
    is_disk_full,
    validation_error,
)


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every response that reports an error."""

    error: ErrorDetail


RESPONSES: dict[int | str, dict[str, Any]] = {
    422: {"model": ErrorResponse, "description": "Wrong types, or values out of range."},
    "4XX": {"model": ErrorResponse, "description": "A request that is refused; the message says why."},
    "5XX": {"model": ErrorResponse, "description": "The server failed, is stopping or is not ready."},
}
"""Errors in the OpenAPI document, the same for every route."""


def answer(error: ApiError) -> JSONResponse:
    """The error as a response."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def install_handlers(app: FastAPI) -> None:
    """Answer every error of `app` in OpenAI's shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(validation_error(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        if is_disk_full(error.__cause__):  # FastAPI read a body into the system's temporary folder
            return answer(as_api_error(error.__cause__ or error))
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is no {request.url.path} here; /docs lists the endpoints"
        elif error.status_code == 405:
            message = f"{request.url.path} does not accept {request.method}"
        code = BODY_TOO_LARGE if error.status_code == 413 else None
        return answer(ApiError(error.status_code, message, code=code, headers=error.headers))

    async def other(request: Request, error: Exception) -> JSONResponse:
        return answer(as_api_error(error))

    # Named one by one: the handler of Exception answers too, but the server also logs what it handles.
    for kind in (ApiError, CheckpointError, *USER_ERRORS, Exception):
        app.add_exception_handler(kind, other)
