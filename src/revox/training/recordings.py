"""A step's recordings, from the data room's endless batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from revox.training.data import ClipBatches


@dataclass(frozen=True)
class Recordings:
    """One process's part of a step's recordings.

    `waveforms` `[clips, samples]`, full scale 1, silent beyond `lengths` `[clips]` (samples). Where known,
    `transcripts` and `languages` are those of each whole clip.
    """

    waveforms: Tensor
    lengths: Tensor
    transcripts: Sequence[str | None] = ()
    languages: Sequence[str | None] = ()


class RecordingStream:
    """Batches as `start(state)` gives them (`revox.training.data`), begun at the first draw."""

    def __init__(self, start: Callable[[dict[str, Any] | None], ClipBatches]) -> None:
        self._start = start
        self._from: dict[str, Any] | None = None
        self._batches: ClipBatches | None = None

    def draw(self) -> Recordings:
        """This process's next batch. Raises DataError when nothing can be decoded."""
        if self._batches is None:
            self._batches = self._start(self._from)
        batch = next(self._batches)
        return Recordings(batch.waveforms, batch.lengths, batch.transcripts, batch.languages)

    def state(self) -> dict[str, Any]:
        """Where the sequence stands: numbers and strings."""
        return {"from": self._from} if self._batches is None else {"from": self._batches.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from there: the same recordings again."""
        self.close()
        self._from = state["from"]

    def close(self) -> None:
        """End the workers."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
