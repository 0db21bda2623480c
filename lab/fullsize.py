"""A checkpoint of random weights with the release's exact inventory, for checks of memory and speed.

Nothing of it speaks: it has the release's files, tensor names, shapes and types (386 tensors, 8.0 GB), and 20
voices of the release's lengths whose rows are sums over its own embedding table, and a small tekken.json.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from lab.errors import LabError
from revox.checkpoint.params import Params
from revox.checkpoint.release import (
    EMBEDDING_TABLE,
    END_POSITION_NORM,
    POSITION_NORM,
    PRESETS,
    TensorSpec,
    expected_tensors,
    release_params,
)
from revox.checkpoint.tensors import WEIGHTS, write_safetensors_stream
from revox.model.config import END_AUDIO_ID, N_SPECIAL_CODES, VoxtralConfig
from revox.progress import ProgressCallback, ignore_progress
from revox.speech.files import pt_bytes, replace_file

_ROW_NORM, _END_ROW_NORM = sum(POSITION_NORM) / 2, sum(END_POSITION_NORM) / 2
_WEIGHT_STD = 0.02
_LAYER_SCALE = 0.01
_BLOCK = 1 << 22  # elements generated at once


def write_fullsize(
    folder: str | Path,
    seed: int = 0,
    progress: ProgressCallback = ignore_progress,
    with_encoder: bool = False,
) -> Path:
    """Write the full-size folder (8.0 GB; 8.3 GB with the encoder) and return its path.

    The same seed gives the same bytes. Memory stays in the hundreds of megabytes.

    Args:
        folder: made if it is not there; must be empty or hold an earlier one.
        seed: of the random weights and voices.
        progress: called with the bytes written.
        with_encoder: also write the 114 tensors that the release withholds.

    Raises:
        LabError: the folder holds something else, or the disk is too full.
    """
    return write_random_checkpoint(folder, release_params(), PRESETS, seed, progress, with_encoder)


def write_random_checkpoint(
    folder: str | Path,
    params: dict[str, Any],
    voices: dict[str, int],
    seed: int = 0,
    progress: ProgressCallback = ignore_progress,
    with_encoder: bool = False,
) -> Path:
    """Write a checkpoint of random weights with the sizes of `params` and `voices` {name: rows}.

    As `write_fullsize`, for any sizes: small ones make a complete checkpoint in milliseconds.
    """
    folder = Path(folder)
    config = Params.model_validate(params).voxtral_config()
    specs = {
        name: spec
        for name, spec in expected_tensors(config).items()
        if with_encoder or spec.component != "codec_encoder"
    }
    _prepare(folder, sum(spec.parameters for spec in specs.values()) * 2)
    table = _embedding_table(specs[EMBEDDING_TABLE], config, seed)
    write_safetensors_stream(
        folder / WEIGHTS,
        [(name, spec.shape, spec.dtype, _provider(name, specs, table, seed)) for name, spec in specs.items()],
        metadata={"format": "pt"},
        progress=progress,
    )
    for name, rows in voices.items():
        codes = random_codes(config, rows - 1, _generator(seed, f"voice {name}"))
        _write_voice(folder / "voice_embedding" / f"{name}.pt", voice_embedding(table, codes, config))
    from lab.tokenizer import write_tekken

    codec = config.codec
    write_tekken(
        folder / "tekken.json", voices, sampling_rate=codec.sampling_rate, frame_rate=codec.frame_rate
    )
    replace_file(folder / "params.json", json.dumps(params, indent=2) + "\n")
    return folder


def random_codes(config: VoxtralConfig, frames: int, generator: np.random.Generator) -> np.ndarray:
    """Uniform random codes int64 `[codebooks, frames]`."""
    codec = config.codec
    semantic = generator.integers(0, codec.semantic_codebook_size, (1, frames))
    acoustic = generator.integers(0, codec.acoustic_codebook_size, (codec.acoustic_dim, frames))
    return np.concatenate([semantic, acoustic])


def voice_embedding(table: np.ndarray, codes: np.ndarray, config: VoxtralConfig) -> np.ndarray:
    """Rows of a voice, uint16 bits of bf16 `[frames + 1, dim]`, for codes `[codebooks, frames]`.

    Each is the float32 sum of one table row a codebook, rounded once; the last is the end frame's (semantic
    id 1, acoustic ids 0). `table` holds the bits of the bf16 embedding table.
    """
    offsets = np.cumsum([0, *config.codebook_rows[:-1]])
    end = np.zeros((codes.shape[0], 1), dtype=np.int64)
    end[0] = END_AUDIO_ID
    ids = np.concatenate([codes + N_SPECIAL_CODES, end], axis=1) + offsets[:, None]
    rows = np.zeros((ids.shape[1], table.shape[1]), dtype=np.float32)
    for codebook in ids:
        rows += _to_float32(table[codebook])
    return _to_bf16(rows)


def _prepare(folder: Path, wanted: int) -> None:
    if folder.exists() and not folder.is_dir():
        raise LabError(f"{folder} is a file; name a folder that does not exist yet, or an empty one")
    ours = {WEIGHTS, "params.json", "tekken.json", "voice_embedding"}
    if folder.is_dir() and any(
        entry.name not in ours and entry.suffix != ".tmp" for entry in folder.iterdir()
    ):
        raise LabError(f"{folder} holds other files; name a folder that does not exist yet, or an empty one")
    (folder / "voice_embedding").mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < wanted * 1.01:
        raise LabError(
            f"{folder} needs {wanted / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free; make room first"
        )


def _provider(name: str, specs: dict[str, TensorSpec], table: np.ndarray, seed: int) -> Callable[[], Any]:
    """The blocks of one tensor, made when its turn comes; each tensor has its own generator."""
    spec = specs[name]
    if name == EMBEDDING_TABLE:
        return lambda: table
    if name.endswith("norm.weight") or name.endswith("cluster_usage"):
        return lambda: _constant(spec.parameters, 1.0)
    if name.endswith(("attention_scale", "ffn_scale")):
        return lambda: _constant(spec.parameters, _LAYER_SCALE)
    if name.endswith("original0"):
        # The gain of a weight-normed convolution: the norm of its direction, so that w = v.
        direction = name.removesuffix("0") + "1"
        return lambda: _norms(direction, specs[direction].shape, seed)
    return lambda: _normal(name, spec.parameters, _std(name, spec.shape), seed)


def _std(name: str, shape: tuple[int, ...]) -> float:
    if name.endswith("embedding_sum"):
        return 1.0
    if name.startswith("audio_tokenizer.") and len(shape) == 3:
        return 1 / math.sqrt(shape[1] * shape[2])
    if name.startswith("audio_tokenizer."):
        return 1 / math.sqrt(shape[-1])
    return _WEIGHT_STD


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))


@lru_cache(maxsize=1)
def _unit_normal() -> np.ndarray:
    """65,536 equally likely values of the standard normal, float32: a uniform 16-bit number picks one."""
    unit = NormalDist()
    half = np.array([unit.inv_cdf((i + 0.5) / 65536) for i in range(32768, 65536)], dtype=np.float32)
    return np.concatenate([-half[::-1], half])


@lru_cache(maxsize=8)
def _scaled_normal(std: float) -> np.ndarray:
    return _to_bf16(_unit_normal() * np.float32(std))


def _normal(name: str, count: int, std: float, seed: int) -> Iterator[np.ndarray]:
    """Blocks of `count` normal values of deviation `std`, as bits of bf16."""
    values, generator = _scaled_normal(std), _generator(seed, name)
    for start in range(0, count, _BLOCK):
        drawn = generator.integers(0, 65536, min(_BLOCK, count - start), dtype=np.uint16)
        yield values[drawn]


def _constant(count: int, value: float) -> np.ndarray:
    return np.full(count, _to_bf16(np.array([value], dtype=np.float32))[0])


def _norms(direction: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    # Drawn again rather than kept: the gain stands before the direction in the file.
    bits = np.concatenate(list(_normal(direction, math.prod(shape), _std(direction, shape), seed)))
    return _to_bf16(np.linalg.norm(_to_float32(bits).reshape(shape[0], -1), axis=1))


def _embedding_table(spec: TensorSpec, config: VoxtralConfig, seed: int) -> np.ndarray:
    """Bits of the audio embedding table `[rows, dim]`, scaled for rows of the norms seen in the release."""
    rows, dim = spec.shape
    unit = math.sqrt(config.codec.n_codebooks * dim)
    blocks = list(_normal(EMBEDDING_TABLE, rows * dim, _ROW_NORM / unit, seed))
    table = np.concatenate(blocks).reshape(rows, dim)
    offsets = np.cumsum([0, *config.codebook_rows[:-1]])
    end = [END_AUDIO_ID, *offsets[1:]]
    table[end] = _to_bf16(_to_float32(table[end]) * np.float32(_END_ROW_NORM / _ROW_NORM))
    return table


def _write_voice(path: Path, rows: np.ndarray) -> None:
    import torch

    replace_file(path, pt_bytes(torch.from_numpy(rows).view(torch.bfloat16)))


def _to_bf16(values: np.ndarray) -> np.ndarray:
    """Bits of float32 values rounded to bf16, half to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)
