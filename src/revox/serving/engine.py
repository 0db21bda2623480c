"""The thread that owns the model: it speaks all requests together and hands their audio to asyncio.

A request joins and leaves between two frames. A reader that is slow costs the others nothing: its utterance
rests once it is far enough ahead. A request that fails is told so, alone. While somebody listens as it is
spoken, no more are spoken at once than the machine speaks in real time (`revox.serving.pace`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from revox.model.voxtral import Voxtral
from revox.serving.errors import ApiError, as_api_error
from revox.serving.metrics import Metrics
from revox.serving.pace import Pace
from revox.synthesis.continuous import ContinuousBatch, Utterance
from revox.synthesis.generate import DEFAULT_CFG
from revox.synthesis.stream import FIRST_ENDS, PIECE, chunk_ends, decode_after

if TYPE_CHECKING:
    from revox.serving.settings import ServeSettings

log = logging.getLogger("revox.serving")

STALL_SECONDS = 60.0
"""A reader that takes nothing for so long, while its utterance rests for it, is given up."""


@dataclass(frozen=True)
class Chunk:
    """Audio as it is made: float32 samples and the frames they stand for."""

    samples: np.ndarray
    frames: int


class Stream:
    """One request's audio, chunk by chunk: iterate over it, in the event loop that it was asked for in.

    Iterating raises ApiError when the request fails. `frames` counts what was made, `truncated` says at the
    end that the limit on its length cut it.
    """

    def __init__(
        self,
        prompt: Tensor,
        seed: int,
        max_frames: int | None,
        ends: Iterator[int],
        wake: threading.Event,
        live: bool = False,
        cfg_alpha: float = DEFAULT_CFG,
        speed: float = 1.0,
    ) -> None:
        self.prompt, self.seed, self.max_frames, self.ends = prompt, seed, max_frames, ends
        self.live, self.cfg_alpha, self.speed = live, cfg_alpha, speed
        self.frames = 0
        self.truncated = False
        self.cancelled = False
        self.asked_at = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Chunk | ApiError | None] = asyncio.Queue()
        self._wake = wake
        self._taken = 0
        self._taken_at = self.asked_at
        # The engine's own notes.
        self.utterance: Utterance | None = None
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
        self._wake.set()
        return item

    def cancel(self) -> None:
        """Nobody listens any more; its place is free after the next frame."""
        self.cancelled = True
        self._wake.set()

    @property
    def ahead(self) -> int:
        """Frames made that nobody has taken."""
        return self.decoded - self._taken

    @property
    def stalled(self) -> float:
        """Seconds since somebody took something, or since it was its turn."""
        return time.monotonic() - max(self._taken_at, self.started_at)

    def put(self, item: Chunk | ApiError | None) -> None:
        """Hand over, from the engine's thread: a chunk, a failure, or the end (None)."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # the event loop is gone, and with it the reader
            self.cancelled = True


class Engine:
    """Requests in, streams out; see the module."""

    def __init__(self, model: Voxtral, settings: ServeSettings, metrics: Metrics) -> None:
        self.model, self.settings, self.metrics = model, settings, metrics
        self._batch = ContinuousBatch(model)
        self._pace = Pace(1 / model.config.codec.frame_rate)
        self._waiting: deque[Stream] = deque()
        self._active: list[Stream] = []
        self._lock = threading.Lock()  # guards _waiting and _over
        self._wake = threading.Event()
        self._closing = False
        self._over = True  # nobody will take what is put into _waiting
        self._thread: threading.Thread | None = None
        self._seconds = 5.0  # what an utterance took lately

    @property
    def running(self) -> bool:
        """Whether the thread is there."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def active(self) -> int:
        """Utterances that have a place."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Utterances that wait for a place."""
        return len(self._waiting)

    def start(self) -> None:
        """Start the thread."""
        self._closing = self._over = False
        self._thread = threading.Thread(target=self._run, name="revox-engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; whoever still waits is told that the server stops."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=30)

    async def drain(self, seconds: float) -> None:
        """Wait until nothing is spoken any more, but no longer than so many seconds."""
        deadline = time.monotonic() + seconds
        while (self._active or self._waiting) and self.running and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def check_room(self) -> None:
        """Raise ApiError 429 when the queue is full, 503 when nothing is spoken any more."""
        if self._closing or not self.running:
            raise _not_ready()
        settings = self.settings
        if len(self._waiting) + len(self._active) >= settings.max_streams + settings.max_queue:
            again = max(1, math.ceil(self._seconds * len(self._waiting) / settings.max_streams))
            raise ApiError(
                429,
                f"{len(self._active)} requests are being spoken and {len(self._waiting)} wait; ask again "
                f"in {again} s",
                code="queue_full",
                headers={"Retry-After": str(again)},
            )

    def submit(
        self,
        prompt: Tensor,
        seed: int,
        max_frames: int | None = None,
        *,
        streaming: bool = False,
        first_frames: int | None = None,
        admitted: bool = False,
        cfg_alpha: float = DEFAULT_CFG,
        speed: float = 1.0,
    ) -> Stream:
        """Speak a prompt `[time, dim]` (`revox.synthesis.batch.embed`) when it is its turn.

        streaming: audio in chunks as soon as may be (the first after `first_frames`, 5 by default), sooner
        where a player would run dry, not in long pieces. admitted: part of a request that has been let in;
        the queue's limit does not hold. cfg_alpha: the scale of guidance. speed: at which what is made is
        heard.
        Raises ApiError as `check_room` does; 503 even when admitted.
        """
        if not admitted:
            self.check_room()
        ends = _ends(first_frames) if streaming else count(PIECE, PIECE)
        stream = Stream(prompt, seed, max_frames, ends, self._wake, streaming, cfg_alpha, speed)
        with self._lock:
            if self._over:
                raise _not_ready()
            self._waiting.append(stream)
        self.metrics.queued.set(len(self._waiting))
        self._wake.set()
        return stream

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        try:
            while not self._closing:
                try:
                    if not self._round():
                        self._wake.wait(timeout=1.0)
                        self._wake.clear()
                except Exception as error:  # a defect of the engine itself: everybody is told, and it goes on
                    self._start_over(as_api_error(error))
        finally:
            # However the thread ends: nobody waits for what never comes.
            with self._lock:
                self._over = True
                left = [*self._active, *self._waiting]
                self._waiting.clear()
            for stream in left:
                stream.utterance = None
                self._finish(stream, ApiError(503, "the server stops; ask again later", code="stopping"))

    def _start_over(self, error: ApiError) -> None:
        """Tell everybody who has a place, and begin with an empty batch: what is in this one is not known."""
        for stream in list(self._active):
            stream.utterance = None
            self._finish(stream, error)
        self._batch = ContinuousBatch(self.model)

    def _round(self) -> bool:
        """One frame of everybody; False when there is nothing to do before somebody asks or takes."""
        began = time.monotonic()
        self._sweep()
        joined = self._admit()
        speaking = [stream for stream in self._active if stream.utterance in self._batch.speaking]
        if not speaking:
            return False
        try:
            self._batch.step()
        except Exception as error:
            log.warning("a step of %d utterances failed (%s); trying each alone", len(speaking), error)
            self._each_alone(speaking)
        for stream in speaking:
            if stream.utterance is not None:
                self._hand_over(stream)
        self._pace.observe(len(speaking), time.monotonic() - began, joined)
        return True

    def _each_alone(self, speaking: list[Stream]) -> None:
        for stream in speaking:
            try:
                if stream.utterance is not None:
                    self._batch.step_one(stream.utterance)
            except Exception as error:
                self._finish(stream, as_api_error(error))

    def _sweep(self) -> None:
        """Let go of those nobody listens to; let those rest who are far ahead, and wake who are not."""
        with self._lock:
            gone = [stream for stream in self._waiting if stream.cancelled]
            for stream in gone:
                self._waiting.remove(stream)
        for stream in gone:
            self._finish(stream, None, "cancelled")
            self.metrics.queued.set(len(self._waiting))
        lead = self.settings.lead_frames
        for stream in list(self._active):
            resting = stream.utterance not in self._batch.speaking
            if stream.cancelled:
                self._finish(stream, None, "cancelled")
            elif resting and stream.stalled > STALL_SECONDS:
                told = ApiError(
                    408, f"nothing of the audio was taken for {STALL_SECONDS:g} s", code="stalled"
                )
                self._finish(stream, told, "stalled")
            elif stream.utterance is not None and not resting and stream.ahead > lead:
                self._batch.rest(stream.utterance)
            elif stream.utterance is not None and resting and stream.ahead <= lead:
                self._batch.wake(stream.utterance)

    def _admit(self) -> bool:
        """Let the next one in, and say whether there was one; one a frame, for reading a prompt makes the
        others wait."""
        joined = False
        while len(self._active) < self.settings.max_streams:
            with self._lock:
                stream = self._waiting.popleft() if self._waiting and self._keeps_pace() else None
            self.metrics.queued.set(len(self._waiting))
            if stream is None:
                break
            joined = True
            stream.started_at = time.monotonic()
            try:
                stream.utterance = self._batch.join(
                    stream.prompt, stream.seed, stream.max_frames, stream.cfg_alpha
                )
            except Exception as error:
                self._finish(stream, as_api_error(error))
                continue
            self._active.append(stream)
            self.metrics.active.set(len(self._active))
            if len(self._active) > 1:
                break
        return joined

    def _keeps_pace(self) -> bool:
        """Whether the first who waits can join without anybody's player running dry."""
        heard = [stream.speed for stream in (self._waiting[0], *self._active) if stream.live]
        return not (heard and self._active and self.settings.keep_pace) or self._pace.holds(
            self._batch.count_speaking + 1, max(heard)
        )

    def _is_due(self, stream: Stream, made: int) -> bool:
        if made >= stream.end:
            return True
        # No smaller pieces than at the start: each is decoded with its context, which costs as much again.
        enough = stream.decoded > 0 and made - stream.decoded >= FIRST_ENDS[0]
        if not (stream.live and enough and self.settings.keep_pace):
            return False
        seconds = self._pace.frame_seconds / stream.speed
        since = time.monotonic() - stream.first_at
        return self._pace.soon_dry(stream.decoded * seconds, since, self._batch.count_speaking)

    def _hand_over(self, stream: Stream) -> None:
        """Decode and hand over what is due of a stream that has just spoken."""
        one = stream.utterance
        assert one is not None
        made = len(one.ids)
        stream.frames = made
        try:
            if made > stream.decoded and (one.done or self._is_due(stream, made)):
                samples = self._decode(one, stream.decoded)
                if stream.decoded == 0:
                    stream.first_at = time.monotonic()
                    self.metrics.first_audio.observe(stream.first_at - stream.asked_at)
                stream.put(Chunk(samples, made - stream.decoded))
                stream.decoded = made
                while stream.end <= made:
                    stream.end = next(stream.ends)
        except Exception as error:
            self._finish(stream, as_api_error(error))
            return
        if one.done:
            stream.truncated = one.cut
            self._finish(stream, None, "cut" if one.cut else "ended")

    @torch.inference_mode()
    def _decode(self, one: Utterance, start: int) -> np.ndarray:
        codec = self.model.audio_tokenizer
        first = max(0, start - self._reach)
        samples = decode_after(codec, one.codes(first), start - first).cpu().numpy()
        if not np.isfinite(samples).all():
            raise ApiError(
                500, "the model gave sound that is not finite; try another seed", code="not_finite"
            )
        return samples

    @property
    def _reach(self) -> int:
        from revox.model.codec import decoder_reach

        return decoder_reach(self.model.audio_tokenizer)

    def _finish(self, stream: Stream, error: ApiError | None, outcome: str = "failed") -> None:
        if stream.utterance is not None:
            self._batch.leave(stream.utterance)
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
        stream.utterance = None
        stream.put(error)


def _not_ready() -> ApiError:
    return ApiError(503, "the server is stopping or not ready; ask again later", code="not_ready")


def _ends(first: int | None) -> Iterator[int]:
    """Frames at which chunks end: as in serving, or from a first one of another size on."""
    if first is not None:
        yield first
    for end in chunk_ends():
        if first is None or end > first:
            yield end
