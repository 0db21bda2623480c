"""Silence at the ends of the lab's recordings, and their level."""

import numpy as np
import pytest

from lab.level import level, sounding

RATE = 24000


def tone(seconds, hertz=200.0, size=0.3):
    return (size * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def test_silence_at_the_ends_is_cut_to_the_margin():
    quiet = np.zeros(RATE // 2, np.float32)
    start, end = sounding(np.concatenate([quiet, tone(1.0), quiet]), RATE, margin=0.05)
    assert (start, end) == pytest.approx((0.45 * RATE, 1.55 * RATE), abs=RATE // 100)


def test_nothing_is_left_of_silence_and_its_level_stays():
    quiet = np.zeros(RATE // 2, np.float32)
    assert sounding(quiet, RATE) == (0, 0)
    assert not level(quiet, RATE).any()


def test_level_sets_the_root_mean_square_of_the_active_part():
    half_silent = np.concatenate([tone(1.0), np.zeros(RATE, np.float32)])
    leveled = level(half_silent, RATE, -23.0)
    assert 10 * np.log10((leveled[:RATE].astype(float) ** 2).mean()) == pytest.approx(-23.0, abs=0.1)


def test_level_never_clips():
    click = tone(1.0, size=0.001)
    click[100] = 1.0
    assert np.abs(level(click, RATE)).max() <= 1.0
