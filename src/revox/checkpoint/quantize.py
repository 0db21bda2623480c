"""`revox quantize`: a folder of the same checkpoint with its matrices in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.inject import folder_to_write
from revox.checkpoint.params import read_params
from revox.checkpoint.quantized import stored_weights
from revox.checkpoint.readable import check_tensors
from revox.checkpoint.release import CONFIG, HUB_ID, LICENSE, expected_tensors, is_quantizable
from revox.checkpoint.tensors import (
    WEIGHTS,
    TensorHeader,
    folder_tensors,
    read_metadata,
    read_tensor,
    tensor_blocks,
    write_safetensors_stream,
)
from revox.progress import ProgressCallback, ignore_progress
from revox.speech.files import replace_file

if TYPE_CHECKING:
    from revox.model.linear import Int4Weight, Int8Weight

CARD = "README.md"


def write_quantized(
    folder: Path, out: Path, bits: int, progress: ProgressCallback = ignore_progress
) -> tuple[int, int]:
    """Write the checkpoint of `folder` to `out` with the matrices of `is_quantizable` in 8 or 4 bits.

    Everything else is copied: other tensors, params.json, tekken.json, the voices with their records. Memory
    stays at one matrix. Returns the bytes of the weights before and after.

    Raises CheckpointError when the checkpoint cannot be read, is quantized already, or `out` is there.
    """
    if out.exists():
        raise CheckpointError(f"{out} is there already; name a folder that does not exist yet.")
    config = read_params(folder).voxtral_config()
    tensors, expected = folder_tensors(folder), expected_tensors(config)
    check_tensors(
        tensors,
        {n: spec for n, spec in expected.items() if n in tensors or spec.component != "codec_encoder"},
    )
    if stored := stored_weights(tensors, expected):
        kind = next(iter(stored.values())).kind
        raise CheckpointError(f"{folder} is quantized already ({kind}); take the checkpoint as released.")
    entries: list[tuple[str, tuple[int, ...], str, Any]] = []
    for name, entry in tensors.items():
        if name in expected and is_quantizable(name):
            entries += _entries(name, entry, bits)
        else:
            entries.append((name, entry.shape, entry.dtype, _copy_of(entry)))
    files = {entry.file for entry in tensors.values()}
    metadata = {key: text for file in sorted(files) for key, text in read_metadata(file).items()}
    with folder_to_write(folder, out, tensors) as place:
        write_safetensors_stream(place / WEIGHTS, entries, {**metadata, "format": "pt"}, progress)
    return sum(entry.end - entry.start for entry in tensors.values()), (out / WEIGHTS).stat().st_size


def write_card(folder: Path, out: Path, bits: int, sizes: tuple[int, int], quality: str) -> None:
    """The model card of a quantized folder; `quality` is a paragraph with the table of what was measured."""
    release = read_params(folder).voxtral_config() == CONFIG
    card = Template((Path(__file__).parent / "quantized_card.md").read_text()).substitute(
        base=f"base_model: {HUB_ID}\nbase_model_relation: quantized\n" if release else "",
        license=LICENSE,
        bits=bits,
        before=f"{sizes[0] / 1e9:.2f}",
        after=f"{sizes[1] / 1e9:.2f}",
        quality=quality,
    )
    replace_file(out / CARD, card)


def _entries(
    name: str, entry: TensorHeader, bits: int
) -> list[tuple[str, tuple[int, ...], str, Callable[[], Any]]]:
    """The tensors of one quantized matrix: name, shape, type and provider."""
    from revox.model.linear import INT4_GROUP, quantize

    @lru_cache(maxsize=1)
    def parts() -> Mapping[str, Any]:
        return _parts(quantize(read_tensor(name, entry), bits))

    def part(last: str) -> Callable[[], Any]:
        def provide() -> Any:
            tensor = parts()[last]
            if last == "weight_scale":
                parts.cache_clear()  # the last of them: one matrix is in memory at a time
            return tensor

        return provide

    stem, (outputs, inputs) = name.removesuffix("weight"), entry.shape
    if bits == 8 or outputs % 16 or inputs % INT4_GROUP:
        shapes = {"weight": ((outputs, inputs), "I8"), "weight_scale": ((outputs, 1), "F32")}
    else:
        groups = (outputs, inputs // INT4_GROUP)
        shapes = {
            "weight_packed": ((outputs, inputs // 2), "U8"),
            "weight_offset": (groups, "BF16"),
            "weight_scale": (groups, "BF16"),
        }
    return [(f"{stem}{last}", shape, dtype, part(last)) for last, (shape, dtype) in shapes.items()]


def _parts(weight: Int8Weight | Int4Weight) -> dict[str, Any]:
    from revox.model.linear import Int8Weight

    if isinstance(weight, Int8Weight):
        return {"weight": weight.values, "weight_scale": weight.scale[:, None]}
    low, high = weight.values[:, 0::2], weight.values[:, 1::2]
    return {
        "weight_packed": low | high << 4,
        "weight_offset": weight.offset,
        "weight_scale": weight.scale,
    }


def _copy_of(entry: TensorHeader) -> Callable[[], Any]:
    return lambda: tensor_blocks(entry)
