"""The lab's speech on disk: every speaker's utterances and the human clips, made once and read by training.

For each kind (synthetic, human) and split (train, validation, heldout) a folder holds `KIND-SPLIT.json`, its
utterances, and the file of samples it names: int16, concatenated, memory-mapped.
"""

from __future__ import annotations

import itertools
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from lab.arrays import npz_bytes, read_npz
from lab.errors import LabError
from lab.flite import Flite, find_flite
from lab.sentences import SPLITS, sentences
from lab.speakers import SyntheticSpeaker, find_human_clips, synthetic_speakers
from lab.synthesize import level, synthesize, trim
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech.files import load_stamped, replace_file, save_stamped, stamp_of

KINDS = ("synthetic", "human")
RATE = 24000


@dataclass(frozen=True)
class SpeechCounts:
    """Sentences of each training speaker, of each preset, and of each speaker and preset of other splits."""

    per_speaker: int = 20
    per_preset: int = 300
    per_check: int = 10


@dataclass(frozen=True)
class LabUtterance:
    """One utterance of a set: the speaker, the text (None for human clips), and where its samples start.

    `phones` are (name, end in seconds); None if there is no synthesizer to report them.
    """

    speaker: str
    sex: str
    preset: str | None
    text: str | None
    start: int
    samples: int
    phones: tuple[tuple[str, float], ...] | None = None


class SpeechSet:
    """The utterances of one split: of one kind ("synthetic", "human") or of every kind there is ("all").

    `utterances` lists them; `waveform(i)` reads one; `crop` draws segments at random. Samples are float32,
    mono, 24 kHz. `identity` changes with the contents, for stamps of caches.

    Raises LabError if the folder was not prepared.
    """

    def __init__(self, folder: str | Path, split: str, kind: str = "all") -> None:
        self.name = split if kind == "all" else f"{kind} {split}"
        self.utterances: list[LabUtterance] = []
        self._sources: list[np.ndarray] = []
        self._source_of: list[int] = []
        paths = [Path(folder) / f"{one}-{split}.json" for one in (KINDS if kind == "all" else (kind,))]
        found = [path for path in paths if path.is_file()]
        if not found:
            raise LabError(f"{paths[0]} is missing: make the lab's speech first with `python -m lab build`")
        texts = [path.read_text() for path in found]
        self.identity = stamp_of(texts)
        for path, text in zip(found, texts, strict=True):
            contents = json.loads(text)
            utterances = [LabUtterance(**fields) for fields in contents["utterances"]]
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
        """A segment of `seconds` [n], uniform over speakers, then over their utterances, then over positions.

        A shorter utterance is continued with another of the same speaker, so no segment is mostly silence.
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


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1] as 16-bit integers, clipped."""
    return np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16)


def planned_texts(speaker: SyntheticSpeaker, split: str, count: int, seed: int) -> list[str]:
    """The first `count` sentences of `split` for a speaker: others for each speaker, always the same."""
    return list(
        itertools.islice(sentences(split, seed * 1_000_003 + zlib.crc32(speaker.name.encode())), count)
    )


def _synthetic_plan(split: str, counts: SpeechCounts) -> Iterator[tuple[SyntheticSpeaker, int]]:
    """Each speaker of a split with its number of sentences; the presets speak in every split."""
    for speaker in synthetic_speakers():
        if speaker.preset:
            yield speaker, counts.per_preset if split == "train" else counts.per_check
        elif speaker.split == split:
            yield speaker, counts.per_speaker if split == "train" else counts.per_check


def _speaker_part(
    folder: Path, speaker: SyntheticSpeaker, split: str, count: int, seed: int, flite: Flite | None
) -> tuple[np.ndarray, list[dict]]:
    """A speaker's samples and utterances; those that an earlier run cached in `folder` are not made again."""
    path = folder / f"{split}-{speaker.name}.cache"
    stamp = stamp_of({**asdict(speaker), "preset": None, "split": None}, seed)
    pieces: list[np.ndarray] = []
    index: list[dict] = []
    if (cached := load_stamped(path, stamp)) is not None:
        part = read_npz(cached)
        index = json.loads(str(part["utterances"]))
        pieces.append(part["samples"])
    missing = planned_texts(speaker, split, count, seed)[len(index) :]
    for text in missing:
        speech = synthesize(speaker, text, RATE, flite)
        pieces.append(to_int16(speech.samples))
        index.append({"text": text, "samples": len(speech.samples), "phones": speech.phones})
    samples = np.concatenate(pieces)
    if missing:
        content = npz_bytes({"samples": samples, "utterances": np.array(json.dumps(index))})
        save_stamped(path, stamp, content)
    used = index[:count]
    return samples[: sum(one["samples"] for one in used)], used


_In = TypeVar("_In")
_Out = TypeVar("_Out")


def _in_order(make: Callable[[_In], _Out], items: list[_In], workers: int) -> Iterator[_Out]:
    """make(item) of every item, in order, `workers` at a time; an error cancels those not yet started."""
    if workers <= 1:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(workers) as pool:  # threads: each synthesizer is a process
        try:
            yield from pool.map(make, items)
        finally:
            pool.shutdown(cancel_futures=True)


def _human_samples(path: Path) -> np.ndarray:
    from revox.speech import read_audio

    samples = read_audio(path, rate=RATE).samples
    return to_int16(level(trim(samples, RATE), RATE))


def write_set(folder: Path, name: str, parts: Iterator[tuple[np.ndarray, list[dict]]]) -> None:
    """Concatenate parts into NAME-CHECKSUM.npy, then name that file in NAME.json and remove older ones.

    Readers see the old set or the new one, and a set that is already open stays readable.
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

    def write(file: BinaryIO) -> None:
        header = {"descr": "<i2", "fortran_order": False, "shape": (total,)}
        np.lib.format.write_array_header_1_0(file, header)
        with open(raw, "rb") as source:
            shutil.copyfileobj(source, file, 1 << 24)

    replace_file(folder / samples_name, write)
    raw.unlink()
    contents = json.dumps({"samples": samples_name, "utterances": utterances})
    replace_file(folder / f"{name}.json", contents)
    for old in folder.glob(f"{name}-????????.npy"):
        if old.name != samples_name:
            old.unlink()


def prepare(
    out_dir: str | Path,
    librispeech: str | Path | None,
    counts: SpeechCounts,
    *,
    seed: int = 0,
    splits: tuple[str, ...] = SPLITS,
    workers: int = 1,
    flite: Path | None = None,
    progress: ProgressCallback = ignore_progress,
) -> dict[str, float]:
    """Make the lab's speech in `out_dir`; returns the seconds in each set ("synthetic-train", ...).

    librispeech: the folder of the human clips listed in lists/librispeech.csv, or None to leave them out.
    workers: speakers synthesized at the same time. flite: a folder with a copied synthesizer (`lab.flite`),
    in place of the installed one. An interrupted run is continued.

    Raises LabError if the synthesizer or a clip is missing.
    """
    folder = Path(out_dir)
    synthesizer = find_flite(flite) if flite else None
    (folder / "parts").mkdir(parents=True, exist_ok=True)

    def synthetic(split: str) -> Iterator[tuple[np.ndarray, list[dict]]]:
        plan = list(_synthetic_plan(split, counts))

        def make(of: tuple[SyntheticSpeaker, int]) -> tuple[np.ndarray, list[dict]]:
            return _speaker_part(folder / "parts", of[0], split, of[1], seed, synthesizer)

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
