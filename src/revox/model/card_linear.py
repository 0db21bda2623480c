"""Linear layers in 8 or 4 bits on a graphics card, by torchao.

Written for cards of 8 and 6 GB. It has not been run on one: on the CPU, "int8" and "fp8" are tested.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .linear import Weight, as_tensor

FORMATS = ("int8", "int4", "fp8")
_GROUP = 128  # inputs that share a scale in 4 bits, as torch's CUDA kernel takes them
_MULTIPLIES_FP8 = (8, 9)  # the least compute capability that does


def card_linear(weight: Weight, weights: str, device: torch.device) -> nn.Module:
    """A bf16 layer on `device` whose weight `[out, in]` is held as `weights` says, of `FORMATS`.

    int8: a scale per output, activations in bf16. int4: groups of 128 inputs, likewise; int8 where they do
    not fit. fp8: E4M3 with a scale per output, activations too (a scale per row) on cards that multiply it.
    Raises ImportError without torchao.
    """
    from torchao.quantization import quantize_

    values = as_tensor(weight)
    if weights == "int4" and (values.shape[1] % _GROUP or values.shape[0] % 16):
        weights = "int8"
    with torch.device("meta"):
        layer = nn.Linear(values.shape[1], values.shape[0], bias=False)
    layer.weight = nn.Parameter(values.to(device, torch.bfloat16), requires_grad=False)
    quantize_(layer, _configuration(weights, device))
    return layer


def _configuration(weights: str, device: torch.device) -> Any:
    from torchao import quantization

    if weights == "int8":
        return quantization.Int8WeightOnlyConfig()
    if weights == "int4":
        return quantization.Int4WeightOnlyConfig(group_size=_GROUP, int4_packing_format="tile_packed_to_4d")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= _MULTIPLIES_FP8:
        return quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
    return quantization.Float8WeightOnlyConfig()
