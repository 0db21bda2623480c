"""Hugging Face datasets by row: saved ones, and those of the hub, downloaded into the cache of `datasets`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from revox.training.data.errors import DataError
from revox.training.data.manifest import cut_record
from revox.training.errors import library

HUB = "hf:"
# Of several columns with transcripts, speakers or languages the first listed is used.
_TEXT = ("sentence", "text", "transcript", "transcription", "normalized_text", "text_normalized")
_SPEAKER = ("speaker_id", "speaker", "client_id", "spk_id", "reader_id")
_LANGUAGE = ("language", "locale", "lang")
_SPLITS = ("train", "validation", "valid", "dev", "test", "other", "validated", "all")


@functools.lru_cache(maxsize=64)
def open_dataset(place: str) -> Any:
    """The `datasets.Dataset` of a folder written by `save_to_disk`, or of "hf:OWNER/NAME[:config][:split]".

    Its audio column is named `audio` and left undecoded. The split is "train" unless given; a single extra
    word that is a usual name of a split is one. Raises DataError when there is none, TrainingError when the
    library is missing.
    """
    datasets = library("datasets")
    if not place.startswith(HUB):
        try:
            dataset = datasets.load_from_disk(place)
        except Exception as error:  # its own, pyarrow's and the system's
            raise DataError(
                f"{place} is a saved dataset that cannot be read ({error}); save it again"
            ) from None
        return _undecoded(dataset, place)
    name, *rest = place.removeprefix(HUB).split(":")
    config, split = None, "train"
    if len(rest) == 1 and rest[0].split("[")[0].split(".")[0] in _SPLITS:
        split = rest[0]
    elif rest:
        config, split = rest[0] or None, (rest[1] if len(rest) > 1 else "") or "train"
    if not name or len(rest) > 2:
        raise DataError(f"{place} does not name a dataset; write hf:OWNER/NAME or hf:OWNER/NAME:CONFIG:SPLIT")
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the network's, the hub's, the library's own
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{place} cannot be opened ({first}); check the name, the split and the connection"
        ) from None
    return _undecoded(dataset, place)


def _undecoded(dataset: Any, name: str) -> Any:
    audio = library("datasets").Audio
    columns = [column for column, kind in dataset.features.items() if isinstance(kind, audio)]
    if not columns:
        listed = ", ".join(dataset.features)
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


def dataset_records(place: str, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The cuts of a dataset, and what `datasets` takes for the identity of its content.

    Without a speaker column, the whole dataset `name` is one speaker.
    """
    dataset = open_dataset(place)
    plain = dataset.select_columns([column for column in dataset.column_names if column != "audio"])
    rows = iter(plain) if plain.column_names else ({} for _ in range(len(dataset)))
    for i, row in enumerate(rows):
        speaker = _first(row, _SPEAKER)
        record = cut_record(
            f"{name}@row{i}", f"{place}@row{i}", f"{name}/{speaker}" if speaker else name,
            _first(row, _LANGUAGE), _first(row, _TEXT),
        )  # fmt: skip
        yield record, getattr(dataset, "_fingerprint", "")


def _first(row: dict[str, Any], columns: tuple[str, ...]) -> str | None:
    values = (row.get(column) for column in columns)
    texts = (str(value).strip() for value in values if isinstance(value, (str, int)))
    return next(filter(None, texts), None)
