"""Text -> what is spoken at a time: sentences, clauses, and pieces that a take of the model can hold.

The one splitter of the command line, the library, the API and the WebSocket. It never changes a text: what it
gives are parts of it, without the white space around them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from revox.synthesis.errors import SpeakError

DEFAULT_MAX_CHARS = 300
"""Users of the released model report fillers below about 100 characters and flat delivery above about 350."""
MAX_CHARS_RANGE = (20, 2000)
MAX_SECONDS = 30.0
"""The longest piece by `expected_seconds`, which scripts of syllables or words a character reach first."""
CHARACTERS_A_SECOND = 15.0
"""Read speech in alphabets, spaces and marks included."""

Granularity = Literal["none", "sentence", "clause"]

# Marks of an end that need white space after them, and marks that do not.
_STOPS, _STOPS_ALONE = ".!?…", "。．｡！？।॥؟۔"
_COMMAS, _COMMAS_ALONE = ",;:—–", "，；：、،؛"
_CLOSERS = r"(?:[\"'”’)\]}」』）】〉》]|[\s\u00a0\u202f]?»)*"

# Words before a dot: those that no sentence ends with; those that number what follows; those that may end a
# sentence, and do where a capital follows. Initials (J. S. Bach) are found by their length.
# fmt: off
_TITLES = frozenset({
    "dr", "mr", "mrs", "ms", "prof", "st", "mt", "gen", "col", "capt", "lt", "rev", "hon", "gov", "sen",
    "vs", "e.g", "i.e", "cf", "approx", "u.s", "u.k", "u.n", "e.u", "bzw", "ca", "z.b", "d.h", "u.a", "vgl",
    "hr", "fr", "frl", "mme", "mlle", "mm", "sr", "sra", "srta", "dott", "sig", "dra", "exmo", "dhr", "mevr",
    "bijv", "mio", "mrd", "tsd", "inkl", "ee",
})
_NUMBERING = frozenset({
    "no", "nr", "nos", "fig", "figs", "eq", "sec", "ch", "vol", "art", "p", "pp", "pg", "núm", "pág", "abb",
    "kap", "bd", "str", "tel",
})
_CLOSING = frozenset({
    "etc", "jr", "inc", "ltd", "co", "corp", "dept", "al", "a.m", "p.m", "b.c", "a.d", "usw", "ecc",
    "ph.d", "enz", "est", "ave", "blvd", "jan", "feb", "aug", "sept", "oct", "nov", "dec",
})
# fmt: on

# German ordinals: am 3. Oktober, im 19. Jahrhundert. What follows has a capital as after a full stop.
_ORDINAL = re.compile(r"(?:^|[\s(])\d{1,2}$")
_LETTERS = re.compile(r"[^\W\d_]*")
_AFTER_ORDINALS = re.compile(
    r"\s*(?:Januar|Jänner|Februar|März|April|Mai|Juni|Juli|August|September|Oktober|November|Dezember|"
    r"Jahrhunderts?|Jahrtausends?|Auflage|Kapitel|Klasse|Etage|Stock|Geburtstag|Jahrestag|Weltkriegs?|Platz|"
    r"Lebensjahr\w*|Semester|Mal)\b"
)

_LIST_MARK = re.compile(r"\s*(?:[-*+•‣◦–—]|\(?(?:\d{1,3}|[A-Za-z])[.)])[ \t]+")
_HEADING = re.compile(r"\s{0,3}#{1,6}[ \t]|\s*[=\-*_~]{3,}\s*$")
_SPACE = re.compile(r"\s*")
_WRAP_WIDTH = 50
"""Characters from which a line without a stop is taken for one that an editor wrapped, not for a heading."""

_SENTENCE, _CLAUSE, _WORD, _CHARACTER = range(4)
PAUSES = {"paragraph": 0.6, "line": 0.4, "sentence": 0.25, "clause": 0.1, "word": 0.0}
"""Seconds of silence after a piece, by what ends it."""


@dataclass(frozen=True)
class TextPiece:
    """What is spoken in one take: a part of the text, and the silence after it in seconds."""

    text: str
    pause: float = 0.0


def expected_seconds(text: str) -> float:
    """About how long reading `text` takes, in seconds.

    An alphabet's character takes 1/15 s, a syllable or word that is one character (Hangul, kana, Chinese) as
    long as such syllables take, a digit or a symbol that is read as a word a third of a second.
    """
    return sum(_character_seconds(character) for character in text.strip())


def _character_seconds(character: str) -> float:
    if character < "\u0250":
        return 0.33 if character in "0123456789%$€£@&+=" else 1 / CHARACTERS_A_SECOND
    code = ord(character)
    if 0x3040 <= code <= 0x30FF:
        return 0.13
    if 0x3400 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or 0x20000 <= code <= 0x3FFFF:
        return 0.22
    if 0xAC00 <= code <= 0xD7A3:
        return 0.18
    return 0.33 if unicodedata.category(character) == "Nd" else 1 / CHARACTERS_A_SECOND


def split_text(text: str, max_chars: int = DEFAULT_MAX_CHARS, by_sentence: bool = False) -> list[TextPiece]:
    """The pieces of a text, each of at most `max_chars` characters and `MAX_SECONDS` expected seconds.

    A text that fits is one piece, as it is; `by_sentence`: each of its sentences that fits is one. Others are
    cut at as few places as possible, at ends of sentences; a sentence that does not fit at ends of clauses, a
    clause at spaces, a word anywhere. Pieces are of similar length, so none is a short rest. Raises
    SpeakError when `max_chars` is out of range.
    """
    low, high = MAX_CHARS_RANGE
    if not low <= max_chars <= high:
        raise SpeakError(
            f"pieces of {max_chars} characters are out of range: {low} to {high} are possible, "
            f"{DEFAULT_MAX_CHARS} are usual"
        )
    whole = _span(text, 0, len(text))
    bounds = _Bounds(max_chars, MAX_SECONDS)
    if not text.strip():
        return []
    if by_sentence:
        ends = ends_in(text[whole.start : whole.stop], "sentence", whole=True)
        cuts = [whole.start, *(whole.start + end for end in ends), whole.stop]
        sentences = (_span(text, first, last) for first, last in pairwise(cuts))
        groups = [group for one in sentences if one.stop > one.start for group in _groups(text, one, bounds)]
    else:
        groups = _groups(text, whole, bounds)
    following = [group.start for group in groups[1:]] + [len(text)]
    return [
        TextPiece(text[group.start : group.stop], _pause(text, group.stop, start))
        for group, start in zip(groups, following, strict=True)
    ]


def _groups(text: str, span: _Span, bounds: _Bounds) -> list[_Span]:
    """A span of `text` as few groups of similar length within `bounds`."""
    if bounds.hold(span):
        return [span]
    units = list(_units(text, span, _SENTENCE, bounds))
    groups = _packed(units, bounds)
    # The narrowest bounds that need no more pieces give pieces of similar length.
    wide, narrow = 1.0, 0.0
    for _ in range(8):
        share = (wide + narrow) / 2
        tried = _packed(units, _Bounds(bounds.characters * share, bounds.seconds * share))
        if len(tried) <= len(groups):
            groups, wide = tried, share
        else:
            narrow = share
    return groups


@dataclass(frozen=True)
class _Span:
    """A stretch of a text, without white space at its ends, and its expected seconds."""

    start: int
    stop: int
    seconds: float


@dataclass(frozen=True)
class _Bounds:
    characters: float
    seconds: float

    def hold(self, span: _Span) -> bool:
        return span.stop - span.start <= self.characters and span.seconds <= self.seconds


def _span(text: str, start: int, stop: int) -> _Span:
    part = text[start:stop]
    start += len(part) - len(part.lstrip())
    return _Span(start, start + len(part.strip()), expected_seconds(part))


def _units(text: str, span: _Span, level: int, bounds: _Bounds) -> Iterator[_Span]:
    """Spans of `text` within `bounds`, cut as coarsely as possible."""
    part = text[span.start : span.stop]
    if level == _CHARACTER:
        share = min(bounds.characters / len(part), bounds.seconds / span.seconds)
        ends = list(range(0, len(part), max(1, int(share * len(part)))))[1:]
    elif level == _WORD:
        ends = [match.end() for match in re.finditer(r"\s+", part)]
    else:
        ends = ends_in(part, "sentence" if level == _SENTENCE else "clause", whole=True)
    for first, last in zip([0, *ends], [*ends, len(part)], strict=True):
        unit = _span(text, span.start + first, span.start + last)
        if unit.start >= unit.stop:
            continue
        if bounds.hold(unit) or level == _CHARACTER:
            yield unit
        else:
            yield from _units(text, unit, level + 1, bounds)


def _packed(units: Sequence[_Span], bounds: _Bounds) -> list[_Span]:
    """As many neighboring units in a group as its bounds hold; a unit that they do not hold is a group."""
    groups: list[_Span] = []
    for unit in units:
        if groups:
            joined = _Span(groups[-1].start, unit.stop, groups[-1].seconds + unit.seconds)
            if bounds.hold(joined):
                groups[-1] = joined
                continue
        groups.append(unit)
    return groups


def _pause(text: str, stop: int, following: int) -> float:
    if following >= len(text):
        return 0.0
    breaks = text[stop:following].count("\n")
    if breaks:
        return PAUSES["paragraph" if breaks > 1 else "line"]
    before = text[:stop][-3:].rstrip("\"'”’)]}」』）】»")[-1:]
    if before in _STOPS + _STOPS_ALONE:
        return PAUSES["sentence"]
    return PAUSES["clause" if before in _COMMAS + _COMMAS_ALONE else "word"]


def ends_in(text: str, by: Granularity, whole: bool = False) -> list[int]:
    """Positions in `text` at which a sentence, or a clause, ends for certain.

    `whole`: no text follows. Otherwise the text may go on, and an end is certain once the first character
    of what comes next is there. Line breaks end a sentence; in a whole text only those that are not an
    editor's wrapping of a paragraph.
    """
    if by == "none":
        return []
    spaced = _STOPS + (_COMMAS if by == "clause" else "")
    alone = _STOPS_ALONE + (_COMMAS_ALONE if by == "clause" else "")
    marks = re.compile(f"\\n|[{re.escape(spaced + alone)}]+{_CLOSERS}")
    cased = any(character.isupper() for character in text)
    ends = []
    for match in marks.finditer(text):
        end = match.end()
        if match.group() == "\n":
            if not (whole and _is_wrap(text, match.start())):
                ends.append(end)
            continue
        space = _SPACE.match(text, end)
        assert space is not None
        following = text[space.end() : space.end() + 1]
        if not following and not whole:
            continue  # more marks, a digit, a closing quote or a small letter may follow
        if any(mark in alone for mark in match.group()):
            ends.append(end)
            continue
        if following and not space.group():
            continue  # 3.14, example.org, 12:30
        if not whole and _ORDINAL.search(text[max(0, match.start() - 16) : match.start()]):
            word = _LETTERS.match(text, space.end())
            if word is not None and following.isupper() and word.end() == len(text):
                continue  # 3. Okto
        stops = match.group()[0] in _STOPS
        if stops and cased and following.islower():
            continue  # approx. five; "Why?" she asked; wait ... what
        if not (match.group() == "." and _is_abbreviation(text, match.start(), following)):
            ends.append(end)
    return ends


def _is_abbreviation(text: str, dot: int, following: str) -> bool:
    """Whether a dot is an abbreviation's, an initial's or an item's number's, and `following` goes on."""
    line = text[text.rfind("\n", 0, dot) + 1 : dot + 2]
    if _LIST_MARK.fullmatch(line):
        return True
    before = text[max(0, dot - 16) : dot]
    if _ORDINAL.search(before) and following.isupper() and _AFTER_ORDINALS.match(text, dot + 1):
        return True
    word = re.search(r"[^\W\d_][\w.]*$", before[-8:])
    if word is None:
        return False
    token = word.group().lower()
    if len(token) == 1:
        return token not in "aàeioy" or (word.group().isupper() and token != "i")
    return token in _TITLES or (
        (token in _NUMBERING and following.isdigit())
        or (token in _CLOSING and not (following.isupper() or not following))
    )


def _is_wrap(text: str, at: int) -> bool:
    """Whether the line break at `at` only wraps a paragraph."""
    stop = text.find("\n", at + 1)
    line, following = text[text.rfind("\n", 0, at) + 1 : at], text[at + 1 : stop if stop >= 0 else len(text)]
    if not line.strip() or not following.strip():
        return False
    if _HEADING.match(line) or _HEADING.match(following) or _LIST_MARK.match(following):
        return False
    return len(line.rstrip()) >= _WRAP_WIDTH or following.lstrip()[:1].islower()


class Splitter:
    """Splits text that arrives in parts; each sentence or clause is given as soon as its end is certain.

    by: "sentence", "clause", or "none" (everything at the flush). The results, joined, are the text without
    the white space between them.
    """

    def __init__(self, by: Granularity = "sentence") -> None:
        self.by: Granularity = by
        self._rest = ""

    @property
    def pending(self) -> int:
        """Characters that are not given yet."""
        return len(self._rest)

    def feed(self, text: str) -> list[str]:
        """The sentences that `text` completes."""
        self._rest += text
        return self._cut(ends_in(self._rest, self.by))

    def settle(self) -> list[str]:
        """The sentences that are complete if nothing follows: for a pause in which no text came."""
        return self._cut(ends_in(self._rest, self.by, whole=True))

    def overdue(self) -> list[str]:
        """What can be spoken of a text that has no end yet: its clauses, or else its words but the last."""
        if self.by == "none":
            return []
        ends = ends_in(self._rest, "clause", whole=True)
        if not ends:
            ends = [match.end() for match in re.finditer(r"\S\s+", self._rest)]
        return self._cut(ends[-1:])

    def flush(self) -> list[str]:
        """The rest, complete or not."""
        rest, self._rest = self._rest.strip(), ""
        return [rest] if rest else []

    def _cut(self, ends: Sequence[int]) -> list[str]:
        pieces, start = [], 0
        for end in ends:
            piece = self._rest[start:end].strip()
            start = end
            if piece:
                pieces.append(piece)
        self._rest = self._rest[start:]
        return pieces
