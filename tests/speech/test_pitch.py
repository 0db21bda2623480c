from pathlib import Path

import numpy as np
import pytest

from revox.speech import pitch_track, read_audio

CLIPS = Path(__file__).parent / "clips"


def voice(f0, rate=24000, seconds=1.0):
    """A harmonic series with falling amplitudes; `f0` in Hz, a number or one for each sample."""
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(f0, round(rate * seconds))) / rate
    return 0.1 * sum(np.sin(k * phase) / k for k in range(1, 9))


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 24000, 48000])
@pytest.mark.parametrize("f0", [75.0, 110.0, 210.0, 330.0])
def test_the_pitch_of_a_harmonic_tone_is_its_fundamental(f0, rate):
    track = pitch_track(voice(f0, rate), rate)
    assert track.median == pytest.approx(f0, rel=0.005)
    assert track.voiced.mean() > 0.95


def test_a_missing_fundamental_is_found():
    t = np.arange(24000) / 24000
    x = 0.1 * sum(np.sin(2 * np.pi * 120 * k * t) for k in range(3, 8))
    assert pitch_track(x, 24000).median == pytest.approx(120, rel=0.005)


def test_a_glide_is_followed_frame_by_frame():
    f0 = np.linspace(100, 200, 48000)
    track = pitch_track(voice(f0, seconds=2.0), 24000)
    expected = np.interp(np.arange(len(track.f0)) * track.hop, np.arange(48000) / 24000, f0)
    inner = slice(5, -6)
    np.testing.assert_allclose(track.f0[inner], expected[inner], rtol=0.02)


def test_noise_and_silence_have_no_pitch():
    noise = np.random.default_rng(0).normal(scale=0.1, size=24000)
    assert pitch_track(noise, 24000).voiced.mean() < 0.02
    assert np.isnan(pitch_track(np.zeros(24000), 24000).median)
    assert np.isnan(pitch_track(np.zeros(0), 24000).median)


def test_mains_hum_does_not_pass_for_a_voice():
    t = np.arange(48000) / 24000
    x = voice(210.0, seconds=2.0)
    x[24000:] = 0.0
    hummed = x + 0.02 * np.sin(2 * np.pi * 60 * t)
    assert pitch_track(hummed, 24000).median == pytest.approx(210, rel=0.01)


@pytest.mark.parametrize("name", ["1183-124566-0000", "1455-134435-0000"])
def test_human_pitch_agrees_with_librosas_yin(name):
    # librosa 0.11's values (`clips/README.md`): numba, which compiles its yin, crashes on some processors.
    audio = read_audio(CLIPS / f"{name}.flac", max_seconds=4)
    track = pitch_track(audio.samples, audio.rate)
    theirs = np.load(CLIPS / f"{name}.yin.npy")
    ours = track.f0[: len(theirs)]
    voiced = np.isfinite(ours)
    assert voiced.sum() > 100
    difference = np.abs(ours[voiced] / theirs[voiced] - 1)
    assert np.median(difference) < 0.02
    assert (difference < 0.05).mean() > 0.8
