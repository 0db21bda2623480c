"""Weights on a graphics card in fewer bits. torchao's layers compute on the CPU as well, but for 4 bits."""

from __future__ import annotations

import sys

import pytest
import torch

from revox.checkpoint import load
from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.load import load_model
from revox.demo import checkpoint_folder
from revox.model.card_linear import card_linear
from revox.model.linear import Int8Weight

CPU = torch.device("cpu")


@pytest.mark.parametrize(("weights", "most"), [("int8", 0.01), ("fp8", 0.05)])
def test_a_layer_multiplies_as_its_weight_does(weights, most):
    pytest.importorskip("torchao")
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(96, 256, generator=generator), torch.randn(2, 5, 256, generator=generator)
    for given in (weight, Int8Weight.of(weight)):
        layer = card_linear(given, weights, CPU)
        product, exact = layer(x.bfloat16()), x @ weight.T
        assert product.dtype == torch.bfloat16
        assert (product.float() - exact).norm() < most * exact.norm()


def test_four_bits_ask_for_cudas_kernel_and_fall_back_where_groups_do_not_fit():
    pytest.importorskip("torchao")
    if not torch.cuda.is_available():
        with pytest.raises(AssertionError, match="CUDA"):
            card_linear(torch.randn(64, 256), "int4", CPU)
    assert card_linear(torch.randn(64, 192), "int4", CPU)(torch.ones(1, 192).bfloat16()).shape == (1, 64)


def test_a_checkpoint_is_loaded_as_for_a_card(monkeypatch):
    pytest.importorskip("torchao")
    # What a card would get, on the CPU: the same layers, the rest in bf16.
    card = type("Card", (), {"type": "cuda"})()
    monkeypatch.setattr(
        load, "card_linear", lambda weight, weights, device: card_linear(weight, weights, CPU)
    )
    monkeypatch.setattr(load.torch, "device", lambda name: card if name == "cpu" else CPU)
    model = load_model(checkpoint_folder(), quantized="int8")
    monkeypatch.undo()
    held = {type(p.data).__name__ for n, p in model.backbone.named_parameters() if n.endswith("wq.weight")}
    assert held == {"Int8Tensor"}
    assert {p.dtype for n, p in model.named_parameters() if n.endswith("norm.weight")} == {torch.bfloat16}


def test_without_torchao_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(CheckpointError, match=r"revox\[card\]"):
        load._on_card(torch.randn(64, 128), "int8", CPU)
