"""The plan of the lab's synthetic speech: who says what, in the order of making.

`plan.tsv` holds one utterance a line (number, speaker, written form); `speakers.json` the speakers. Both
are committed, and the speech is a function of them. Numbers below 20,000 are sentences of the lab's grammar;
the others are free sentences, chosen by `lab.speech.sentences`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

FIRST_FREE = 20_000
SPLITS = ("train", "validation", "heldout")


@dataclass(frozen=True)
class Speaker:
    """A voice of the synthesizer: style = mean of all voices + spread x (mixture - mean).

    mix: weight of each of the synthesizer's voices. speed: speaking rate, 1.0 is the synthesizer's own.
    preset: a single voice, which plays one of the release's presets.
    """

    name: str
    split: str
    preset: bool
    mix: dict[str, float]
    spread: float
    speed: float

    @property
    def language(self) -> str:
        """The espeak-ng language: en-gb where British voices (`b...`) make up over half, else en-us."""
        british = sum(weight for voice, weight in self.mix.items() if voice.startswith("b"))
        return "en-gb" if british > 0.5 else "en-us"


@dataclass(frozen=True)
class PlannedUtterance:
    """A sentence in a speaker's voice; `written` as a person would type it."""

    number: int
    speaker: str
    written: str

    @property
    def text(self) -> str:
        """Lower-case words without punctuation."""
        return plain_words(self.written)

    @property
    def kind(self) -> str:
        """`plan` for a sentence of the grammar, `free` for any other: the index's names."""
        return "plan" if self.number < FIRST_FREE else "free"

    @property
    def file(self) -> str:
        """The name of its audio file."""
        return f"{self.number:05d}.opus"


def plain_words(written: str) -> str:
    """Lower-case words of a sentence that is spelled with letters and apostrophes only."""
    return " ".join(re.findall(r"[a-z']+", written.lower()))


def read_speakers(path: Path) -> dict[str, Speaker]:
    """The speakers of a `speakers.json`, by name."""
    speakers = [Speaker(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))]
    return {speaker.name: speaker for speaker in speakers}


def write_speakers(path: Path, speakers: Iterable[Speaker]) -> None:
    """One speaker a line."""
    lines = ",\n".join(json.dumps(vars(speaker)) for speaker in speakers)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def read_plan(path: Path) -> list[PlannedUtterance]:
    """The utterances of a plan in the order of making.

    Raises ValueError naming the line that is not number, speaker and sentence, or repeats a number.
    """
    plan, numbers = [], set()
    for at, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        number, _, rest = line.partition("\t")
        speaker, _, written = rest.partition("\t")
        if not (number.isdecimal() and speaker and written):
            raise ValueError(f"{path}, line {at}: expected number, speaker and sentence with tabs between")
        if int(number) in numbers:
            raise ValueError(f"{path}, line {at}: number {number} stands in the plan twice")
        numbers.add(int(number))
        plan.append(PlannedUtterance(int(number), speaker, written))
    return plan


def write_plan(path: Path, plan: Iterable[PlannedUtterance]) -> None:
    """What `read_plan` reads."""
    lines = (f"{item.number}\t{item.speaker}\t{item.written}\n" for item in plan)
    path.write_text("".join(lines), encoding="utf-8")


def speaker_order(speakers: Sequence[Speaker], count: int, seed: int, preset_share: int = 3) -> list[str]:
    """Names for `count` utterances: shuffled rounds in which each preset speaks `preset_share` times."""
    rng = np.random.default_rng(seed)
    one_round = [s.name for s in speakers for _ in range(preset_share if s.preset else 1)]
    names: list[str] = []
    while len(names) < count:
        names += [one_round[i] for i in rng.permutation(len(one_round))]
    return names[:count]


def assemble(
    speakers: Sequence[Speaker],
    grammar: Sequence[PlannedUtterance],
    made: Sequence[PlannedUtterance],
    sentences: Mapping[str, Sequence[str]],
    seed: int,
) -> list[PlannedUtterance]:
    """The whole plan: what is made, then validation and held-out speech, then training speech.

    grammar: all sentences of the grammar with their speakers. made: utterances that exist already; they
    come first so that the order of a later run from nothing is the order of this one. sentences: new free
    sentences of each split; a split's speakers say its sentences. Training alternates a sentence of the
    grammar and a free one, and stops with the shorter of the two lists.
    """
    done = {item.number for item in made}
    split = {speaker.name: speaker.split for speaker in speakers}
    rest = [item for item in grammar if item.number not in done]
    number = max([FIRST_FREE - 1, *done]) + 1
    free: dict[str, list[PlannedUtterance]] = {}
    for offset, name in enumerate(SPLITS):
        of_split = [speaker for speaker in speakers if speaker.split == name]
        names = speaker_order(of_split, len(sentences[name]), seed + offset)
        free[name] = [
            PlannedUtterance(number + i, who, written)
            for i, (who, written) in enumerate(zip(names, sentences[name], strict=True))
        ]
        number += len(free[name])
    checks = [item for item in rest if split[item.speaker] != "train"]
    training = [item for item in rest if split[item.speaker] == "train"]
    pairs = zip_longest(training[: len(free["train"])], free["train"][: len(training)])
    alternating = [item for pair in pairs for item in pair if item is not None]
    return [*made, *checks, *free["validation"], *free["heldout"], *alternating]
