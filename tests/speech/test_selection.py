import math
from pathlib import Path

import numpy as np
import pytest

from revox.speech import Audio, AudioError, read_audio, select_reference, whole_frames
from revox.speech.selection import bandwidth

CLIPS = Path(__file__).parent / "clips"


@pytest.fixture(scope="module")
def speech():
    """The last 9 s of a clip, 16 kHz, full scale."""
    samples = read_audio(CLIPS / "103-1240-0000.flac").samples[5 * 16000 :]
    return samples / np.abs(samples).max()


def silence(seconds):
    return np.random.default_rng(3).normal(scale=1e-5, size=round(seconds * 16000)).astype(np.float32)


def test_silence_is_trimmed_and_the_sentence_says_what_was_used(speech):
    x = np.concatenate([silence(4), speech, silence(6)])
    chosen = select_reference(Audio(x, 16000), rate=24000)
    assert chosen.rate == 24000
    assert 3.7 < chosen.start < 4.3
    assert chosen.end == pytest.approx(4 + len(speech) / 16000, abs=0.3)
    assert chosen.seconds == pytest.approx(chosen.end - chosen.start, abs=1e-3)
    assert len(chosen.reasons) == 1
    assert f"{chosen.start:.1f} to {chosen.end:.1f} s" in str(chosen)


def test_the_clean_take_is_chosen_over_a_noisy_and_a_clipped_one(speech):
    noisy = speech + np.random.default_rng(0).normal(scale=0.05, size=len(speech))
    noisy /= np.abs(noisy).max()
    clipped = np.clip(speech * 8, -1, 1)
    x = np.concatenate([silence(1), clipped, silence(1), noisy, silence(1), speech, silence(1)])
    chosen = select_reference(Audio(x, 16000), max_seconds=9.5)
    start_of_clean = (3 * 16000 + 2 * len(speech)) / 16000
    assert chosen.start > start_of_clean - 0.2
    assert chosen.clipped < 1e-3


def test_the_longest_length_is_kept_even_without_a_pause(speech):
    joined = np.concatenate([speech[16000:]] * 6)
    for limit in (4.0, 10.0, 30.0):
        chosen = select_reference(Audio(joined, 16000), max_seconds=limit)
        assert 3.0 <= chosen.seconds <= limit + 0.02


def test_too_little_speech_is_a_sentence(speech):
    short = np.concatenate([silence(1), speech[: 2 * 16000], silence(3)])
    with pytest.raises(
        AudioError, match=r"Only \d\.\d s of speech were found in 6\.0 s; give a clip with at"
    ):
        select_reference(Audio(short, 16000))


@pytest.mark.parametrize("samples", [np.zeros(0), np.zeros(160000), np.sin(np.arange(160000) * 0.2)])
def test_no_speech_is_a_sentence(samples):
    with pytest.raises(AudioError, match="No speech was found"):
        select_reference(Audio(samples, 16000))


def test_warnings_name_noise_clipping_bandwidth_and_a_cut_file(speech):
    noise = np.random.default_rng(0).normal(scale=0.08, size=len(speech))
    assert any("over the noise" in w for w in select_reference(Audio(speech + noise, 16000)).warnings)
    assert any("clipped" in w for w in select_reference(Audio(np.clip(speech * 8, -1, 1), 16000)).warnings)
    assert any("above 8.0 kHz" in w for w in select_reference(Audio(speech, 16000)).warnings)
    assert any(
        "above 8." in w or "above 7." in w for w in select_reference(Audio(speech, 16000).at(48000)).warnings
    )
    assert any("were read" in w for w in select_reference(Audio(speech, 16000, truncated=True)).warnings)
    clean = select_reference(Audio(speech, 16000))
    assert not any("clipped" in w or "noise" in w for w in clean.warnings)


def test_a_stereo_recording_is_taken_as_mono(speech):
    assert select_reference(Audio(np.stack([speech, speech]), 16000)).samples.ndim == 1


@pytest.mark.parametrize("cutoff", [3500, 6000, 8000])
def test_bandwidth_is_where_the_spectrum_ends(cutoff):
    spectrum = np.fft.rfft(np.random.default_rng(0).normal(size=48000))
    spectrum[cutoff:] = 0  # a second at 48 kHz: one bin a hertz
    assert bandwidth(np.fft.irfft(spectrum).astype(np.float32), 48000) == pytest.approx(cutoff, abs=100)


def test_samples_are_cut_to_whole_frames():
    x = np.arange(1, 10 * 1920 + 101, dtype=np.float32)
    np.testing.assert_array_equal(whole_frames(x, 1920), x[: 10 * 1920])
    np.testing.assert_array_equal(whole_frames(x[:7], 1920), np.pad(x[:7], (0, 1913)))
    with pytest.raises(AudioError):
        whole_frames(x[:0], 1920)


def test_taken_whole_nothing_between_the_first_word_and_the_last_is_left_out(speech):
    noisy = speech + np.random.default_rng(0).normal(scale=0.05, size=len(speech))
    x = np.concatenate([silence(1), noisy / np.abs(noisy).max(), silence(4), speech, silence(2)])
    whole = select_reference(Audio(x, 16000), whole=True)
    assert 0.5 < whole.start < 1.5
    assert whole.end == pytest.approx(5 + 2 * len(speech) / 16000, abs=0.5)
    assert select_reference(Audio(x, 16000), max_seconds=12).start > 12
    with pytest.raises(AudioError, match="too long to be used whole"):
        select_reference(Audio(x, 16000), max_seconds=12, whole=True)


def test_no_length_under_a_minute_is_left_that_mistral_common_counts_differently():
    disagree = [k for k in range(1, 751) if math.ceil(k * 1920 / 24000 * 12.5) != k]
    assert len(disagree) == 34
    assert [k * 1920 for k in (7, 14, 55)] == [13440, 26880, 105600]
    for k in {k + d for k in disagree for d in (-1, 0, 1)}:
        n = len(whole_frames(np.zeros(k * 1920, dtype=np.int8), 1920))
        assert math.ceil(n / 24000 * 12.5) == n // 1920
        assert 0 <= k - n // 1920 <= (4 if k in disagree else 0)
