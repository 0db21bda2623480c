"""The lab's synthetic speakers and human clips, and the committed lists that split them.

A synthetic speaker is one of flite's voices with a pitch, a speed, a vocal-tract length (formants scaled by
resampling) and a color (spectral tilt and three resonances). The lists in `lists/` are authoritative;
benchmarks/lab_speakers.py made them with `draw_speakers`, `split_speakers` and `cast_presets`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np

from lab.errors import LabError
from lab.sizes import PRESETS

_FLITE = {"awb": "M", "rms": "M", "kal16": "M", "slt": "F"}


@dataclass(frozen=True)
class SyntheticSpeaker:
    """One synthetic speaker.

    sex: "F" or "M", of flite's voice. voice: the name of flite's voice. pitch: factor on the voice's pitch.
    speed: factor on durations, before the formants are scaled. formants: factor on all frequencies.
    tilt: dB per octave around 1 kHz. resonances: (center Hz, gain dB), half an octave wide.
    split: "train", "validation" or "heldout". preset: the release's preset that it stands for, or None.
    """

    name: str
    sex: str
    voice: str
    pitch: float
    speed: float
    formants: float
    tilt: float
    resonances: tuple[tuple[float, float], ...]
    split: str
    preset: str | None = None


def draw_speakers(count: int, seed: int) -> list[SyntheticSpeaker]:
    """`count` random speakers, alternately male and female, all of split "train" and without a preset."""
    rng = np.random.default_rng(seed)
    speakers = []
    for index in range(count):
        sex = "F" if index % 2 else "M"
        voice = str(rng.choice([name for name, of in _FLITE.items() if of == sex]))
        pitch = round(float(np.exp(rng.uniform(-0.26, 0.26))), 3)
        speed = round(float(rng.uniform(0.9, 1.15)), 3)
        low, high = (0.9, 1.22) if sex == "F" else (0.84, 1.16)
        resonances = tuple(
            (
                round(float(np.exp(rng.uniform(np.log(at / 1.5), np.log(at * 1.5))))),
                round(float(rng.uniform(-8, 8)), 1),
            )
            for at in (500, 1600, 4000)
        )
        speakers.append(
            SyntheticSpeaker(
                name=f"{sex.lower()}{index:04d}",
                sex=sex,
                voice=voice,
                pitch=pitch,
                speed=speed,
                formants=round(float(rng.uniform(low, high)), 3),
                tilt=round(float(rng.uniform(-2.5, 2.0)), 2),
                resonances=resonances,
                split="train",
            )
        )
    return speakers


def to_json(speakers: Sequence[SyntheticSpeaker]) -> str:
    """One speaker a line."""
    return "[\n" + ",\n".join(json.dumps(asdict(speaker)) for speaker in speakers) + "\n]\n"


def from_json(text: str) -> list[SyntheticSpeaker]:
    """What `to_json` wrote."""
    speakers = []
    for fields in json.loads(text):
        fields["resonances"] = tuple(tuple(pair) for pair in fields["resonances"])
        speakers.append(SyntheticSpeaker(**fields))
    return speakers


@cache
def synthetic_speakers() -> tuple[SyntheticSpeaker, ...]:
    """The committed synthetic speakers of every split."""
    return tuple(from_json(resources.files("lab").joinpath("lists/speakers.json").read_text()))


def preset_speakers() -> dict[str, SyntheticSpeaker]:
    """The training speakers that stand for the release's 20 presets, by preset name."""
    by_preset = {speaker.preset: speaker for speaker in synthetic_speakers() if speaker.preset}
    return {name: by_preset[name] for name in PRESETS}


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


def _least_similar(
    pool: list[int], count: int, similarity: np.ndarray, rng: np.random.Generator
) -> list[int]:
    """`count` of `pool` at random, with the lowest maximal similarity that admits so many."""
    order = rng.permutation(pool)
    for limit in np.arange(0.5, 1.01, 0.01):
        chosen: list[int] = []
        for i in order:
            if len(chosen) < count and (not chosen or similarity[i, chosen].max() <= limit):
                chosen.append(int(i))
        if len(chosen) == count:
            return chosen
    raise LabError(f"{len(pool)} speakers are too few to choose {count} from: draw more speakers")


def split_speakers(
    speakers: Sequence[SyntheticSpeaker], embeddings: np.ndarray, seed: int
) -> list[SyntheticSpeaker]:
    """Choose 20 held-out speakers and 20 for validation, ten women and ten men each; the rest only train.

    embeddings `[speakers, dim]`, of unit length, measure similarity. The speakers of each group are as
    dissimilar as possible. Speakers with a cosine above 0.95 to a held-out or validation speaker are dropped,
    so that training never sees a near copy of one.
    """
    rng = np.random.default_rng(seed)
    similarity = embeddings @ embeddings.T
    split = ["train"] * len(speakers)
    for name in ("heldout", "validation"):
        for sex in "FM":
            free = [i for i, speaker in enumerate(speakers) if speaker.sex == sex and split[i] == "train"]
            for i in _least_similar(free, 10, similarity, rng):
                split[i] = name
    checks = [i for i, name in enumerate(split) if name != "train"]
    return [
        replace(speaker, split=split[i])
        for i, speaker in enumerate(speakers)
        if split[i] != "train" or similarity[i, checks].max() <= 0.95
    ]


def cast_presets(
    speakers: Sequence[SyntheticSpeaker], embeddings: np.ndarray, seed: int
) -> list[SyntheticSpeaker]:
    """Assign the presets to 20 training speakers of their sex that are as dissimilar as possible."""
    rng = np.random.default_rng(seed)
    similarity = embeddings @ embeddings.T
    parts: dict[int, str] = {}
    for sex in "FM":
        names = [name for name in PRESETS if ("female" in name) == (sex == "F")]
        pool = [i for i, speaker in enumerate(speakers) if (speaker.sex, speaker.split) == (sex, "train")]
        parts |= dict(zip(_least_similar(pool, len(names), similarity, rng), names, strict=True))
    return [replace(speaker, preset=parts.get(i)) for i, speaker in enumerate(speakers)]
