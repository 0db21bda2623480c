"""Weights that a folder stores in fewer bits: what the tensors of each stand for.

revox's own int8 and int4 (`revox quantize`), FP8 and INT8 with scales, bitsandbytes' INT8 and NF4, and MLX's
groups of 4 and 8 bits. Each gives the values that its own library gives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.release import TensorSpec
from revox.checkpoint.tensors import TensorHeader, read_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from revox.model.linear import Int4Weight, Int8Weight

SCALES = ("weight_scale", "weight_scale_inv", "scale_weight", "qscale_weight")
"""Names of the scale beside an FP8 weight; whatever the name, the weight is multiplied by it."""
INT8, INT4 = "revox int8", "revox int4"
_LASTS = (
    "weight", "weight_packed", "weight_offset", "weight_format", "SCB", "scales", "biases", "input_scale",
    "qscale_act", "weight_zero_point", "weight_scale_2", "weight_global_scale", *SCALES,
    "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4",
)  # fmt: skip
"""Last names of the tensors of one weight, in any of the formats; some that mark others."""


@dataclass(frozen=True)
class StoredWeight:
    """A matrix as it is stored: `kind`, the `shape` it stands for, and its tensors by their last names."""

    kind: str
    shape: tuple[int, ...]
    parts: Mapping[str, tuple[str, TensorHeader]]

    def read(self) -> Tensor | Int8Weight | Int4Weight:
        """What it stands for: float32, or 8 or 4 bits where those are exactly what is stored.

        Imports torch. Raises CheckpointError when the parts do not fit together.
        """
        tensors = {last: read_tensor(*part) for last, part in self.parts.items()}
        try:
            value = _READERS[self.kind](tensors, self.shape)
        except (LookupError, ArithmeticError, TypeError, ValueError, RuntimeError) as error:  # damaged
            value = None
            reason = next(iter(str(error).splitlines()), type(error).__name__)
        else:
            reason = f"it is {list(_shape_of(value))}"
        if value is None or _shape_of(value) != self.shape:
            name, entry = next(iter(self.parts.values()))
            raise CheckpointError(
                f"{entry.file}: {name} ({self.kind}) does not stand for a matrix {list(self.shape)} "
                f"({reason}); copy or download the file again."
            )
        return value


def stored_weights(
    tensors: Mapping[str, TensorHeader], expected: Mapping[str, TensorSpec]
) -> dict[str, StoredWeight]:
    """Those of the `expected` tensors that are stored in fewer bits, in a way that is read rightly."""
    found = {name: _stored(name, spec.shape, tensors) for name, spec in expected.items()}
    return {name: weight for name, weight in found.items() if weight is not None}


def _stored(name: str, shape: tuple[int, ...], tensors: Mapping[str, TensorHeader]) -> StoredWeight | None:
    stem = name.removesuffix("weight")
    parts = {last: (stem + last, tensors[stem + last]) for last in _LASTS if stem + last in tensors}
    lasts, dtype = set(parts), parts["weight"][1].dtype if "weight" in parts else None
    kind = None
    if lasts == {"weight_packed", "weight_scale", "weight_offset"}:
        kind = INT4
    elif dtype in ("F8_E4M3", "F8_E5M2") and lasts <= {"weight", *SCALES, "input_scale", "qscale_act"}:
        kind = "FP8"
    elif dtype == "I8" and lasts == {"weight", "weight_scale"}:
        kind = INT8
    elif dtype == "I8" and {"weight", "SCB"} <= lasts <= {"weight", "SCB", "weight_format"}:
        kind = "bitsandbytes INT8"
    elif dtype == "U8" and "weight.quant_state.bitsandbytes__nf4" in lasts:
        kind = "bitsandbytes NF4"
    elif dtype == "U32" and lasts == {"weight", "scales", "biases"}:
        kind = "MLX groups"
    return None if kind is None else StoredWeight(kind, shape, parts)


def _shape_of(value: Any) -> tuple[int, ...]:
    return tuple(value.values.shape if hasattr(value, "scale") else value.shape)


# ------------------------------------------------------------------------------------- what they stand for


def _int8(parts: dict[str, Tensor], shape: tuple[int, ...]) -> Int8Weight:
    from revox.model.linear import Int8Weight

    scale = parts["weight_scale"].float().reshape(-1)
    return Int8Weight(parts["weight"], scale.expand(shape[0]).contiguous())


def _int4(parts: dict[str, Tensor], shape: tuple[int, ...]) -> Int4Weight:
    from revox.model.linear import INT4_GROUP, Int4Weight

    for last in ("weight_scale", "weight_offset"):
        _check_shape(parts, last, (shape[0], shape[1] // INT4_GROUP))
    packed = parts["weight_packed"]
    values = packed.new_empty(shape)
    values[:, 0::2], values[:, 1::2] = packed & 15, packed >> 4
    return Int4Weight(values, parts["weight_scale"], parts["weight_offset"])


def _check_shape(parts: dict[str, Tensor], last: str, shape: tuple[int, ...]) -> None:
    if parts[last].shape != shape:
        raise ValueError(f"{last} is {list(parts[last].shape)} and should be {list(shape)}")


def _fp8(parts: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """With one scale, one an output channel, or one a block (DeepSeek's 128 x 128)."""
    weight = parts["weight"].float()
    for last in SCALES:
        if last not in parts:
            continue
        scale = parts[last].float()
        if scale.numel() == 1:
            weight = weight * scale.reshape(())
        elif scale.numel() == len(scale) == shape[0]:
            weight = weight * scale.reshape(-1, 1)
        else:
            rows, columns = (_block(size, count) for size, count in zip(shape, scale.shape, strict=True))
            scale = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            weight = weight * scale[: shape[0], : shape[1]]
    return weight


def _block(size: int, count: int) -> int:
    """The size of blocks of which `count` cover `size`: a power of two, as all formats have."""
    block = 1
    while count > 0 and block * count < size:
        block *= 2
    if not count or -(-size // block) != count:
        raise ValueError(f"{count} scales do not cover {size} values in blocks")
    return block


def _bitsandbytes_int8(parts: dict[str, Tensor], shape: tuple[int, ...]) -> Int8Weight:
    """LLM.int8(): a row's largest value (SCB) at 127. Only the plain layout of rows is written today."""
    from revox.model.linear import Int8Weight

    if "weight_format" in parts and int(parts["weight_format"]) != 0:
        raise ValueError("a layout of rows other than bitsandbytes' plain one")
    _check_shape(parts, "SCB", (shape[0],))
    return Int8Weight(parts["weight"], parts["SCB"].float() / 127)


def _bitsandbytes_nf4(parts: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """QLoRA's NF4: the high nibble first, a largest value per block, itself quantized where it is nested."""
    import torch

    state = json.loads(bytes(parts["weight.quant_state.bitsandbytes__nf4"].tolist()))
    if tuple(state["shape"]) != shape:
        raise ValueError(f"its state says {state['shape']}")
    packed = parts["weight"].reshape(-1)
    nibbles = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)[: shape[0] * shape[1]]
    largest = parts["weight.absmax"]
    if "weight.nested_absmax" in parts:
        outer = _of_blocks(parts["weight.nested_absmax"], int(state["nested_blocksize"]), len(largest))
        largest = parts["weight.nested_quant_map"][largest.int()] * outer
        largest = largest + float(state["nested_offset"])
    outer = _of_blocks(largest.float(), int(state["blocksize"]), shape[0] * shape[1])
    return (parts["weight.quant_map"].float()[nibbles.int()] * outer).reshape(shape)


def _of_blocks(values: Tensor, block: int, count: int) -> Tensor:
    """A value of each block, repeated for the `count` values that the blocks hold."""
    if block < 1 or len(values) != -(-count // block):
        raise ValueError(f"{len(values)} blocks of {block} do not hold {count} values")
    return values.repeat_interleave(min(block, count))[:count]


def _mlx(parts: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """`scale * value + bias` by groups of a row; values of 4 or 8 bits, the lowest first in 32."""
    scales, biases = parts["scales"].float(), parts["biases"].float()
    _check_shape(parts, "biases", (shape[0], scales.shape[1]))
    packed = parts["weight"].view(-1, parts["weight"].shape[-1])
    bits, group = 32 * packed.shape[1] // shape[1], shape[1] // scales.shape[1]
    if bits not in (4, 8):
        raise ValueError(f"values of {bits} bits")
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int64)
    values = (packed.to(torch.int64)[:, :, None] >> shifts) & (2**bits - 1)
    groups = values.flatten(1).float().unflatten(1, (-1, group))
    return (groups * scales[..., None] + biases[..., None]).flatten(1)


_READERS: dict[str, Callable[[dict[str, Tensor], tuple[int, ...]], Any]] = {
    INT8: _int8,
    INT4: _int4,
    "FP8": _fp8,
    "bitsandbytes INT8": _bitsandbytes_int8,
    "bitsandbytes NF4": _bitsandbytes_nf4,
    "MLX groups": _mlx,
}
