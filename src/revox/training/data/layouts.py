"""Speech in a folder, in any layout: plain, LibriSpeech, LibriTTS-R, Common Voice, Shar, saved datasets.

lhotse's recipes for these corpora need the official folders complete, fail on the first unreadable file,
hold a corpus in memory, and open whatever path a list names; this walk has none of these limits.
"""

from __future__ import annotations

import csv
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revox.training.data.errors import DataError
from revox.training.data.hub import dataset_records
from revox.training.data.manifest import cut_record, hash_of
from revox.training.data.shar import CUTS, shard_records

# fmt: off
AUDIO = frozenset({
    ".wav", ".flac", ".mp3", ".opus", ".ogg", ".oga", ".m4a", ".aac", ".mp4", ".webm", ".mka", ".mkv",
    ".aiff", ".aif", ".wma", ".spx", ".amr",
})
# fmt: on
# The transcript in a file next to the audio; of LibriTTS the normalized one first.
_TRANSCRIPTS = (".normalized.txt", ".txt", ".lab", ".original.txt")
# Speakers of LibriSpeech and LibriTTS are the same people with the same numbers.
_LIBRI = re.compile(r"(\d+)-\d+-\d{4}|(\d+)_\d+_\d{6}_\d{6}")
_COMMON_VOICE = ("validated.tsv", "train.tsv")


@dataclass(frozen=True)
class Found:
    """A clip of the walk: its cut, and a hash of name, size and time of every file that describes it.

    `transcript` is the file of its text. `complete`: its length and rate are already known. `problem` is why
    it cannot be used.
    """

    name: str
    stamp: int
    record: dict[str, Any] | None = None
    transcript: str | None = None
    complete: bool = False
    problem: str | None = None


def _stamp(*parts: object) -> int:
    """A 64-bit hash, never 0."""
    return hash_of(repr(parts)) or 1


def _broken(name: str, sentence: str) -> Found:
    return Found(name, _stamp(name, sentence), problem=sentence)


def walk(folder: Path) -> Iterator[Found]:
    """Every clip under `folder` (absolute), in a fixed order. Links are followed once; hidden names are not.

    What cannot be read (a folder, a list, a shard) is found with its `problem`. Raises TrainingError for
    saved datasets without the library to read them.
    """
    visited: set[tuple[int, int]] = set()
    pending = [folder]
    while pending:
        here = pending.pop()
        try:
            status = here.stat()
            entries = {e.name: e for e in os.scandir(here) if not e.name.startswith(".")}
        except OSError as error:
            yield _broken(str(here), f"{here} cannot be listed ({error.strerror}); check its permissions")
            continue
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        folders = {name for name, entry in entries.items() if _is_folder(entry)}
        if "dataset_dict.json" in entries:
            for name in sorted(folders):
                yield from from_dataset(str(here / name), _name(folder, here / name))
            continue
        if {"state.json", "dataset_info.json"} <= set(entries):
            yield from from_dataset(str(here), _name(folder, here))
            continue
        listed = next((name for name in _COMMON_VOICE if name in entries), None)
        if listed and "clips" in folders:
            yield from _common_voice(here, listed)
            folders.discard("clips")
        yield from _files(folder, here, {n: e for n, e in entries.items() if n not in folders})
        pending += [here / name for name in sorted(folders, reverse=True)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _state(path: str | os.PathLike[str] | None) -> tuple[int, int]:
    """Size and time of a file; zeros when there is none (a link that leads nowhere)."""
    try:
        status = os.stat(path) if path is not None else None
    except OSError:
        status = None
    return (status.st_size, status.st_mtime_ns) if status else (0, 0)


def _name(folder: Path, here: Path) -> str:
    """`here` by its path from `folder`, whose own name comes first."""
    return "/".join((folder.name, *here.relative_to(folder).parts))


def _files(folder: Path, here: Path, entries: dict[str, os.DirEntry[str]]) -> Iterator[Found]:
    """The audio files and shards directly in `here`."""
    texts, lists = _chapter_texts(here, entries)
    for name in sorted(entries):
        stem, ending = os.path.splitext(name)
        path = str(here / name)
        if CUTS.fullmatch(name):
            yield from _shard(here / name)
        elif re.fullmatch(r"revox-\d+\.tar", name):
            yield _broken(path, f"{path} is a shard of revox 0.1; pack the original speech again")
        if ending.lower() not in AUDIO:
            continue
        speaker, language = _speaker(folder, here, stem)
        transcript = None
        if stem not in texts:
            transcript = next(
                (str(here / (stem + end)) for end in _TRANSCRIPTS if stem + end in entries), None
            )
        record = cut_record(f"{_name(folder, here)}/{name}", path, speaker, language, texts.get(stem))
        stamp = _stamp(path, speaker, _state(path), _state(transcript), lists)
        yield Found(path, stamp, record, transcript)


def _speaker(folder: Path, here: Path, stem: str) -> tuple[str, str | None]:
    """The speaker as far as names tell, and the language where the corpus has only one."""
    if libri := _LIBRI.fullmatch(stem):
        return f"librispeech-{libri[1] or libri[2]}", "en"
    parts = _name(folder, here).split("/")
    if len(parts) >= 3 and re.match(rf"{re.escape(parts[-2])}[-_]{re.escape(parts[-1])}[-_]", stem):
        return "/".join(parts[:-1]), None  # speaker/chapter/speaker_chapter_..., as in MLS
    if here != folder:
        return "/".join(parts), None
    return f"{folder.name}/{re.split(r'[-_ ]', stem)[0] or stem}", None


def _chapter_texts(
    here: Path, entries: dict[str, os.DirEntry[str]]
) -> tuple[dict[str, str], list[tuple[int, int]]]:
    """Transcripts by stem from the lists of a LibriSpeech or LibriTTS chapter, and the state of those lists.

    LibriSpeech is all capitals; it is lowercased, which is closer to the text that models are trained on.
    """
    texts: dict[str, str] = {}
    lists = sorted(name for name in entries if name.endswith((".trans.txt", ".trans.tsv")))
    for name in lists:
        try:
            lines = (here / name).read_text(encoding="utf-8-sig", errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            stem, *columns = line.split("\t") if name.endswith(".tsv") else line.split(None, 1)
            if columns and (text := columns[-1].strip()):
                texts[stem] = text.lower() if text.isupper() else text
    return texts, [_state(here / name) for name in lists]


def _common_voice(here: Path, name: str) -> Iterator[Found]:
    """The clips that a Common Voice list names. Names that lead out of `clips` are ignored."""
    path = here / name
    csv.field_size_limit(sys.maxsize)
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            if not {"client_id", "path", "sentence"} <= set(rows.fieldnames or ()):
                sentence = f"{path} is not a list of Common Voice: it needs columns client_id, path, sentence"
                yield _broken(str(path), sentence)
                return
            for row in rows:
                clip = row["path"] or ""
                if not clip or "/" in clip or clip.startswith("."):
                    continue
                audio = str(here / "clips" / (clip if os.path.splitext(clip)[1] else f"{clip}.mp3"))
                # 64 bits of the 512 of `client_id`: enough that two people never share one.
                speaker = f"commonvoice-{(row['client_id'] or clip)[:16]}"
                facts = (speaker, row.get("locale") or None, row["sentence"] or None)
                yield Found(
                    audio,
                    _stamp(audio, _state(audio), facts),
                    cut_record(f"{here.name}/{clip}", audio, *facts),
                )
    except OSError as error:
        yield _broken(str(path), f"{path} cannot be read ({error.strerror}); check its permissions")


def _shard(cuts: Path) -> Iterator[Found]:
    states = _state(cuts), _state(cuts.with_name(f"recording.{cuts.name.split('.')[1]}.tar"))
    try:
        for record in shard_records(cuts):
            yield Found(record["id"], _stamp(str(cuts), record["id"], states), record, complete=True)
    except DataError as error:
        yield _broken(str(cuts), str(error))


def from_dataset(place: str, name: str) -> Iterator[Found]:
    """Every row of a dataset (`hub.open_dataset`), which is called `name`."""
    for record, fingerprint in dataset_records(place, name):
        yield Found(record["id"], _stamp(place, record["id"], fingerprint), record)
