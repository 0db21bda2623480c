"""Batches of clips: drawn in this process, decoded, resampled and leveled in workers, given in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from revox.training.data.errors import DataError
from revox.training.data.locate import audio_source
from revox.training.data.manifest import cut_source
from revox.training.data.sampling import ClipSampler
from revox.workers import in_order

if TYPE_CHECKING:
    from lhotse.cut import MonoCut
    from torch import Tensor

_AHEAD = 2  # batches that each worker decodes before their turn
_LISTED = 20  # of the failures, the last ones
_MOST_IN_A_ROW = 200  # failures: then it is not the clips
_LONGEST = 600.0  # seconds decoded of a file of unknown length
_SLACK = 0.05  # seconds by which codecs pad, and headers are off


class Decoded(NamedTuple):
    """Float32 `[samples]`, whether that is the whole clip, and where it begins (seconds)."""

    samples: np.ndarray
    whole: bool
    start: float


_Task = tuple[str, str, float, float]  # source, id, place, seconds (0: unknown)


@dataclass(frozen=True)
class ClipBatch:
    """`waveforms` float32 `[batch, samples]`, silent beyond `lengths` int64 `[batch]` (samples).

    A transcript is given where it is known and the clip was used whole. `cuts` are the clips themselves,
    `starts` (seconds) where the waveforms begin in them, `whole` which were used whole.
    """

    waveforms: Tensor
    lengths: Tensor
    speakers: Sequence[str] = ()
    languages: Sequence[str | None] = ()
    transcripts: Sequence[str | None] = ()
    ids: Sequence[str] = ()
    cuts: Sequence[MonoCut] = ()
    starts: Sequence[float] = ()
    whole: Sequence[bool] = ()

    def fitted(self, samples: int) -> ClipBatch:
        """The same clips in exactly `samples` samples each, cut or silent at the end."""
        from torch.nn.functional import pad

        missing = max(0, samples - self.waveforms.shape[1])
        waveforms = pad(self.waveforms[:, :samples], (0, missing))
        return replace(self, waveforms=waveforms, lengths=self.lengths.clamp(max=samples))

    def inside(self, units: int, samples: int) -> Tensor | None:
        """Which of `units` equal parts (frames, samples) of `samples` samples begin before a clip's end,
        `[batch, units]`; None where all do."""
        import torch

        if bool((self.lengths >= samples).all()):
            return None
        return torch.arange(units) * (samples // units) < self.lengths.cpu()[:, None]


class ClipBatches(Iterator[ClipBatch]):
    """Endless batches of `sampler.batch` clips at `rate` Hz, mono, leveled to -23 LUFS.

    `workers` processes decode (0: this one), each up to two batches ahead. The batches are the same for
    any number of them. `state` is an earlier result of `state()`. Close it when done, or use `with`.
    `failed` counts clips that could not be decoded, `failures` lists the last ones.
    """

    def __init__(
        self,
        sampler: ClipSampler,
        rate: int,
        *,
        workers: int = 4,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        if workers < 0:
            raise DataError("workers cannot be fewer than 0")
        self.sampler, self.rate, self.workers = sampler, rate, workers
        self.failed = 0
        self.failures: deque[str] = deque(maxlen=_LISTED)
        self._begin()
        if state is not None:
            self.load_state(state)

    def _begin(self) -> None:
        """Begin where the sampler is. Workers start with the first batch."""
        self._state = self.sampler.state_dict()  # after what was handed out; the sampler itself is ahead
        self._sent: deque[list[tuple[MonoCut, dict[str, Any]]]] = deque()
        self._ready: deque[tuple[MonoCut, dict[str, Any], Decoded | str]] = deque()
        work = partial(_decode_all, self.sampler.seconds, self.rate)
        self._results = in_order(work, self._tasks(), self.workers, ahead=_AHEAD)

    def __next__(self) -> ClipBatch:
        """The next batch. Raises WorkerError when a worker died, DataError when nothing can be decoded."""
        import torch

        waveforms = torch.zeros(self.sampler.batch, max(1, round(self.sampler.seconds * self.rate)))
        cuts: list[MonoCut] = []
        used: list[Decoded] = []
        failed = 0
        while len(cuts) < self.sampler.batch:
            if not self._ready:
                results = next(self._results, None)
                if results is None:
                    raise DataError("these batches are closed; make new ones")
                pairs = zip(self._sent.popleft(), results, strict=True)
                self._ready.extend((cut, state, result) for (cut, state), result in pairs)
            cut, self._state, result = self._ready.popleft()
            if isinstance(result, str):
                failed += 1
                self.failures.append(f"{cut.id}: {result}")
                if failed >= _MOST_IN_A_ROW + self.sampler.batch:
                    raise DataError(
                        f"{failed} clips in a row could not be decoded; check that the folder is still "
                        f"there. The last one: {result}"
                    )
                continue
            waveforms[len(cuts), : len(result.samples)] = torch.from_numpy(result.samples)
            cuts.append(cut)
            used.append(result)
        self.failed += failed
        return ClipBatch(
            waveforms,
            torch.tensor([len(one.samples) for one in used]),
            [cut.supervisions[0].speaker for cut in cuts],
            [cut.supervisions[0].language for cut in cuts],
            [cut.supervisions[0].text if one.whole else None for cut, one in zip(cuts, used, strict=True)],
            [cut.id for cut in cuts],
            cuts,
            [one.start for one in used],
            [one.whole for one in used],
        )

    def state(self) -> dict[str, Any]:
        """Where the sequence is after the last batch handed out: numbers and strings, ready for JSON."""
        return {**self._state, "failed": self.failed}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state()` gave `state`, which runs of version 0.1 saved as `{"from": state}`."""
        state = state.get("from", state)
        self.close()
        if state is not None:  # else nothing had been drawn
            self.sampler.load_state_dict(state)
            self.failed = int(state.get("failed", 0))
        self._begin()

    def close(self) -> None:
        """End the workers."""
        self._results.close()
        self._ready.clear()

    def __enter__(self) -> ClipBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tasks(self) -> Iterator[list[_Task]]:
        while True:
            drawn = [(next(self.sampler), self.sampler.state_dict()) for _ in range(self.sampler.batch)]
            self._sent.append(drawn)
            yield [(cut_source(c), c.id, c.custom["place"], c.recording.duration) for c, _ in drawn]


def _decode_all(seconds: float, rate: int, tasks: list[_Task]) -> list[Decoded | str]:
    """What is cut from each clip, or why it cannot be. Never raises for what is in a file."""
    results: list[Decoded | str] = []
    for source, cut_id, place, known in tasks:
        try:
            results.append(decode_cut(audio_source(source), place, known or None, seconds, rate))
        except (DataError, ValueError, ArithmeticError, MemoryError) as error:  # AudioError is a ValueError
            results.append(str(error) or type(error).__name__)
        except OSError as error:
            results.append(f"{cut_id} cannot be read ({error.strerror})")
    return results


def decode_cut(source: str | bytes, place: float, known: float | None, seconds: float, rate: int) -> Decoded:
    """At most `seconds` of `source` at `rate` Hz, at -23 LUFS.

    A longer clip is cut at `place` (0 to 1) of what is left over. `known`: its length in seconds, as far as
    it is known; then only what is needed is decoded. Raises AudioError.
    """
    from revox.speech import Audio, AudioError, normalize_loudness, read_audio, read_span, resample

    audio, start = None, 0.0
    if known is not None:
        start = place * (known - seconds) if known - seconds > _SLACK else 0.0
        try:
            audio = read_span(source, start, seconds if start else seconds + _SLACK)
        except AudioError:
            if not start:
                raise
        if audio is not None and start:
            # A header that promised more than there is leaves too little: the file is then read whole.
            enough = audio.seconds >= 0.9 * seconds
            audio = Audio(audio.samples, audio.rate, truncated=True) if enough else None
    begin = 0.0
    if audio is None:
        audio = read_audio(source, max_seconds=_LONGEST)
        start = begin = place * max(0.0, audio.seconds - seconds)
    first, most = round(begin * audio.rate), round(seconds * audio.rate)
    samples = audio.samples[first : first + most]
    whole = not audio.truncated and len(samples) == len(audio.samples)
    samples = resample(samples, audio.rate, rate)[: max(1, round(seconds * rate))]
    return Decoded(np.ascontiguousarray(normalize_loudness(samples, rate)), whole, start)
