"""lhotse cuts by the million: JSON lines on disk, and what sampling needs of each in one array."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from revox.training.errors import library

if TYPE_CHECKING:
    from mmap import mmap

    from lhotse.cut import MonoCut

# Per cut: where its line is, a hash of its id, indexes into the manifest's `speakers` and `languages`
# (-1: unknown), seconds and Hz (0: unknown), and the stamp of the files it was read from.
ROW = np.dtype(
    [
        ("at", np.int64), ("length", np.int32), ("id", np.int64), ("speaker", np.int32),
        ("language", np.int32), ("seconds", np.float32), ("rate", np.int32), ("stamp", np.int64),
    ]
)  # fmt: skip


def cut_record(
    cut_id: str,
    source: str,
    speaker: str,
    language: str | None = None,
    text: str | None = None,
    *,
    seconds: float = 0.0,
    rate: int = 0,
) -> dict[str, Any]:
    """The JSON form of a `lhotse.MonoCut` over one whole recording.

    `source` is an address that `locate.audio_source` reads. `seconds` is 0 where the length is unknown.
    """
    words = {"language": language, "text": text}
    supervision = {"id": cut_id, "recording_id": cut_id, "start": 0.0, "duration": seconds, "channel": 0}
    return {
        "id": cut_id,
        "start": 0.0,
        "duration": seconds,
        "channel": 0,
        "supervisions": [
            supervision | {"speaker": speaker} | {name: value for name, value in words.items() if value}
        ],
        "recording": {
            "id": cut_id,
            "sources": [{"type": "file", "channels": [0], "source": source}],
            "sampling_rate": rate,
            "num_samples": round(seconds * rate),
            "duration": seconds,
            "channel_ids": [0],
        },
        "type": "MonoCut",
    }


def hash_of(text: str) -> int:
    """A signed 64-bit hash."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def cut_line(record: dict[str, Any]) -> bytes:
    """A line of a manifest."""
    return json.dumps(record).encode() + b"\n"


def cut_source(cut: MonoCut) -> str:
    """The address of a cut's audio, which `locate.audio_source` reads."""
    source: str = cut.recording.sources[0].source
    return source


class Manifest:
    """A read-only list of cuts. A cut is parsed when it is asked for; 40 bytes of it are in memory.

    `rows` is an array `[cuts]` of dtype `ROW`. `lines` is JSON lines, as `CutSet.from_jsonl` reads them.
    """

    def __init__(
        self, lines: bytes | mmap, rows: np.ndarray, speakers: list[str], languages: list[str]
    ) -> None:
        self.lines, self.rows, self.speakers, self.languages = lines, rows, speakers, languages

    @classmethod
    def parse(cls, lines: bytes | mmap) -> Manifest:
        """The manifest of JSON lines that `cut_line` wrote. Raises ValueError, KeyError or IndexError on
        others; an incomplete last line is ignored."""
        speakers: dict[str, int] = {}
        languages: dict[str, int] = {}

        def parsed() -> Iterator[tuple[int, ...]]:
            at = 0
            while (end := lines.find(b"\n", at)) >= 0:
                record = json.loads(lines[at:end])
                custom, supervision = record.get("custom") or {}, record["supervisions"][0]
                language = supervision.get("language")
                yield (
                    at, end - at, hash_of(record["id"]),
                    speakers.setdefault(supervision["speaker"], len(speakers)),
                    languages.setdefault(language, len(languages)) if language else -1,
                    record["duration"], record["recording"]["sampling_rate"],
                    custom.get("stamp", 0),
                )  # fmt: skip
                at = end + 1

        rows = np.fromiter(parsed(), ROW)
        for column, names in (("speaker", speakers), ("language", languages)):
            # By name, so that the numbers do not depend on the order of the lines; -1 stays.
            number = {name: i for i, name in enumerate(sorted(names))}
            rows[column] = np.array([*map(number.get, names), -1], dtype=np.int32)[rows[column]]
        return cls(lines, rows, sorted(speakers), sorted(languages))

    @classmethod
    def of(cls, records: Iterable[dict[str, Any]]) -> Manifest:
        """A manifest in memory, of JSON forms of cuts."""
        return cls.parse(b"".join(map(cut_line, records)))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[MonoCut]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> MonoCut:
        return library("lhotse").MonoCut.from_dict(json.loads(self.line(i)))

    def line(self, i: int) -> bytes:
        """The JSON of cut `i`, without its newline. Raises IndexError."""
        at, length = int(self.rows[i]["at"]), int(self.rows[i]["length"])
        return self.lines[at : at + length]

    def texts(self) -> Iterator[str]:
        """The transcripts of the cuts that have one."""
        for i in range(len(self)):
            if text := json.loads(self.line(i))["supervisions"][0].get("text"):
                yield text

    def addresses(self) -> Iterator[str]:
        """The address of each cut's audio, as `cut_source` gives it."""
        for i in range(len(self)):
            yield json.loads(self.line(i))["recording"]["sources"][0]["source"]

    def take(self, indexes: np.ndarray) -> Manifest:
        """The cuts at `indexes` (int `[n]`, or bool `[cuts]`), in that order."""
        return Manifest(self.lines, self.rows[indexes], self.speakers, self.languages)
