"""What a build has learnt so far, in files small enough to carry from a machine that is only lent.

A state is one file of up to 64 MB; carried, it is a few parts and an index, `STAGE-NAME.json`, which names
them, their size and their hash. `revox lab build` puts them together again where a stage has no state yet.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from revox.checkpoint.write import replace_file
from revox.lab.errors import LabError

STAGES_WITH_STATE = ("guide", "encoder", "decoder", "language")
PART_BYTES = 15_000_000

_FILE = re.compile(r"(guide|encoder|decoder|language)/([a-z]+-state\.pt|[a-z]+-log\.jsonl|phones\.npz)")
_PART = re.compile(r"[a-z]+-[a-z.-]+\.[0-9a-f]{12}\.\d{3}")


def carry_state(run: Path, folder: Path, stages: Iterable[str] = STAGES_WITH_STATE) -> list[Path]:
    """Put the states and logs of `stages` into `folder`, in files of `PART_BYTES` at most; returns them all.

    What an earlier call put there of the same state is replaced. Raises LabError where there is no state.
    """
    found = [
        path
        for stage in stages
        for path in sorted((run / stage).glob("*"))
        if _FILE.fullmatch(f"{stage}/{path.name}") and path.is_file()
    ]
    if not any(path.name.endswith("-state.pt") for path in found):
        raise LabError(f"{run} holds no state yet: a stage saves its first after some hundred steps")
    folder.mkdir(parents=True, exist_ok=True)
    return [made for path in found for made in _put(path, folder)]


def _put(path: Path, folder: Path) -> list[Path]:
    name = f"{path.parent.name}-{path.name}"
    with open(path, "rb") as file:
        hashed = hashlib.sha256()
        while block := file.read(PART_BYTES):
            hashed.update(block)
        digest = hashed.hexdigest()
        file.seek(0)
        parts: list[Path] = []
        while block := file.read(PART_BYTES):
            parts.append(folder / f"{name}.{digest[:12]}.{len(parts):03d}")
            replace_file(parts[-1], block)
        size = file.tell()
    index = {
        "file": f"{path.parent.name}/{path.name}",
        "bytes": size,
        "sha256": digest,
        "parts": [part.name for part in parts],
    }
    replace_file(folder / f"{name}.json", json.dumps(index, indent=1))
    for old in folder.glob(f"{name}.*.*"):
        if _PART.fullmatch(old.name) and old not in parts:
            old.unlink()
    return [*parts, folder / f"{name}.json"]


def take_up_state(folder: Path, run: Path) -> list[str]:
    """Put together in `run` what `carry_state` put into `folder`; returns the files' names in `run`.

    A file that `run` has already is left as it is. Raises LabError when a part is missing or not what it was.
    """
    taken = []
    for path in sorted(folder.glob("*.json")):
        index = _read_index(path)
        target = run / index["file"]
        if target.exists():
            continue

        def write(file: BinaryIO, path: Path = path, index: dict[str, Any] = index) -> None:
            digest = hashlib.sha256()
            for block in _blocks(path, index):
                digest.update(block)
                file.write(block)
            if digest.hexdigest() != index["sha256"] or file.tell() != index["bytes"]:
                raise LabError(
                    f"the parts of {index['file']} in {folder} are not what they were: carry them again"
                )

        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, write)
        taken.append(index["file"])
    return taken


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_bytes())
        named = _FILE.fullmatch(index["file"]) and all(_PART.fullmatch(part) for part in index["parts"])
        if not named or not isinstance(index["sha256"], str) or not isinstance(index["bytes"], int):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise LabError(f"{path} is no index of a carried state: take it away, or carry it again") from None
    return dict(index)


def _blocks(path: Path, index: dict[str, Any]) -> Iterator[bytes]:
    for name in index["parts"]:
        try:
            yield (path.parent / name).read_bytes()
        except OSError:
            raise LabError(f"{path.parent / name} is missing: carry {index['file']} again") from None
