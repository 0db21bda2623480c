"""Linear layers, and those for processors, whose weights are held in another way than they are stored.

A frame of speech reads nearly every weight and multiplies it by a few rows only, so that the time it takes is
the time to read the weights: fewer bits are faster. Layers of 8 and 4 bits have no gradient.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

INT4_GROUP = 32
"""Inputs that share a scale and an offset in a 4-bit weight."""
_ROWS_IN_FLOAT32 = 16
_BLOCK, _QUANTIZED = 1024, 128  # outputs converted at once
LARGE, LARGEST = 3 * 2**16, 2**22
"""Numbers in a weight, from which oneDNN's product is quicker than its call (at six rows, on AVX2), and up to
which a second copy is no matter: all of the codec's at the release's sizes, few of the language model's."""
_in_one_digit: ContextVar[bool] = ContextVar("_in_one_digit", default=False)


@dataclass(frozen=True)
class Int8Weight:
    """A weight `[out, in]` as `values` int8 times `scale` float32 `[out]`: symmetric, a scale per output."""

    values: Tensor
    scale: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weight:
        """The nearest to `weight` `[out, in]`, the largest value of each output at +-127."""
        values, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight))
        for start in range(0, len(weight), _QUANTIZED):  # copies in float32 stay in the processor's cache
            block = weight[start : start + _QUANTIZED].to(torch.float32, copy=True)
            scales = _largest(block) / 127
            scale[start : start + _QUANTIZED] = scales[:, 0]
            values[start : start + _QUANTIZED] = block.div_(scales).round_()
        return cls(values, scale)

    def dequantize(self) -> Tensor:
        """The weight in float32, `[out, in]`."""
        return self.values.float() * self.scale[:, None]


@dataclass(frozen=True)
class Int4Weight:
    """A weight `[out, in]` as `values` 0 to 15 (uint8), each (value - 8) * scale + offset.

    `scale` and `offset` are bf16 `[out, in / INT4_GROUP]`.
    """

    values: Tensor
    scale: Tensor
    offset: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Int4Weight:
        """The nearest to `weight` `[out, in]`, from the least to the greatest value of each group.

        Raises ValueError when groups do not divide `in`.
        """
        if weight.shape[1] % INT4_GROUP:
            raise ValueError(f"{weight.shape[1]} inputs are not whole groups of {INT4_GROUP}")
        parts = [cls._of_block(weight[i : i + _BLOCK]) for i in range(0, len(weight), _BLOCK)]
        return cls(*(torch.cat(part) for part in zip(*parts, strict=True)))

    @staticmethod
    def _of_block(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups = weight.float().unflatten(1, (-1, INT4_GROUP))
        low, high = groups.aminmax(dim=-1)
        scale = ((high - low) / 15).clamp_min(1e-8).bfloat16()
        offset = (low + 8 * scale.float()).bfloat16()
        values = (groups - offset.float()[..., None]).div_(scale.float()[..., None]).round_().add_(8)
        return values.clamp_(0, 15).flatten(1).to(torch.uint8), scale, offset

    def dequantize(self) -> Tensor:
        """The weight in float32, `[out, in]`."""
        groups = self.values.float().unflatten(1, (-1, INT4_GROUP)) - 8
        return (groups * self.scale.float()[..., None] + self.offset.float()[..., None]).flatten(1)


Weight = Tensor | Int8Weight | Int4Weight


def as_tensor(weight: Weight) -> Tensor:
    """A weight as one tensor: float32 where it has 8 or 4 bits."""
    return weight if isinstance(weight, Tensor) else weight.dequantize()


@contextmanager
def one_digit() -> Iterator[None]:
    """Every `Int8Linear` within takes one digit: for prompts, whose many rows are bound by arithmetic."""
    token = _in_one_digit.set(True)
    try:
        yield
    finally:
        _in_one_digit.reset(token)


class Int8Linear(nn.Module):
    """`[..., in] -> [..., out]`: 8-bit weights times activations in one or two 8-bit digits.

    Each row of activations is divided by its largest value, by that alone, so that no row depends on the
    others; then it is rounded to 8 bits, and with two `digits` what rounding left is a second row of 8 bits.
    Both rows meet the weights in one product, which costs little where reading the weights is what takes
    time. Where many rows do, and less depends on them, one digit is enough (docs/performance.md).

    The product is FBGEMM's, on weights that are packed here, once; where torch is built without FBGEMM it is
    `torch._int_mm`. Without the VNNI instructions FBGEMM adds pairs of products in 16 bits, which can
    overflow: digits then have 7 bits.
    """

    def __init__(self, weight: Int8Weight, digits: int = 2) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.values.shape
        self.packed, self.scale, self.digits = None, weight.scale, digits
        if has_fbgemm():
            zeros = torch.zeros(self.out_features, dtype=torch.long)
            with warnings.catch_warnings():
                # torch means to remove this type of tensor; without it, `has_fbgemm` is false.
                warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
                stored = torch._make_per_channel_quantized_tensor(
                    weight.values, weight.scale.double(), zeros, 0
                )
            self.packed = torch.ops.quantized.linear_prepack(stored, None)
        else:
            self.values = weight.values.t()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `x` `[..., in]`; the result has its dtype."""
        return self._multiply(self._rounded(x), x)

    @property
    def _half(self) -> int:
        return 127 if self.packed is None or _has_vnni() else 63

    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The digits of `x`, in float32 and not yet rounded to whole numbers, and the step of each row."""
        rows = x.reshape(-1, self.in_features).float()
        half = self._half
        step = _largest(rows).mul_(1 / half)
        rows = rows / step
        if self.digits == 2 and not _in_one_digit.get():
            high = rows.round()
            rows = torch.cat((high, (rows - high).mul_(2 * half)))
        return rows, step

    def _multiply(self, rounded: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        rows, step = rounded
        half = self._half
        if self.packed is not None:
            product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
                rows, 1.0, half + 1, self.packed
            )
        else:
            product = torch._int_mm(rows.round().to(torch.int8), self.values) * self.scale
        count = len(step)
        if len(rows) > count:
            product = product[:count].add_(product[count:], alpha=0.5 / half)
        return product.mul_(step).to(x.dtype).reshape(*x.shape[:-1], self.out_features)


def products(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """What each of the `layers` makes of the same `x`; 8-bit layers of as many digits round it once."""
    first = layers[0]
    if isinstance(first, Int8Linear) and all(
        isinstance(layer, Int8Linear) and layer.digits == first.digits for layer in layers
    ):
        rounded = first._rounded(x)
        return [cast(Int8Linear, layer)._multiply(rounded, x) for layer in layers]
    return [layer(x) for layer in layers]


class Int4Linear(nn.Module):
    """`[..., in] -> [..., out]`: 4-bit weights times activations in bf16, by torch's packed kernel."""

    def __init__(self, weight: Int4Weight) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.values.shape
        self.packed = torch._convert_weight_to_int4pack_for_cpu(weight.values.int(), 2)
        self.scales = torch.stack((weight.scale, weight.offset), dim=-1).transpose(0, 1).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `x` `[..., in]`; the result has its dtype."""
        rows = x.reshape(-1, self.in_features).bfloat16()
        product = torch._weight_int4pack_mm_for_cpu(rows, self.packed, INT4_GROUP, self.scales)
        return product.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


class Frozen:
    """What is computed of parameters once, while they are the same; for inference."""

    def __init__(self) -> None:
        self._known: tuple[list[tuple[Tensor, int, int]], Tensor] | None = None

    def __getstate__(self) -> dict[str, None]:  # a copy computes its own
        return {"_known": None}

    def of(self, parameters: Iterable[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """`compute()` of the parameters, or what it was; `is_inference` of them must hold."""
        now = [(one, one.data_ptr(), one._version) for one in parameters]
        known = self._known
        if known is None or len(now) != len(known[0]) or _differ(now, known[0]):
            known = self._known = now, compute()
        return known[1]


def _differ(now: list[tuple[Tensor, int, int]], before: list[tuple[Tensor, int, int]]) -> bool:
    return any(a is not b or seen != known for (a, *seen), (b, *known) in zip(now, before, strict=True))


def is_inference(x: Tensor, parameter: Tensor) -> bool:
    """Whether `x` and a frozen parameter may take ways of float32 on a processor that have no gradient.

    Not one that is trained: fused optimizers change it unseen.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if parameter.requires_grad or parameter.is_inference():
        return False
    plain = x.dtype == parameter.dtype == torch.float32 and x.device.type == "cpu"
    return plain and not torch.is_autocast_enabled("cpu")


class Linear(nn.Linear):
    """torch's without a bias; where a large one infers in float32 on a processor, oneDNN's, laid out once.

    MKL, which torch takes, can need 2.5 times as long for a few rows (docs/performance.md).
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self._laid_out, self._large = Frozen(), LARGE <= in_features * out_features <= LARGEST

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `x` `[..., in]`."""
        if not (self._large and is_inference(x, self.weight) and _has_onednn()):
            return functional.linear(x, self.weight)
        return _product(x, self._laid_out.of([self.weight], lambda: _laid_out(self.weight.detach())))


def _laid_out(weight: Tensor) -> Tensor:
    """A float32 weight as oneDNN's products want it, or itself where torch has none."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, 8) if _has_onednn() else weight


def _product(x: Tensor, laid_out: Tensor) -> Tensor:
    if not laid_out.is_mkldnn:
        return functional.linear(x, laid_out)
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, laid_out, None, "none", [], ""))


@cache
def _has_onednn() -> bool:
    ops = torch.ops.mkldnn
    there = hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
    return there and torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


class BFloat16Linear(nn.Module):
    """`[..., in] -> [..., out]` in bf16, for processors without bf16 instructions.

    There every row of a product takes as long as the first, so many rows are multiplied in float32, with a
    block of the weight converted at a time. A `wide` layer is one that always has several rows: without
    gradients it multiplies by a copy of its weight in float32, which it makes when it is first asked.
    """

    def __init__(self, weight: Tensor, wide: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.out_features, self.in_features = weight.shape
        self.wide, self._in_float32 = wide, Frozen()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `x` `[..., in]`."""
        weight = self.weight
        plain = isinstance(weight, nn.Parameter) and not weight.is_inference()
        if self.wide and plain and not torch.is_grad_enabled():
            held = self._in_float32.of([weight], lambda: _laid_out(weight.detach().float()))
            return _product(x.float(), held).to(x.dtype)
        if x.numel() < _ROWS_IN_FLOAT32 * x.shape[-1]:
            return functional.linear(x, weight)
        rows = x.float()
        blocks = [functional.linear(rows, block.float()) for block in weight.split(_BLOCK)]
        return torch.cat(blocks, dim=-1).to(x.dtype)


def quantize(weight: Weight, bits: int) -> Int8Weight | Int4Weight:
    """A weight in 8 or 4 bits, itself where it has them; 8 where groups of 4-bit weights do not fit."""
    if isinstance(weight, Int8Weight if bits == 8 else Int4Weight):
        return weight
    weight = as_tensor(weight)
    if bits == 4 and weight.shape[1] % INT4_GROUP == 0 and weight.shape[0] % 16 == 0:
        return Int4Weight.of(weight)
    return Int8Weight.of(weight)


def quantized_linear(weight: Weight, bits: int, digits: int = 2) -> nn.Module:
    """The layer of a weight `[out, in]`, held as `quantize` says; `digits` as for `Int8Linear`."""
    held = quantize(weight, bits)
    return Int4Linear(held) if isinstance(held, Int4Weight) else Int8Linear(held, digits)


@cache
def has_fbgemm() -> bool:
    """Whether torch has FBGEMM's products of 8-bit weights (on x86, with AVX2)."""
    return "fbgemm" in torch.backends.quantized.supported_engines and hasattr(
        torch, "_make_per_channel_quantized_tensor"
    )


@cache
def multiplies_bf16() -> bool:
    """Whether this processor has instructions for products in bf16."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")):
        return False  # built without oneDNN
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


@cache
def _has_vnni() -> bool:
    return torch.cpu._is_vnni_supported()


def _largest(rows: Tensor) -> Tensor:
    """The largest absolute value of each row, `[rows, 1]`; never 0."""
    largest = torch.maximum(rows.amax(dim=1, keepdim=True), rows.amin(dim=1, keepdim=True).neg_())
    return largest.clamp_min_(1e-10)
