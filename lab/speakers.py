"""Who speaks in the lab: synthetic speakers and human clips, and the committed lists that split them.

A synthetic speaker is one of flite's voices, its pitch and speed, a vocal-tract length (formants scaled by
resampling) and a colour (spectral tilt and three resonances). The lists under `lists/` are the truth;
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
class Speaker:
    """One synthetic speaker.

    sex: "F" or "M", the synthesiser's own voice's. voice: flite's name of it. pitch: factor on the voice's
    own. speed: factor on durations, before the formants are scaled. formants: factor on all frequencies.
    tilt: dB per octave about 1 kHz. resonances: (centre Hz, gain dB) half an octave wide.
    split: "train", "validation" or "heldout". preset: the release's preset whose part it plays, or None.
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


def draw_speakers(count: int, seed: int) -> list[Speaker]:
    """`count` random speakers, nearly half of them women, all of split "train" and without a preset."""
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
            Speaker(
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


def to_json(speakers: Sequence[Speaker]) -> str:
    """One speaker a line."""
    return "[\n" + ",\n".join(json.dumps(asdict(speaker)) for speaker in speakers) + "\n]\n"


def from_json(text: str) -> list[Speaker]:
    """What `to_json` wrote."""
    speakers = []
    for fields in json.loads(text):
        fields["resonances"] = tuple(tuple(pair) for pair in fields["resonances"])
        speakers.append(Speaker(**fields))
    return speakers


@cache
def synthetic_speakers() -> tuple[Speaker, ...]:
    """The committed synthetic speakers of every split."""
    return tuple(from_json(resources.files("lab").joinpath("lists/speakers.json").read_text()))


def preset_speakers() -> dict[str, Speaker]:
    """The training speakers that play the release's 20 presets, by preset name."""
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
    """Where each listed clip lies in `folder`.

    Raises LabError naming the first missing file.
    """
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


def _unalike(pool: list[int], count: int, likeness: np.ndarray, rng: np.random.Generator) -> list[int]:
    """`count` of `pool` at random, among those who sound as little alike as that many can."""
    order = rng.permutation(pool)
    for most_alike in np.arange(0.5, 1.01, 0.01):
        chosen: list[int] = []
        for i in order:
            if len(chosen) < count and (not chosen or likeness[i, chosen].max() <= most_alike):
                chosen.append(int(i))
        if len(chosen) == count:
            return chosen
    raise LabError(f"{len(pool)} speakers are too few to choose {count} from: draw more")


def split_speakers(speakers: Sequence[Speaker], embeddings: np.ndarray, seed: int) -> list[Speaker]:
    """Choose 20 held-out speakers and 20 for validation, ten women and ten men each; the rest only train.

    embeddings [speakers, dim], of unit length: who sounds like whom. Each group's speakers sound as little
    alike as can be. Speakers who sound nearly like a held-out or validation speaker (a cosine above 0.95) are
    left out of training, so that neither is known in disguise.
    """
    rng = np.random.default_rng(seed)
    likeness = embeddings @ embeddings.T
    split = ["train"] * len(speakers)
    for name in ("heldout", "validation"):
        for sex in "FM":
            free = [i for i, speaker in enumerate(speakers) if speaker.sex == sex and split[i] == "train"]
            for i in _unalike(free, 10, likeness, rng):
                split[i] = name
    checks = [i for i, name in enumerate(split) if name != "train"]
    return [
        replace(speaker, split=split[i])
        for i, speaker in enumerate(speakers)
        if split[i] != "train" or likeness[i, checks].max() <= 0.95
    ]


def cast_presets(speakers: Sequence[Speaker], embeddings: np.ndarray, seed: int) -> list[Speaker]:
    """Give the presets' parts to 20 training speakers of their sex who sound as little alike as can be."""
    rng = np.random.default_rng(seed)
    likeness = embeddings @ embeddings.T
    parts: dict[int, str] = {}
    for sex in "FM":
        names = [name for name in PRESETS if ("female" in name) == (sex == "F")]
        pool = [i for i, speaker in enumerate(speakers) if (speaker.sex, speaker.split) == (sex, "train")]
        parts |= dict(zip(_unalike(pool, len(names), likeness, rng), names, strict=True))
    return [replace(speaker, preset=parts.get(i)) for i, speaker in enumerate(speakers)]
