"""A step's recordings, from the data pipeline's endless batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from revox.training.data import ClipBatches
from revox.training.encoder import Recordings


class StreamedRecordings:
    """Batches as `start(state)` gives them (`revox.training.data.ClipBatches`), begun at the first draw."""

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
