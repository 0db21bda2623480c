"""Sentence times as subtitles (WebVTT, SRT), and chapters as JSON that podcast players read."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from revox.render.errors import RenderError
from revox.speech.files import replace_file
from revox.speech.write import Chapter
from revox.synthesis.longform import SentenceTime

SUBTITLES = (".vtt", ".srt")


@dataclass(frozen=True)
class Cue:
    """A sentence of the file: who says it, and when, in seconds."""

    start: float
    end: float
    speaker: str
    text: str


def subtitles(cues: Sequence[Cue], ending: str, named: bool) -> str:
    """The text of a subtitle file of that ending; `named`: with the speakers' names."""
    if ending == ".srt":
        blocks = [
            f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n"
            f"{cue.speaker + ': ' if named else ''}{cue.text}\n"
            for number, cue in enumerate(cues, 1)
        ]
        return "\n".join(blocks)
    # WebVTT: & and < begin something, and --> divides times.
    blocks = [
        f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n"
        f"{f'<v {html.escape(cue.speaker, False)}>' if named else ''}{html.escape(cue.text, False)}\n"
        for cue in cues
    ]
    return "\n".join(["WEBVTT\n", *blocks])


def chapters_json(chapters: Sequence[Chapter], title: str | None) -> str:
    """Chapters in the JSON format of the Podcasting 2.0 namespace, version 1.2.0."""
    entries = [{"startTime": round(one.start, 3), "title": one.title} for one in chapters]
    content = {"version": "1.2.0", **({"title": title} if title else {}), "chapters": entries}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def check_subtitles(path: Path) -> None:
    """Raises RenderError when the path's ending is none of a subtitle file."""
    if path.suffix.lower() not in SUBTITLES:
        raise RenderError(f"{path.name} is not a subtitle file's name; end it in .vtt or .srt")


def write_subtitles(path: Path, cues: Sequence[Cue], named: bool) -> None:
    """Write cues to a `.vtt` or `.srt`. Raises RenderError and OSError."""
    check_subtitles(path)
    replace_file(path, subtitles(cues, path.suffix.lower(), named))


def check_times(path: Path) -> None:
    """Raises RenderError when the path's ending is neither a subtitle file's nor .json."""
    if path.suffix.lower() not in (*SUBTITLES, ".json"):
        raise RenderError(f"{path.name} cannot hold times of sentences; end it in .vtt, .srt or .json")
    if not path.parent.is_dir():
        raise RenderError(f"there is no folder {path.parent}; create it or choose another path")


def write_times(path: Path, times: Sequence[SentenceTime]) -> None:
    """Write when each sentence of one speaker is heard, to a `.vtt`, `.srt` or `.json`.

    Raises RenderError and OSError.
    """
    check_times(path)
    if path.suffix.lower() == ".json":
        replace_file(path, json.dumps([asdict(time) for time in times], indent=1, ensure_ascii=False) + "\n")
    else:
        cues = [Cue(time.start, time.end, "", " ".join(time.text.split())) for time in times]
        write_subtitles(path, cues, named=False)


def _clock(seconds: float, mark: str) -> str:
    whole = round(1000 * seconds)
    minutes, rest = divmod(whole, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{mark}{rest % 1000:03d}"
