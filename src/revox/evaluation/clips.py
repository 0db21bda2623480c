"""The clips of a folder, with speaker, group and transcript where known."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path

from revox.evaluation.errors import EvaluationError
from revox.speech.files import read_text

# fmt: off
AUDIO_ENDINGS = frozenset({
    ".wav", ".flac", ".mp3", ".opus", ".ogg", ".m4a", ".aac", ".mp4", ".webm", ".aiff", ".aif", ".wma",
})
# fmt: on
MANIFESTS = ("manifest.csv", "manifest.jsonl")


@dataclass(frozen=True)
class Clip:
    """One recording. `name` is its path inside the folder; each `group` has tables of its own."""

    path: Path
    name: str
    speaker: str
    group: str = ""
    text: str | None = None


def find_clips(
    folder: Path, manifest: Path | None = None, transcripts: Path | None = None, limit: int | None = None
) -> list[Clip]:
    """The clips of `folder`, sorted by group and name.

    With a manifest (CSV with a header, or JSONL; by default `manifest.csv` or `manifest.jsonl` in the
    folder): its entries, columns `file` (inside the folder), and where known `speaker`, `group`, `text`.
    Without: every audio file; the speaker is the file's stem, the group the subfolder, the text a file of
    its name in .txt beside it. `transcripts` adds texts: one clip a line, its file name or stem, a space or
    tab, the words (as in LibriSpeech). `limit` clips of each group are taken. Nothing outside the folder is
    read: a link or an entry that leads out of it is refused.

    Raises EvaluationError when there is no clip, or a file cannot be read as described.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise EvaluationError(f"{folder} is not a folder; name a folder of clips")
    if manifest is None:
        manifest = next((folder / name for name in MANIFESTS if (folder / name).is_file()), None)
    clips = _listed(folder, manifest) if manifest else _found(folder)
    if not clips:
        raise EvaluationError(
            f"{folder} holds no audio files; name a folder with clips "
            f"({', '.join(sorted(AUDIO_ENDINGS)[:4])} ...) or give a manifest"
        )
    if transcripts is not None:
        texts = _transcripts(transcripts)
        clips = [replace(c, text=c.text or texts.get(c.path.name, texts.get(c.path.stem))) for c in clips]
    clips.sort(key=lambda clip: (clip.group, clip.name))
    if limit is not None:
        groups = groupby(clips, key=lambda clip: clip.group)
        clips = [clip for _, group in groups for clip in islice(group, limit)]
    return clips


def partners(clips: list[Clip]) -> dict[str, Clip | None]:
    """For each clip (by name) the next one of another speaker, of its group if there is one, else of any."""
    found: dict[str, Clip | None] = {}
    for i, clip in enumerate(clips):
        others = [c for c in (*clips[i + 1 :], *clips[:i]) if c.speaker != clip.speaker]
        same = [c for c in others if c.group == clip.group]
        found[clip.name] = next(iter(same or others), None)
    return found


def _found(folder: Path) -> list[Clip]:
    clips = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.suffix.lower() not in AUDIO_ENDINGS or hidden or not path.is_file():
            continue
        # Bytes of a name that are not UTF-8 could not be written into a report.
        printable = Path(os.fsencode(relative).decode("utf-8", "backslashreplace"))
        group = printable.parts[0] if len(printable.parts) > 1 else ""
        words = path.with_suffix(".txt")
        text = read_text(_inside(folder, words), EvaluationError).strip() if words.is_file() else ""
        clips.append(Clip(_inside(folder, path), printable.as_posix(), printable.stem, group, text or None))
    return clips


def _listed(folder: Path, manifest: Path) -> list[Clip]:
    clips: list[Clip] = []
    for number, entry in enumerate(_entries(manifest), start=1):
        file = entry.get("file")
        if not isinstance(file, str) or not file or "\0" in file:
            raise EvaluationError(f"{manifest}: entry {number} names no file; give it a column `file`")
        path = _inside(folder, folder / file)
        if not path.is_file():
            raise EvaluationError(f"{manifest}: entry {number} names {file}, which is not in {folder}")
        known = {key: str(entry[key]).strip() for key in ("speaker", "group", "text") if entry.get(key)}
        name = Path(file).as_posix()
        if name in {clip.name for clip in clips}:
            raise EvaluationError(f"{manifest} lists {file} twice; name each clip once")
        speaker = known.get("speaker") or Path(file).stem
        clips.append(Clip(path, name, speaker, known.get("group", ""), known.get("text") or None))
    return clips


def _entries(manifest: Path) -> list[dict]:
    try:
        text = manifest.read_text(encoding="utf-8-sig")
        if manifest.suffix.lower() in (".jsonl", ".ndjson"):
            entries = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            entries = list(csv.DictReader(text.splitlines()))
        json.dumps(entries, ensure_ascii=False).encode()  # half a surrogate could not be written
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise EvaluationError(
            f"{manifest} cannot be read as a list of clips ({error}); give CSV with a header, or JSONL"
        ) from None
    if not all(isinstance(entry, dict) for entry in entries):
        raise EvaluationError(f"{manifest} holds lines that are not JSON objects; give one object a line")
    return entries


def _inside(folder: Path, path: Path) -> Path:
    resolved = path.resolve()
    if not resolved.is_relative_to(folder.resolve()):
        raise EvaluationError(f"{path} leads out of {folder}; put the clip itself into the folder")
    return resolved


def _transcripts(path: Path) -> dict[str, str]:
    lines = read_text(path, EvaluationError).splitlines()
    pairs = (line.split(maxsplit=1) for line in lines if line.strip())
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}
