"""A million clips as columns: what is known of each, in arrays and one file."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

_FORMAT = "revox-index-1"


@dataclass(frozen=True)
class Clip:
    """One recording. `key` is its path, or where it lies in a larger file (see `locate.clip_source`).

    `seconds` and `rate` (Hz) are the file's own, as its header says; None where it does not.
    """

    key: str
    speaker: str
    language: str | None = None
    transcript: str | None = None
    seconds: float | None = None
    rate: int | None = None


class Strings(Sequence[str]):
    """Strings laid end to end in UTF-8: `blob` uint8 `[bytes]`, `ends` int64 `[n]`."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray) -> None:
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> Strings:
        """The strings of `texts`."""
        builder = _StringsBuilder()
        for text in texts:
            builder.append(text)
        return builder.done()

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        start = int(self.ends[i - 1]) if i else 0
        return self.blob[start : int(self.ends[i])].tobytes().decode("utf-8", "surrogateescape")


class _StringsBuilder:
    def __init__(self) -> None:
        self.blob, self.ends = bytearray(), array("q")

    def append(self, text: str) -> None:
        self.blob += text.encode("utf-8", "surrogateescape")
        self.ends.append(len(self.blob))

    def done(self) -> Strings:
        return Strings(np.frombuffer(bytes(self.blob), np.uint8), np.array(self.ends, dtype=np.int64))


class ClipTable(Sequence[Clip]):
    """Clips as columns: about 100 bytes and the transcript each, where an object would take a kilobyte.

    `speaker` and `language` int32 `[n]` are places in `speakers` and `languages` (-1: unknown); `seconds`
    float32 (nan: unknown) and `rate` int32 (Hz, 0: unknown); `stamp` int64 changes when the file does. A key
    that is no absolute path lies under `folder`.
    """

    def __init__(
        self,
        folder: str,
        keys: Strings,
        speaker: np.ndarray,
        language: np.ndarray,
        transcripts: Strings,
        seconds: np.ndarray,
        rate: np.ndarray,
        stamp: np.ndarray,
        speakers: Sequence[str],
        languages: Sequence[str],
    ) -> None:
        self.folder, self.keys, self.transcripts = folder, keys, transcripts
        self.speaker, self.language = speaker, language
        self.seconds, self.rate, self.stamp = seconds, rate, stamp
        self.speakers, self.languages = speakers, languages

    @classmethod
    def of(cls, clips: Iterable[Clip], folder: str = "") -> ClipTable:
        """The table of `clips`."""
        builder = TableBuilder(folder)
        for clip in clips:
            builder.append(clip)
        return builder.done()

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, i: int) -> Clip: ...
    @overload
    def __getitem__(self, i: slice) -> list[Clip]: ...
    def __getitem__(self, i: int | slice) -> Clip | list[Clip]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        key, seconds, language = self.keys[i], float(self.seconds[i]), int(self.language[i])
        return Clip(
            key=f"{self.folder}/{key}" if self.folder and not key.startswith("/") else key,
            speaker=self.speakers[int(self.speaker[i])],
            language=self.languages[language] if language >= 0 else None,
            transcript=self.transcripts[i] or None,
            seconds=seconds if math.isfinite(seconds) else None,
            rate=int(self.rate[i]) or None,
        )

    def __iter__(self) -> Iterator[Clip]:
        return (self[i] for i in range(len(self)))

    def take(self, rows: np.ndarray) -> ClipTable:
        """The rows at `rows` (int `[k]`), in that order; names of speakers are kept as they are."""
        return ClipTable(
            self.folder,
            Strings.of(self.keys[int(i)] for i in rows),
            self.speaker[rows],
            self.language[rows],
            Strings.of(self.transcripts[int(i)] for i in rows),
            self.seconds[rows],
            self.rate[rows],
            self.stamp[rows],
            self.speakers,
            self.languages,
        )

    def to_bytes(self, broken: Sequence[tuple[str, int, str]] = ()) -> bytes:
        """The table as the bytes of a safetensors file, with the (key, stamp, reason) of broken files."""
        from safetensors.numpy import save

        tensors = {
            "speaker": self.speaker,
            "language": self.language,
            "seconds": self.seconds,
            "rate": self.rate,
            "stamp": self.stamp,
        }
        columns = {"key": self.keys, "transcript": self.transcripts}
        for name, texts in (("speakers", self.speakers), ("languages", self.languages)):
            columns[name] = texts if isinstance(texts, Strings) else Strings.of(texts)
        for name, strings in columns.items():
            tensors[f"{name}.blob"], tensors[f"{name}.ends"] = strings.blob, strings.ends
        said = {"format": _FORMAT, "folder": self.folder, "broken": json.dumps(list(broken))}
        return save(tensors, said)

    @classmethod
    def load(cls, path: Path) -> tuple[ClipTable, list[tuple[str, int, str]]]:
        """The table in `path` and its broken files. Raises ValueError when the file is not one."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "np") as file:
                said = file.metadata() or {}
                if said.get("format") != _FORMAT:
                    raise ValueError(f"{path} is no index of this version")
                of = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(str(error)) from None

        def strings(name: str) -> Strings:
            return Strings(of[f"{name}.blob"], of[f"{name}.ends"])

        table = cls(
            said["folder"],
            strings("key"),
            of["speaker"],
            of["language"],
            strings("transcript"),
            of["seconds"],
            of["rate"],
            of["stamp"],
            strings("speakers")[:],
            strings("languages")[:],
        )
        return table, [(key, stamp, reason) for key, stamp, reason in json.loads(said["broken"])]


class TableBuilder:
    """Grows a `ClipTable` row by row without holding the clips as objects."""

    def __init__(self, folder: str = "") -> None:
        self.folder = folder
        self._keys, self._transcripts = _StringsBuilder(), _StringsBuilder()
        self._speaker, self._language, self._rate = array("i"), array("i"), array("i")
        self._seconds, self._stamp = array("f"), array("q")
        self._speakers: dict[str, int] = {}
        self._languages: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._stamp)

    def append(self, clip: Clip, stamp: int = 0) -> None:
        """One more row."""
        self._keys.append(clip.key)
        self._transcripts.append(clip.transcript or "")
        self._speaker.append(self._speakers.setdefault(clip.speaker, len(self._speakers)))
        language = -1
        if clip.language is not None:
            language = self._languages.setdefault(clip.language, len(self._languages))
        self._language.append(language)
        self._seconds.append(math.nan if clip.seconds is None else clip.seconds)
        self._rate.append(clip.rate or 0)
        self._stamp.append(stamp)

    def done(self) -> ClipTable:
        """What has been appended so far."""
        return ClipTable(
            self.folder,
            self._keys.done(),
            np.array(self._speaker, dtype=np.int32),
            np.array(self._language, dtype=np.int32),
            self._transcripts.done(),
            np.array(self._seconds, dtype=np.float32),
            np.array(self._rate, dtype=np.int32),
            np.array(self._stamp, dtype=np.int64),
            list(self._speakers),
            list(self._languages),
        )
