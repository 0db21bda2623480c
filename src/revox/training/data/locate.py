"""From the address of a clip to the file or the bytes that are decoded."""

from __future__ import annotations

import os
import re

from revox.training.data.errors import DataError

_IN_TAR = re.compile(r"(.+\.tar)@(\d+)\+(\d+)", re.S)
_IN_DATASET = re.compile(r"(.+)@row(\d+)", re.S)


def audio_source(address: str) -> str | bytes:
    """What `revox.speech` decodes for `address`: a path, or the bytes of an audio file inside a larger one.

    `SHARD.tar@OFFSET+LENGTH` is a member of a tar file, `PLACE@rowN` a row of a dataset (`hub.open_dataset`),
    and anything else a path. Raises OSError or DataError when it cannot be read.
    """
    if within := _IN_TAR.fullmatch(address):
        path, offset, length = within[1], int(within[2]), int(within[3])
        with open(path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), length, offset)
        if len(data) < length:
            raise DataError(f"{path} ends too early; copy it again, or pack the speech again")
        return data
    if within := _IN_DATASET.fullmatch(address):
        from revox.training.data.hub import open_dataset, row_audio

        return row_audio(open_dataset(within[1])[int(within[2])])
    return address
