"""Speech packed into compressed shards, small enough to carry to another machine.

A shard is one file: `REVOXSH1`, the length of its index (8 bytes, little-endian), the index (one JSON line an
utterance: what `SpeechSet` lists, with `at` and `bytes` in place of `start`), then every utterance as an
Ogg Opus file of its own. It is read in order or at any utterance, without unpacking the rest.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from lab.data import KINDS, RATE, SpeechSet, write_set
from lab.errors import LabError
from lab.sentences import SPLITS
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech.files import replacing

_MAGIC = b"REVOXSH1"
_NAME = re.compile(r"(synthetic|human)-(train|validation|heldout)-\d{4}\.shard")


def encode_opus(samples: np.ndarray, bit_rate: int, rate: int = RATE) -> bytes:
    """float32 samples [n] as an Ogg Opus file (variable bit rate, `bit_rate` bits a second on average)."""
    import av

    file = io.BytesIO()
    with av.open(
        file, "w", format="ogg", options={"fflags": "+bitexact", "page_duration": "2000000"}
    ) as container:
        stream = container.add_stream("libopus", rate=rate, layout="mono", format="flt")
        stream.bit_rate = bit_rate
        stream.codec_context.flags |= 1 << 23  # AV_CODEC_FLAG_BITEXACT: the same bytes every time
        frame = av.AudioFrame.from_ndarray(samples.astype(np.float32)[None], format="flt", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def decode_opus(data: bytes, samples: int, rate: int = RATE) -> np.ndarray:
    """The first `samples` samples [samples] at `rate` Hz of an Ogg Opus file that `encode_opus` made."""
    import av

    resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
    parts = []
    with av.open(io.BytesIO(data)) as container:
        for frame in [*container.decode(audio=0), None]:
            parts += [piece.to_ndarray()[0] for piece in resampler.resample(frame)]
    decoded = np.concatenate(parts)[:samples]
    return np.pad(decoded, (0, samples - len(decoded)))


class Shard:
    """One shard file. `index` lists its utterances; `waveform(i)` decodes one: float32 [n], 24 kHz.

    Raises LabError if the file is not a shard or is cut short.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        damaged = (
            f"{self.path} is not a complete shard of speech: copy it again, or make it with "
            "`python -m lab build`"
        )
        with open(self.path, "rb") as file:
            head = file.read(16)
            length = int.from_bytes(head[8:], "little")
            if head[:8] != _MAGIC or length > self.path.stat().st_size:
                raise LabError(damaged)
            try:
                self.index: list[dict] = [json.loads(line) for line in file.read(length).splitlines()]
                end = max((one["at"] + one["bytes"] for one in self.index), default=0)
            except (ValueError, KeyError, TypeError):
                raise LabError(damaged) from None
        self._blobs = 16 + length
        if self.path.stat().st_size < self._blobs + end:
            raise LabError(damaged)

    def __len__(self) -> int:
        return len(self.index)

    def waveform(self, i: int) -> np.ndarray:
        """Samples [n] of utterance i."""
        one = self.index[i]
        with open(self.path, "rb") as file:
            file.seek(self._blobs + one["at"])
            return decode_opus(file.read(one["bytes"]), one["samples"])

    def __iter__(self) -> Iterator[tuple[dict, np.ndarray]]:
        return ((one, self.waveform(i)) for i, one in enumerate(self.index))


def write_shard(path: str | Path, utterances: list[tuple[dict, bytes]]) -> None:
    """Write a shard of (index entry, Ogg Opus file) pairs."""
    path = Path(path)
    lines, at = [], 0
    for one, blob in utterances:
        lines.append(json.dumps({**one, "at": at, "bytes": len(blob)}))
        at += len(blob)
    index = "\n".join(lines).encode()
    with replacing(path) as beside, open(beside, "wb") as file:
        file.write(_MAGIC + len(index).to_bytes(8, "little") + index)
        for _, blob in utterances:
            file.write(blob)


def require_speech(data_dir: str | Path) -> None:
    """Raises LabError if `lab.data.prepare` made no set in `data_dir`."""
    if not any((Path(data_dir) / f"{k}-{s}.json").is_file() for k in KINDS for s in SPLITS):
        raise LabError(f"{data_dir} holds no speech: make it with `python -m lab build --stage speech`")


def pack(
    data_dir: str | Path,
    shard_dir: str | Path,
    *,
    bit_rate: int = 20_000,
    per_shard: int = 500,
    splits: tuple[str, ...] = SPLITS,
    most: int | None = None,
    kinds: tuple[str, ...] = KINDS,
    progress: ProgressCallback = ignore_progress,
) -> int:
    """Pack the sets that `lab.data.prepare` made into `shard_dir`; returns the bytes of all shards.

    kinds: what is packed; synthetic speech can be spoken again where it is needed (`lab.flite`).
    most: at most so many utterances of a speaker without a preset (the presets' are all packed).
    Shards that are already there are kept as they are (delete them to pack anew). Raises LabError where
    there is no speech.
    """
    require_speech(data_dir)
    shard_dir = Path(shard_dir)
    shard_dir.mkdir(parents=True, exist_ok=True)
    total = 0
    for kind in kinds:
        for split in splits:
            if not (Path(data_dir) / f"{kind}-{split}.json").is_file():
                continue
            speech = SpeechSet(data_dir, split, kind)
            chosen = [
                i
                for speaker in speech.speakers
                for rank, i in enumerate(speech.of(speaker))
                if most is None or rank < most or speech.utterances[i].preset
            ]
            for number, start in enumerate(range(0, len(chosen), per_shard)):
                path = shard_dir / f"{kind}-{split}-{number:04d}.shard"
                if not path.is_file():
                    entries = []
                    for i in chosen[start : start + per_shard]:
                        one = asdict(speech.utterances[i])
                        del one["start"]
                        entries.append((one, encode_opus(speech.waveform(i), bit_rate)))
                    write_shard(path, entries)
                total += path.stat().st_size
                progress(Progress(f"{kind} {split}", min(start + per_shard, len(chosen)), len(chosen)))
    return total


def shards_in(shard_dir: str | Path, kind: str, split: str) -> list[Shard]:
    """The shards of one kind and split, in order."""
    return [Shard(path) for path in sorted(Path(shard_dir).glob(f"{kind}-{split}-*.shard"))]


def unpack(shard_dir: str | Path, data_dir: str | Path, progress: ProgressCallback = ignore_progress) -> None:
    """Make the sets that `SpeechSet` reads from shards. Raises LabError if there are none."""
    shard_dir, data_dir = Path(shard_dir), Path(data_dir)
    found = sorted(
        {match.group(1, 2) for path in shard_dir.glob("*.shard") if (match := _NAME.match(path.name))}
    )
    if not found:
        raise LabError(f"{shard_dir} holds no shards of speech: make them with `python -m lab build`")
    data_dir.mkdir(parents=True, exist_ok=True)

    def parts(kind: str, split: str) -> Iterator[tuple[np.ndarray, list[dict]]]:
        shards = shards_in(shard_dir, kind, split)
        for done, shard in enumerate(shards):
            for one, samples in shard:
                entry = {key: value for key, value in one.items() if key not in ("at", "bytes")}
                yield np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16), [entry]
            progress(Progress(f"{kind} {split}", done + 1, len(shards)))

    for kind, split in found:
        write_set(data_dir, f"{kind}-{split}", parts(kind, split))
