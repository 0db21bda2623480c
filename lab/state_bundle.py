"""State bundles: a build's training state in small files, to copy between machines.

A stage's state is one file of up to 64 MB plus its logs. A bundle concatenates them and cuts them into parts,
with an index, `STAGE.json`: files, parts, sizes, a hash. `python -m lab build` restores the bundle of a stage
that has no state yet.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from lab.errors import LabError
from revox.speech.files import replace_file
from revox.training.run import saved_state

STAGES_WITH_STATE = ("teacher", "encoder", "decoder", "finish", "language", "tune")
PART_BYTES = 15_000_000

_FILE = re.compile(r"[a-z]+-state\.pt|[a-z]+-log\.jsonl")
_PART = re.compile(r"[a-z]+\.[0-9a-f]{12}\.\d{3}")


def write_bundles(
    run: Path, folder: Path, stages: Iterable[str] = STAGES_WITH_STATE, *, weights: bool = False
) -> list[Path]:
    """Write the states and logs of `stages` to `folder`, in files of at most `PART_BYTES`; returns the files.

    An earlier bundle of the same stage is replaced. With `weights` a state is a sixth of the size: in bf16,
    without optimizer, the weights their own average where there is one. Raises LabError if there is no state.
    """
    chosen = [stage for stage in stages if (run / stage / f"{stage}-state.pt").is_file()]
    if not chosen:
        raise LabError(f"{run} holds no state yet: a stage first saves its state after a few hundred steps")
    folder.mkdir(parents=True, exist_ok=True)
    return [made for stage in chosen for made in _write(run / stage, folder, weights)]


def _weights(path: Path) -> bytes:
    with saved_state(path) as state:
        found = {name: value for name, value in state.items() if not name.endswith("optimizer")}
    averaged = averaged_weights(found)
    found.pop("averaged", None)
    for name in {"codec", "model"} & found.keys():
        found[name] = {key: averaged.get(key, value) for key, value in found[name].items()}
    buffer = io.BytesIO()
    torch.save(_in_bf16(found), buffer)
    return buffer.getvalue()


def _in_bf16(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _in_bf16(one) for name, one in value.items()}
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(torch.bfloat16)
    return value


def averaged_weights(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The moving average of the weights in a run's state, by the module's own names; empty if it has none."""
    found = state.get("averaged", {}).items()
    return {k.removeprefix("module."): v for k, v in found if k.startswith("module.")}


def _write(stage: Path, folder: Path, weights: bool) -> list[Path]:
    contents = {
        path.name: _weights(path) if weights and path.suffix == ".pt" else path.read_bytes()
        for path in sorted(stage.iterdir())
        if _FILE.fullmatch(path.name) and path.is_file()
    }
    whole = b"".join(contents.values())
    digest = hashlib.sha256(whole).hexdigest()
    parts = []
    for number, start in enumerate(range(0, len(whole), PART_BYTES)):
        parts.append(folder / f"{stage.name}.{digest[:12]}.{number:03d}")
        replace_file(parts[-1], whole[start : start + PART_BYTES])
    index = {
        "files": {name: len(content) for name, content in contents.items()},
        "sha256": digest,
        "parts": [part.name for part in parts],
    }
    replace_file(folder / f"{stage.name}.json", json.dumps(index, indent=1))
    for old in folder.glob(f"{stage.name}.*.*"):
        if _PART.fullmatch(old.name) and old not in parts:
            old.unlink()
    return [*parts, folder / f"{stage.name}.json"]


def restore_bundles(folder: Path, run: Path) -> list[str]:
    """Restore in `run` what `write_bundles` wrote to `folder`; returns the stages that were restored.

    A stage that has a state in `run` is left as it is. Raises LabError if a part is missing or damaged; then
    nothing of its stage is written.
    """
    restored = []
    for stage in STAGES_WITH_STATE:
        path, state = folder / f"{stage}.json", f"{stage}-state.pt"
        if not path.is_file() or (run / stage / state).exists():
            continue
        index = _read_index(path)
        whole = b"".join(_blocks(path, index))
        if hashlib.sha256(whole).hexdigest() != index["sha256"] or len(whole) != sum(index["files"].values()):
            raise LabError(f"the state bundle of {stage} in {folder} is damaged: copy it again")
        (run / stage).mkdir(parents=True, exist_ok=True)
        ends = list(itertools.accumulate(index["files"].values()))
        found = {
            name: whole[end - size : end]
            for (name, size), end in zip(index["files"].items(), ends, strict=True)
        }
        for name in sorted(found, key=lambda name: name == state):
            replace_file(run / stage / name, found[name])
        restored.append(stage)
    return restored


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_bytes())
        files, parts = index["files"], index["parts"]
        named = all(_FILE.fullmatch(name) for name in files) and all(_PART.fullmatch(part) for part in parts)
        sized = all(isinstance(size, int) and size >= 0 for size in files.values())
        if not (named and sized and isinstance(index["sha256"], str)):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise LabError(f"{path} is not the index of a state bundle: remove it, or copy it again") from None
    return dict(index)


def _blocks(path: Path, index: dict[str, Any]) -> Iterator[bytes]:
    for name in index["parts"]:
        try:
            yield (path.parent / name).read_bytes()
        except OSError:
            raise LabError(f"{path.parent / name} is missing: copy the bundle of {path.stem} again") from None
