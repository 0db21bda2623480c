"""Augmentation beside closed forms: levels, delays, decay, noise; and the same changes for the same seeds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from revox.training import augment
from revox.training.augment import Augmentation, augmented, draw_seeds

pytestmark = pytest.mark.usefixtures("one_thread")

RATE = 24000


def tones(clips: int = 64, hertz: float = 440.0) -> Tensor:
    time = torch.arange(RATE // 2) / RATE
    return (0.1 * torch.sin(2 * math.pi * hertz * time)).expand(clips, -1)


def seeds(clips: int = 64) -> Tensor:
    return draw_seeds(clips, torch.Generator().manual_seed(0))


def decibels(audio: Tensor) -> Tensor:
    return 10 * audio.square().mean(dim=1).log10()


def test_without_settings_sound_stays_as_it_is():
    assert not Augmentation().changes
    assert augmented(tones(2), RATE, Augmentation(), seeds(2)) is not None
    assert torch.equal(augmented(tones(2), RATE, Augmentation(), seeds(2)), tones(2))


def test_gains_are_uniform_to_both_sides():
    gains = decibels(augmented(tones(), RATE, Augmentation(gain_db=6.0), seeds())) - decibels(tones())
    assert gains.abs().max() <= 6.0 + 1e-3
    assert gains.min() < -4
    assert gains.max() > 4
    assert float(gains.std()) == pytest.approx(12 / math.sqrt(12), rel=0.2)


def test_a_delay_moves_a_click_and_loses_nothing_but_the_end():
    click = torch.zeros(64, RATE // 2)
    click[:, 1000] = 1.0
    moved = augmented(click, RATE, Augmentation(delay_ms=5.0), seeds())
    delays = (moved.argmax(dim=1) - 1000) / RATE * 1000
    assert delays.min() >= -0.03
    assert delays.max() <= 5.03
    assert float(delays.mean()) == pytest.approx(2.5, abs=0.5)
    torch.testing.assert_close(moved.sum(dim=1), torch.ones(64), atol=1e-3, rtol=0)


def test_an_equalizer_changes_bands_by_its_deviation_and_independently():
    found = []
    for hertz in (440.0, 3520.0):
        changed = augmented(tones(hertz=hertz), RATE, Augmentation(equalization_db=4.0), seeds())
        found.append(decibels(changed) - decibels(tones(hertz=hertz)))
    for gains in found:
        assert 2.0 < float(gains.std()) < 5.0
    assert abs(float(torch.corrcoef(torch.stack(found))[0, 1])) < 0.4


def test_a_share_of_the_clips_has_a_room_whose_tail_decays():
    click = torch.zeros(64, RATE // 2)
    click[:, 1000] = 1.0
    in_room = augmented(click, RATE, Augmentation(room=0.5), seeds())
    early, late = in_room[:, 1200:3000], in_room[:, 8000:9800]
    has_room = early.square().mean(dim=1) > 1e-8
    assert 20 < int(has_room.sum()) < 44
    assert (late.square().mean(dim=1)[has_room] < early.square().mean(dim=1)[has_room]).all()
    torch.testing.assert_close(in_room[:, 1000], torch.ones(64), atol=1e-3, rtol=0)
    assert in_room[:, :999].abs().max() < 1e-4  # nothing comes before the sound


def test_noise_lies_so_many_decibels_under_the_sound():
    noise = augmented(tones(), RATE, Augmentation(noise=1.0), seeds()) - tones()
    ratio = decibels(tones()) - decibels(noise)
    low, high = augment.SIGNAL_TO_NOISE
    assert ratio.min() >= low - 0.1
    assert ratio.max() <= high + 0.1
    assert float(ratio.std()) > 5


def test_a_clips_changes_are_those_of_its_seed_wherever_it_stands():
    everything = Augmentation(gain_db=6, delay_ms=5, equalization_db=3, room=0.5, noise=0.5)
    whole = augmented(tones(8), RATE, everything, seeds(8))
    part = augmented(tones(8)[4:], RATE, everything, seeds(8)[4:])
    torch.testing.assert_close(part, whole[4:])
    assert not torch.allclose(whole[0], whole[1])
