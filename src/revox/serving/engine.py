"""The thread that owns the model: it speaks all requests together and hands their audio to asyncio.

A request joins and leaves between two frames. Requests of slow clients are paused once they are far enough
ahead, so that they do not hold up the others. A request that fails gets its error alone. While a client
listens to a stream, no more requests are spoken at once than the machine speaks in real time
(`revox.serving.admission`). New streams get their first sound before those that have enough in hand get more.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import torch

from revox.model.backbone import BLOCK
from revox.model.codec import PIECE
from revox.model.voxtral import Voxtral
from revox.serving.admission import WEIGHT, AdmissionControl
from revox.serving.errors import ApiError, as_api_error
from revox.serving.metrics import Metrics
from revox.synthesis.engine import CHUNK, FIRST_CHUNK, Engine, Generation, Request, chunk_ends

if TYPE_CHECKING:
    from revox.serving.settings import ServeSettings

log = logging.getLogger("revox.serving")

OTHERS_WAIT = 1.0
"""Seconds for which whole files, and pieces that are not played yet, wait for streams without a sound."""
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
        engine: EngineThread,
        live: bool = False,
        first_frames: int | None = None,
        speed: float = 1.0,
        opening: bool = True,
    ) -> None:
        self.request, self.live, self.first_frames, self.speed = request, live, first_frames, speed
        self.opening = opening
        self.frames = 0
        self.truncated = False
        self.cancelled = False
        self._clock = engine.clock
        self.asked_at = self._clock()
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Chunk | ApiError | None] = asyncio.Queue()
        self._changed = engine.changed
        self._taken = 0
        self._taken_at = self.asked_at
        # The engine thread's own notes.
        self.generation: Generation | None = None
        self.ends: Iterator[int] = count(PIECE, PIECE)
        self.end = 0
        self.decoded = 0
        self.started_at = 0.0
        self.stepped_at = 0.0
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
        self._taken_at = self._clock()
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
        return self._clock() - max(self._taken_at, self.started_at)

    def put(self, item: Chunk | ApiError | None) -> None:
        """Hand over, from the engine's thread: a chunk, a failure, or the end (None)."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # the event loop is gone, and with it the client
            self.cancelled = True


class EngineThread:
    """Requests in, streams out; see the module. `clock`: seconds, by which streams are paced."""

    def __init__(
        self,
        model: Voxtral,
        settings: ServeSettings,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.settings, self.metrics, self.clock = model, settings, metrics, clock
        self.changed = threading.Event()
        self._engine = Engine(model)
        self._admission = AdmissionControl(1 / model.config.codec.frame_rate, clock)
        self._cache_bytes = settings.cache_mb * 2**20 if settings.cache_mb else _half_of_memory(model.device)
        self._waiting: deque[SpeechStream] = deque()
        self._active: list[SpeechStream] = []
        self._preparing = 0
        self._lock = threading.Lock()  # guards _waiting and _over
        self._closing = False
        self._over = True  # the thread will take nothing more from _waiting
        self._thread: threading.Thread | None = None
        self._seconds = 5.0  # what a request took lately
        self._decoded, self._decoding_took = 0.0, 0.0  # frames and seconds, less of those long ago

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
        self.changed.set()
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
        opening: bool = True,
    ) -> SpeechStream:
        """Speak a request when it is its turn. Its place should be held (`place`): the queue is not checked.

        streaming: audio in chunks as soon as possible, sooner where a player would run dry; otherwise in
        long pieces. first_frames: of the first chunk; by default 1 to 5, as many as the pace requires. speed:
        of the playback. opening: the client has no sound yet; False for the later pieces of a text.
        Raises ApiError 503 when the server stops.
        """
        stream = SpeechStream(request, self, streaming, first_frames, speed, opening)
        with self._lock:
            if self._over:
                raise _not_ready()
            self._waiting.append(stream)
        self.metrics.queued.set(len(self._waiting))
        self.changed.set()
        return stream

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        try:
            while not self._closing:
                try:
                    if not self._step():
                        self.changed.wait(timeout=1.0)
                        self.changed.clear()
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
        """One frame of whoever is next; False when there is nothing to do before a client asks or takes."""
        began = self.clock()
        self._sweep()
        joined = self._admit()
        speaking = self._next(self.clock())
        if not speaking:
            return False
        for stream in self._active:
            if stream.generation is not None and stream not in speaking:
                self._engine.pause(stream.generation)
        for stream in speaking:
            if stream.generation is not None:
                self._engine.resume(stream.generation)
        try:
            self._engine.step()
        except Exception as error:
            log.warning("a step of %d requests failed (%s); trying each alone", len(speaking), error)
            self._each_alone(speaking)
        took = self.clock() - began
        self._hand_over([stream for stream in speaking if stream.generation is not None])
        # With its share of the decoding, which comes in chunks, and later.
        even = took + len(speaking) * self._decoding
        self._admission.observe(len(speaking), even, joined, whole=self.clock() - began)
        return True

    def _next(self, now: float) -> list[SpeechStream]:
        """Who gets a frame in the next step: all, except those far ahead of their clients.

        While a client has no sound yet, those that have enough in hand wait for it: players until they would
        run dry within a few steps, whole files for a second.
        """
        able = [stream for stream in self._active if stream.ahead <= self.settings.lead_frames]
        silent = [stream for stream in able if stream.live and stream.opening and not stream.decoded]
        if not (silent and self.settings.admission_control):
            chosen = able
        else:
            margin = 2 * self._admission.margin(len(able))
            chosen = [stream for stream in able if stream in silent or self._is_urgent(stream, now, margin)]
        for stream in chosen:
            stream.stepped_at = now
        return chosen

    def _is_urgent(self, stream: SpeechStream, now: float, margin: float) -> bool:
        if not (stream.live and stream.decoded):
            return now - stream.stepped_at > OTHERS_WAIT
        return self._in_hand(stream) < margin

    def _each_alone(self, speaking: list[SpeechStream]) -> None:
        for stream in speaking:
            try:
                if stream.generation is not None:
                    self._engine.step(stream.generation)
            except Exception as error:
                self._finish(stream, as_api_error(error))

    def _sweep(self) -> None:
        """Drop the requests whose clients are gone, or take nothing for a minute."""
        with self._lock:
            gone = [stream for stream in self._waiting if stream.cancelled]
            for stream in gone:
                self._waiting.remove(stream)
        for stream in gone:
            self._finish(stream, None, "cancelled")
            self.metrics.queued.set(len(self._waiting))
        for stream in list(self._active):
            if stream.cancelled:
                self._finish(stream, None, "cancelled")
            elif stream.ahead > self.settings.lead_frames and stream.stalled > STALL_SECONDS:
                error = ApiError(
                    408, f"no audio was taken for {STALL_SECONDS:g} s; read the stream as it comes",
                    code="stalled",
                )  # fmt: skip
                self._finish(stream, error, "stalled")

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
            stream.started_at = stream.stepped_at = self.clock()
            if stream.live:
                stream.first_frames = stream.first_frames or self._first_frames(stream)
                stream.ends = chunk_ends(stream.first_frames)
            stream.end = next(stream.ends)
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

    def _first_frames(self, stream: SpeechStream) -> int:
        if not self.settings.admission_control:
            return FIRST_CHUNK
        return self._admission.first_frames(len(self._active) + 1, stream.speed)

    def _fits(self) -> bool:
        """Whether the first request that waits can start: its cache has room, and no player runs dry."""
        if not self._active:
            return True
        streams = [self._waiting[0], *self._active]
        longest = max(len(stream.request.prompt) + stream.request.room for stream in streams)
        blocks = -(-longest // BLOCK) * BLOCK
        if len(streams) * blocks * self._engine.cache.position_bytes > self._cache_bytes:
            return False
        speeds = [stream.speed for stream in streams if stream.live]
        if not (speeds and self.settings.admission_control):
            return True
        return self._admission.allows(len(streams), max(speeds))

    @property
    def _decoding(self) -> float:
        """Seconds that decoding a frame took lately; a frame of a long chunk takes less."""
        return self._decoding_took / max(self._decoded, 1.0)

    def _is_due(self, stream: SpeechStream, speaking: bool) -> bool:
        one = stream.generation
        if one is None or stream.frames == stream.decoded:
            return False
        if one.done or stream.frames >= stream.end:
            return True
        if not (speaking and stream.live and stream.decoded and self.settings.admission_control):
            return False
        return self._in_hand(stream) < self._admission.margin(self._engine.count_speaking)

    def _in_hand(self, stream: SpeechStream) -> float:
        """Seconds until the player of a stream is out of sound; the least before its first."""
        if not stream.live:
            return math.inf
        if not stream.decoded:
            return -math.inf
        seconds = self._admission.frame_seconds / stream.speed
        return stream.decoded * seconds - (self.clock() - stream.first_at)

    def _in_turn(self, due: list[SpeechStream]) -> list[SpeechStream]:
        """Those who cannot wait, and as many others as fit into a step, those with the least in hand first.

        Chunks of many streams that are due at once would make everybody wait for all of them.
        """
        margin = self._admission.margin(self._engine.count_speaking)
        # At least twice what must be decoded a step in the long run.
        left = max(self._admission.frame_seconds / 2, 2 * self._decoding * len(self._active))
        taken: list[SpeechStream] = []
        for stream in sorted(due, key=self._in_hand):
            assert stream.generation is not None
            left -= (stream.frames - stream.decoded) * self._decoding
            # No longer than a chunk takes: what piles up would be decoded at once in the end.
            overdue = stream.generation.done or stream.frames >= stream.end + CHUNK
            waits = self._in_hand(stream) >= margin and not overdue
            if left >= 0 or not (taken and waits and self.settings.admission_control):
                taken.append(stream)
        return taken

    def _hand_over(self, speaking: list[SpeechStream]) -> None:
        """Decode and hand over what is due, now that some streams have got a frame."""
        for stream in speaking:
            assert stream.generation is not None
            stream.frames = len(stream.generation.frames)
        due = self._in_turn([stream for stream in self._active if self._is_due(stream, stream in speaking)])
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
        began, frames = self.clock(), sum(stream.frames - stream.decoded for stream in due)
        waveforms = self._engine.decode(generations)
        if frames:
            self._decoded += frames - WEIGHT * self._decoded
            self._decoding_took += self.clock() - began - WEIGHT * self._decoding_took
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
                stream.first_at = self.clock()
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
            took = self.clock() - stream.started_at
            spoken = stream.frames / self.model.config.codec.frame_rate
            self.metrics.speech_seconds.inc(spoken)
            self.metrics.real_time_factor.observe(took / spoken)
            self._seconds += 0.2 * (took - self._seconds)
        stream.generation = None
        stream.put(error)


def _half_of_memory(device: torch.device) -> int:
    """Half of the device's memory that is free now, or of the machine's memory; bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _not_ready() -> ApiError:
    return ApiError(503, "the server is stopping or not ready; ask again later", code="not_ready")
