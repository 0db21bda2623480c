"""Made conversations whose truth is known: recipes are drawn once and committed, sound is built from them.

A recipe names whole clips of ../shared/speech, the pauses before them and their levels; music and noise are
synthesized from its seed. Nobody's name is in its subtitles. Who speaks when follows from the recipe alone:
a clip's speaker speaks from its first 10 ms frame within 40 dB of its loudest to its last one.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from revox.speech import pitch_track, read_audio
from revox.speech.activity import HOP, frame_levels

RATE = 24000
WITHIN = 40.0  # dB under a clip's loudest frame that still count as speaking
BANDS = {"F": (160, 260), "M": (75, 150)}  # Hz, for --pitch
FORMATS = ("flac", "mp3", "m4a", "opus")


@dataclass(frozen=True)
class Spoken:
    """Who speaks from `start` to `end` (seconds), and the subtitles' text of it."""

    speaker: str
    start: float
    end: float


class Speech:
    """The clips of ../shared/speech by speaker: `half` 0 to develop with, 1 for the recipes that count."""

    def __init__(self, folder: Path, half: int) -> None:
        self.folder = folder
        self.clips: dict[str, list[str]] = defaultdict(list)
        self.words: dict[str, list] = {}
        self.lengths: dict[str, float] = {}
        self.pitches: dict[str, float] = {}
        self.sex: dict[str, str] = {}
        self.human: set[str] = set()
        for line in (folder / "kokoro/index.jsonl").read_text().splitlines():
            row = json.loads(line)
            file, words = f"kokoro/audio/{row['file']}", row["written"].split()
            ends = np.cumsum([len(word) + 1 for word in words]) / sum(len(word) + 1 for word in words)
            times = [0.0, *(ends * row["seconds"])]
            self.words[file] = [[times[i], times[i + 1], word] for i, word in enumerate(words)]
            self.lengths[file] = row["seconds"]
            self.clips[row["speaker"]].append(file)
            name = row["speaker"]
            self.sex[name] = (name[-1] if name[1:4].isdigit() else name[1]).upper()
        sexes = dict(
            line.split(",") for line in (folder / "librispeech/speakers.csv").read_text().split()[1:]
        )
        for part in ("librispeech", "librispeech-multi"):
            for line in (folder / part / "transcripts.jsonl").read_text().splitlines():
                row = json.loads(line)
                speaker, file = f"h{row['file'].split('-')[0]}", f"{part}/{row['file']}"
                self.words[file] = [word[:3] for word in row["words"]]
                self.lengths[file] = row["seconds"]
                self.clips[speaker].append(file)
                self.human.add(speaker)
                self.sex[speaker] = sexes.get(speaker[1:], "")
        names = sorted(self.clips)
        for clips in self.clips.values():
            clips.sort()
        self.names = [name for i, name in enumerate(names) if i // 2 % 2 == half]
        for name in self.names:
            if not self.sex[name]:  # not written down: by pitch, and none where that is between
                self.sex[name] = "F" if self.f0(name) > 165 else "M" if self.f0(name) < 145 else ""

    def f0(self, name: str) -> float:
        """A speaker's median pitch over five clips at most, Hz."""
        if name not in self.pitches:
            tracks = [pitch_track(clip(self.folder, file), RATE).f0 for file in self.clips[name][:5]]
            self.pitches[name] = float(np.nanmedian(np.concatenate(tracks)))
        return self.pitches[name]

    def seconds(self, file: str) -> float:
        return self.lengths[file]


@cache
def clip(folder: Path, file: str) -> np.ndarray:
    return read_audio(folder / file, RATE).samples


def draw(speech: Speech, kind: str, number: int, seed: int, used: set[str]) -> dict[str, Any]:
    """A recipe: `kind` pitch (the target alone is of its sex) or like (all are of one sex).

    used: targets of other recipes, which are not drawn again.
    """
    rng = np.random.default_rng([seed, number, kind == "like"])
    female = bool(rng.random() < 0.6)
    sex, other = ("F", "M") if female else ("M", "F")
    low, high = BANDS[sex]
    while True:
        target = str(rng.choice(_able(speech, sex, kind)))
        others_sex = sex if kind == "like" else other
        many = _able(speech, others_sex, "other")
        others = [str(name) for name in rng.choice(many, int(rng.integers(1, 4)))]
        if target in used or len({target, *others}) <= len(others):
            continue
        if kind == "like" or (
            low + 5 < speech.f0(target) < high - 5
            and all(not low - 5 < speech.f0(name) < high + 5 for name in others)
        ):
            break
    unused = {name: [str(file) for file in rng.permutation(speech.clips[name])] for name in (target, *others)}
    like = []
    if kind == "like":
        while sum(map(speech.seconds, like)) < 5:
            like.append(unused[target].pop())
    turns = _turns(speech, rng, target, others, unused)
    clips: list[dict[str, Any]] = []
    for speaker, files in turns:
        for i, file in enumerate(files):
            pause = float(
                rng.uniform(0.0, 0.4) if i else rng.choice([rng.uniform(0.0, 0.6), 2.0], p=[0.85, 0.15])
            )
            clips.append({"speaker": speaker, "file": file, "pause_s": round(pause, 2)})
    recipe: dict[str, Any] = {
        "name": f"{kind}-{number + 1:02d}",
        "format": FORMATS[number % 4],
        "target": target,
        "pitch_hz": [low, high] if kind == "pitch" else None,
        "like": like,
        "levels_db": {name: round(float(rng.uniform(-6, 3)), 1) for name in (target, *others)},
        "background": None,
        "seed": int(rng.integers(1 << 31)),
        "clips": clips,
    }
    if number % 2:  # under half of them
        recipe["background"] = {
            "kind": ("music", "noise")[number // 2 % 2],
            "snr_db": round(float(rng.uniform(12, 22)), 1),
            "share": [[0.0, 1.0], [0.0, 0.5], [0.4, 1.0]][int(rng.integers(3))],
        }
    return recipe


def _able(speech: Speech, sex: str, role: str) -> list[str]:
    """Who has enough clips: for a long turn, and a target for short ones and clips to be found by as well."""
    found = []
    for name in speech.names:
        if speech.sex[name] != sex:
            continue
        lengths = [speech.seconds(file) for file in speech.clips[name]]
        alone = len(lengths) == 1
        if sum(lengths) > (12 if alone else 22) and not (alone and role == "like"):
            # Human speakers with one clip are many: one in four is drawn from them.
            found.append((name, alone))
    few = [name for name, alone in found if not alone]
    many = [name for name, alone in found if alone]
    return few * max(1, 3 * len(many)) + many * len(few)


def _turns(
    speech: Speech, rng: np.random.Generator, target: str, others: list[str], unused: dict[str, list[str]]
) -> list[tuple[str, list[str]]]:
    """Speakers and the files of their turns: long ones, short ones, and a word thrown in."""

    def take(name: str, seconds: float) -> list[str]:
        files: list[str] = []
        while unused[name] and sum(map(speech.seconds, files)) < seconds:
            files.append(unused[name].pop())
        return files

    long = [(target, take(target, float(rng.uniform(13, 20))))]
    long += [(name, take(name, float(rng.uniform(12, 26)))) for name in others]
    short = []
    for name in (target, *others, target, *others, *others):
        if files := take(name, float(rng.uniform(1, 7))):
            short.append((name, files))
    turns: list[tuple[str, list[str]]] = []
    for i in rng.permutation(len(long)):
        turns.append(long[i])
        while short and rng.random() < 0.7:
            turns.append(short.pop(int(rng.integers(len(short)))))
    turns += short
    # A short sentence of somebody else within the target's turn: what is left may be too short to be used.
    at = next(i for i, turn in enumerate(turns) if turn is long[0])
    name = others[0]
    files = long[0][1]
    if sum(map(speech.seconds, files[1:])) > 11 and unused[name] and rng.random() < 0.6:
        turns[at : at + 1] = [(target, files[:1]), (name, [unused[name].pop()]), (target, files[1:])]
    return turns


def build(folder: Path, recipe: dict[str, Any]) -> tuple[np.ndarray, list[Spoken], str]:
    """A recipe's samples `[n]` at 24 kHz, who speaks when, and its subtitles as SRT."""
    rng = np.random.default_rng(recipe["seed"])
    at, parts, spoken, cues = 1.0, [], [], []
    for one in recipe["clips"]:
        samples = clip(folder, one["file"])
        level = np.sqrt(np.mean(np.square(samples)))
        samples = samples * (0.05 / level) * 10 ** (recipe["levels_db"][one["speaker"]] / 20)
        at += one["pause_s"]
        levels = frame_levels(samples, RATE)
        loud = np.flatnonzero(levels > levels.max() - WITHIN) * HOP
        spoken.append(Spoken(one["speaker"], at + float(loud[0]), at + float(loud[-1]) + HOP))
        parts.append((round(at * RATE), samples))
        cues += _cues(at, _words(folder)[one["file"]], rng)
        at += len(samples) / RATE
    total = round((at + 1.0) * RATE)
    mixed = np.zeros(total, np.float32)
    for start, samples in parts:
        mixed[start : start + len(samples)] += samples
    if background := recipe["background"]:
        first, last = (round(share * total) for share in background["share"])
        under = music(last - first, rng) if background["kind"] == "music" else noise(last - first, rng)
        gain = 0.05 * 10 ** (-background["snr_db"] / 20) / np.sqrt(np.mean(np.square(under)))
        mixed[first:last] += np.float32(gain) * under
    else:
        mixed += rng.normal(scale=10 ** (-70 / 20), size=total).astype(np.float32)
    return mixed * np.float32(0.9 / max(0.9, np.abs(mixed).max())), spoken, _srt(cues)


@cache
def _words(folder: Path) -> dict[str, list]:
    return Speech(folder, 0).words


def _cues(at: float, words: list, rng: np.random.Generator) -> list[tuple[float, float, str]]:
    """Cues of up to eight words, whose times are off by up to 0.15 s, as people's are."""
    found = []
    for first in range(0, len(words), 8):
        part = words[first : first + 8]
        start, end = (at + float(t) + float(rng.uniform(-0.15, 0.15)) for t in (part[0][0], part[-1][1]))
        found.append((max(0.0, start), max(end, start + 0.3), " ".join(word[2] for word in part)))
    return found


def _srt(cues: list[tuple[float, float, str]]) -> str:
    def clock(seconds: float) -> str:
        whole, milli = divmod(round(seconds * 1000), 1000)
        return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d},{milli:03d}"

    return "\n".join(f"{i}\n{clock(a)} --> {clock(b)}\n{text}\n" for i, (a, b, text) in enumerate(cues, 1))


def music(length: int, rng: np.random.Generator) -> np.ndarray:
    """Four chords of plucked harmonics over and over, a melody, and a beat, `[length]` at 24 kHz."""
    beat = round(RATE * rng.uniform(0.4, 0.6))
    out = np.zeros(length + 8 * beat, np.float32)
    t = np.arange(4 * beat) / RATE
    root = 110 * 2 ** (rng.integers(0, 12) / 12)
    hit = rng.normal(size=beat // 4) * np.exp(-np.arange(beat // 4) / (0.03 * RATE))
    scale = (0, 2, 4, 7, 9, 12)
    for number, start in enumerate(range(0, length, beat)):
        chord = (0, 9, 5, 7)[number // 4 % 4]
        steps = [chord, chord + 4, chord + 7] if number % 4 == 0 else []
        steps.append(12 + int(rng.choice(scale)))
        for step in steps:
            hz = root * 2 ** (step / 12)
            for k in range(1, 6):
                tone = np.sin(2 * np.pi * hz * k * t + rng.uniform(0, 6)) * np.exp(-t / 0.5) / k
                out[start : start + len(t)] += tone.astype(np.float32)
        out[start : start + len(hit)] += (0.6 * hit).astype(np.float32)
    return out[:length]


def noise(length: int, rng: np.random.Generator) -> np.ndarray:
    """Pink noise that swells and falls, with hum, `[length]` at 24 kHz."""
    spectrum = np.fft.rfft(rng.normal(size=length))
    spectrum /= np.sqrt(np.maximum(np.fft.rfftfreq(length, 1 / RATE), 20.0))
    pink = np.fft.irfft(spectrum, length)
    t = np.arange(length) / RATE
    swell = 1 + 0.4 * np.sin(2 * np.pi * t / rng.uniform(5, 15))
    hum = 0.3 * np.std(pink) * np.sin(2 * np.pi * 100 * t)
    return (pink * swell + hum).astype(np.float32)
