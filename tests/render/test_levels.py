from __future__ import annotations

import math

import numpy as np
import pytest

from revox.render.levels import Level, common_target, leveled
from revox.speech import loudness, true_peak

RATE = 24000


def tone(db: float, seconds: float = 1.0) -> np.ndarray:
    """A tone of that amplitude in dB, which is 3 LU louder than its loudness."""
    return (10 ** (db / 20) * np.sin(2 * np.pi * 997 * np.arange(int(seconds * RATE)) / RATE)).astype(
        np.float32
    )


def with_a_click(db: float, click: float) -> np.ndarray:
    wave = tone(db, 2.0)
    wave[RATE : RATE + 48] = click * np.hanning(48)
    return wave


@pytest.mark.parametrize("db", [-60, -30, -3])
def test_each_segment_reaches_the_target_by_one_linear_gain(db):
    wave = tone(db)
    louder, limited = leveled(wave, RATE, Level.of(wave, RATE), -19.0, -1.5)
    assert loudness(louder, RATE) == pytest.approx(-19.0, abs=0.05)
    assert limited == 0
    np.testing.assert_allclose(louder, wave * (louder[100] / wave[100]), rtol=1e-5)


def test_peaks_meet_the_limiter_and_the_loudness_is_still_reached():
    wave = with_a_click(-35, 0.8)
    louder, limited = leveled(wave, RATE, Level.of(wave, RATE), -19.0, -1.5)
    assert 10 < limited < 30
    assert true_peak(louder, RATE) <= -1.5
    assert loudness(louder, RATE) == pytest.approx(-19.0, abs=0.5)


def test_the_common_target_goes_down_for_a_sharp_segment_and_not_without_end():
    plain = Level(-25.0, -12.0)
    assert common_target([plain], -19.0, -1.5) == -19.0
    # 4 dB over: the limiter takes them. 9 dB over: it takes 6, and all go down by 3. A click: no more than 6.
    assert common_target([plain, Level(-25.0, -3.5)], -19.0, -1.5) == -19.0
    assert common_target([plain, Level(-25.0, 1.5)], -19.0, -1.5) == pytest.approx(-22.0)
    assert common_target([plain, Level(-60.0, 0.0)], -19.0, -1.5) == pytest.approx(-25.0)


def test_silence_and_noise_under_the_gate_are_not_raised():
    for quiet in (np.zeros(RATE, np.float32), tone(-80)):
        level = Level.of(quiet, RATE)
        same, limited = leveled(quiet, RATE, level, -19.0, -1.5)
        np.testing.assert_array_equal(same, quiet)
        assert limited == 0
        assert common_target([level], -19.0, -1.5) == -19.0
        assert level.over(-19.0, -1.5) == -math.inf
