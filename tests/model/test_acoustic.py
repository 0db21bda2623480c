"""The acoustic transformer computes what is read, and times once."""

from __future__ import annotations

import torch

from conftest import TINY
from revox.model.acoustic import AcousticTransformer


def whole_velocity(model: AcousticTransformer, x: torch.Tensor, time: torch.Tensor, condition: torch.Tensor):
    """All layers at all positions."""
    h = torch.stack((model.input_projection(x), time, condition), dim=1)
    for layer in model.layers.values():
        h = layer(h)
    return model.acoustic_codebook_output(model.norm(h)[:, 0])


def model() -> AcousticTransformer:
    torch.manual_seed(0)
    return AcousticTransformer(TINY).double().eval()


def test_the_last_layer_computes_the_first_position_as_the_whole_does():
    acoustic, x, hidden = model(), torch.randn(5, 36).double(), torch.randn(5, 256).double()
    times = torch.linspace(0, 1, 5).double()
    expected = whole_velocity(
        acoustic, x, acoustic.time_projection(acoustic.embed_time(times)), acoustic.llm_projection(hidden)
    )
    assert torch.allclose(acoustic.velocity(x, times, hidden), expected, atol=1e-12)


def test_times_are_projected_once_while_the_weights_are_the_same(monkeypatch):
    acoustic, hidden, noise = model().requires_grad_(False), torch.randn(2, 256), torch.randn(2, 36)
    hidden, noise, calls = hidden.double(), noise.double(), []
    count = lambda module, inputs, output: calls.append(len(output))  # noqa: E731
    acoustic.time_projection.register_forward_hook(count)
    first = acoustic.flow(hidden, noise)
    assert torch.equal(acoustic.flow(hidden, noise), first)
    assert calls == [8]
    acoustic.flow(hidden, noise, steps=3)
    assert calls == [8, 4]
    with torch.no_grad():
        acoustic.time_projection.weight.mul_(2)
    assert not torch.equal(acoustic.flow(hidden, noise), first)
    assert calls == [8, 4, 8]
    acoustic.requires_grad_(True)
    acoustic.flow(hidden, noise)
    acoustic.flow(hidden, noise)
    assert calls == [8, 4, 8, 8, 8]


def test_no_layer_is_given_strided_rows():
    """Of `[batch, 1, dim]` with gaps between items `linear` makes a batch of products, each with a copy of
    the weight: at full size that was half of a frame in bf16."""
    transformer, strided = model(), []
    for name, layer in transformer.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(
                lambda _, given, name=name: None if given[0].is_contiguous() else strided.append(name)
            )
    with torch.no_grad():
        transformer.frame(torch.randn(2, 256).double(), torch.randn(2, 36))
    assert not strided
