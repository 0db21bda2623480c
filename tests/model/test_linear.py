"""Layers of 8 and 4 bits against the product of the weights that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from revox.model import linear
from revox.model.linear import (
    INT4_GROUP,
    BFloat16Linear,
    Int4Linear,
    Int4Weight,
    Int8Linear,
    Int8Weight,
    one_digit,
    products,
    quantized_linear,
)


def weight_of(outputs: int, inputs: int) -> torch.Tensor:
    return 0.02 * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))


def rows_of(*shape: int) -> torch.Tensor:
    """Activations with outliers, as trained models have."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    x[..., 3] *= 40
    return x


def without_fbgemm(weight: Int8Weight, monkeypatch: pytest.MonkeyPatch) -> Int8Linear:
    monkeypatch.setattr(linear, "has_fbgemm", lambda: False)
    return Int8Linear(weight)


@pytest.mark.parametrize("digits", ["8 bits", "7 bits", "without FBGEMM"])
def test_a_product_of_8_bit_weights_is_as_exact_as_activations_in_float(digits, monkeypatch):
    weight, x = Int8Weight.of(weight_of(96, 320)), rows_of(2, 5, 320)
    if digits == "8 bits" and not linear._has_vnni():
        pytest.skip("this processor takes 7 bits")
    if digits == "without FBGEMM":
        layer = without_fbgemm(weight, monkeypatch)
    else:
        monkeypatch.setattr(linear, "_has_vnni", lambda: digits == "8 bits")
        layer = Int8Linear(weight)
    exact = x.double() @ weight.dequantize().double().T
    assert layer(x).shape == (2, 5, 96)
    assert (layer(x) - exact).norm() < 1e-3 * exact.norm()


def test_one_digit_is_coarser_and_prompts_get_it():
    weight, x = Int8Weight.of(weight_of(96, 320)), rows_of(5, 320)
    exact = x.double() @ weight.dequantize().double().T

    def error(layer: Int8Linear) -> float:
        return float((layer(x) - exact).norm() / exact.norm())

    two, one = Int8Linear(weight), Int8Linear(weight, digits=1)
    with one_digit():
        assert error(two) == error(one)
    assert error(two) < 1e-3 < error(one) < 0.1


def test_the_largest_sums_of_8_bit_products_do_not_overflow(monkeypatch):
    # All values at their limits: pairs of products in 16 bits would overflow with 8-bit digits.
    weight, x = Int8Weight.of(torch.ones(32, 9216)), torch.ones(3, 9216)
    for vnni in {False, linear._has_vnni()}:
        monkeypatch.setattr(linear, "_has_vnni", lambda vnni=vnni: vnni)
        assert torch.allclose(Int8Linear(weight)(x), torch.full((3, 32), 9216.0), rtol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_no_row_depends_on_the_rows_beside_it(bits):
    layer, x = quantized_linear(weight_of(64, 256), bits), rows_of(7, 256)
    x[5] *= 1000
    whole = layer(x)
    for row in range(7):
        assert torch.equal(layer(x[row : row + 1])[0], whole[row])


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_and_weights_of_zeros_give_zeros(bits):
    weight = weight_of(32, 64)
    weight[4] = 0
    product = quantized_linear(weight, bits)(torch.cat((torch.zeros(1, 64), rows_of(1, 64))))
    assert (product[0].abs() < 1e-6).all()
    assert abs(product[1, 4]) < 1e-3


def test_8_bit_weights_are_within_half_a_step_of_the_given_ones():
    weight = weight_of(2100, 64)  # more than one block of outputs
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((Int8Weight.of(weight).dequantize() - weight).abs() <= 0.501 * step).all()


def test_4_bit_weights_are_within_half_a_step_of_the_given_ones():
    weight = weight_of(2100, 2 * INT4_GROUP)
    groups = weight.unflatten(1, (-1, INT4_GROUP))
    step = (groups.amax(-1) - groups.amin(-1))[..., None] / 15
    error = (Int4Weight.of(weight).dequantize() - weight).unflatten(1, (-1, INT4_GROUP)).abs()
    # Scales and offsets are bf16, which rounds them by 2^-9.
    assert (error <= 0.6 * step).all()


def test_a_product_of_4_bit_weights_is_that_of_the_weights_they_stand_for():
    weight, x = Int4Weight.of(weight_of(64, 256)), rows_of(3, 256).bfloat16()
    exact = x.double() @ weight.dequantize().double().T
    assert (Int4Linear(weight)(x.float()) - exact).norm() < 0.01 * exact.norm()


def test_4_bit_weights_need_whole_groups_and_others_take_8_bits():
    weight = weight_of(32, INT4_GROUP + 8)
    with pytest.raises(ValueError, match="40 inputs are not whole groups of 32"):
        Int4Weight.of(weight)
    assert isinstance(quantized_linear(weight, 4), Int8Linear)


def test_many_rows_in_bf16_are_the_rounded_product_in_float32():
    weight, x = weight_of(40, 96).bfloat16(), rows_of(50, 96).bfloat16()
    exact = functional.linear(x.float(), weight.float())
    assert torch.equal(BFloat16Linear(weight)(x), exact.bfloat16())
    assert torch.allclose(BFloat16Linear(weight)(x[:2]).float(), exact[:2], rtol=0.01, atol=0.01)


@pytest.mark.parametrize("rows", [1, 6, 50])
def test_a_wide_layer_is_the_rounded_product_in_float32_for_any_rows(rows):
    weight, x = weight_of(40, 96).bfloat16(), rows_of(rows, 96).bfloat16()
    layer = BFloat16Linear(weight, wide=True)
    exact = functional.linear(x.float(), weight.float())
    with torch.no_grad():
        assert torch.allclose(layer(x).float(), exact.bfloat16().float(), rtol=2**-8, atol=1e-6)
        layer.weight.copy_(2 * weight)  # the copy in float32 follows
        assert torch.allclose(layer(x).float(), 2 * exact, rtol=2**-8, atol=1e-6)


def test_a_wide_layer_that_was_made_for_inference_works():
    with torch.inference_mode():
        layer, x = BFloat16Linear(weight_of(40, 96).bfloat16(), wide=True), rows_of(6, 96).bfloat16()
        assert layer(x).shape == (6, 40)


def test_a_wide_layer_has_gradients_where_they_are_asked_for():
    x = rows_of(6, 96).bfloat16().requires_grad_()
    BFloat16Linear(weight_of(40, 96).bfloat16(), wide=True)(x).float().sum().backward()
    assert x.grad is not None
    assert x.grad.norm() > 0


def test_products_of_the_same_rows_are_those_of_the_layers():
    x = rows_of(2, 3, 64)
    eight = [Int8Linear(Int8Weight.of((i + 1) * weight_of(32, 64))) for i in range(3)]
    coarse = Int8Linear(Int8Weight.of(weight_of(32, 64)), digits=1)
    for layers in (eight, [eight[0], coarse], [eight[0], nn.Linear(64, 32, bias=False)]):
        found = products(x, *layers)
        assert all(torch.equal(one, layer(x)) for one, layer in zip(found, layers, strict=True))


def test_a_weight_is_as_it_was_after_it_is_rounded_to_8_bits():
    weight = weight_of(300, 64)
    before = weight.clone()
    Int8Weight.of(weight)
    assert torch.equal(weight, before)
