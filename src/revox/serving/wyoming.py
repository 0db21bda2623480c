"""Wyoming, the voice protocol of Home Assistant: text to speech, whole texts and texts in parts.

Events are read and written by the package `wyoming` (github.com/OHF-Voice/wyoming), of which a client is
tested. The protocol has no keys: whoever reaches the address can speak.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from typing import TYPE_CHECKING, Any

from revox import __version__
from revox.checkpoint.release import PRESETS
from revox.serving.errors import ApiError, as_api_error
from revox.serving.pending_text import PendingText
from revox.serving.speaking import ResolvedRequest, resolve
from revox.serving.speech_request import SpeechOptions, parse
from revox.serving.voices import Voices
from revox.synthesis.languages import LANGUAGES, language_code
from revox.synthesis.longform import has_words, language_of

if TYPE_CHECKING:
    from wyoming.event import Event
    from wyoming.tts import SynthesizeVoice

    from revox.serving.state import ServerState

log = logging.getLogger("revox.serving")

ASKED_BY = "wyoming"
MAX_CONNECTIONS = 64
AHEAD = 256  # events that are read ahead of what is spoken
DATA_BYTES, CHARACTER_BYTES = 4096, 12
"""Of an event: for everything, and for each character of a text, twice as many as JSON takes at most."""
IDLE_SECONDS = 300.0
"""Home Assistant opens a connection for each request; one in which nothing happens is closed."""
WIDTH = 2  # bytes of a sample


class WyomingServer:
    """Serves on a bound socket, from `start` to `close`."""

    def __init__(self, state: ServerState, listener: socket.socket) -> None:
        self._state, self._listener = state, listener
        self._server: asyncio.Server | None = None
        self._sessions: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Accept connections from now on."""
        limit = self._state.settings.max_body_bytes
        self._server = await asyncio.start_server(self._connected, sock=self._listener, limit=limit)

    async def close(self) -> None:
        """Accept no more, and end those that are left."""
        if self._server is not None:
            self._server.close()
        for session in self._sessions:
            session.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._sessions) >= MAX_CONNECTIONS:
            writer.close()
            return
        # A task of its own: asyncio reports its callback's task as failed when that is cancelled.
        session = asyncio.ensure_future(WyomingSession(self._state, reader, writer).run())
        self._sessions.add(session)
        session.add_done_callback(self._sessions.discard)


class WyomingSession:
    """One connection."""

    def __init__(
        self, state: ServerState, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._state, self._reader, self._writer = state, reader, writer
        self._inbox: asyncio.Queue[Event] = asyncio.Queue(AHEAD)
        self._text = PendingText()
        self._resolved: ResolvedRequest | None = None  # between synthesize-start and -stop
        self._sounding = False

    async def run(self) -> None:
        """Serve until either side ends it."""
        reading = asyncio.ensure_future(self._read())
        working = asyncio.ensure_future(self._work())
        try:
            await asyncio.wait({reading, working}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done() and not self._inbox.empty() and reading.exception() is None:
                await asyncio.wait({working}, timeout=IDLE_SECONDS)  # what was sent before the end
        finally:
            for task in (reading, working):
                task.cancel()
            for end in await asyncio.gather(reading, working, return_exceptions=True):
                if isinstance(end, Exception) and not isinstance(end, OSError):
                    log.error("a Wyoming session failed", exc_info=end)
            with contextlib.suppress(OSError):
                self._writer.close()
                await self._writer.wait_closed()

    async def _read(self) -> None:
        while (event := await self._next_event()) is not None:
            await self._inbox.put(event)

    async def _next_event(self) -> Event | None:
        """The next event; None at the end, and for what is not one or is too large."""
        from wyoming.event import async_read_event

        try:
            line = await self._reader.readline()
            header = json.loads(line) if line else None
            if not isinstance(header, dict) or not isinstance(header.get("type"), str):
                return None
            sizes = [header.get(name) or 0 for name in ("data_length", "payload_length")]
            if not all(isinstance(size, int) and size >= 0 for size in sizes):
                return None
            most = DATA_BYTES + CHARACTER_BYTES * self._state.settings.max_text_characters
            if sum(sizes) > min(most, self._state.settings.max_body_bytes):
                return None
            whole = asyncio.StreamReader()
            whole.feed_data(line + await self._reader.readexactly(sum(sizes)))
            whole.feed_eof()
            return await async_read_event(whole)
        except (OSError, ValueError, TypeError, AttributeError, asyncio.IncompleteReadError):
            return None

    async def _work(self) -> None:
        while True:
            seconds = self._text.seconds() if self._resolved is not None else None
            try:
                event = await asyncio.wait_for(
                    self._inbox.get(), IDLE_SECONDS if seconds is None else seconds
                )
            except asyncio.TimeoutError:
                if seconds is None:
                    return
                event = None
            try:
                if event is None:
                    await self._speak_all(self._text.waiting())
                else:
                    self._text.touch()
                    await self._handle(event)
            except OSError:
                return
            except Exception as error:
                from wyoming.error import Error

                # Clients wait for the end of audio: only a closed connection tells them that none comes.
                answer = as_api_error(error)
                await self._send(Error(text=answer.message, code=answer.code).event())
                return

    async def _handle(self, event: Event) -> None:
        from wyoming.info import Describe
        from wyoming.ping import Ping, Pong
        from wyoming.tts import (
            Synthesize,
            SynthesizeChunk,
            SynthesizeStart,
            SynthesizeStop,
            SynthesizeStopped,
        )

        kind = event.type
        if Describe.is_type(kind):
            await self._send(await asyncio.to_thread(describe, self._state))
        elif Ping.is_type(kind):
            await self._send(Pong(text=_parsed(Ping, event).text).event())
        elif SynthesizeStart.is_type(kind):
            self._resolved = await self._resolve(_parsed(SynthesizeStart, event).voice)
            self._text = PendingText()
        elif SynthesizeChunk.is_type(kind) and self._resolved is not None:
            await self._feed(_text(_parsed(SynthesizeChunk, event)))
        elif SynthesizeStop.is_type(kind) and self._resolved is not None:
            await self._speak_all(self._text.flush())
            await self._stop_audio()
            await self._send(SynthesizeStopped().event())
            self._resolved = None
        # In a stream the whole text comes as well, for servers that do not know streams.
        elif Synthesize.is_type(kind) and self._resolved is None:
            asked = _parsed(Synthesize, event)
            self._resolved = await self._resolve(asked.voice)
            await self._speak(_text(asked))
            await self._stop_audio()
            self._resolved = None

    async def _feed(self, text: str) -> None:
        limit = self._state.settings.max_text_characters
        if self._text.characters + len(text) > limit:
            raise ApiError(400, f"more than {limit:,} characters wait for an end; send shorter sentences")
        await self._speak_all(self._text.feed(text))

    async def _resolve(self, voice: SynthesizeVoice | None) -> ResolvedRequest:
        names = await asyncio.to_thread(self._state.voices.names)
        name = voice.name if voice is not None else None
        if name is None:
            name = _default_voice(names, voice.language if voice is not None else None)
        options = parse(SpeechOptions, {"voice": name, "response_format": "pcm"})
        return await resolve(self._state, options, ASKED_BY, streaming=True)

    async def _speak_all(self, sentences: list[str]) -> None:
        for sentence in sentences:
            assert self._resolved is not None
            if has_words(sentence, self._resolved.settings):
                await self._speak(sentence)

    async def _speak(self, text: str) -> None:
        from wyoming.audio import AudioChunk, AudioStart

        resolved, rate = self._resolved, self._state.tts.sampling_rate
        assert resolved is not None
        with self._state.engine.place():
            response = await resolved.speak(text, streaming=True)
        try:
            async for data in response.pieces():
                if not self._sounding:
                    start = AudioStart(rate=rate, width=WIDTH, channels=1).event()
                    record = resolved.record()
                    if record is not None:
                        start.data["mark"] = record.plain()
                    await self._send(start)
                    self._sounding = True
                await self._send(AudioChunk(rate=rate, width=WIDTH, channels=1, audio=data).event())
        finally:
            response.cancel()

    async def _stop_audio(self) -> None:
        from wyoming.audio import AudioStop

        if self._sounding:
            await self._send(AudioStop().event())
        self._sounding = False

    async def _send(self, event: Event) -> None:
        from wyoming.event import async_write_event

        await async_write_event(event, self._writer)


def _parsed(kind: Any, event: Event) -> Any:
    """The event as `kind`. Raises ApiError 400 when it is not of the protocol's form."""
    try:
        return kind.from_event(event)
    except (KeyError, TypeError, AttributeError):
        raise _malformed(event.type) from None


def _text(event: Any) -> str:
    if not isinstance(event.text, str):
        raise _malformed(type(event).__name__)
    return event.text


def _malformed(kind: str) -> ApiError:
    return ApiError(400, f"the event {kind[:100]} is not of the protocol's form", code="bad_event")


def _default_voice(names: list[str], language: str | None) -> str:
    """The first voice, of a language if one is asked for. Raises ApiError 404 where there is none."""
    code = None if language is None else language_code(language) or language
    name = next((one for one in names if code is None or language_of(one) == code), None)
    if name is None:
        what = "no voices" if code is None else f"no voice of the language {language!r}"
        raise ApiError(404, f"this server has {what}; name one of its voices", code="voice_not_found")
    return name


def describe(state: ServerState) -> Event:
    """The server's voices. A cloned voice speaks all languages of the model, a preset its own."""
    from wyoming.info import Attribution, Info, TtsProgram, TtsVoice

    voices: Voices = state.voices
    made_by = Attribution(name="Mistral AI", url="https://mistral.ai")
    return Info(
        tts=[
            TtsProgram(
                name="revox",
                description=f"{state.settings.served_name} by revox; speech is marked as synthetic"
                if state.settings.marking
                else state.settings.served_name,
                attribution=made_by,
                installed=True,
                version=__version__,
                supports_synthesize_streaming=True,
                voices=[
                    TtsVoice(
                        name=name,
                        description=name.replace("_", " "),
                        attribution=made_by,
                        installed=True,
                        version=None,
                        languages=[language_of(name)] if name in PRESETS else list(LANGUAGES),
                    )
                    for name in voices.names()
                ],
            )
        ]
    ).event()
