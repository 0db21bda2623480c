"""From the names that a user gives to cuts: folders and datasets of the hub, which are indexed."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from revox.checkpoint.locate import user_cache
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech.files import replace_file
from revox.training.data.errors import DataError
from revox.training.data.hub import HUB
from revox.training.data.layouts import Found, from_dataset, walk
from revox.training.data.locate import audio_source
from revox.training.data.manifest import Manifest, cut_line
from revox.workers import in_order

_CHUNK = 256  # files whose headers a worker reads at a time


@dataclass(frozen=True)
class SpeechSource:
    """Speech of one origin. `broken` lists the files that cannot be used, with the reason."""

    name: str
    cuts: Manifest
    broken: Sequence[tuple[str, str]] = field(default_factory=tuple)


def find_sources(
    specs: Sequence[str],
    *,
    cache: Path | None = None,
    workers: int | None = None,
    progress: ProgressCallback = ignore_progress,
) -> list[SpeechSource]:
    """The speech that each of `specs` names, in that order.

    A spec is a folder (any mixture of what `layouts` knows) or "hf:OWNER/NAME[:config][:split]" (downloaded
    by `datasets`; the split is "train" unless given). It is listed every time, but the header of a file is
    read once: `cache` keeps a manifest of each. Headers are read by `workers` processes (default: all cores;
    0: this one).

    Raises DataError when a spec does not exist or holds no clip that can be used.
    """
    if not specs:
        raise DataError("no speech is named; give a folder of audio files, or hf:OWNER/NAME")
    sources = []
    for spec in specs:
        if spec.startswith(HUB):
            name, place, found = spec, spec, from_dataset(spec, spec)
        else:
            folder = Path(spec).expanduser()
            if not folder.is_dir():
                raise DataError(f"{spec} is not a folder; give a folder of audio files, or hf:OWNER/NAME")
            folder = folder.resolve()
            name, place, found = folder.name or str(folder), str(folder), walk(folder)
        source = _indexed(name, place, found, cache or user_cache(), workers, progress)
        if not len(source.cuts):
            broken = source.broken
            why = f" ({len(broken)} files cannot be read; the first: {broken[0][1]})" if broken else ""
            raise DataError(f"{spec} holds no audio that can be used{why}; give a folder of audio files")
        sources.append(source)
    return sources


def _indexed(
    name: str,
    place: str,
    clips: Iterator[Found],
    cache: Path,
    workers: int | None,
    progress: ProgressCallback,
) -> SpeechSource:
    """The `clips` of `place`, ordered by a hash of their ids: one order, whatever was known before.

    What the manifest in `cache` knows is not read again. It is replaced also when the reading is interrupted.
    """
    path = cache / f"cuts-{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}.jsonl"
    old = _cached(path)
    known = {stamp: row for row, stamp in enumerate(old.rows["stamp"].tolist())}
    broken: list[tuple[str, str]] = []
    found = unchanged = 0

    def unknown() -> Iterator[list[Found]]:
        nonlocal found, unchanged
        chunk: list[Found] = []
        for one in clips:
            found += 1
            if (row := known.pop(one.stamp, None)) is not None:
                unchanged += 1
                lines.write(old.line(row) + b"\n")
            else:
                chunk.append(one)
            if len(chunk) == _CHUNK:
                yield chunk
                chunk = []
            if found % _CHUNK == 0:
                progress(Progress(f"indexing {name}", found))
        yield chunk

    with _temporary_file(cache) as lines:
        try:
            for results in in_order(_read_headers, unknown(), workers):
                lines.writelines(line for line in results if isinstance(line, bytes))
                broken += [reason for reason in results if isinstance(reason, tuple)]
        except BaseException:  # what was not reached is still known
            lines.writelines(old.line(row) + b"\n" for row in known.values())
            raise
        finally:
            if not found == unchanged == len(old):
                with contextlib.suppress(OSError):  # without a cache the next run reads the headers again
                    replace_file(path, lambda file: _copy(lines, file))
        cuts = Manifest.parse(_mapped(lines))
    return SpeechSource(name, cuts.take(np.argsort(cuts.rows["id"], kind="stable")), broken)


def _temporary_file(cache: Path) -> Any:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=cache)
    except OSError:
        return tempfile.TemporaryFile()


def _copy(lines: BinaryIO, file: BinaryIO) -> None:
    lines.seek(0)
    shutil.copyfileobj(lines, file)


def _cached(path: Path) -> Manifest:
    try:
        with open(path, "rb") as file:
            return Manifest.parse(_mapped(file))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return Manifest.of([])


def _mapped(file: BinaryIO) -> bytes | mmap.mmap:
    file.flush()
    if os.fstat(file.fileno()).st_size == 0:
        return b""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_headers(chunk: list[Found]) -> list[bytes | tuple[str, str]]:
    """The manifest lines of what was found; name and reason in place of one that cannot be used."""
    from revox.speech import AudioError

    lines: list[bytes | tuple[str, str]] = []
    for one in chunk:
        try:
            lines.append(_read_one(one))
        except (AudioError, DataError) as error:
            lines.append((one.name, str(error)))
        except OSError as error:
            lines.append((one.name, f"{one.name} cannot be read ({error.strerror}); check its permissions"))
    return lines


def _read_one(one: Found) -> bytes:
    from revox.speech import audio_header

    if one.record is None:
        raise DataError(one.problem)
    record = one.record
    if not one.complete:
        recording, supervision = record["recording"], record["supervisions"][0]
        length, rate = audio_header(audio_source(recording["sources"][0]["source"]))
        seconds = round(length or 0.0, 6)
        recording |= {"sampling_rate": rate, "duration": seconds, "num_samples": round(seconds * rate)}
        record["duration"] = supervision["duration"] = seconds
        if one.transcript is not None:
            with contextlib.suppress(OSError):
                text = Path(one.transcript).read_text(encoding="utf-8-sig", errors="replace")
                supervision |= {"text": " ".join(text.split())} if text.strip() else {}
    record.setdefault("custom", {})["stamp"] = one.stamp
    return cut_line(record)
