"""From a clip's key to the bytes that are decoded."""

from __future__ import annotations

import functools
import os
import re
from typing import Any

from revox.training.data.errors import DataError

_IN_SHARD = re.compile(r"(.+\.tar)@(\d+)\+(\d+)", re.S)
_IN_DATASET = re.compile(r"(.+)@row(\d+)", re.S)


def clip_source(key: str) -> str | bytes:
    """What `revox.speech` decodes for `key`: a path, or the bytes of an audio file inside a larger one.

    `SHARD.tar@OFFSET+LENGTH` is a stretch of a shard, `FOLDER@rowN` a row of a dataset saved with
    `save_to_disk`, and anything else a path. Raises OSError or DataError when it cannot be read.
    """
    if within := _IN_SHARD.fullmatch(key):
        path, offset, length = within[1], int(within[2]), int(within[3])
        with open(path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), length, offset)
        if len(data) < length:
            raise DataError(f"{path} is cut short; copy or pack it again")
        return data
    if within := _IN_DATASET.fullmatch(key):
        return audio_of(saved_dataset(within[1])[int(within[2])])
    return key


@functools.lru_cache(maxsize=64)
def saved_dataset(folder: str) -> Any:
    """The `datasets.Dataset` of a folder made by `save_to_disk`, its audio left undecoded, its audio column
    named `audio`. Raises DataError when it has none or the library is missing.
    """
    library = datasets_library()
    try:
        dataset = library.load_from_disk(folder)
    except Exception as error:  # its own, pyarrow's and the system's
        raise DataError(f"{folder} is a saved dataset that cannot be read ({error}); save it again") from None
    return undecoded(dataset, folder)


def datasets_library() -> Any:
    """The `datasets` module. Raises DataError when it is not installed."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            "Hugging Face datasets need the library `datasets`; install it with `pip install 'revox[train]'`"
        ) from None
    return datasets


def undecoded(dataset: Any, name: str) -> Any:
    """`dataset` with one column of audio files in bytes or by path, named `audio`. Raises DataError."""
    audio = datasets_library().Audio
    features = dataset.features or {}
    columns = [column for column, kind in features.items() if isinstance(kind, audio)]
    if not columns:
        listed = ", ".join(features) or "none known"
        raise DataError(
            f"{name} has no column of type Audio (columns: {listed}); cast one with datasets.Audio()"
        )
    dataset = dataset.cast_column(columns[0], audio(decode=False))
    return dataset if columns[0] == "audio" else dataset.rename_column(columns[0], "audio")


def audio_of(row: dict[str, Any]) -> str | bytes:
    """The path or the bytes in an undecoded row. Raises DataError when it has neither."""
    audio = row["audio"] or {}
    if audio.get("bytes"):
        return audio["bytes"]
    if audio.get("path"):
        return audio["path"]
    raise DataError("a row has no audio; remove it from the dataset")
