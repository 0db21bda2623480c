"""POST /v1/audio/speech, /v1/audio/speech/stream and /v1/audio/speech/batch."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import asdict
from typing import Any, TypeVar, get_args

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from revox.serving.compatible import SpeechRoute, drop_ignored
from revox.serving.encoding import WHOLE_ONLY
from revox.serving.errors import ApiError, as_api_error, client_gone
from revox.serving.speaking import SpeechResponse, resolve
from revox.serving.speech_request import BatchRequest, Format, SpeechRequest, batch_item, parse
from revox.serving.state import AskedBy, ServerState, State, asked_by, state_of
from revox.speech import FORMATS

router = APIRouter(prefix="/v1/audio", tags=["speech"], route_class=SpeechRoute)

T = TypeVar("T")

log = logging.getLogger("revox.serving")

_BINARY = {"type": "string", "format": "binary"}
_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string", "description": "JSON"}},
}

AUDIO: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The audio; or, as events, speech.audio.delta and speech.audio.done.",
        "content": {
            **{FORMATS[name].media_type: {"schema": _BINARY} for name in get_args(Format)},
            "text/event-stream": {"schema": _EVENT},
        },
    }
}


@router.post("/speech", responses=AUDIO, response_class=Response)
async def speech(request: Request, body: SpeechRequest) -> Response:
    """Speak a text: a complete file, or a stream (`stream`, `stream_format`)."""
    return await _speak(request, body, body.streams)


@router.post("/speech/stream", responses=AUDIO, response_class=Response)
async def speech_stream(request: Request, body: SpeechRequest) -> Response:
    """Speak a text and send the audio as it is generated; as events with stream_format sse."""
    return await _speak(request, body, body.stream_format or "audio")


@router.post("/speech/batch")
async def speech_batch(request: Request, state: State, who: AskedBy, body: BatchRequest) -> JSONResponse:
    """Speak 1 to 32 texts; an item that fails has an error, and the others are spoken."""
    # No more at once than the engine runs: all clients share the queue.
    turns = asyncio.Semaphore(state.settings.max_streams)

    async def one(index: int, item: Any) -> dict[str, Any]:
        async with turns:
            return await _batch_result(state, who, body, index, item)

    with state.engine.place():
        results = await _unless_gone(
            request, asyncio.gather(*(one(i, item) for i, item in enumerate(body.items)))
        )
    good = sum(result["status"] == "success" for result in results)
    return JSONResponse(
        {
            "id": f"speech-batch-{secrets.token_hex(8)}",
            "results": results,
            "total": len(results),
            "succeeded": good,
            "failed": len(results) - good,
        }
    )


async def _batch_result(
    state: ServerState, who: str, batch: BatchRequest, index: int, item: Any
) -> dict[str, Any]:
    try:
        fields = batch_item(batch, item)
        ignored = drop_ignored(SpeechRequest, fields) if state.settings.compatible else []
        asked = parse(SpeechRequest, fields)
        resolved = await resolve(state, asked, who, streaming=False, ignored=ignored)
        response = await resolved.speak(asked.input, streaming=False)
        audio = await response.whole()
    except Exception as error:
        return {"index": index, "status": "error", "error": as_api_error(error).message}
    return {
        "index": index,
        "status": "success",
        "audio_data": base64.b64encode(audio).decode(),
        "media_type": FORMATS[asked.response_format].media_type,
        "usage": response.usage.body(),
        **response.outcome,
        **({"ignored": ignored} if ignored else {}),
    }


async def _speak(request: Request, body: SpeechRequest, streams: str | None) -> Response:
    state = state_of(request)
    if body.timestamps is not None and streams != "sse":
        raise ApiError(
            400,
            "timestamps come as events; set stream_format to sse, or leave timestamps out",
            param="timestamps",
            code="unsupported_parameter",
        )

    streaming = streams is not None and body.response_format not in WHOLE_ONLY

    async def begin() -> SpeechResponse:
        with state.engine.place():
            resolved = await resolve(
                state, body, asked_by(request), streaming=streaming, ignored=request.state.ignored
            )
            return await resolved.speak(body.input, streaming=streaming)

    response = await _unless_gone(request, begin())
    headers = response.request.headers()
    kind = FORMATS[body.response_format].media_type
    if streams is None:
        data = await _unless_gone(request, response.whole())
        return Response(data, media_type=kind, headers={**headers, **response.headers})
    pieces = response.pieces()
    # What fails before the first audio still gets a status.
    first = await _unless_gone(request, anext(pieces))
    if streams == "audio":
        return Streamed(_after(first, pieces), response, kind, headers)
    return Streamed(_events(first, pieces, response), response, "text/event-stream", headers)


async def _after(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    yield first
    async for data in rest:
        yield data


async def _events(
    first: bytes, rest: AsyncGenerator[bytes, None], response: SpeechResponse
) -> AsyncGenerator[bytes, None]:
    """OpenAI's speech.audio events (platform.openai.com/docs/api-reference/audio), as by vllm-omni."""
    options = response.request.options
    format, sent = options.response_format, 0
    timed = isinstance(options, SpeechRequest) and options.timestamps is not None
    try:
        async for data in _after(first, rest):
            audio = base64.b64encode(data).decode()
            yield _event({"type": "speech.audio.delta", "audio": audio, "response_format": format})
            for time in response.times[sent:] if timed else ():
                yield _event({"type": "speech.audio.sentence", "index": sent, **asdict(time)})
                sent += 1
        for time in response.times[sent:] if timed else ():  # of a piece that ended without another sample
            yield _event({"type": "speech.audio.sentence", "index": sent, **asdict(time)})
            sent += 1
    except Exception as error:
        # The status is sent already; the stream itself reports the error.
        details = as_api_error(error).body()["error"]
        yield _event({"type": "speech.audio.error", "error": {**details, "partial_audio": True}})
        return
    for warning in response.speech.warnings:
        yield _event({"type": "speech.audio.warning", **asdict(warning)})
    done = {"usage": response.usage.body(), "truncated": response.speech.truncated}
    yield _event({"type": "speech.audio.done", **done})


def _event(data: dict[str, Any]) -> bytes:
    return f"event: {data['type']}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


class Streamed(StreamingResponse):
    """Bytes as they are generated. A client that disconnects is noticed at once, and its place is free."""

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        response: SpeechResponse,
        media_type: str,
        headers: dict[str, str],
    ) -> None:
        headers = {**headers, "cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(pieces, headers=headers, media_type=media_type)
        self.pieces, self.response = pieces, response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, unless the client disconnects."""
        # Starlette watches for it only below this version of ASGI; it relies on send failing above.
        scope = {**scope, "asgi": {**scope["asgi"], "spec_version": "2.3"}}
        try:
            await super().__call__(scope, receive, send)
        except Exception as error:
            # The status is sent: the connection closes without the last chunk, which tells the client.
            log.warning("a stream failed: %s", as_api_error(error).message)
        finally:
            self.response.cancel()
            await self.pieces.aclose()


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client disconnects. The body must have been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise client_gone()
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
