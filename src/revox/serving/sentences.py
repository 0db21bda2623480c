"""Text that comes in pieces -> sentences, each as soon as it is certain that it has ended."""

from __future__ import annotations

import re

ENDS = {
    "sentence": (".!?", "。！？…।॥؟"),
    "clause": (".!?,;:", "。！？…।॥؟，；、،؛"),
}
"""Marks that end a sentence or a clause: those that need white space after them, and those that do not."""

# Words before a dot that ends no sentence; single letters (J. S. Bach) are told by their length.
# fmt: off
_ABBREVIATIONS = frozenset({
    "dr", "mr", "mrs", "ms", "prof", "sr", "jr", "st", "mt", "fig", "no", "vs", "etc", "approx", "dept",
    "inc", "ltd", "co", "al", "e.g", "i.e", "u.s", "u.k", "a.m", "p.m", "bzw", "usw", "ca", "z.b", "d.h",
    "nr", "str", "hr", "fr", "mme", "mlle", "sra", "dott", "sig", "dra",
})
# fmt: on
_CLOSERS = "\"'”’»)]}」』）】"


class Splitter:
    """Takes text as it comes and gives what is complete; `flush` gives the rest.

    by: "sentence", "clause", or "none" (everything at the flush). What it gives, laid end to end, is the text
    less white space at the seams.
    """

    def __init__(self, by: str) -> None:
        self._by = by
        self._rest = ""

    @property
    def pending(self) -> int:
        """Characters that wait."""
        return len(self._rest)

    def feed(self, text: str) -> list[str]:
        """The pieces that are complete with `text`."""
        self._rest += text
        if self._by == "none":
            return []
        given, start = [], 0
        for end in self._ends():
            piece = self._rest[start:end].strip()
            start = end
            if piece:
                given.append(piece)
        self._rest = self._rest[start:]
        return given

    def flush(self) -> list[str]:
        """What is left, complete or not."""
        given, self._rest = self._rest.strip(), ""
        return [given] if given else []

    def _ends(self) -> list[int]:
        spaced, alone = ENDS[self._by]
        marks = re.escape(spaced + alone)
        ends = []
        for match in re.finditer(f"[{marks}]+[{re.escape(_CLOSERS)}]*", self._rest):
            if match.end() == len(self._rest):
                break  # more marks, a digit or a closing quote may follow
            certain = any(mark in alone for mark in match.group())
            if not certain and not self._rest[match.end()].isspace():
                continue  # 3.14, example.org, 12:30
            if match.group() == "." and self._is_abbreviation(match.start()):
                continue
            ends.append(match.end())
        return ends

    def _is_abbreviation(self, dot: int) -> bool:
        before = self._rest[max(0, dot - 8) : dot]
        word = re.search(r"[^\W\d_][\w.]*$", before)
        if word is None:
            return False
        token = word.group().lower()
        return (len(token) == 1 and token not in "aàeioy") or token in _ABBREVIATIONS
