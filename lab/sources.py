"""What the lab learns to speak from: natural synthetic speech and human clips, with speakers and texts.

Synthetic speech is what `lab.speech.kokoro` made of the committed plan. Human speech is LibriSpeech (one clip
a speaker, `lists/librispeech.csv`), cut at its pauses into utterances by the word times of a recognizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path

import numpy as np

from lab.errors import LabError
from lab.sizes import PRESETS
from lab.speech.kokoro import read_index
from lab.speech.plan import plain_words, read_plan, read_speakers

SPEECH = Path(__file__).parent / "speech"

SPEEDS = (0.88, 0.94, 1.06, 1.12)
"""Of further voices made of human ones, the inner two of synthetic ones too (Ko et al., Audio augmentation
for speech recognition, 2015)."""

SHORTEST, LONGEST, PAUSE = 1.5, 7.0, 0.12  # seconds of human utterances, and of a pause that may end one
DOUBTFUL = -0.6  # mean log probability of a transcript's words, below which it is not read


@dataclass(frozen=True)
class SourceUtterance:
    """One utterance: its file, the part of it in seconds (None: all), and who says what.

    `text` is as a person would write it, or None where it is not known well enough to learn from. `speed` is
    a factor on rate, pitch and formants. `words` are the seconds of the part, before that, at which each
    plain word begins and ends, where a recognizer has told.
    """

    path: Path
    span: tuple[float, float] | None
    speaker: str
    sex: str
    preset: str | None
    text: str | None
    speed: float = 1.0
    words: tuple[tuple[float, float], ...] | None = None


@dataclass(frozen=True)
class HumanClip:
    """One LibriSpeech clip: its file's name, its speaker's number and sex, and its split."""

    file: str
    speaker: str
    sex: str
    split: str


@cache
def human_clips() -> tuple[HumanClip, ...]:
    """The committed list of LibriSpeech clips (one a speaker) of every split."""
    text = resources.files("lab").joinpath("lists/librispeech.csv").read_text()
    lines = text.splitlines()
    return tuple(HumanClip(*line.split(",")) for line in lines[1:])


def find_human_clips(folder: str | Path, split: str | None = None) -> dict[HumanClip, Path]:
    """The path of each listed clip in `folder`. Raises LabError naming the first missing file."""
    found = {}
    for clip in human_clips():
        if split is None or clip.split == split:
            path = Path(folder) / clip.file
            if not path.is_file():
                raise LabError(
                    f"{path} is missing: give the folder that holds the LibriSpeech clips listed in "
                    "lab/lists/librispeech.csv (train-clean-100)"
                )
            found[clip] = path
    return found


def sex_of(speaker: str) -> str:
    """ "F" or "M" of a synthetic speaker: `af_heart` and `v002f` are women."""
    letter = speaker[1] if "_" in speaker else speaker[-1]
    return letter.upper()


@cache
def preset_speakers() -> dict[str, str]:
    """The synthetic speaker that stands for each of the release's presets, by preset name."""
    single = [s.name for s in read_speakers(SPEECH / "speakers.json").values() if s.preset]
    by_sex = {sex: iter([name for name in single if sex_of(name) == sex]) for sex in "FM"}
    return {preset: next(by_sex["F" if "female" in preset else "M"]) for preset in PRESETS}


def synthetic_utterances(folders: Sequence[Path], split: str) -> list[SourceUtterance]:
    """The plan's utterances of `split` that `folders` have, in the plan's order.

    Raises LabError if a folder has no index of speech.
    """
    speakers = read_speakers(SPEECH / "speakers.json")
    presets = {speaker: preset for preset, speaker in preset_speakers().items()}
    made: dict[int, Path] = {}
    for folder in folders:
        if not (folder / "index.jsonl").is_file():
            raise LabError(
                f"{folder} holds no speech (index.jsonl): make it with `python -m lab.speech.kokoro`"
            )
        made |= {number: folder / "audio" / line["file"] for number, line in read_index(folder).items()}
    return [
        SourceUtterance(
            made[item.number],
            None,
            item.speaker,
            sex_of(item.speaker),
            presets.get(item.speaker),
            item.written,
        )
        for item in read_plan(SPEECH / "plan.tsv")
        if item.number in made and speakers[item.speaker].split == split
    ]


def _stretches(words: list[list], seconds: float) -> Iterator[tuple[float, float, list[list]]]:
    """Start, end and words of the utterances of a clip: all of it, cut in the middle of pauses."""
    start, first = 0.0, 0
    for i, (_, end, word, _) in enumerate(words):
        last = i == len(words) - 1
        pause = (seconds if last else words[i + 1][0]) - end
        stop = seconds if last else end + pause / 2
        ends = str(word)[-1:] in ".,;:?!" or pause > 3 * PAUSE
        long_enough = end - start >= (SHORTEST if ends else LONGEST)
        if last or (pause >= PAUSE and long_enough and seconds - stop >= SHORTEST):
            yield start, stop, words[first : i + 1]
            start, first = stop, i + 1


def _plain_times(words: list[list], start: float) -> tuple[tuple[float, float], ...] | None:
    """When each plain word is spoken, in seconds after `start`; None if one is written in figures."""
    found = []
    for begin, end, written, _ in words:
        plain = plain_words(str(written)).split()
        if not plain and any(c.isalnum() for c in str(written)):
            return None
        parts = np.linspace(begin - start, end - start, len(plain) + 1).tolist()
        found += list(pairwise(parts)) if plain else []
    return tuple(found)


def human_utterances(folder: Path, split: str) -> list[SourceUtterance]:
    """The utterances of the human clips of `split`, with the words of `transcripts.jsonl` in `folder`.

    Raises LabError if a clip or its words are missing.
    """
    path = folder / "transcripts.jsonl"
    if not path.is_file():
        raise LabError(f"{path} is missing: the recognizer's words and times of the human clips")
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    transcripts = {line["file"]: line for line in lines}
    found = []
    for clip, audio in find_human_clips(folder, split).items():
        if clip.file not in transcripts:
            raise LabError(f"{path} has no words of {clip.file}: transcribe this clip as the others were")
        line = transcripts[clip.file]
        for start, end, words in _stretches(line["words"], line["seconds"]):
            text = " ".join(str(word) for _, _, word, _ in words)
            found.append(
                SourceUtterance(
                    audio, (start, end), f"librispeech-{clip.speaker}", clip.sex, None,
                    text if line["logprob"] >= DOUBTFUL else None, words=_plain_times(words, start),
                )
            )  # fmt: skip
    return found


def changed_voices(
    utterances: Sequence[SourceUtterance], speeds: Sequence[float] = SPEEDS
) -> list[SourceUtterance]:
    """The utterances that have words, at each of `speeds`, as voices of their own; none is a preset's."""
    return [
        replace(one, speaker=f"{one.speaker}-{speed}", preset=None, speed=speed)
        for speed in speeds
        for one in utterances
        if one.text is not None
    ]
