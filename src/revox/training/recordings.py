"""Where a step's recordings come from: a few clips in memory, or the data pipeline's endless batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from revox.training.data import ClipBatches
from revox.training.encoder import Recordings
from revox.training.world import World


class ClipsInMemory:
    """Random stretches of `clips`, each `[samples]` at the codec's rate; `batch` a step over all ranks.

    Every rank draws for the whole batch and takes its part. For small sets and for tests.
    """

    def __init__(
        self, clips: Sequence[Tensor], samples: int, batch: int, world: World, seed: int = 0
    ) -> None:
        if not clips:
            raise ValueError("no clips")
        self.clips, self.samples, self.batch, self.world = list(clips), samples, batch, world
        self.seed, self.drawn = seed, 0

    def draw(self) -> Recordings:
        """This rank's part of the next batch; a short clip is followed by silence."""
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + self.drawn)
        self.drawn += 1
        found, lengths = [], []
        for _ in range(self.batch):
            clip = self.clips[int(torch.randint(len(self.clips), (), generator=rng))]
            start = int(torch.randint(max(1, len(clip) - self.samples + 1), (), generator=rng))
            part = clip[start : start + self.samples]
            lengths.append(len(part))
            found.append(torch.nn.functional.pad(part, (0, self.samples - len(part))))
        mine = self.world.part(self.batch)
        return Recordings(torch.stack(found[mine]), torch.tensor(lengths[mine]))

    def state(self) -> dict[str, Any]:
        """How many batches were drawn."""
        return {"drawn": self.drawn}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.drawn = int(state["drawn"])

    def close(self) -> None:
        """Nothing is held."""


class StreamedRecordings:
    """Batches as `start(state)` gives them (`revox.training.data.clip_batches`), begun at the first draw."""

    def __init__(self, start: Callable[[dict[str, Any] | None], ClipBatches]) -> None:
        self._start = start
        self._from: dict[str, Any] | None = None
        self._batches: ClipBatches | None = None

    @property
    def failed(self) -> int:
        """Clips that could not be decoded so far."""
        return 0 if self._batches is None else self._batches.failed

    def draw(self) -> Recordings:
        """This rank's next batch. Raises DataError when nothing can be decoded."""
        if self._batches is None:
            self._batches = self._start(self._from)
        batch = next(self._batches)
        return Recordings(batch.waveforms, batch.lengths, batch.transcripts, batch.languages)

    def state(self) -> dict[str, Any]:
        """Where the sequence stands."""
        return {"from": self._from} if self._batches is None else {"from": self._batches.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.close()
        self._from = state["from"]

    def close(self) -> None:
        """End the workers."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
