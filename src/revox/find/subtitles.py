"""Subtitles (WebVTT, SRT): when somebody speaks, without a name, and where one person goes on."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from revox.find.errors import FindError
from revox.speech.files import read_text

GAP = 1.0  # seconds without a cue that end a monologue
_TIME = r"(?:(\d+):)?(\d{1,2}):(\d{2})[.,](\d{3})"
_CUE = re.compile(rf"^\s*{_TIME}\s*-->\s*{_TIME}.*$", re.M)
_TAGS = re.compile(r"<[^>]*>|\{\\[^}]*\}")
_SOUNDS = re.compile(r"\[[^\]]*\]|\([^)]*\)|♪[^♪\n]*♪?")  # what is heard but not said
_CHANGE = re.compile(r"^\s*(?:[-–—]|>>)\s*", re.M)


@dataclass(frozen=True)
class Monologue:
    """Cues after one another: seconds from `start` to `end`, and what is said."""

    start: float
    end: float
    text: str

    @property
    def words(self) -> int:
        """How many words it has."""
        return len(self.text.split())


def read_monologues(path: str | os.PathLike[str], gap: float = GAP) -> list[Monologue]:
    """The cues of a WebVTT or SRT file, joined over gaps of up to `gap` seconds.

    A dash or `>>` at the beginning of a line is a change of speaker; a cue of two speakers belongs to
    neither. Sounds in brackets and songs are left out. Raises FindError, with a sentence.
    """
    text = read_text(path, FindError).replace("\r\n", "\n")
    cues = list(_CUE.finditer(text))
    if not cues:
        raise FindError(f"{path} has no cues (hours:minutes:seconds --> ...); give a WebVTT or SRT file")
    found: list[Monologue] = []
    joined = False  # whether the next cue may go on with the last monologue
    for cue, following in zip(cues, [*cues[1:], None], strict=True):
        body = text[cue.end() : following.start() if following else len(text)]
        lines = [line for line in body.strip().split("\n\n")[0].splitlines() if not line.strip().isdigit()]
        spoken = _SOUNDS.sub(" ", _TAGS.sub("", "\n".join(lines))).strip()
        start, end = _seconds(cue.groups()[:4]), _seconds(cue.groups()[4:])
        changes = len(_CHANGE.findall(spoken))
        words = " ".join(_CHANGE.sub("", spoken).split())
        if not re.search(r"\w", words) or end <= start:
            continue
        if changes > 1:
            joined = False
            continue
        if joined and not changes and start - found[-1].end <= gap:
            last = found.pop()
            found.append(Monologue(last.start, max(last.end, end), f"{last.text} {words}"))
        else:
            found.append(Monologue(start, end, words))
        joined = True
    if not found:
        raise FindError(f"{path} has cues but no speech in them; leave --subtitles out")
    return found


def _seconds(parts: tuple[str | None, ...]) -> float:
    hours, minutes, seconds, milli = (int(part or 0) for part in parts)
    return hours * 3600 + minutes * 60 + seconds + milli / 1000
