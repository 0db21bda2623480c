"""The lab's speech on disk: every speaker's utterances and the human clips, made once and read by training.

For each kind (synthetic, human) and split (train, validation, heldout) a folder holds `KIND-SPLIT.json` (its
utterances) and the file of samples it names: int16, laid end to end, memory-mapped.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from lab.errors import LabError
from lab.flite import Flite, find_flite
from lab.sentences import SPLITS, sentences
from lab.speakers import Speaker, find_human_clips, synthetic_speakers
from lab.synthesise import level, synthesise, trim
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech.files import replace_file, replacing

KINDS = ("synthetic", "human")
RATE = 24000


@dataclass(frozen=True)
class Utterance:
    """One utterance of a set: who says what (text is None for human clips), and where its samples lie.

    `phones`, where the synthesiser told them, are (name, end in seconds).
    """

    speaker: str
    sex: str
    preset: str | None
    text: str | None
    start: int
    samples: int
    phones: tuple[tuple[str, float], ...] | None = None


class SpeechSet:
    """The utterances of one split: of one kind ("synthetic", "human") or of whatever is there ("all").

    `utterances` lists them; `waveform(i)` reads one; `crop` draws stretches at random. Samples are float32,
    mono, 24 kHz.
    Raises LabError if the folder was not prepared.
    """

    def __init__(self, folder: str | Path, split: str, kind: str = "all") -> None:
        self.utterances: list[Utterance] = []
        self._sources: list[np.ndarray] = []
        self._source_of: list[int] = []
        paths = [Path(folder) / f"{one}-{split}.json" for one in (KINDS if kind == "all" else (kind,))]
        found = [path for path in paths if path.is_file()]
        if not found:
            raise LabError(f"{paths[0]} is missing: make the lab's speech first with `python -m lab build`")
        for path in found:
            contents = json.loads(path.read_text())
            utterances = [Utterance(**fields) for fields in contents["utterances"]]
            self.utterances += utterances
            self._source_of += [len(self._sources)] * len(utterances)
            self._sources.append(np.load(path.with_name(contents["samples"]), mmap_mode="r"))
        self._by_speaker: dict[str, list[int]] = {}
        for index, utterance in enumerate(self.utterances):
            self._by_speaker.setdefault(utterance.speaker, []).append(index)
        self._speakers = sorted(self._by_speaker)

    def __len__(self) -> int:
        return len(self.utterances)

    @property
    def speakers(self) -> list[str]:
        """Names of all speakers, sorted."""
        return self._speakers

    @property
    def seconds(self) -> float:
        """Length of all utterances together."""
        return sum(utterance.samples for utterance in self.utterances) / RATE

    def of(self, speaker: str) -> list[int]:
        """Indices of a speaker's utterances."""
        return self._by_speaker[speaker]

    def waveform(self, index: int) -> np.ndarray:
        """The samples [n] of one utterance."""
        utterance = self.utterances[index]
        source = self._sources[self._source_of[index]]
        return source[utterance.start : utterance.start + utterance.samples].astype(np.float32) / 32768

    def crop(self, rng: np.random.Generator, seconds: float) -> np.ndarray:
        """A stretch of `seconds` [n], uniform over speakers, then over their utterances, then over positions.

        A shorter utterance is continued with another of the same speaker, so no stretch is mostly silence.
        """
        length = round(seconds * RATE)
        mine = self._by_speaker[self._speakers[rng.integers(len(self._speakers))]]
        index = mine[rng.integers(len(mine))]
        samples = self.waveform(index)
        if len(samples) >= length:
            start = rng.integers(len(samples) - length + 1)
            return samples[start : start + length]
        parts = [samples[rng.integers(len(samples)) // 2 :]]
        while sum(len(part) for part in parts) < length:
            parts.append(self.waveform(mine[rng.integers(len(mine))]))
        return np.concatenate(parts)[:length]


def _to_int16(samples: np.ndarray) -> np.ndarray:
    return np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16)


def planned_texts(speaker: Speaker, split: str, count: int, seed: int) -> list[str]:
    """The first `count` sentences of `split` for a speaker: other ones for every speaker, always the same."""
    return list(
        itertools.islice(sentences(split, seed * 1_000_003 + zlib.crc32(speaker.name.encode())), count)
    )


def _synthetic_plan(split: str, counts: dict[str, int]) -> Iterator[tuple[Speaker, int]]:
    """Who says how many sentences in a split: its own speakers, and the presets in every split."""
    for speaker in synthetic_speakers():
        if speaker.preset:
            yield speaker, counts["preset"] if split == "train" else counts["preset_check"]
        elif speaker.split == split:
            yield speaker, counts["speaker"] if split == "train" else counts["check"]


def _speaker_part(
    folder: Path, speaker: Speaker, split: str, count: int, seed: int, flite: Flite | None
) -> tuple[np.ndarray, list[dict]]:
    """A speaker's samples and utterances, continued from what an earlier run left in `folder`."""
    path = folder / f"{split}-{speaker.name}.npz"
    recipe = json.dumps({**asdict(speaker), "preset": None, "split": None, "seed": seed})
    pieces: list[np.ndarray] = []
    index: list[dict] = []
    if path.is_file():
        with np.load(path) as part:
            if str(part["recipe"]) == recipe:
                index = json.loads(str(part["utterances"]))
                pieces.append(part["samples"])
    missing = planned_texts(speaker, split, count, seed)[len(index) :]
    for text in missing:
        said = synthesise(speaker, text, RATE, flite)
        pieces.append(_to_int16(said.samples))
        index.append({"text": text, "samples": len(said.samples), "phones": said.phones})
    samples = np.concatenate(pieces)
    if missing:
        with replacing(path) as beside, open(beside, "wb") as file:
            np.savez(file, samples=samples, utterances=json.dumps(index), recipe=recipe)
    used = index[:count]
    return samples[: sum(one["samples"] for one in used)], used


_In = TypeVar("_In")
_Out = TypeVar("_Out")


def _in_order(make: Callable[[_In], _Out], items: list[_In], workers: int) -> Iterator[_Out]:
    """make(item) of every item, in order, `workers` at a time; what has not begun is dropped on an error."""
    if workers <= 1:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(workers) as pool:  # threads: the synthesisers are processes of their own
        try:
            yield from pool.map(make, items)
        finally:
            pool.shutdown(cancel_futures=True)


def _human_samples(path: Path) -> np.ndarray:
    from revox.speech import read_audio

    samples = read_audio(path, rate=RATE, mono=True).samples
    return _to_int16(level(trim(samples, RATE), RATE))


def write_set(folder: Path, name: str, parts: Iterator[tuple[np.ndarray, list[dict]]]) -> None:
    """Lay parts end to end into NAME-CHECKSUM.npy, then name that file in NAME.json and remove older ones.

    A reader sees the old set or the new one, and a set already open stays readable.
    """
    raw = folder / f"{name}.part"
    utterances: list[dict] = []
    total = checksum = 0
    with open(raw, "wb") as file:
        for samples, index in parts:
            start = total
            for one in index:
                utterances.append({**one, "start": start})
                start += one["samples"]
            assert start == total + len(samples)
            file.write(samples.tobytes())
            checksum = zlib.crc32(samples.tobytes(), checksum)
            total += len(samples)
    samples_name = f"{name}-{checksum:08x}.npy"
    with replacing(folder / samples_name) as beside, open(beside, "wb") as file, open(raw, "rb") as source:
        header = {"descr": "<i2", "fortran_order": False, "shape": (total,)}
        np.lib.format.write_array_header_1_0(file, header)
        while block := source.read(1 << 24):
            file.write(block)
    raw.unlink()
    contents = json.dumps({"samples": samples_name, "utterances": utterances})
    replace_file(folder / f"{name}.json", contents)
    for old in folder.glob(f"{name}-????????.npy"):
        if old.name != samples_name:
            old.unlink()


def prepare(
    out_dir: str | Path,
    librispeech: str | Path | None,
    *,
    per_speaker: int = 25,
    per_preset: int = 60,
    per_check: int = 10,
    seed: int = 0,
    splits: tuple[str, ...] = SPLITS,
    workers: int = 1,
    flite: Path | None = None,
    progress: ProgressCallback = ignore_progress,
) -> dict[str, float]:
    """Make the lab's speech in `out_dir`; returns the seconds in each set ("synthetic-train", ...).

    librispeech: the folder of the human clips listed in lists/librispeech.csv, or None to leave them out.
    per_speaker, per_preset: training sentences of each synthetic speaker and of each preset. per_check:
    sentences of each validation and held-out speaker, and of each preset in those splits. workers: speakers
    synthesised at the same time. flite: the folder of a carried synthesiser, in place of the installed one.
    What an interrupted run made is kept and continued.
    Raises LabError if a synthesiser or a clip is missing.
    """
    folder = Path(out_dir)
    speaks = find_flite(flite) if flite else None
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    counts = {"preset": per_preset, "speaker": per_speaker, "check": per_check, "preset_check": per_check}

    def synthetic(split: str) -> Iterator[tuple[np.ndarray, list[dict]]]:
        plan = list(_synthetic_plan(split, counts))

        def make(of: tuple[Speaker, int]) -> tuple[np.ndarray, list[dict]]:
            return _speaker_part(folder / "parts", of[0], split, of[1], seed, speaks)

        made = _in_order(make, plan, workers)
        for done, ((speaker, _), (samples, index)) in enumerate(zip(plan, made, strict=True)):
            who = {"speaker": speaker.name, "sex": speaker.sex, "preset": speaker.preset}
            yield samples, [{**who, **one} for one in index]
            progress(Progress(f"synthetic speech, {split}", done + 1, len(plan)))

    def human(split: str, clips: dict) -> Iterator[tuple[np.ndarray, list[dict]]]:
        for done, (clip, path) in enumerate(clips.items()):
            samples = _human_samples(path)
            yield (
                samples,
                [
                    {
                        "speaker": f"librispeech-{clip.speaker}",
                        "sex": clip.sex,
                        "preset": None,
                        "text": None,
                        "samples": len(samples),
                    }
                ],
            )
            progress(Progress(f"human speech, {split}", done + 1, len(clips)))

    clips_of = {split: find_human_clips(librispeech, split) for split in splits} if librispeech else {}
    for split in splits:
        if librispeech:
            write_set(folder, f"human-{split}", human(split, clips_of[split]))
        write_set(folder, f"synthetic-{split}", synthetic(split))
    return {
        f"{kind}-{split}": SpeechSet(folder, split, kind).seconds
        for split in splits
        for kind in KINDS
        if (folder / f"{kind}-{split}.json").is_file()
    }
