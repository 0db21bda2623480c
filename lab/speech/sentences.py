"""Choose the free sentences of the plan from public-domain books, everyday phrases and human transcripts.

A sentence is chosen if it is short, spelled with plain words that all occur often enough, and shares no
run of words with the human clips that evaluate the lab. `lab.speech.make_plan` puts these functions together.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from lab.speech.plan import plain_words

SHORTEST, LONGEST = 3, 14  # words
# Names that may stand in a sentence; other words with a capital inside a sentence rule it out.
_ALLOWED = """
    i i'm i'll i've i'd monday tuesday wednesday thursday friday saturday sunday january february march april
    may june july august september october november december christmas london england english french american
    mary alice anne jane peter robert john james george tom jack mother father
"""
_NAMES = set(_ALLOWED.split())
_UNWANTED = {"savage", "heathen", "gipsies", "suicide", "murder", "gay", "queer", "ass"}
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "_": "", "\ufeff": ""})


def body_of_book(text: str) -> str:
    """A Project Gutenberg text without the notices before and after the book."""
    start = re.search(r"\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG.*?\*\*\*", text, re.S)
    end = re.search(r"\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG", text)
    return text[start.end() if start else 0 : end.start() if end else len(text)]


def sentences_of(text: str) -> list[str]:
    """The sentences of running prose, quotation marks dropped, each with its final mark."""
    text = text.translate(_QUOTES).replace("\r", "")
    text = re.sub(
        r"\b(Mr|Mrs|Ms|Dr|St|Messrs|No|Esq|Hon|Rev|Capt|Col|[A-Z])\. ", r"\1@ ", text
    )  # no sentence ends
    # A book that quotes speech with double marks uses the single ones at a word's edge for dialect.
    speech = '"' if text.count('"') * 400 > len(text) else r"(?<![A-Za-z])'|'(?![A-Za-z])|\""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        line = re.sub(speech, "", " ".join(paragraph.split()))
        found += re.findall(r"(?:(?<=^)|(?<=[.!?] ))[A-Z][^.!?]*[.!?](?= [A-Z]|$)", line)
    return found


def is_plain(sentence: str) -> bool:
    """Whether a sentence has the right length and only letters, commas, a final mark, no unknown name."""
    if not re.fullmatch(r"[A-Z][a-z']*(?:,? [A-Za-z][a-z']*)*[.!?]", sentence):
        return False
    words = re.findall(r"[A-Za-z']+", sentence)
    if not SHORTEST <= len(words) <= LONGEST or any(word.lower() in _UNWANTED for word in words):
        return False
    if any(word.startswith("'") or word.endswith("'") for word in words):
        return False
    return all(word.islower() or word.lower() in _NAMES for word in words[1:])


def without_unknown_names(sentences: Sequence[str]) -> list[str]:
    """The sentences whose first word is no name: it stands inside another sentence in lower case."""
    lower = {word for s in sentences for word in re.findall(r"[a-z'A-Z]+", s)[1:] if word.islower()} | _NAMES
    return [sentence for sentence in sentences if re.findall(r"[a-z'A-Z]+", sentence)[0].lower() in lower]


def runs(words: Sequence[str], length: int = 5) -> set[tuple[str, ...]]:
    """Every run of `length` words."""
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def without_rare_words(sentences: Iterable[str], at_least: int, known: Iterable[str] = ()) -> list[str]:
    """The sentences whose every word occurs `at_least` times in those that are left, or is in `known`."""
    left = [(sentence, plain_words(sentence).split()) for sentence in sentences]
    known = set(known)
    while True:
        counts = Counter(word for _, words in left for word in words)
        common = [item for item in left if all(counts[w] >= at_least or w in known for w in item[1])]
        if len(common) == len(left):
            return [sentence for sentence, _ in common]
        left = common


def by_coverage(sentences: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` sentences in an order that brings every word early, and rare words again and again.

    In passes over shuffled sentences: a pass takes each sentence that has a word seen less than `target`
    times, and the next pass doubles the target. A sentence with a rare word therefore comes more than once.
    """
    rng = np.random.default_rng(seed)
    words = [plain_words(sentence).split() for sentence in sentences]
    seen: Counter[str] = Counter()
    chosen: list[str] = []
    target = 1
    while len(chosen) < count:
        for i in rng.permutation(len(sentences)):
            if len(chosen) < count and min(seen[word] for word in words[i]) < target:
                chosen.append(sentences[i])
                seen.update(words[i])
        target *= 2
    return chosen
