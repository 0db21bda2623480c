"""Can the weights be read as they are? One answer for the loader, the inspection and the doctor."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.quantized import stored_weights
from revox.checkpoint.release import TensorSpec
from revox.checkpoint.tensors import FLOAT_DTYPES, TensorHeader

# What quantizers store beside a weight, or in its place.
_COMPANIONS = re.compile(
    r"(?:\.(?:scales|biases|qweight|qzeros|g_idx|SCB|absmax|quant_map|nested_absmax|nested_quant_map|zero_point|"
    r"weight_packed|weight_shape|weight_zero_point|weight_offset|weight_format|input_scale|weight_global_scale|qscale_weight|qscale_act)"
    r"|\.?weight_scale(?:_inv|_2)?|\.quant_state\..*)$"
)


def is_companion(name: str) -> bool:
    """Whether a tensor of this name belongs to a quantized weight: a scale, a zero point, a packed form."""
    return _COMPANIONS.search(name) is not None


def quantization(tensors: Mapping[str, TensorHeader]) -> str | None:
    """How the weights are quantized, in words, or None if they are not."""
    suffixes = {match[0].lstrip(".") for name in tensors if (match := _COMPANIONS.search(name))}
    types: dict[str, int] = {}
    for name, entry in tensors.items():
        if entry.dtype not in FLOAT_DTYPES and entry.dtype != "F64" and not is_companion(name):
            types[entry.dtype] = types.get(entry.dtype, 0) + 1
    if not suffixes and not any(dtype.startswith(("F8", "F6", "F4")) for dtype in types):
        return None  # an integer tensor without scales is a mistake, not a quantized weight
    if "scales" in suffixes and "U32" in types:
        kind = "MLX groups"
    elif "qweight" in suffixes:
        kind = "GPTQ or AWQ"
    elif suffixes & {"SCB", "absmax"}:
        kind = "bitsandbytes"
    elif any(dtype.startswith("F8") for dtype in types):
        kind = "FP8"
    elif "I8" in types:
        kind = "INT8 with scales"
    else:
        kind = "unknown kind"
    listed = [f"{count} tensors in {dtype}" for dtype, count in sorted(types.items())]
    named = [f"*.{suffix}" if "." not in suffix else suffix for suffix in sorted(suffixes)[:4]]
    return ", ".join([kind, *listed, *named])


def unreadable(tensors: Mapping[str, TensorHeader], expected: Mapping[str, TensorSpec]) -> str | None:
    """Why revox would not read the right values from these tensors: a sentence, or None if it would.

    Read rightly are plain BF16, F16 and F32 tensors, and what `revox.checkpoint.quantized` knows. Another
    scale beside a weight changes what the weight means, whatever the weight's own type is.
    """
    stored = stored_weights(tensors, expected)
    used = {name for weight in stored.values() for name, _ in weight.parts.values()}
    kind = quantization({name: entry for name, entry in tensors.items() if name not in used})
    if kind is not None:
        return (
            f"The weights are quantized ({kind}) in a way that revox does not read. Take the checkpoint as "
            "released; `revox quantize CHECKPOINT --weights int8 --out FOLDER` makes a smaller folder of it."
        )
    wrong = (n for n in expected if n in tensors and n not in stored and tensors[n].dtype not in FLOAT_DTYPES)
    return next((mismatch(name, tensors[name], expected[name]) for name in wrong), None)


def check_tensors(tensors: Mapping[str, TensorHeader], expected: Mapping[str, TensorSpec]) -> None:
    """Raise CheckpointError unless every expected tensor is there, readable and of its shape."""
    why, stored = unreadable(tensors, expected), stored_weights(tensors, expected)
    absent = [name for name in expected if name not in tensors and name not in stored]
    if why is None and absent:
        file = next((str(entry.file) for entry in tensors.values()), "The folder")
        why = missing(file, absent, expected)
    for name, spec in expected.items():
        if why is None and name not in stored and tensors[name].shape != spec.shape:
            why = mismatch(name, tensors[name], spec)
    if why is not None:
        raise CheckpointError(why)


def missing(file: str, absent: Sequence[str], expected: Mapping[str, TensorSpec]) -> str:
    """The sentence about tensors that are not there."""
    first = expected[absent[0]]
    return (
        f"{file} lacks {len(absent)} of the {len(expected)} tensors that params.json asks for, the first "
        f"being {absent[0]} ({first.dtype} {list(first.shape)}); copy or download it again."
    )


def mismatch(name: str, found: TensorHeader, spec: TensorSpec) -> str:
    """The sentence about a tensor of another type or shape than params.json asks for."""
    return (
        f"{found.file}: tensor {name} is {found.dtype} {list(found.shape)}, where params.json asks for "
        f"{spec.dtype} {list(spec.shape)}; copy or download the file again, or take the params.json that "
        "belongs to it."
    )
