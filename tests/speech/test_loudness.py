import math

import numpy as np
import pytest

from revox.speech import AudioError, limit_peaks, loudness, normalize_loudness, true_peak


def tone(rate=48000, seconds=2.0, amplitude=1.0):
    return amplitude * np.sin(2 * np.pi * 997 * np.arange(round(rate * seconds)) / rate)


def test_a_full_scale_997_hz_sine_reads_minus_3_01_lufs_as_the_standard_says():
    # ITU-R BS.1770-4, end of annex 1: such a sine on one channel reads -3.01 LKFS.
    assert loudness(tone(), 48000) == pytest.approx(-3.01, abs=0.05)
    assert loudness(tone(amplitude=0.1), 48000) == pytest.approx(-23.01, abs=0.05)


@pytest.mark.parametrize("rate", [16000, 24000, 44100])
def test_other_rates_read_the_same(rate):
    assert loudness(tone(rate), rate) == pytest.approx(-3.01, abs=0.15)


def test_two_equal_channels_read_3_db_more():
    assert loudness(np.stack([tone(), tone()]), 48000) == pytest.approx(0.0, abs=0.05)


def test_a_clip_shorter_than_a_block_is_measured_all_the_same():
    assert loudness(tone(seconds=0.1, amplitude=0.1), 48000) == pytest.approx(-23.0, abs=0.3)


def test_normalising_reaches_the_target_by_one_gain():
    x = tone(amplitude=0.01).astype(np.float32)
    y = normalize_loudness(x, 48000, lufs=-23)
    assert loudness(y, 48000) == pytest.approx(-23, abs=0.01)
    np.testing.assert_allclose(y, x * (y[100] / x[100]), rtol=1e-5)
    assert y.dtype == np.float32


def test_the_peak_is_never_passed():
    x = tone(amplitude=0.01)
    x[1000] = 0.5
    y = normalize_loudness(x, 48000, lufs=-10, peak=0.9)
    assert np.abs(y).max() == pytest.approx(0.9, rel=1e-6)


def test_silence_and_noise_under_the_gate_stay_as_they_are():
    assert loudness(np.zeros(48000), 48000) == -math.inf
    for quiet in (np.zeros(48000, np.float32), tone(amplitude=1e-5).astype(np.float32)):
        np.testing.assert_array_equal(normalize_loudness(quiet, 48000), quiet)
    assert normalize_loudness(np.zeros(0), 48000).shape == (0,)


@pytest.mark.parametrize("rate", [24000, 48000])
def test_a_peak_between_samples_is_read(rate):
    # A sine of a quarter of the rate, at 45 degrees to the samples, which reach 0.7071 (-3.01 dB) of its 1.
    x = np.sin(np.pi / 2 * np.arange(rate) + np.pi / 4) * np.hanning(rate)
    assert 20 * math.log10(np.abs(x).max()) == pytest.approx(-3.01, abs=0.01)
    assert true_peak(x, rate) == pytest.approx(0.0, abs=0.1)
    assert true_peak(np.zeros(rate), rate) == -math.inf


def test_the_limiter_holds_true_peaks_and_leaves_the_rest_where_it_was():
    rate = 24000
    x = tone(rate, 3.0, 0.2).astype(np.float32)
    x[rate : rate + 240] += np.hanning(240).astype(np.float32) * tone(rate, 0.01, 1.5).astype(np.float32)
    limited = limit_peaks(x, rate, -3.0)
    assert limited.shape == x.shape
    assert true_peak(x, rate) > 3
    assert -4.0 < true_peak(limited, rate) <= -3.0
    before = slice(240, rate - 1200)  # neither delayed nor turned down
    np.testing.assert_allclose(limited[before], x[before], atol=2e-3)
    np.testing.assert_allclose(limited[2 * rate : -240], x[2 * rate : -240], atol=2e-3)


def test_sound_under_the_ceiling_is_not_touched_and_a_short_one_is_limited_too():
    x = tone(24000, 0.5, 0.5).astype(np.float32)
    np.testing.assert_array_equal(limit_peaks(x, 24000, -1.5), x)
    assert true_peak(limit_peaks(4 * x[:100], 24000, -1.5), 24000) <= -1.5
    with pytest.raises(AudioError, match="out of range"):
        limit_peaks(x, 24000, 3.0)
