"""Recordings at hand: a few folders' clips in memory, drawn in the same order every time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from revox.training.encoder import Recordings
from revox.training.world import World


class ClipsInMemory:
    """Random stretches of `clips`, each `[samples]` at the codec's rate; `batch` a step over all ranks.

    Every rank draws for the whole batch and takes its part. For small sets and for tests; what does not fit
    into memory is `revox.training.data`'s.
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
        found = []
        for _ in range(self.batch):
            clip = self.clips[int(torch.randint(len(self.clips), (), generator=rng))]
            start = int(torch.randint(max(1, len(clip) - self.samples + 1), (), generator=rng))
            part = clip[start : start + self.samples]
            found.append(torch.nn.functional.pad(part, (0, self.samples - len(part))))
        return Recordings(torch.stack(found[self.world.part(self.batch)]))

    def state(self) -> dict[str, Any]:
        """How many batches were drawn."""
        return {"drawn": self.drawn}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.drawn = int(state["drawn"])
