"""Splits text that arrives in pieces into sentences, each as soon as its end is certain."""

from __future__ import annotations

import re

ENDS = {
    "sentence": (".!?", "。！？…।॥؟"),
    "clause": (".!?,;:", "。！？…।॥؟，；、،؛"),
}
"""Marks that end a sentence or a clause: those that need white space after them, and those that do not."""

# Words before a dot that does not end a sentence; single letters (J. S. Bach) are found by their length.
# fmt: off
_ABBREVIATIONS = frozenset({
    "dr", "mr", "mrs", "ms", "prof", "sr", "jr", "st", "mt", "fig", "no", "vs", "etc", "approx", "dept",
    "inc", "ltd", "co", "al", "e.g", "i.e", "u.s", "u.k", "a.m", "p.m", "bzw", "usw", "ca", "z.b", "d.h",
    "nr", "str", "hr", "fr", "mme", "mlle", "sra", "dott", "sig", "dra",
})
# fmt: on
_CLOSERS = "\"'”’»)]}」』）】"


class Splitter:
    """Returns complete sentences as text is fed; `flush` returns the rest.

    by: "sentence", "clause", or "none" (everything at the flush). The results, joined, are the text without
    the white space between them.
    """

    def __init__(self, by: str) -> None:
        self._by = by
        self._rest = ""

    @property
    def pending(self) -> int:
        """Characters that are not returned yet."""
        return len(self._rest)

    def feed(self, text: str) -> list[str]:
        """The sentences that `text` completes."""
        self._rest += text
        if self._by == "none":
            return []
        pieces, start = [], 0
        for end in self._ends():
            piece = self._rest[start:end].strip()
            start = end
            if piece:
                pieces.append(piece)
        self._rest = self._rest[start:]
        return pieces

    def flush(self) -> list[str]:
        """The rest, complete or not."""
        rest, self._rest = self._rest.strip(), ""
        return [rest] if rest else []

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
