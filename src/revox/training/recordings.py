"""A step's recordings, from the data room's endless batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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

    def fitted(self, samples: int) -> Recordings:
        """The same in exactly `samples` samples each, cut or silent at the end."""
        missing = max(0, samples - self.waveforms.shape[1])
        return dataclasses.replace(
            self,
            waveforms=functional.pad(self.waveforms[:, :samples], (0, missing)),
            lengths=self.lengths.clamp(max=samples),
        )

    def inside(self, units: int, samples: int) -> Tensor | None:
        """Which of `units` equal parts (frames, samples) of `samples` samples begin before a clip's end,
        `[clips, units]`; None where all do."""
        if bool((self.lengths >= samples).all()):
            return None
        return torch.arange(units) * (samples // units) < self.lengths.cpu()[:, None]


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
