"""Words as they are compared: however a number, a time or an amount is written, it becomes the same word."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

_MONTH = "(january|february|march|april|may|june|july|august|september|october|november|december)"
_DAY = r"(?:the )?(\d{1,2})(?:st|nd|rd|th)"


@cache
def _english() -> Any:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})


def normalize_words(text: str) -> str:
    """Whisper's English normalizer, and one word for a number that is said in groups.

    Whisper's own part (transformers): lower case, no punctuation, contractions in full, numbers as digits,
    ordinals as "28th", amounts as "$20.50". Here: "5:45", "5.45", "5 45" and "five forty five" are all "545";
    "o'clock" is one word; "-", "+" and "=" between numbers are "minus", "plus" and "is", but
    "4-2-7-1-9" is spelled digits, "42719"; a date is "28 january" however it is said.
    """
    text = text.lower().replace("’", "'")
    text = re.sub(r"\bo'? ?clock\b", "oclock", text)
    text = re.sub(r"\bninth\b", "9th", text)  # the one ordinal that Whisper's normalizer does not know
    text = re.sub(r"(?<![$£€\d.,:])(\d{1,2}):00\b", r"\1", text)
    text = re.sub(r"(?<![$£€\d.,:])(\d{1,2})[:.](\d{2})(?![\d:])", r"\1\2", text)
    text = re.sub(r"(?<![\d-])\d(?:-\d){2,}(?![\d-]| *=)", lambda found: found[0].replace("-", ""), text)
    for symbol, word in (("-", "minus"), ("+", "plus"), ("=", "is")):
        text = re.sub(rf"(?<=\d) *{re.escape(symbol)} *(?=\d)", f" {word} ", text)
    text = _english()(text)
    text = re.sub(rf"\b{_DAY} (?:of )?{_MONTH}\b", r"\1 \2", text)
    text = re.sub(rf"\b{_MONTH} {_DAY}\b", r"\2 \1", text)
    return re.sub(r"(?<=\d) (?=\d+\b(?![.%]))", "", text)


def words_wrong(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Substitutions, deletions and insertions per word of the references, by jiwer; may exceed 1."""
    import jiwer

    return float(
        jiwer.wer([normalize_words(text) for text in references], [normalize_words(t) for t in hypotheses])
    )
