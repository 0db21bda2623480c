"""Batches of clips: drawn in the parent, decoded, cut, resampled and levelled in workers, given in order."""

from __future__ import annotations

import multiprocessing
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np

from revox.training.data.errors import DataError
from revox.training.data.pool import quiet_worker
from revox.training.data.sampling import ClipSampler, Draw
from revox.training.data.table import Clip

if TYPE_CHECKING:
    from torch import Tensor

_LISTED = 20  # of the failures, the last ones
_MOST_IN_A_ROW = 200  # failures: then it is not the clips
_LONGEST = 600.0  # seconds decoded of a file that does not say how long it is
_ENCODING_SLACK = 0.05  # seconds by which codecs pad, and headers are off


@dataclass(frozen=True)
class ClipBatch:
    """`waveforms` float32 `[batch, samples]`, silent beyond `lengths` int64 `[batch]` (samples).

    A transcript is given where it is known and the clip was used whole. `replaced` clips could not be decoded
    and gave way to the next draws.
    """

    waveforms: Tensor
    lengths: Tensor
    speakers: list[str]
    languages: list[str | None]
    transcripts: list[str | None]
    keys: list[str]
    replaced: int = 0


def clip_batches(
    sampler: ClipSampler,
    *,
    seconds: float,
    rate: int,
    batch: int,
    workers: int = 4,
    prefetch: int = 4,
    state: Mapping[str, Any] | None = None,
) -> ClipBatches:
    """Batches of `batch` clips of at most `seconds` at `rate` Hz, mono, levelled to -23 LUFS; endless.

    `workers` processes decode (0: this one does), up to `prefetch` batches ahead. What comes is the same for
    any number of both. `state` is what `ClipBatches.state` gave. Close it when done, or use `with`.
    """
    return ClipBatches(sampler, seconds, rate, batch, workers, prefetch, state)


class ClipBatches(Iterator[ClipBatch]):
    """See `clip_batches`. `failed` counts clips that could not be decoded, `failures` lists the last ones."""

    def __init__(
        self,
        sampler: ClipSampler,
        seconds: float,
        rate: int,
        batch: int,
        workers: int,
        prefetch: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        if batch < 1 or prefetch < 1 or workers < 0 or seconds <= 0:
            raise DataError("a batch has one clip or more of some length, and is prefetched at least once")
        self.sampler, self.seconds, self.rate, self.batch = sampler, seconds, rate, batch
        self.failed = 0
        self.failures: deque[str] = deque(maxlen=_LISTED)
        if state is not None:
            sampler.load_state_dict(state)
            self.failed = int(state.get("failed", 0))
        self._ahead = sampler.copy()  # the sampler itself stays at what was handed out
        self._decoders = _Decoders(self._ahead, seconds, rate, workers, prefetch * batch) if workers else None
        self._close = weakref.finalize(self, _Decoders.close, self._decoders) if self._decoders else None

    def __next__(self) -> ClipBatch:
        """The next batch. Raises DataError when a worker died or nothing can be decoded any more."""
        import torch

        length = max(1, round(self.seconds * self.rate))
        waveforms = torch.zeros(self.batch, length)
        lengths: list[int] = []
        clips: list[Clip] = []
        transcripts: list[str | None] = []
        failed = 0
        while len(clips) < self.batch:
            draw, result, after = self._decoders.next() if self._decoders else self._decoded_here()
            if isinstance(result, str):
                failed += 1
                self.failures.append(f"{draw.clip.key}: {result}")
                if failed >= _MOST_IN_A_ROW + self.batch:
                    raise DataError(
                        f"{failed} clips of one batch could not be decoded; is the folder still there? "
                        f"The last one: {result}"
                    )
                continue
            samples, whole = result
            waveforms[len(clips), : len(samples)] = torch.from_numpy(samples)
            lengths.append(len(samples))
            clips.append(draw.clip)
            transcripts.append(draw.clip.transcript if whole else None)
        self.failed += failed
        self.sampler.load_state_dict(after)
        return ClipBatch(
            waveforms,
            torch.tensor(lengths),
            [clip.speaker for clip in clips],
            [clip.language for clip in clips],
            transcripts,
            [clip.key for clip in clips],
            failed,
        )

    def state(self) -> dict[str, Any]:
        """Where the sequence stands after the last batch handed out: numbers and strings, fit for JSON."""
        return {**self.sampler.state_dict(), "failed": self.failed}

    def close(self) -> None:
        """End the workers."""
        if self._close is not None:
            self._close()

    def __enter__(self) -> ClipBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decoded_here(self) -> tuple[Draw, Decoded | str, dict[str, Any]]:
        draw = self._ahead.draw()
        return draw, _decoded(_task(draw, self.seconds, self.rate)), self._ahead.state_dict()


Decoded = tuple[np.ndarray, bool]  # float32 [samples], and whether that is the clip whole
_Task = tuple[str | bytes, str, float, float | None, float, int]


def _task(draw: Draw, seconds: float, rate: int) -> _Task:
    source = draw.clip.key if draw.data is None else draw.data
    return source, draw.clip.key, draw.place, draw.clip.seconds, seconds, rate


def _decoded(task: _Task) -> Decoded | str:
    """What is cut from a clip, or the sentence why not. Never raises for what lies in a file."""
    from revox.speech import AudioError
    from revox.training.data.locate import clip_source

    source, key, place, known, seconds, rate = task
    try:
        data = clip_source(source) if isinstance(source, str) else source
        return cut(data, place, known, seconds, rate)
    except (AudioError, DataError, ValueError, ArithmeticError, MemoryError) as error:
        return str(error) or type(error).__name__
    except OSError as error:
        return f"{key} cannot be read ({error.strerror})"


def cut(source: str | bytes, place: float, known: float | None, seconds: float, rate: int) -> Decoded:
    """At most `seconds` of `source` at `rate` Hz, float32 `[samples]`, at -23 LUFS; True if that is all.

    A longer clip is cut `place` (0 to 1) of what is left over from its beginning. `known`: its length in
    seconds, as far as it is known; only what is needed is then decoded. Raises AudioError.
    """
    from revox.speech import AudioError, normalise_loudness, read_audio, read_span, resample

    room = None if known is None else max(0.0, known - seconds)
    audio = None
    if room is not None:
        start = place * room if room > _ENCODING_SLACK else 0.0
        try:
            audio = read_span(source, start, seconds + (_ENCODING_SLACK if start == 0.0 else 0.0))
        except AudioError:
            if start == 0.0:
                raise
        if audio is not None and start and audio.seconds < 0.9 * seconds:
            audio = None  # the header promised more than there is
    if audio is None:
        audio = read_audio(source, max_seconds=_LONGEST)
        start = place * max(0.0, audio.seconds - seconds)
    else:
        start, begun = 0.0, start
        if audio.truncated or begun:
            audio = type(audio)(audio.samples, audio.rate, truncated=True)
    first, most = round(start * audio.rate), round(seconds * audio.rate)
    samples = audio.samples[first : first + most]
    whole = not audio.truncated and len(samples) == len(audio.samples)
    samples = resample(samples, audio.rate, rate)[: max(1, round(seconds * rate))]
    return np.ascontiguousarray(normalise_loudness(samples, rate)), whole


class _Decoders:
    """Worker processes, one thread of this process for each: it hands out draws and takes back samples.

    Results are given in the order of the draws, so neither the number of workers nor their speed shows. The
    threads wait for pipes nearly all the time.
    """

    def __init__(self, sampler: ClipSampler, seconds: float, rate: int, workers: int, most: int) -> None:
        self._sampler, self._seconds, self._rate, self._most = sampler, seconds, rate, most
        self._changed = threading.Condition()
        self._done: dict[int, tuple[Draw, Decoded | str, dict[str, Any]]] = {}
        self._drawn = self._given = 0
        self._error: BaseException | None = None
        self._closed = False
        # A fresh interpreter: a forked one would inherit torch's threads and locks as they are.
        context = multiprocessing.get_context("spawn")
        self._processes, self._pipes, self._threads = [], [], []
        for i in range(workers):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), name=f"revox-data-{i}", daemon=True)
            process.start()
            there.close()  # so that a worker's end is the end of its pipe
            self._processes.append(process)
            self._pipes.append(here)
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            thread = threading.Thread(target=self._attend, args=(process, pipe), daemon=True)
            thread.start()
            self._threads.append(thread)

    def next(self) -> tuple[Draw, Decoded | str, dict[str, Any]]:
        """The next draw, what came of it, and the sampler's state after it."""
        with self._changed:
            self._changed.wait_for(lambda: self._given in self._done or self._error or self._closed)
            if self._given in self._done:
                self._given += 1
                self._changed.notify_all()
                return self._done.pop(self._given - 1)
            if self._error:
                raise self._error
            raise DataError("these batches are closed; make new ones")

    def _attend(self, process: Any, pipe: Connection) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._closed or self._error or self._drawn - self._given < self._most
                    )
                    if self._closed or self._error:
                        return
                    number = self._drawn
                    draw = self._sampler.draw()
                    after = self._sampler.state_dict()
                    self._drawn += 1
                try:
                    pipe.send(_task(draw, self._seconds, self._rate))
                    said = pipe.recv()
                    result = said if isinstance(said, str) else (_samples(pipe.recv_bytes()), said)
                except (EOFError, OSError):
                    process.join(5)
                    raise DataError(_obituary(process.exitcode, draw.clip.key)) from None
                with self._changed:
                    self._done[number] = (draw, result, after)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                if not self._closed and self._error is None:
                    self._error = error
                self._changed.notify_all()

    def close(self) -> None:
        """End processes and threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
        for thread in self._threads:
            thread.join(5)
        for pipe in self._pipes:
            pipe.close()


def _samples(data: bytes) -> np.ndarray:
    return np.frombuffer(bytearray(data), np.float32)


def _obituary(exit_code: int | None, key: str) -> str:
    how = f"was killed by signal {-exit_code}" if exit_code and exit_code < 0 else f"ended ({exit_code})"
    return (
        f"a data worker {how} while it decoded {key}; if memory is short use fewer workers, if it is always "
        'this clip remove it, and a script that starts training needs `if __name__ == "__main__":`'
    )


def _serve(pipe: Connection) -> None:
    """The life of a worker: a task comes, a sentence or samples go back; it ends with its parent."""
    quiet_worker()
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        result = _decoded(task)
        try:
            if isinstance(result, str):
                pipe.send(result)
            else:
                pipe.send(result[1])
                pipe.send_bytes(result[0].tobytes())
        except OSError:
            return
