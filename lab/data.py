"""The lab's speech on disk, made once from `lab.sources` and read by training.

For each kind (synthetic, human) and split (train, more, validation, heldout) a folder holds
`KIND-SPLIT.json`, its utterances, and the file of samples it names: int16, concatenated, memory-mapped.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soxr

from lab.errors import LabError
from lab.level import level, sounding
from lab.sources import SPEEDS, SourceUtterance, changed_voices, human_utterances, synthetic_utterances
from lab.speech.plan import SPLITS
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech import read_audio
from revox.speech.files import replace_file, stamp_of

KINDS = ("synthetic", "human")
SETS = tuple(f"{kind}-{split}" for kind in KINDS for split in ("train", "more", "validation", "heldout"))
"""Names of the sets, KIND-SPLIT."""
RATE = 24000


@dataclass(frozen=True)
class LabUtterance:
    """One utterance of a set: who says what (`text` as written, None if unknown), where its samples are.

    `words`: seconds at which each plain word begins and ends, if known. `speed`: see `SourceUtterance`.
    """

    speaker: str
    sex: str
    preset: str | None
    text: str | None
    start: int
    samples: int
    speed: float = 1.0
    words: list[list[float]] | None = None


class SpeechSet:
    """The utterances of one kind ("synthetic", "human") and split.

    `utterances` lists them; `waveform(i)` reads one: float32, mono, 24 kHz. `identity` changes with the
    contents, for stamps of caches.

    Raises LabError if the set is missing or of an older version.
    """

    def __init__(self, folder: str | Path, split: str, kind: str) -> None:
        self.name = f"{kind} {split}"
        path = Path(folder) / f"{kind}-{split}.json"
        if not path.is_file():
            raise LabError(f"{path} is missing: make the lab's speech first with `python -m lab build`")
        text = path.read_text()
        self.identity = stamp_of([text])
        contents = json.loads(text)
        try:
            self.utterances = [LabUtterance(**fields) for fields in contents["utterances"]]
        except TypeError:
            raise LabError(
                f"{path} is of an older version of the lab: make its speech again, in a folder of its own"
            ) from None
        self._samples = np.load(path.with_name(contents["samples"]), mmap_mode="r")
        self._by_speaker: dict[str, list[int]] = {}
        for index, utterance in enumerate(self.utterances):
            self._by_speaker.setdefault(utterance.speaker, []).append(index)

    def __len__(self) -> int:
        return len(self.utterances)

    @property
    def speakers(self) -> list[str]:
        """Names of all speakers, sorted."""
        return sorted(self._by_speaker)

    def of(self, speaker: str) -> list[int]:
        """Indices of a speaker's utterances."""
        return self._by_speaker[speaker]

    def waveform(self, index: int) -> np.ndarray:
        """The samples [n] of one utterance."""
        utterance = self.utterances[index]
        samples = self._samples[utterance.start : utterance.start + utterance.samples]
        return samples.astype(np.float32) / 32768


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1] as 16-bit integers, clipped."""
    return np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16)


def read_utterance(one: SourceUtterance) -> tuple[np.ndarray, list[list[float]] | None]:
    """Samples int16 `[n]`, trimmed and leveled, and the seconds when each plain word is spoken in them."""
    samples = read_audio(one.path, rate=RATE).samples
    if one.span is not None:
        samples = samples[round(one.span[0] * RATE) : round(one.span[1] * RATE)]
    if one.speed != 1.0:
        samples = soxr.resample(samples, RATE * one.speed, RATE)
    start, stop = sounding(samples, RATE)
    words = (
        None
        if one.words is None
        else [[round(t / one.speed - start / RATE, 3) for t in word] for word in one.words]
    )
    return to_int16(level(samples[start:stop], RATE)), words


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
    synthetic: Sequence[Path],
    librispeech: Path | None,
    codec_utterances: int,
    *,
    progress: ProgressCallback = ignore_progress,
) -> None:
    """Make the lab's speech in `out_dir`; a set without utterances is left out.

    synthetic: folders that `lab.speech.kokoro` wrote. librispeech: the folder of the human clips and their
    transcripts, or None to leave them out. The first `codec_utterances` of the training plan are the split
    "train", from which everything learns; the others, and voices of "train" changed a little, are "more",
    from which all but the network of the semantic codes learns.

    Raises LabError if a clip is missing or a folder holds no speech.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    sets: dict[str, list[SourceUtterance]] = {}
    for split in SPLITS:
        found = synthetic_utterances(synthetic, split)
        if split == "train":
            found, more = found[:codec_utterances], found[codec_utterances:]
            sets["synthetic-more"] = more + changed_voices(found, SPEEDS[1:3])
        sets[f"synthetic-{split}"] = found
        if librispeech:
            sets[f"human-{split}"] = human_utterances(librispeech, split)
            if split == "train":
                sets["human-more"] = changed_voices(sets["human-train"])

    def parts(name: str, utterances: list[SourceUtterance]) -> Iterator[tuple[np.ndarray, list[dict]]]:
        for done, one in enumerate(utterances, 1):
            samples, words = read_utterance(one)
            who = {"speaker": one.speaker, "sex": one.sex, "preset": one.preset, "text": one.text}
            yield samples, [{**who, "samples": len(samples), "speed": one.speed, "words": words}]
            if done % 100 == 0 or done == len(utterances):
                progress(Progress(f"speech, {name}", done, len(utterances)))

    for name, utterances in sets.items():
        if utterances:
            write_set(folder, name, parts(name, utterances))
        else:
            (folder / f"{name}.json").unlink(missing_ok=True)
