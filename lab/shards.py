"""The lab's speech packed into Shar shards (lhotse's format), small enough to copy to another machine.

Each set is a folder `KIND-SPLIT` of shards, which lhotse and `revox.training.data` can read. What lhotse
has no field for (sex, preset) is in a cut's custom fields.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from lab.data import RATE, SETS, SpeechSet, to_int16, write_set
from lab.errors import LabError
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech import Audio, encode_audio, read_audio
from revox.speech.files import replace_file, replacing
from revox.training.data.locate import audio_source
from revox.training.data.manifest import cut_record
from revox.training.data.shar import CUTS, shard_cuts, shard_records
from revox.training.errors import library

SHARDS = "shards"
"""The folder of a build's shards."""

CUSTOM = ("sex", "preset", "speed", "words")


def require_speech(data_dir: str | Path) -> None:
    """Raises LabError if `lab.data.prepare` made no set in `data_dir`."""
    if not any((Path(data_dir) / f"{name}.json").is_file() for name in SETS):
        raise LabError(f"{data_dir} holds no speech: make it with `python -m lab build RUN --stage speech`")


def pack(
    data_dir: str | Path,
    shard_dir: str | Path,
    *,
    bit_rate: int = 20_000,
    per_shard: int = 500,
    most: int | None = None,
    progress: ProgressCallback = ignore_progress,
) -> int:
    """Pack the sets that `lab.data.prepare` made into `shard_dir`, as Opus; returns the bytes of all shards.

    most: at most so many utterances of a speaker that is not a preset.
    Existing shards are kept: delete them to pack again. Raises LabError if there is no speech, DataError if
    lhotse is not installed.
    """
    require_speech(data_dir)
    shar = library("lhotse.shar")
    total = 0
    for name in SETS:
        if not (Path(data_dir) / f"{name}.json").is_file():
            continue
        kind, split = name.split("-")
        speech = SpeechSet(data_dir, split, kind)
        chosen = sorted(
            i
            for speaker in speech.speakers
            for rank, i in enumerate(speech.of(speaker))
            if most is None or rank < most or speech.utterances[i].preset
        )
        folder = Path(shard_dir) / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, start in enumerate(range(0, len(chosen), per_shard)):
            cuts, tar = folder / f"cuts.{number:06d}.jsonl.gz", folder / f"recording.{number:06d}.tar"
            if not cuts.is_file():
                with replacing(tar) as temporary, shar.TarWriter(str(temporary), None) as files:
                    lines = _write_clips(files, speech, chosen[start : start + per_shard], bit_rate)
                # The cuts are written last: they say that the shard is complete.
                replace_file(cuts, gzip.compress(lines.encode(), mtime=0))
            total += cuts.stat().st_size + tar.stat().st_size
            progress(Progress(f"{kind} {split}", min(start + per_shard, len(chosen)), len(chosen)))
    return total


def _write_clips(files: Any, speech: SpeechSet, chosen: list[int], bit_rate: int) -> str:
    """Write the clips `chosen` to a lhotse `TarWriter`; returns their cuts as JSON lines."""
    lines = []
    for i in chosen:
        one = speech.utterances[i]
        seconds = one.samples / RATE
        record = cut_record(f"{i:06d}", "", one.speaker, None, one.text, seconds=seconds, rate=RATE)
        record["recording"]["sources"][0]["type"] = "shar"
        record["custom"] = {name: getattr(one, name) for name in CUSTOM}
        data = encode_audio(Audio(speech.waveform(i), RATE), "opus", bit_rate=bit_rate)[0]
        files.write(f"{record['id']}.opus", BytesIO(data))
        files.write(f"{record['id']}.json", BytesIO(json.dumps(record["recording"]).encode()))
        lines.append(json.dumps(record) + "\n")
    return "".join(lines)


def unpack(
    shard_dir: str | Path, data_dir: str | Path, progress: ProgressCallback = ignore_progress
) -> list[str]:
    """Make the sets that `SpeechSet` reads from shards; returns their names (KIND-SPLIT).

    Raises LabError if there are no shards, DataError if one is damaged.
    """
    folders = sorted(path for path in Path(shard_dir).iterdir() if path.name in SETS)
    if not folders:
        raise LabError(f"{shard_dir} holds no shards of speech: make them with `python -m lab pack RUN`")
    Path(data_dir).mkdir(parents=True, exist_ok=True)
    for folder in folders:
        write_set(Path(data_dir), folder.name, _parts(folder, progress))
    return [folder.name for folder in folders]


def _parts(folder: Path, progress: ProgressCallback) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]]]:
    shards = sorted(path for path in folder.iterdir() if CUTS.fullmatch(path.name))
    for done, cuts in enumerate(shards):
        for cut, record in zip(shard_cuts(cuts), shard_records(cuts), strict=True):
            audio = read_audio(audio_source(record["recording"]["sources"][0]["source"]), rate=RATE)
            count, words = cut["recording"]["num_samples"], cut["supervisions"][0]
            samples = np.pad(audio.samples[:count], (0, max(0, count - len(audio.samples))))
            entry = {"speaker": words["speaker"], "text": words.get("text"), "samples": count}
            yield to_int16(samples), [entry | {name: cut["custom"][name] for name in CUSTOM}]
        progress(Progress(folder.name.replace("-", " "), done + 1, len(shards)))
