"""Hugging Face datasets: saved ones by row, and those of the hub as streams that resume exactly.

lhotse reads such datasets in one pass and without a state, so the streaming here is `datasets`' own.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from revox.training.data.errors import DataError
from revox.training.data.manifest import cut_record
from revox.training.errors import library

if TYPE_CHECKING:
    from lhotse.cut import MonoCut

# Of several columns with transcripts, speakers or languages the first listed is used.
_TEXT = ("sentence", "text", "transcript", "transcription", "normalized_text", "text_normalized")
_SPEAKER = ("speaker_id", "speaker", "client_id", "spk_id", "reader_id")
_LANGUAGE = ("language", "locale", "lang")
_SPLITS = ("train", "validation", "valid", "dev", "test", "other", "validated", "all")


@functools.lru_cache(maxsize=64)
def saved_dataset(folder: str) -> Any:
    """The `datasets.Dataset` of a folder written by `save_to_disk`, its audio column named `audio` and left
    undecoded. Raises DataError when there is none, TrainingError when the library is missing.
    """
    datasets = library("datasets")
    try:
        dataset = datasets.load_from_disk(folder)
    except Exception as error:  # its own, pyarrow's and the system's
        raise DataError(f"{folder} is a saved dataset that cannot be read ({error}); save it again") from None
    return _undecoded(dataset, folder)


def _undecoded(dataset: Any, name: str) -> Any:
    audio = library("datasets").Audio
    features = dataset.features or {}
    columns = [column for column, kind in features.items() if isinstance(kind, audio)]
    if not columns:
        listed = ", ".join(features) or "none known"
        raise DataError(
            f"{name} has no column of type Audio (columns: {listed}); cast one with datasets.Audio()"
        )
    dataset = dataset.cast_column(columns[0], audio(decode=False))
    return dataset if columns[0] == "audio" else dataset.rename_column(columns[0], "audio")


def row_audio(row: dict[str, Any]) -> str | bytes:
    """The bytes or the path in an undecoded row. Raises DataError when it has neither."""
    audio = row["audio"] or {}
    if found := audio.get("bytes") or audio.get("path"):
        return found
    raise DataError("a row has no audio; remove it from the dataset")


def row_record(row: dict[str, Any], cut_id: str, source: str, name: str) -> dict[str, Any]:
    """The cut of a dataset's row; without a speaker column, the whole dataset `name` is one speaker."""

    def first(columns: tuple[str, ...]) -> str | None:
        values = (row.get(column) for column in columns)
        texts = (str(value).strip() for value in values if isinstance(value, (str, int)))
        return next(filter(None, texts), None)

    speaker = first(_SPEAKER)
    return cut_record(
        cut_id, source, f"{name}/{speaker}" if speaker else name, first(_LANGUAGE), first(_TEXT)
    )


def saved_records(folder: str, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The cuts of a saved dataset, and what `datasets` takes for the identity of its content."""
    dataset = saved_dataset(folder)
    plain = dataset.select_columns([column for column in dataset.column_names if column != "audio"])
    rows = iter(plain) if plain.column_names else ({} for _ in range(len(dataset)))
    for i, row in enumerate(rows):
        yield (
            row_record(row, f"{name}@row{i}", f"{folder}@row{i}", name),
            getattr(dataset, "_fingerprint", ""),
        )


class ClipStream:
    """Clips that come one after the other. `opened()` gives a fresh iterable dataset, audio undecoded."""

    def __init__(self, name: str, opened: Callable[[], Any]) -> None:
        self.name, self.opened = name, opened

    def __iter__(self) -> Iterator[MonoCut]:
        """Every clip once, in the stored order, with its file in memory."""
        for i, row in enumerate(self.rows(self.opened())):
            yield self.cut(row, i)

    def cut(self, row: dict[str, Any], i: int) -> MonoCut:
        """The cut of a row. Where its audio is missing the file is empty, and decoding it fails."""
        from revox.speech import AudioError, audio_header

        try:
            data = row_audio(row)
        except DataError:
            data = b""
        if isinstance(data, str):
            data = self._fetched(data)
        cut = library("lhotse").MonoCut.from_dict(row_record(row, f"{self.name}@{i}", "", self.name))
        try:
            seconds, rate = audio_header(data)
        except AudioError:
            seconds, rate = None, 0
        cut.duration = cut.recording.duration = seconds or 0.0
        cut.recording.sampling_rate = rate
        cut.recording.sources[0].type, cut.recording.sources[0].source = "memory", data
        return cut

    def rows(self, dataset: Any) -> Iterator[dict[str, Any]]:
        """The rows of `dataset`. Raises DataError where reading fails."""
        try:
            yield from dataset
        except Exception as error:  # the network's, the hub's, pyarrow's
            raise DataError(
                f"reading {self.name} failed ({type(error).__name__}: {error}); check the connection and "
                "continue with --resume"
            ) from None

    def _fetched(self, path: str) -> bytes:
        from datasets.utils.file_utils import xopen

        try:
            with open(path, "rb") if os.path.isfile(path) else xopen(path, "rb") as file:
                data: bytes = file.read()
                return data
        except Exception as error:
            raise DataError(f"{self.name} cannot be read ({error}); check the connection") from None


class StreamReader:
    """Reads every `world`-th part of a stream, pass after pass, and knows exactly where it is."""

    _rows: Iterator[dict[str, Any]] | None
    _dataset: Any

    def __init__(self, stream: ClipStream, rank: int, world: int) -> None:
        self.stream, self.rank, self.world = stream, rank, world
        self.load({"count": 0, "at": None})

    def next(self) -> MonoCut:
        """The next clip. Raises DataError when the stream is empty or cannot be read."""
        for _ in range(2):
            if self._rows is None:
                self._open()
            assert self._rows is not None
            if (row := next(self._rows, None)) is not None:
                self._count += 1
                return self.stream.cut(row, self._count - 1)
            self._rows, self._at = None, None
        raise DataError(f"{self.stream.name} holds no examples; name another dataset or split")

    def state(self) -> dict[str, Any]:
        """Clips read so far, and the dataset's own state."""
        return {"count": self._count, "at": self._at if self._rows is None else self._dataset.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. Nothing is read before it is needed."""
        self._count, self._at = state["count"], state["at"]
        self._dataset = self._rows = None

    def _open(self) -> None:
        dataset = self.stream.opened()
        if self.world > 1:
            from datasets.distributed import split_dataset_by_node

            dataset = split_dataset_by_node(dataset, self.rank, self.world)
        if self._at is not None:
            dataset.load_state_dict(self._at)
        self._dataset, self._rows = dataset, self.stream.rows(dataset)


def open_stream(spec: str) -> ClipStream:
    """The stream that "hf:OWNER/NAME[:config][:split]" names.

    A single extra word that is a usual name of a split is one. Raises DataError when it cannot be opened.
    """
    datasets = library("datasets")
    name, *rest = spec.removeprefix("hf:").split(":")
    config, split = None, "train"
    if len(rest) == 1 and rest[0].split("[")[0].split(".")[0] in _SPLITS:
        split = rest[0]
    elif rest:
        config, split = rest[0] or None, (rest[1] if len(rest) > 1 else "") or "train"
    if not name or len(rest) > 2:
        raise DataError(f"{spec} does not name a dataset; write hf:OWNER/NAME or hf:OWNER/NAME:CONFIG:SPLIT")

    def opened() -> Any:
        try:
            dataset = datasets.load_dataset(name, config, split=split, streaming=True)
            if dataset.features is None:
                dataset = dataset._resolve_features()
        except Exception as error:  # the network's, the hub's, the library's own
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"{spec} cannot be opened ({first}); check the name, the split and the connection"
            ) from None
        return _undecoded(dataset, spec)

    opened()  # a wrong name is reported at once
    return ClipStream(spec, opened)
