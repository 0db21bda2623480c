"""Codes of planned speech, small enough to commit: the language model learns from them without the sound.

A folder holds `index.jsonl`, with a line for each utterance as `lab.speech.kokoro` writes it (so that its
`--have` takes the folder), and `ENCODER.NNN.npz`, codes of the encoder with that stamp, under 16 MB each.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from lab.errors import LabError
from lab.speech.kokoro import read_index
from lab.speech.plan import PlannedUtterance
from revox.speech.files import replace_file

FOLDER = Path(__file__).parent / "spoken"
_PER_FILE = 600_000  # frames, of 13 bytes in the mean and 22 at most


def read_codes(folder: Path, stamp: str) -> dict[int, np.ndarray]:
    """Codes `[37, frames]` int16 by number in the plan; empty if the folder has none of this encoder.

    Raises LabError if a file is damaged.
    """
    found: dict[int, np.ndarray] = {}
    for path in sorted(folder.glob(f"{stamp}.*.npz")):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                numbers, ends = arrays["numbers"], arrays["ends"]
                codes = np.concatenate((arrays["semantic"][None], arrays["acoustic"].astype(np.int16)))
        except (OSError, ValueError, KeyError, EOFError, zlib.error, BadZipFile) as error:
            raise LabError(f"{path} does not hold codes: {error}") from None
        found |= dict(zip(numbers.tolist(), np.split(codes, ends[:-1], axis=1), strict=True))
    return found


def add_codes(
    folder: Path, stamp: str, made: Iterable[tuple[PlannedUtterance, np.ndarray, float]]
) -> tuple[int, int]:
    """Add utterances with their codes and seconds; those that are there stay.

    Returns how many utterances were added and how many there are. Raises LabError if the folder holds codes
    of another encoder, or a file there is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if others := [path.name for path in folder.glob("*.[0-9]*.npz") if not path.name.startswith(f"{stamp}.")]:
        raise LabError(f"{folder} holds codes of another encoder ({others[0]}): name another folder")
    codes = read_codes(folder, stamp)
    lines = {number: line for number, line in read_index(folder).items() if number in codes}
    before = len(codes)
    for item, new, seconds in made:
        if item.number not in codes:
            codes[item.number] = new
            lines[item.number] = {
                "file": item.file, "speaker": item.speaker, "written": item.written,
                "seconds": round(seconds, 4), "kind": item.kind,
            }  # fmt: skip
    for n, part in enumerate(_parts(codes)):
        all_codes = np.concatenate([codes[number] for number in part], axis=1)
        arrays = {
            "numbers": np.array(part, np.int32),
            "ends": np.cumsum([codes[number].shape[1] for number in part]),
            "semantic": all_codes[0].astype(np.int16),
            "acoustic": all_codes[1:].astype(np.uint8),
        }
        path, content = folder / f"{stamp}.{n:03d}.npz", io.BytesIO()
        np.savez_compressed(content, **arrays)
        replace_file(path, content.getvalue())
    index = "".join(json.dumps(lines[n], ensure_ascii=False) + "\n" for n in sorted(lines))
    replace_file(folder / "index.jsonl", index)
    return len(codes) - before, len(codes)


def _parts(codes: dict[int, np.ndarray]) -> Iterator[list[int]]:
    part: list[int] = []
    frames = 0
    for number in sorted(codes):
        part.append(number)
        frames += codes[number].shape[1]
        if frames >= _PER_FILE:
            yield part
            part, frames = [], 0
    if part:
        yield part
