"""WebSocket /v1/audio/speech/stream: text in pieces, audio out sentence by sentence.

The messages are vllm-omni 0.30's (vllm_omni/entrypoints/openai/serving_speech_stream.py): session.config,
input.text, input.done and session.close in; audio.start, binary audio, audio.done, session.done and error
out. Unlike there, text is spoken as soon as a sentence or line is complete, or no end has come for a while,
unless split_granularity is "none".
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from fastapi import APIRouter, WebSocket
from pydantic import TypeAdapter, ValidationError
from starlette.websockets import WebSocketDisconnect, WebSocketState

from revox.serving.compatible import drop_ignored
from revox.serving.errors import ApiError, as_api_error
from revox.serving.pending_text import PendingText
from revox.serving.speaking import ResolvedRequest, SpeechResponse, resolve
from revox.serving.speech_request import SessionConfig, parse
from revox.serving.state import AskedBy, ServerState, State
from revox.synthesis.longform import has_words

router = APIRouter(prefix="/v1/audio", tags=["speech"])

log = logging.getLogger("revox.serving")

CONFIG_SECONDS = 10.0
"""From the connection to session.config."""
IDLE_SECONDS = 30.0
"""Between a message and the next, while nothing is spoken."""
AHEAD = 1 << 20
"""Characters of messages that are read ahead; beyond that the client has to wait. A language model sends its
tokens far faster than they are spoken, and pings are answered only while messages are read."""
_MESSAGE = TypeAdapter(dict[str, Any])
OVERHEAD = 64  # characters that a message counts in addition: empty messages take memory too


@router.websocket("/speech/stream")
async def speech_socket(socket: WebSocket, state: State, who: AskedBy) -> None:
    """Text in pieces, audio out sentence by sentence."""
    await socket.accept()
    await Session(socket, state, who).run()


class Session:
    """One connection. Its settings apply to every utterance until it sends others."""

    def __init__(self, socket: WebSocket, state: ServerState, asked_by: str) -> None:
        self.socket, self.state, self.asked_by = socket, state, asked_by
        self._inbox: asyncio.Queue[str] = asyncio.Queue()
        self._ahead, self._room = 0, asyncio.Event()
        self._config: SessionConfig | None = None
        self._resolved: ResolvedRequest | None = None
        self._text = PendingText()
        self._open = False  # an utterance has begun
        self._utterance = 0
        self._sentence = 0

    async def run(self) -> None:
        """Serve until either side ends it."""
        reading = asyncio.ensure_future(self._read())
        working = asyncio.ensure_future(self._work())
        try:
            await asyncio.wait({reading, working}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (reading, working):
                task.cancel()
            ends = await asyncio.gather(reading, working, return_exceptions=True)
            for end in ends:
                gone = isinstance(end, WebSocketDisconnect | OSError) or not self._connected
                if isinstance(end, Exception) and not gone:
                    log.error("a WebSocket session failed", exc_info=end)
            if self._connected:
                with contextlib.suppress(RuntimeError, OSError, WebSocketDisconnect):
                    await self.socket.close()

    @property
    def _connected(self) -> bool:
        return self.socket.client_state == WebSocketState.CONNECTED

    async def _read(self) -> None:
        """Put messages into the inbox until the client disconnects."""
        while True:
            message = await self.socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text") or ""
            self._ahead += len(text) + OVERHEAD
            self._inbox.put_nowait(text)
            while self._ahead > AHEAD:
                self._room.clear()
                await self._room.wait()

    async def _work(self) -> None:
        while True:
            try:
                raw = await self._next()
            except asyncio.TimeoutError:
                what = "session.config" if self._config is None else "message"
                await self._error(ApiError(408, f"no {what} came within {self._patience:g} s"))
                return
            try:
                if raw is None:
                    await self._speak_waiting()
                elif not await self._handle(raw):
                    return
            except (WebSocketDisconnect, OSError):
                raise
            except Exception as error:
                await self._error(as_api_error(error))
                if self._config is None:
                    return

    @property
    def _patience(self) -> float:
        return CONFIG_SECONDS if self._config is None else IDLE_SECONDS

    async def _next(self) -> str | None:
        """The next message; None when it is time to speak text that waits for its end.

        Raises TimeoutError when no message comes.
        """
        if self._inbox.empty():
            seconds = self._text.seconds()
            try:
                raw = await asyncio.wait_for(
                    self._inbox.get(), self._patience if seconds is None else seconds
                )
            except asyncio.TimeoutError:
                if seconds is not None:
                    return None
                raise
        else:
            raw = self._inbox.get_nowait()
        self._text.touch()
        self._ahead -= len(raw) + OVERHEAD
        self._room.set()
        return raw

    async def _speak_waiting(self) -> None:
        """Speak what of the pending text is complete, or overdue."""
        for sentence in self._text.waiting():
            await self._speak(sentence)

    async def _handle(self, raw: str) -> bool:
        """Handle one message; False ends the session. Raises ApiError on an invalid one."""
        message = _message(raw, self.state.settings.max_body_bytes)
        kind = message.pop("type", None)
        if kind == "session.close":
            return False
        if kind == "session.config":
            await self._configure(message)
        elif self._config is None:
            raise ApiError(400, f"the first message is {kind!r}, expected session.config", param="type")
        elif kind == "input.text":
            await self._add(message)
        elif kind == "input.done":
            await self._done()
        else:
            raise ApiError(
                400,
                f"unknown message {kind!r}; send session.config, input.text, input.done or session.close",
                param="type",
            )
        return True

    async def _configure(self, message: dict[str, Any]) -> None:
        if self._open:
            raise ApiError(
                409, "session.config cannot change an utterance in progress; send input.done first"
            )
        ignored = drop_ignored(SessionConfig, message) if self.state.settings.compatible else []
        config = parse(SessionConfig, message)
        if config.stream_audio and config.response_format != "pcm":
            raise ApiError(
                400, "stream_audio sends raw samples; set response_format to pcm", param="response_format"
            )
        resolved = await resolve(
            self.state, config, self.asked_by, streaming=config.stream_audio, ignored=ignored
        )
        self._config, self._resolved = config, resolved
        self._text = PendingText(config.split_granularity)

    async def _add(self, message: dict[str, Any]) -> None:
        text = message.get("text")
        if not isinstance(text, str):
            raise ApiError(422, "input.text must have a text, a string", param="text")
        limit = self.state.settings.max_text_characters
        if self._text.characters + len(text) > limit:
            raise ApiError(
                400,
                f"more than {limit:,} characters would wait for the end of a sentence; this text was "
                "dropped: send input.done, or shorter sentences",
                param="text",
                code="input_too_long",
            )
        if text and not self._open and self._utterance:  # the connection itself paid for the first
            self.state.keys.admit(self.socket.headers.get("authorization"))
        self._open = self._open or bool(text)
        for sentence in self._text.feed(text):
            await self._speak(sentence)

    async def _done(self) -> None:
        for sentence in self._text.flush():
            await self._speak(sentence)
        await self.socket.send_json(
            {
                "type": "session.done",
                "utterance_index": self._utterance,
                "total_sentences": self._sentence,
            }
        )
        self._utterance, self._sentence, self._open = self._utterance + 1, 0, False

    async def _speak(self, sentence: str) -> None:
        assert self._config is not None
        assert self._resolved is not None
        if not has_words(sentence, self._resolved.settings):
            return  # a line of a list's marks, an emoji
        streaming, format = self._config.stream_audio, self._config.response_format
        where = {"utterance_index": self._utterance, "sentence_index": self._sentence}
        start: dict[str, Any] = {"type": "audio.start", **where, "sentence_text": sentence, "format": format}
        if format == "pcm":
            start["sample_rate"] = self._config.sample_rate or self.state.tts.sampling_rate
        if self._resolved.ignored:
            start["ignored"] = list(dict.fromkeys(self._resolved.ignored))
        record = self._resolved.record()
        if record is not None:
            start["mark"] = record.plain()
        await self.socket.send_json(start)
        sent, failed = 0, False
        response: SpeechResponse | None = None
        try:
            with self.state.engine.place():
                response = await self._resolved.speak(sentence, streaming=streaming)
            if streaming:
                async for data in response.pieces():
                    await self.socket.send_bytes(data)
                    sent += len(data)
            else:
                data = await response.whole()
                await self.socket.send_bytes(data)
                sent = len(data)
        except (WebSocketDisconnect, OSError):
            raise
        except Exception as error:
            failed = True
            await self._error(as_api_error(error), partial=sent > 0)
        finally:
            if response is not None:
                response.cancel()
        done: dict[str, Any] = {"type": "audio.done", **where, "total_bytes": sent, "error": failed}
        if response is not None and not failed:
            done.update(usage=response.usage.body(), **response.outcome)
        await self.socket.send_json(done)
        self._sentence += 1

    async def _error(self, error: ApiError, partial: bool = False) -> None:
        message: dict[str, Any] = {"type": "error", "message": error.message, **error.body()}
        if partial:
            message.update(partial_audio=True, action="discard")
        await self.socket.send_json(message)


def _message(raw: str, limit: int) -> dict[str, Any]:
    if len(raw) > limit:
        raise ApiError(413, f"the message is longer than {limit:,} characters", code="body_too_large")
    try:
        return _MESSAGE.validate_json(raw)
    except ValidationError:
        raise ApiError(
            400, "a message must be a JSON object with a type, sent as text in whole Unicode characters"
        ) from None
