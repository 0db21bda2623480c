"""From what a user names to clips: folders of any layout, saved datasets, shards, the hub's streams."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from revox.checkpoint.locate import user_cache
from revox.speech.files import replace_file
from revox.training.data.errors import DataError
from revox.training.data.layouts import Found, walk
from revox.training.data.pool import cores, in_order
from revox.training.data.stream import ClipStream, open_stream
from revox.training.data.table import Clip, ClipTable, TableBuilder

Progress = Callable[[str, int, int | None], None]
_CHUNK = 256  # files a worker reads the headers of at a time
_SAVE_EVERY = 200_000  # headers read between two saves of an unfinished index


@dataclass(frozen=True)
class Source:
    """Speech of one origin. `clips` is a sequence, or a `ClipStream` for a dataset that is streamed.

    `broken` lists the files that cannot be used, with the reason.
    """

    name: str
    clips: Sequence[Clip] | ClipStream
    broken: Sequence[tuple[str, str]] = field(default_factory=tuple)

    @property
    def streamed(self) -> bool:
        """Whether its clips come one after the other only."""
        return isinstance(self.clips, ClipStream)


def find_sources(
    specs: Sequence[str],
    *,
    cache: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Source]:
    """The speech that each of `specs` names, in that order.

    A spec is a folder (audio in any of the layouts of `layouts`, shards and saved datasets, mixed) or
    "hf:OWNER/NAME[:config][:split]" (streamed; the split is "train" unless given). A folder is listed anew
    each time, but the header of a file is read once: `cache` keeps an index of each folder. Headers are read
    by `workers` processes (all cores; 0 in this one). `progress(what, done, of)` is called as it goes.

    Raises DataError when a folder is not there or holds no clip that can be used.
    """
    if not specs:
        raise DataError("no speech is named; give a folder of audio files, or hf:OWNER/NAME")
    sources = []
    for spec in specs:
        if spec.startswith("hf:"):
            sources.append(Source(spec, open_stream(spec)))
        else:
            sources.append(_folder_source(spec, cache or user_cache(), workers, progress))
    return sources


def _folder_source(spec: str, cache: Path, workers: int | None, progress: Progress | None) -> Source:
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        raise DataError(f"{spec} is not a folder; give a folder of audio files, or hf:OWNER/NAME for the hub")
    folder = folder.resolve()
    table, broken = index(folder, cache, cores() if workers is None else workers, progress)
    if not len(table):
        why = f" ({len(broken)} files cannot be read; the first: {broken[0][1]})" if broken else ""
        raise DataError(f"{folder} holds no audio that can be used{why}; give a folder of audio files")
    return Source(folder.name or str(folder), table, broken)


def index(
    folder: Path, cache: Path, workers: int, progress: Progress | None = None
) -> tuple[ClipTable, list[tuple[str, str]]]:
    """The clips of `folder` (absolute) with what their headers say, and (path, reason) of broken ones.

    What the index in `cache` knows of unchanged files (path, size, time) is taken from there; it is brought
    up to date, in one step, also while a long reading is under way.
    """
    path = cache / f"index-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.safetensors"
    old, old_broken = _kept(path, folder)
    order = np.argsort(old.stamp, kind="stable")
    stamps = old.stamp[order]
    reasons = {stamp: reason for _, stamp, reason in old_broken}

    builder = TableBuilder(str(folder))
    broken: list[tuple[str, int, str]] = []
    done = fresh = 0
    saved_at = 0

    def chunks() -> Iterator[tuple[list[Found], list[Clip | str | None]]]:
        found = walk(folder)
        while chunk := list(itertools.islice(found, _CHUNK)):
            wanted = np.array([one.stamp for one in chunk], dtype=np.int64)
            known: list[Clip | str | None] = [reasons.get(one.stamp) for one in chunk]
            if len(stamps):
                places = np.minimum(np.searchsorted(stamps, wanted), len(stamps) - 1)
                for i in np.flatnonzero(stamps[places] == wanted):
                    known[i] = old[int(order[places[i]])]
            yield chunk, known

    def save() -> None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            replace_file(path, builder.done().to_bytes(broken))
        except OSError:
            pass  # an index that cannot be kept costs the next run some time, not this one its data

    read = partial(_read_chunk, str(folder))
    pieces = chunks()
    first = list(itertools.islice(pieces, 3))
    if len(first) < 3:
        workers = 0  # so little is not worth starting anybody
    for chunk, known, results in _with_headers(read, itertools.chain(first, pieces), workers):
        for one, before, result in zip(chunk, known, results, strict=True):
            clip = result if before is None else before
            fresh += before is None
            if isinstance(clip, str):
                broken.append((one.clip.key, one.stamp, clip))
            elif clip is not None:
                builder.append(replace(clip, key=one.clip.key), one.stamp)
        done += len(chunk)
        if progress:
            progress(f"indexing {folder.name}", done, None)
        if fresh - saved_at >= _SAVE_EVERY:
            save()
            saved_at = fresh
    if fresh or done != len(old) + len(old_broken):
        save()
    table = builder.done()
    return table, [(f"{folder}/{key}", reason) for key, _, reason in broken]


def _with_headers(
    read: Callable[[list[Found]], list[Clip | str]],
    chunks: Iterable[tuple[list[Found], list[Clip | str | None]]],
    workers: int,
) -> Iterator[tuple[list[Found], list[Clip | str | None], list[Clip | str | None]]]:
    """Chunks with the results of reading what was not known, in order; known chunks cost no worker."""
    waiting: list[tuple[list[Found], list[Clip | str | None]]] = []

    def unknown() -> Iterator[list[Found]]:
        for chunk, known in chunks:
            waiting.append((chunk, known))
            yield [one for one, before in zip(chunk, known, strict=True) if before is None]

    for results in in_order(read, unknown(), workers):
        chunk, known = waiting.pop(0)
        answers = iter(results)
        yield chunk, known, [next(answers) if before is None else None for before in known]


def _kept(path: Path, folder: Path) -> tuple[ClipTable, list[tuple[str, int, str]]]:
    try:
        table, broken = ClipTable.load(path)
    except (OSError, ValueError, KeyError):
        return ClipTable.of([]), []
    if table.folder != str(folder):  # two folders of one hash
        return ClipTable.of([]), []
    table.folder = ""  # keys as they are found, under the folder
    return table, broken


def _read_chunk(folder: str, chunk: list[Found]) -> list[Clip | str]:
    """The clips with their headers and transcripts read; a sentence in place of one that cannot be used."""
    return [_read_one(folder, one) for one in chunk]


def _read_one(folder: str, one: Found) -> Clip | str:
    from revox.speech import AudioError, audio_header
    from revox.training.data.locate import clip_source

    if one.problem is not None:
        return one.problem
    if one.whole:
        return one.clip
    try:
        seconds, rate = audio_header(clip_source(f"{folder}/{one.clip.key}"))
    except (AudioError, DataError) as error:
        return str(error)
    except OSError as error:
        return f"{one.clip.key} cannot be read ({error.strerror}); check its permissions."
    transcript = one.clip.transcript
    if one.sidecar is not None:
        try:
            text = Path(folder, one.sidecar).read_text(encoding="utf-8-sig", errors="replace")
            transcript = " ".join(text.split()) or None
        except OSError:
            transcript = None
    return replace(one.clip, seconds=seconds, rate=rate, transcript=transcript)
