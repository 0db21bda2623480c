"""Datasets of the Hugging Face hub, one example after the other, resumed where they were."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

from revox.training.data.errors import DataError
from revox.training.data.locate import audio_of, datasets_library, undecoded
from revox.training.data.table import Clip

_SPLITS = ("train", "validation", "valid", "dev", "test", "other", "validated", "all")
_BLOCK = 256  # examples held and shuffled together


class ClipStream:
    """Clips that come one after the other. `opened()` gives a fresh iterable dataset, audio undecoded."""

    def __init__(self, name: str, opened: Callable[[], Any], block: int = _BLOCK) -> None:
        self.name, self.opened, self.block = name, opened, block

    def __iter__(self) -> Iterator[Clip]:
        return (clip for clip, _ in self.once())

    def once(self) -> Iterator[tuple[Clip, str | bytes]]:
        """Every clip once, in the stored order, with its file's bytes or path."""
        for i, row in enumerate(self._rows(self.opened())):
            yield self.clip(row, i)

    def clip(self, row: dict[str, Any], i: int) -> tuple[Clip, str | bytes]:
        """What a row says of its clip, and its file. A row without audio has an empty file."""
        from revox.training.data.layouts import row_clip

        try:
            data = audio_of(row)
        except DataError:
            data = b""
        clip = row_clip(row, f"{self.name}@{i}", self.name)
        if isinstance(data, str) and not os.path.isfile(data):
            data = self._fetched(data)
        return clip, data

    def reader(self, rank: int, world: int, seed: int) -> StreamReader:
        """An endless reader of every `world`-th part of the stream."""
        return StreamReader(self, rank, world, seed)

    def _rows(self, dataset: Any) -> Iterator[dict[str, Any]]:
        try:
            yield from dataset
        except Exception as error:  # the network's, the hub's, pyarrow's
            raise DataError(
                f"{self.name} cannot be read on ({type(error).__name__}: {error}); check the connection and "
                "go on with --resume"
            ) from None

    def _fetched(self, path: str) -> bytes:
        from datasets.utils.file_utils import xopen

        try:
            with xopen(path, "rb") as file:
                return file.read()
        except Exception as error:
            raise DataError(f"{self.name} cannot be read ({error}); check the connection") from None


class StreamReader:
    """Reads a stream round after round, shuffled in blocks, and can say exactly where it is."""

    _epoch: int
    _block: int
    _place: int
    _at: dict[str, Any] | None
    _rows: list[dict[str, Any]]
    _dataset: Any

    def __init__(self, stream: ClipStream, rank: int, world: int, seed: int) -> None:
        self.stream, self.rank, self.world, self.seed = stream, rank, world, seed
        self._begin({"epoch": 0, "block": 0, "place": 0, "at": None})

    def next(self) -> tuple[Clip, str | bytes]:
        """The next clip and its file. Raises DataError when the stream is empty or cannot be read."""
        if self._place and not self._rows:
            self._read_again()
        if self._place >= len(self._rows):
            self._fill()
        row = self._rows[self._order[self._place]]
        i = self._block * self.stream.block + int(self._order[self._place])
        self._place += 1
        return self.stream.clip(row, i)

    def state(self) -> dict[str, Any]:
        """Where it is: the place in its block, and the dataset's own state where the block begins."""
        return {"epoch": self._epoch, "block": self._block, "place": self._place, "at": self._at}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. Nothing is read before it is needed."""
        self._begin(state)

    def _read_again(self) -> None:
        """The block that `load` led into; what was drawn of it is passed over."""
        place = self._place
        self._block -= 1  # `_fill` counts it again
        self._fill(resumed=True)
        self._place = place

    def _begin(self, state: Mapping[str, Any]) -> None:
        self._epoch = state["epoch"]
        self._block = state["block"]
        self._place = state["place"]
        self._at = state["at"]
        self._rows = []
        self._order = np.zeros(0, np.int64)
        self._dataset = None

    def _open(self) -> None:
        dataset = self.stream.opened()
        if self.world > 1:
            from datasets.distributed import split_dataset_by_node

            dataset = split_dataset_by_node(dataset, self.rank, self.world)
        if self._at is not None:
            dataset.load_state_dict(self._at)
        self._dataset, self._iterator = dataset, self.stream._rows(dataset)

    def _fill(self, resumed: bool = False) -> None:
        for _ in range(2):
            if self._dataset is None:
                self._open()
            elif not resumed:
                self._at = self._dataset.state_dict()
            began = bool(self._rows) or resumed
            self._rows = list(islice(self._iterator, self.stream.block))
            if self._rows:
                self._block += began
                rng = np.random.default_rng([self.seed, 3, self.rank, self._epoch, self._block])
                self._order, self._place = rng.permutation(len(self._rows)), 0
                return
            self._epoch, self._block, self._at = self._epoch + 1, 0, None
            self._dataset = None
        raise DataError(f"{self.stream.name} holds no examples; name another dataset or split")


def open_stream(spec: str) -> ClipStream:
    """The stream that "hf:OWNER/NAME[:config][:split]" names.

    A single extra word that is a usual name of a split is one. Raises DataError when it cannot be opened.
    """
    library = datasets_library()
    name, *rest = spec.removeprefix("hf:").split(":")
    config, split = None, "train"
    if len(rest) == 1 and rest[0].split("[")[0].split(".")[0] in _SPLITS:
        split = rest[0]
    elif rest:
        config, split = rest[0] or None, (rest[1] if len(rest) > 1 else "") or "train"
    if not name or len(rest) > 2:
        raise DataError(f"{spec} names no dataset; write hf:OWNER/NAME, hf:OWNER/NAME:CONFIG:SPLIT")

    def opened() -> Any:
        try:
            dataset = library.load_dataset(name, config, split=split, streaming=True)
            if dataset.features is None:
                dataset = dataset._resolve_features()
        except Exception as error:  # the network's, the hub's, the library's own
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"{spec} cannot be opened ({first}); check the name, the split and the connection"
            ) from None
        return undecoded(dataset, spec)

    opened()  # a wrong name is said at once
    return ClipStream(spec, opened)
