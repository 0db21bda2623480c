"""Shar shards (lhotse's format) as random access: one reading of the headers finds every clip's bytes.

lhotse itself reads shards from front to end, which leaves no room for balance. Nothing in a shard is
unpacked, executed or followed: sources and transforms that its manifest names are ignored.
"""

from __future__ import annotations

import gzip
import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from revox.training.data.errors import DataError
from revox.training.data.manifest import cut_record

CUTS = re.compile(r"cuts\.(\d+)\.jsonl\.gz")


def shard_records(cuts: Path) -> Iterator[dict[str, Any]]:
    """The clips of the shard `cuts.NNNNNN.jsonl.gz` with `recording.NNNNNN.tar` beside it.

    Raises DataError when they do not fit together or are damaged.
    """
    tar = cuts.with_name(f"recording.{cuts.name.split('.')[1]}.tar")
    damaged = f"{cuts} and {tar.name} are not a whole Shar shard; copy them or pack the speech again"
    try:
        with tarfile.open(tar, "r:") as members:
            for cut, (name, at, length) in zip(shard_cuts(cuts), _members(members), strict=True):
                supervision = (cut.get("supervisions") or [{}])[0]
                if name.rpartition(".")[0] != cut["id"] or at + length > tar.stat().st_size:
                    raise DataError(damaged)
                # A window of a longer recording names the words of all of it, which are not the window's.
                whole = supervision.get("duration", 0.0) <= cut["duration"] + 0.01
                yield cut_record(
                    f"{cuts.parent.name}/{cut['id']}", f"{tar}@{at}+{length}",
                    str(supervision.get("speaker") or cuts.parent.name),
                    supervision.get("language"), supervision.get("text") if whole else None,
                    seconds=float(cut["duration"]), rate=int(cut["recording"]["sampling_rate"]),
                )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, tarfile.TarError, zlib.error):
        raise DataError(damaged) from None
    except OSError as error:
        raise DataError(f"{damaged} ({error.strerror or error})") from None


def shard_cuts(cuts: Path) -> Iterator[dict[str, Any]]:
    """The JSON forms of the cuts of a shard, as they were written."""
    with gzip.open(cuts, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each audio file; after each comes its JSON, which is not needed."""
    for member in tar:
        if not member.name.endswith((".json", ".nometa")):
            yield member.name, member.offset_data, member.size
