"""The thread that owns the model: it speaks all requests together and hands their audio to asyncio.

A request joins and leaves between two frames. Requests of slow clients are paused once they are far enough
ahead, so that they do not hold up the others. A request that fails gets its error alone. While a client
listens to a stream, no more requests are spoken at once than the machine speaks in real time
(`revox.serving.admission`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from revox.model.codec import PIECE
from revox.model.voxtral import Voxtral
from revox.serving.admission import AdmissionControl
from revox.serving.errors import ApiError, as_api_error
from revox.serving.metrics import Metrics
from revox.synthesis.engine import FIRST_ENDS, Engine, Generation, Request, chunk_ends

if TYPE_CHECKING:
    from revox.serving.settings import ServeSettings

log = logging.getLogger("revox.serving")

STALL_SECONDS = 60.0
"""A client that takes nothing for so long, while its request is paused for it, is given up."""


@dataclass(frozen=True)
class Chunk:
    """Audio as it is made: float32 samples, the semantic codes of their frames, and whether it is the last
    because the model ended or met its limit."""

    samples: np.ndarray
    semantic: np.ndarray
    ended: bool
    truncated: bool

    @property
    def frames(self) -> int:
        """Frames that the samples stand for."""
        return len(self.semantic)


class SpeechStream:
    """One request's audio, chunk by chunk: iterate over it, in the event loop that it was asked for in.

    Iterating raises ApiError when the request fails. `frames` counts what was made, `truncated` says at the
    end that the limit on its length cut it.
    """

    def __init__(
        self,
        request: Request,
        ends: Iterator[int],
        changed: threading.Event,
        live: bool = False,
        speed: float = 1.0,
    ) -> None:
        self.request, self.ends, self.live, self.speed = request, ends, live, speed
        self.frames = 0
        self.truncated = False
        self.cancelled = False
        self.asked_at = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Chunk | ApiError | None] = asyncio.Queue()
        self._changed = changed
        self._taken = 0
        self._taken_at = self.asked_at
        # The engine thread's own notes.
        self.generation: Generation | None = None
        self.end = next(ends)
        self.decoded = 0
        self.started_at = 0.0
        self.first_at = 0.0

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        item = await self._queue.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, ApiError):
            raise item
        self._taken += item.frames
        self._taken_at = time.monotonic()
        self._changed.set()
        return item

    def cancel(self) -> None:
        """The client is gone; the place is free after the next frame."""
        self.cancelled = True
        self._changed.set()

    @property
    def ahead(self) -> int:
        """Frames made that the client has not taken."""
        return self.decoded - self._taken

    @property
    def stalled(self) -> float:
        """Seconds since the client took something, or since the request was started."""
        return time.monotonic() - max(self._taken_at, self.started_at)

    def put(self, item: Chunk | ApiError | None) -> None:
        """Hand over, from the engine's thread: a chunk, a failure, or the end (None)."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # the event loop is gone, and with it the client
            self.cancelled = True


class EngineThread:
    """Requests in, streams out; see the module."""

    def __init__(self, model: Voxtral, settings: ServeSettings, metrics: Metrics) -> None:
        self.model, self.settings, self.metrics = model, settings, metrics
        self._engine = Engine(model)
        self._admission = AdmissionControl(1 / model.config.codec.frame_rate)
        self._waiting: deque[SpeechStream] = deque()
        self._active: list[SpeechStream] = []
        self._preparing = 0
        self._lock = threading.Lock()  # guards _waiting and _over
        self._changed = threading.Event()
        self._closing = False
        self._over = True  # the thread will take nothing more from _waiting
        self._thread: threading.Thread | None = None
        self._seconds = 5.0  # what a request took lately

    @property
    def running(self) -> bool:
        """Whether the thread is there."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def active(self) -> int:
        """Requests that are being spoken."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._waiting)

    def start(self) -> None:
        """Start the thread."""
        self._closing = self._over = False
        self._thread = threading.Thread(target=self._run, name="revox-engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; requests that still wait get an error that the server stops."""
        self._closing = True
        self._changed.set()
        if self._thread is not None:
            self._thread.join(timeout=30)

    async def drain(self, seconds: float) -> None:
        """Wait until all requests are done, but no longer than so many seconds."""
        deadline = time.monotonic() + seconds
        while (self._active or self._waiting) and self.running and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place in the queue while a request is prepared and submitted.

        Raises ApiError 429 when the queue is full, 503 when the server is not ready or stops.
        """
        if self._closing or not self.running:
            raise _not_ready()
        settings, taken = self.settings, len(self._waiting) + len(self._active) + self._preparing
        if taken >= settings.max_streams + settings.max_queue:
            again = max(1, math.ceil(self._seconds * len(self._waiting) / settings.max_streams))
            raise ApiError(
                429,
                f"{len(self._active)} requests are being spoken and {len(self._waiting)} wait; ask again "
                f"in {again} s",
                code="queue_full",
                headers={"Retry-After": str(again)},
            )
        self._preparing += 1
        try:
            yield
        finally:
            self._preparing -= 1

    def submit(
        self,
        request: Request,
        *,
        streaming: bool = False,
        first_frames: int | None = None,
        speed: float = 1.0,
    ) -> SpeechStream:
        """Speak a request when it is its turn. Its place should be held (`place`): the queue is not checked.

        streaming: audio in chunks as soon as possible (the first after `first_frames`, 5 by default), sooner
        where a player would run dry; otherwise in long pieces. speed: of the playback.
        Raises ApiError 503 when the server stops.
        """
        ends = chunk_ends(first_frames) if streaming else count(PIECE, PIECE)
        stream = SpeechStream(request, ends, self._changed, streaming, speed)
        with self._lock:
            if self._over:
                raise _not_ready()
            self._waiting.append(stream)
        self.metrics.queued.set(len(self._waiting))
        self._changed.set()
        return stream

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        try:
            while not self._closing:
                try:
                    if not self._step():
                        self._changed.wait(timeout=1.0)
                        self._changed.clear()
                except Exception as error:  # a defect of this thread: all requests fail, it goes on
                    self._start_over(as_api_error(error))
        finally:
            # However the thread ends: no client waits for what never comes.
            with self._lock:
                self._over = True
                left = [*self._active, *self._waiting]
                self._waiting.clear()
            for stream in left:
                stream.generation = None
                self._finish(stream, ApiError(503, "the server stops; ask again later", code="stopping"))

    def _start_over(self, error: ApiError) -> None:
        """Fail all requests that are being spoken, and begin with an empty engine: the state of this one is
        not known."""
        for stream in list(self._active):
            stream.generation = None
            self._finish(stream, error)
        self._engine = Engine(self.model)

    def _step(self) -> bool:
        """One frame of every request; False when there is nothing to do before a client asks or takes."""
        began = time.monotonic()
        self._sweep()
        joined = self._admit()
        speaking = [stream for stream in self._active if stream.generation in self._engine.speaking]
        if not speaking:
            return False
        try:
            self._engine.step()
        except Exception as error:
            log.warning("a step of %d requests failed (%s); trying each alone", len(speaking), error)
            self._each_alone(speaking)
        self._hand_over([stream for stream in speaking if stream.generation is not None])
        self._admission.observe(len(speaking), time.monotonic() - began, joined)
        return True

    def _each_alone(self, speaking: list[SpeechStream]) -> None:
        for stream in speaking:
            try:
                if stream.generation is not None:
                    self._engine.step(stream.generation)
            except Exception as error:
                self._finish(stream, as_api_error(error))

    def _sweep(self) -> None:
        """Drop the requests whose clients are gone; pause those that are far ahead, and resume the others."""
        with self._lock:
            gone = [stream for stream in self._waiting if stream.cancelled]
            for stream in gone:
                self._waiting.remove(stream)
        for stream in gone:
            self._finish(stream, None, "cancelled")
            self.metrics.queued.set(len(self._waiting))
        lead = self.settings.lead_frames
        for stream in list(self._active):
            generation, paused = stream.generation, stream.generation not in self._engine.speaking
            if stream.cancelled:
                self._finish(stream, None, "cancelled")
            elif paused and stream.stalled > STALL_SECONDS:
                error = ApiError(
                    408, f"no audio was taken for {STALL_SECONDS:g} s; read the stream as it comes",
                    code="stalled",
                )  # fmt: skip
                self._finish(stream, error, "stalled")
            elif generation is not None and not paused and stream.ahead > lead:
                self._engine.pause(generation)
            elif generation is not None and paused and stream.ahead <= lead:
                self._engine.resume(generation)

    def _admit(self) -> bool:
        """Start the next request, and say whether there was one; one a step, because reading its prompt makes
        the others wait."""
        joined = False
        while len(self._active) < self.settings.max_streams:
            with self._lock:
                stream = self._waiting.popleft() if self._waiting and self._fits() else None
            self.metrics.queued.set(len(self._waiting))
            if stream is None:
                break
            joined = True
            stream.started_at = time.monotonic()
            try:
                [stream.generation] = self._engine.join([stream.request])
            except Exception as error:
                self._finish(stream, as_api_error(error))
                continue
            self._active.append(stream)
            self.metrics.active.set(len(self._active))
            if len(self._active) > 1:
                break
        return joined

    def _fits(self) -> bool:
        """Whether the first request that waits can start without any player running dry."""
        speeds = [stream.speed for stream in (self._waiting[0], *self._active) if stream.live]
        return not (speeds and self._active and self.settings.admission_control) or self._admission.allows(
            self._engine.count_speaking + 1, max(speeds)
        )

    def _is_due(self, stream: SpeechStream, made: int) -> bool:
        if made >= stream.end:
            return True
        # No smaller pieces than at the start: each costs a pass through the decoder.
        enough = stream.decoded > 0 and made - stream.decoded >= FIRST_ENDS[0]
        if not (stream.live and enough and self.settings.admission_control):
            return False
        seconds = self._admission.frame_seconds / stream.speed
        since = time.monotonic() - stream.first_at
        return self._admission.soon_dry(stream.decoded * seconds, since, self._engine.count_speaking)

    def _hand_over(self, speaking: list[SpeechStream]) -> None:
        """Decode and hand over what is due of streams that have just got a frame."""
        due = []
        for stream in speaking:
            one = stream.generation
            assert one is not None
            stream.frames = made = len(one.frames)
            if made > stream.decoded and (one.done or self._is_due(stream, made)):
                due.append(stream)
        try:
            self._decode(due)
        except Exception as error:
            log.warning("decoding %d requests failed (%s); trying each alone", len(due), error)
            for stream in due:
                try:
                    self._decode([stream])
                except Exception as its_own:
                    self._finish(stream, as_api_error(its_own))
        for stream in speaking:
            one = stream.generation
            if one is not None and one.done:
                stream.truncated = one.truncated
                self._finish(stream, None, "cut" if one.truncated else "ended")

    def _decode(self, due: list[SpeechStream]) -> None:
        generations = [stream.generation for stream in due if stream.generation is not None]
        codes = [one.codes(one.decoded) for one in generations]
        waveforms = self._engine.decode(generations)
        for stream, one, new, waveform in zip(due, generations, codes, waveforms, strict=True):
            samples = waveform.cpu().numpy()
            if not np.isfinite(samples).all():
                error = ApiError(
                    500,
                    "the model gave sound that is not finite; the operator should check the weights with "
                    "revox doctor",
                    code="not_finite",
                )
                self._finish(stream, error)
                continue
            if stream.decoded == 0:
                stream.first_at = time.monotonic()
                self.metrics.first_audio.observe(stream.first_at - stream.asked_at)
            stream.put(Chunk(samples, new[0].cpu().numpy(), one.ended, one.truncated))
            stream.decoded = stream.frames
            while stream.end <= stream.frames:
                stream.end = next(stream.ends)

    def _finish(self, stream: SpeechStream, error: ApiError | None, outcome: str = "failed") -> None:
        if stream.generation is not None:
            self._engine.leave(stream.generation)
        if stream in self._active:
            self._active.remove(stream)
        self.metrics.active.set(len(self._active))
        self.metrics.speech.labels(outcome).inc()
        if stream.started_at and outcome in ("ended", "cut") and stream.frames:
            took = time.monotonic() - stream.started_at
            spoken = stream.frames / self.model.config.codec.frame_rate
            self.metrics.speech_seconds.inc(spoken)
            self.metrics.real_time_factor.observe(took / spoken)
            self._seconds += 0.2 * (took - self._seconds)
        stream.generation = None
        stream.put(error)


def _not_ready() -> ApiError:
    return ApiError(503, "the server is stopping or not ready; ask again later", code="not_ready")
