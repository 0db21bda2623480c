"""All-pass augmentation: magnitudes stay, bands move a few milliseconds, the waveform changes."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.signal import butter, sosfilt

from revox.training.all_pass import SPACING, all_pass, draw_phases

RATE = 24000


def noise(samples: int = 24000, batch: int = 3) -> torch.Tensor:
    return 0.1 * torch.randn((batch, samples), generator=torch.Generator().manual_seed(1))


def test_phases_of_nought_change_nothing_and_a_straight_slope_is_a_delay():
    audio = noise()
    none = torch.zeros((3, math.ceil(RATE / 2 / SPACING) + 1))
    torch.testing.assert_close(all_pass(audio, RATE, none), audio, atol=1e-6, rtol=0)
    hertz = torch.arange(none.shape[1]) * SPACING
    delayed = all_pass(audio, RATE, (-2 * math.pi * hertz * 48 / RATE).expand(3, -1))
    torch.testing.assert_close(delayed[:, 48:], audio[:, :-48], atol=1e-5, rtol=0)
    opposite = all_pass(audio, RATE, none + math.pi)
    torch.testing.assert_close(opposite[:, 100:-100], -audio[:, 100:-100], atol=1e-2, rtol=0)


def test_magnitudes_stay_and_the_waveform_does_not():
    audio = torch.nn.functional.pad(noise(20000), (2000, 2000))
    turned = all_pass(audio, RATE, draw_phases(3, RATE, 2.5, torch.Generator().manual_seed(0)))
    wanted, found = torch.fft.rfft(audio).abs(), torch.fft.rfft(turned).abs()
    # But for the little that leaves at an end.
    assert float((wanted - found).square().sum() / wanted.square().sum()) < 1e-3
    assert float(torch.nn.functional.cosine_similarity(audio, turned).abs().max()) < 0.2
    assert not torch.allclose(turned[0], turned[1])


def test_each_band_is_delayed_by_about_the_milliseconds_asked_for():
    generator = torch.Generator().manual_seed(0)
    phases = draw_phases(400, RATE, 2.0, generator)
    delays = -phases.diff(dim=1) / (2 * math.pi * SPACING) * 1000
    assert abs(float(delays.std()) - 2.0) < 0.05
    first = phases[:, 0].remainder(2 * math.pi)
    assert 0 <= float(first.min()) < 0.1
    assert 6.1 < float(first.max()) <= 2 * math.pi
    # A click's energy in a band is where that band's delay puts it.
    click = torch.zeros((1, 4800))
    click[0, 2400] = 1.0
    given = torch.zeros((1, phases.shape[1]))
    given[0, 20:] = -2 * math.pi * SPACING * 0.010 * torch.arange(phases.shape[1] - 20)  # 10 ms above 2 kHz
    out = all_pass(click, RATE, given)[0].numpy()
    low = sosfilt(butter(6, 1000, "low", fs=RATE, output="sos"), out)
    high = sosfilt(butter(6, 4000, "high", fs=RATE, output="sos"), out)
    assert abs(int(np.abs(low).argmax()) - 2400) < 24
    assert abs(int(np.abs(high).argmax()) - 2640) < 24
