from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from revox.model.layers import CausalConv1d, CausalConvTranspose1d
from revox.model.linear import LARGE, Linear


def built(kind, *sizes):
    torch.manual_seed(0)
    return kind(*sizes).requires_grad_(False)


LAYERS = {
    "product": (Linear, (256, LARGE // 256), (3, 256)),
    "convolution": (CausalConv1d, (24, 16, 7, 1, "reflect"), (1, 24, 9)),
    "with a stride": (CausalConv1d, (24, 16, 4, 2, "replicate"), (2, 24, 6)),
    "transposed": (CausalConvTranspose1d, (24, 16, 4, 2), (2, 24, 5)),
    "transposed, uneven": (CausalConvTranspose1d, (24, 16, 5, 2), (1, 24, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_inference_is_what_torch_computes_and_follows_the_weights(name):
    kind, sizes, shape = LAYERS[name]
    layer, x = built(kind, *sizes), torch.randn(shape)
    parameter = next(layer.parameters())
    for _ in range(2):
        expected = layer(x)  # with gradients on: torch's own
        with torch.inference_mode():
            assert torch.allclose(layer(x), expected, atol=1e-5)
        with torch.no_grad():
            assert torch.allclose(layer(x), expected, atol=1e-5)
            assert torch.allclose(copy.deepcopy(layer)(x), expected, atol=1e-5)
            parameter.mul_(torch.rand_like(parameter))
    with torch.no_grad():
        layer(x)
    layer.requires_grad_(True)
    with torch.no_grad():
        parameter.data += 1  # as unseen as what fused optimizers do
        expected = copy.deepcopy(layer).double()(x.double()).float()
        assert torch.allclose(layer(x), expected, atol=1e-3)
    layer(x).square().sum().backward()
    assert all(one.grad is not None for one in layer.parameters())


@pytest.mark.parametrize("positions", [1, 3, 40])
@pytest.mark.parametrize("kind", [CausalConv1d, CausalConvTranspose1d])
def test_few_and_many_positions_are_the_same_in_double_precision(kind, positions):
    layer = built(kind, 8, 12, 4, 2, *(["replicate"] if kind is CausalConv1d else []))
    x = torch.randn(2, 8, positions)
    with torch.no_grad():
        assert torch.allclose(layer(x), layer.double()(x.double()).float(), atol=1e-5)


def test_under_autocast_a_product_is_torchs():
    layer, x = built(Linear, 256, LARGE // 256), torch.randn(3, 256)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), functional.linear(x, layer.weight))
        assert layer(x).dtype == torch.bfloat16
