"""The differentiable resampler against tones whose samples are known at any rate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from revox.training.resampling import Resampler


def tone(hertz, rate, samples):
    return torch.sin(2 * math.pi * hertz * torch.arange(samples, dtype=torch.float64) / rate + 0.3).float()


@pytest.mark.parametrize(("from_rate", "to_rate"), [(24000, 16000), (16000, 24000), (44100, 16000)])
@pytest.mark.parametrize("hertz", [100, 3000, 7000])
def test_a_tone_is_the_same_tone_at_the_other_rate(from_rate, to_rate, hertz):
    samples = from_rate // 4 + 1
    out = Resampler(from_rate, to_rate)(tone(hertz, from_rate, samples))
    assert len(out) == math.ceil(samples * to_rate / from_rate)
    edge = to_rate // 60  # there it hears the silence beyond
    torch.testing.assert_close(out[edge:-edge], tone(hertz, to_rate, len(out))[edge:-edge], atol=3e-5, rtol=0)


def test_what_the_lower_rate_cannot_hold_is_gone_and_does_not_fold_back():
    out = Resampler(24000, 16000)(tone(8500, 24000, 12000))[300:-300]
    assert float(out.abs().max()) < 1e-4


def test_the_end_of_a_clip_is_what_silence_after_it_gives():
    samples = torch.randn(2, 5001, generator=torch.Generator().manual_seed(0))
    resampler = Resampler(24000, 16000)
    alone = resampler(samples)
    followed = resampler(torch.cat([samples, torch.zeros(2, 999)], dim=1))
    torch.testing.assert_close(alone, followed[:, : alone.shape[1]])


def test_equal_rates_change_nothing_and_lengths_are_told():
    samples = torch.randn(100)
    assert Resampler(16000, 16000)(samples) is samples
    assert [Resampler(24000, 16000).length(n) for n in (0, 1, 3, 24001)] == [0, 1, 2, 16001]


def test_its_gradient_is_that_of_a_linear_map():
    resampler, rng = Resampler(24000, 16000), np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=600), dtype=torch.float32, requires_grad=True)
    direction = torch.tensor(rng.normal(size=600), dtype=torch.float32)
    weights = torch.tensor(rng.normal(size=400), dtype=torch.float32)
    (resampler(x) @ weights).backward()
    torch.testing.assert_close(x.grad @ direction, resampler(direction) @ weights, atol=1e-3, rtol=1e-4)
