"""What lies in a folder: every layout of speech is recognised where it begins, however deep.

Plain folders, LibriSpeech and LibriTTS-R, Common Voice, revox shards and datasets saved with `save_to_disk`
may lie side by side.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revox.training.data.errors import DataError
from revox.training.data.locate import saved_dataset
from revox.training.data.table import Clip

# fmt: off
AUDIO = frozenset({
    ".wav", ".flac", ".mp3", ".opus", ".ogg", ".oga", ".m4a", ".aac", ".mp4", ".webm", ".mka", ".mkv",
    ".aiff", ".aif", ".wma", ".spx", ".amr",
})
# fmt: on
# The words of a clip beside it, the spelled-out ones of LibriTTS before the written ones.
SIDECARS = (".normalized.txt", ".txt", ".lab", ".original.txt")
# Transcripts of several columns: the first listed is taken when it is there.
TEXT_COLUMNS = ("sentence", "text", "transcript", "transcription", "normalized_text", "text_normalized")
SPEAKER_COLUMNS = ("speaker_id", "speaker", "client_id", "spk_id", "reader_id")
LANGUAGE_COLUMNS = ("language", "locale", "lang")
# Readers of LibriSpeech and LibriTTS are the same people with the same numbers.
_LIBRISPEECH = re.compile(r"(\d+)-\d+-\d{4}")
_LIBRITTS = re.compile(r"(\d+)_\d+_\d{6}_\d{6}")
_COMMON_VOICE_LISTS = ("validated.tsv", "train.tsv")


@dataclass(frozen=True)
class Found:
    """A clip of which only the name is known yet; `clip.key` lies under the folder that was searched.

    `stamp` is a hash of the key and of size and time of every file that says something of it. `sidecar` is
    the path of its transcript. `whole`: nothing is left to be read (a shard's index has it all). `problem`
    is why it cannot be used.
    """

    clip: Clip
    stamp: int
    sidecar: str | None = None
    whole: bool = False
    problem: str | None = None


def stamp_of(*parts: object) -> int:
    """A 64-bit hash of what was seen of a file, never 0."""
    digest = hashlib.blake2b(repr(parts).encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1


def walk(folder: Path) -> Iterator[Found]:
    """Every clip under `folder`, in a fixed order. Links are followed, hidden names and circles are not.

    What cannot be read (a folder, a list, a shard) is found with its `problem`. Raises DataError for saved
    datasets without the library to read them.
    """
    seen: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        inside = pending.pop()
        here = folder / inside if inside else folder
        try:
            status = here.stat()
            entries = {e.name: e for e in os.scandir(here) if not e.name.startswith(".")}
        except OSError as error:
            yield _problem(
                inside or ".", f"{here} cannot be listed ({error.strerror}); check its permissions"
            )
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        if "dataset_dict.json" in entries:
            for name in sorted(name for name, entry in entries.items() if entry.is_dir()):
                yield from _saved(folder, _join(inside, name))
            continue
        if "state.json" in entries and "dataset_info.json" in entries:
            yield from _saved(folder, inside)
            continue
        subfolders = {name for name, entry in entries.items() if _is_dir(entry)}
        listed = next((name for name in _COMMON_VOICE_LISTS if name in entries), None)
        if listed and "clips" in subfolders:
            yield from _common_voice(folder, inside, listed)
            subfolders.discard("clips")
        yield from _files(folder, inside, {n: e for n, e in entries.items() if n not in subfolders})
        pending += [_join(inside, name) for name in sorted(subfolders, reverse=True)]


def _problem(key: str, sentence: str) -> Found:
    return Found(Clip(key, ""), stamp_of(key, sentence), problem=sentence)


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _join(inside: str, name: str) -> str:
    return f"{inside}/{name}" if inside else name


def _seen(entry: os.DirEntry[str] | None) -> tuple[int, int]:
    """Size and time of a file; zeros when there is none (a link that leads nowhere)."""
    try:
        status = entry.stat() if entry is not None else None
    except OSError:
        status = None
    return (status.st_size, status.st_mtime_ns) if status else (0, 0)


def _files(folder: Path, inside: str, entries: dict[str, os.DirEntry[str]]) -> Iterator[Found]:
    """The audio files and shards directly in `inside`."""
    words, words_seen = _listed_words(folder, inside, entries)
    for name in sorted(entries):
        stem, ending = os.path.splitext(name)
        if ending == ".tar":
            yield from _shard(folder, _join(inside, name), entries[name])
        if ending.lower() not in AUDIO:
            continue
        speaker, language = _speaker(folder, inside, stem)
        transcript = words.get(stem)
        sidecar = None
        if transcript is None:
            sidecar = next((stem + end for end in SIDECARS if stem + end in entries), None)
        seen = (_seen(entries[name]), _seen(entries.get(sidecar or "")), words_seen)
        key = _join(inside, name)
        yield Found(
            Clip(key, speaker, language, transcript),
            stamp_of(key, speaker, seen),
            _join(inside, sidecar) if sidecar else None,
        )


def _speaker(folder: Path, inside: str, stem: str) -> tuple[str, str | None]:
    """Who speaks, as far as names tell, and the language where the corpus has one only."""
    if libri := _LIBRISPEECH.fullmatch(stem) or _LIBRITTS.fullmatch(stem):
        return f"librispeech-{libri[1]}", "en"
    parts = (folder.name, *inside.split("/")) if inside else (folder.name,)
    if len(parts) >= 3 and re.match(rf"{re.escape(parts[-2])}[-_]{re.escape(parts[-1])}[-_]", stem):
        return f"{'/'.join(parts[:-2])}/{parts[-2]}", None  # speaker/chapter/speaker_chapter_..., as MLS
    if inside:
        return "/".join(parts), None
    return f"{folder.name}/{re.split(r'[-_ ]', stem)[0] or stem}", None


def _listed_words(
    folder: Path, inside: str, entries: dict[str, os.DirEntry[str]]
) -> tuple[dict[str, str], list[tuple[int, int]]]:
    """Words by stem from the lists of a LibriSpeech or LibriTTS chapter, and the stamps of those lists.

    LibriSpeech has no case: its capitals are made small, which is nearer to text as models know it.
    """
    words: dict[str, str] = {}
    seen = []
    for name in sorted(entries):
        if not name.endswith((".trans.txt", ".trans.tsv")):
            continue
        seen.append(_seen(entries[name]))
        try:
            lines = (folder / inside / name).read_text(encoding="utf-8-sig", errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            stem, *columns = line.split("\t") if name.endswith(".tsv") else line.split(None, 1)
            if columns and columns[-1].strip():
                said = columns[-1].strip()
                words[stem] = said.lower() if said.isupper() else said
    return words, seen


def _common_voice(folder: Path, inside: str, name: str) -> Iterator[Found]:
    """The clips that a Common Voice list names (validated ones where there is that list)."""
    path = folder / inside / name
    csv.field_size_limit(sys.maxsize)
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            if not {"client_id", "path", "sentence"} <= set(rows.fieldnames or ()):
                sentence = f"{path} is no list of Common Voice: it needs columns client_id, path, sentence"
                yield _problem(_join(inside, name), sentence)
                return
            for row in rows:
                clip = row["path"] or ""
                if not clip or "/" in clip or clip.startswith("."):
                    continue
                clip = clip if os.path.splitext(clip)[1] else f"{clip}.mp3"
                key = _join(inside, f"clips/{clip}")
                try:
                    status = os.stat(folder / key)
                    seen = (status.st_size, status.st_mtime_ns)
                except OSError:
                    seen = (0, 0)
                said = (row["client_id"], row.get("locale") or None, row["sentence"] or None)
                yield Found(
                    # 64 bits of the 512: enough that two people never meet.
                    Clip(key, f"commonvoice-{(row['client_id'] or clip)[:16]}", said[1], said[2]),
                    stamp_of(key, seen, said),
                )
    except OSError as error:
        yield _problem(_join(inside, name), f"{path} cannot be read ({error.strerror}); check it")


def _shard(folder: Path, key: str, entry: os.DirEntry[str]) -> Iterator[Found]:
    from revox.training.data.shards import is_shard, shard_clips

    path = str(folder / key)
    if not is_shard(path):
        return
    seen = _seen(entry)
    try:
        for clip in shard_clips(path, key):
            yield Found(clip, stamp_of(clip.key, seen), whole=True)
    except DataError as error:
        yield _problem(key, str(error))


def _saved(folder: Path, inside: str) -> Iterator[Found]:
    """The rows of a dataset saved with `save_to_disk`."""
    where = folder / inside if inside else folder
    dataset = saved_dataset(str(where))
    plain = dataset.select_columns([c for c in dataset.column_names if c != "audio"])
    # What the library itself takes for the identity of the content.
    fingerprint = getattr(dataset, "_fingerprint", "")
    name = "/".join((folder.name, inside)) if inside else folder.name
    start = 0
    for batch in plain.iter(1000) if plain.column_names else ():
        for offset in range(len(next(iter(batch.values())))):
            row = {column: values[offset] for column, values in batch.items()}
            yield _row_found(row, inside, start + offset, name, fingerprint)
        start += len(next(iter(batch.values())))
    if not plain.column_names:
        for i in range(len(dataset)):
            yield _row_found({}, inside, i, name, fingerprint)


def _row_found(row: dict[str, Any], inside: str, i: int, name: str, fingerprint: str) -> Found:
    key = f"{inside or '.'}@row{i}"
    return Found(row_clip(row, key, name), stamp_of(key, fingerprint))


def row_clip(row: dict[str, Any], key: str, name: str) -> Clip:
    """What a dataset's row says of its clip; without a speaker it is one for the whole dataset `name`."""

    def first(columns: tuple[str, ...]) -> str | None:
        for column in columns:
            value = row.get(column)
            if isinstance(value, (str, int)) and str(value).strip():
                return str(value).strip()
        return None

    speaker = first(SPEAKER_COLUMNS)
    return Clip(key, f"{name}/{speaker}" if speaker else name, first(LANGUAGE_COLUMNS), first(TEXT_COLUMNS))
