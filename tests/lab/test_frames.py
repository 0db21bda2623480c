"""Features of the lab's frames against librosa, and which frames a batch holds."""

from types import SimpleNamespace

import librosa
import numpy as np
import pytest
import torch

from lab.data import LabUtterance
from lab.frames import (
    FLOOR,
    PATCH_BANDS,
    PATCH_FFT,
    PITCH_BINS,
    PITCH_FFT,
    FrameFeatures,
    FrameSet,
    make_frames,
)
from revox.model.config import CodecConfig

FRAME = 1920


def spectrum(wave, n_fft, hop):
    padded = np.pad(wave, (0, -len(wave) % FRAME))
    found = librosa.stft(padded, n_fft=n_fft, hop_length=hop, center=True, pad_mode="constant")
    return np.abs(found)[:, : len(padded) // hop]


def test_features_are_librosas_mel_bands_by_patch_and_low_bins_by_two_patches():
    rng = np.random.default_rng(0)
    wave = (0.1 * rng.standard_normal(2 * FRAME + 700)).astype(np.float32)
    wave[FRAME:] *= np.linspace(1, 0, len(wave) - FRAME, dtype=np.float32) ** 8  # down to the floor
    spectra = FrameFeatures(CodecConfig())
    found = spectra(torch.from_numpy(wave)).numpy()
    assert found.shape == (3, spectra.size) == (3, 8 * 96 + 4 * 64)
    bands = librosa.filters.mel(sr=24000, n_fft=PATCH_FFT, n_mels=PATCH_BANDS)
    mel = np.log10(np.maximum(bands @ spectrum(wave, PATCH_FFT, 240), FLOOR * PATCH_FFT))
    low = np.log10(np.maximum(spectrum(wave, PITCH_FFT, 480)[PITCH_BINS], 4 * FLOOR * PITCH_FFT))
    expected = np.concatenate([mel.T.reshape(3, -1), low.T.reshape(3, -1)], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert (found == found.min()).any()


def test_the_mel_bands_reach_up_to_half_the_rate_and_the_low_bins_hold_every_pitch():
    top = librosa.mel_frequencies(PATCH_BANDS + 2, fmin=0, fmax=12000)[-2]
    assert top > 11000
    hertz = librosa.fft_frequencies(sr=24000, n_fft=PITCH_FFT)[PITCH_BINS]
    assert hertz[0] < 50
    assert hertz[-1] > 600


def test_features_of_a_changed_level_are_those_of_louder_and_softer_sound_and_silence_stays():
    spectra = FrameFeatures(CodecConfig())
    rng = np.random.default_rng(0)
    wave = np.zeros(8 * FRAME, np.float32)
    wave[: 4 * FRAME] = 0.05 * rng.standard_normal(4 * FRAME)
    features = spectra(torch.from_numpy(wave)).half().float()  # as they are kept
    for gain in (0.71, 1.41):
        gains = torch.full((1, 1, 1), np.log10(gain))
        changed = spectra.changed(features[None], gains)[0]
        expected = spectra(torch.from_numpy(gain * wave))
        near = features > spectra.floor + 0.2  # elsewhere a gain may lift what lies under the floor
        torch.testing.assert_close(changed[near], expected[near], atol=2e-3, rtol=0)
        assert torch.equal(changed[5:], spectra.floor.expand(3, -1))
        assert (changed >= spectra.floor).all()


@pytest.fixture
def frames():
    """Two speakers with three utterances; each frame's features are its own number."""
    samples = [4 * FRAME, 3 * FRAME - 5, 9 * FRAME, 2 * FRAME, 30 * FRAME, FRAME]
    speech = SimpleNamespace(
        utterances=[LabUtterance("ab"[i // 3], "F", None, None, 0, n) for i, n in enumerate(samples)]
    )
    total = sum(-(-n // FRAME) for n in samples)
    return FrameSet(speech, np.arange(total, dtype=np.float16)[:, None], FRAME)


def test_a_segment_has_the_length_asked_for_and_is_of_one_speaker(frames):
    rng = np.random.default_rng(0)
    for _ in range(200):
        parts = frames.segment(8, rng)
        assert sum(take for _, _, take in parts) == 8
        assert len({i // 3 for i, _, _ in parts}) == 1
        for i, start, take in parts:
            assert 0 <= start < start + take <= frames.ends[i] - frames.starts[i]


def test_every_frame_of_a_long_utterance_can_be_drawn(frames):
    seen = frames.places(300, 8, np.random.default_rng(0)).ravel()
    assert set(range(18, 48)) <= set(seen.tolist())


def test_features_of_other_speech_are_refused(frames):
    speech = SimpleNamespace(utterances=[LabUtterance("a", "F", None, None, 0, 3 * FRAME)])
    with pytest.raises(ValueError, match="49 rows of features for 3 frames of speech"):
        FrameSet(speech, frames.features, FRAME)


def test_features_are_computed_once_for_one_set_of_speech(tmp_path, monkeypatch):
    waves = [np.full(FRAME + 10, 0.1, np.float32), np.full(5, 0.2, np.float32)]

    class Speech:
        name, identity = "a set", "1"
        utterances = tuple(LabUtterance("a", "F", None, None, 0, len(wave)) for wave in waves)

        def __len__(self):
            return len(waves)

        def waveform(self, i):
            return waves[i]

    spectra = FrameFeatures(CodecConfig())
    first = make_frames(Speech(), spectra, tmp_path / "features.npy").features
    expected = np.concatenate([spectra(torch.from_numpy(wave)).numpy() for wave in waves])
    np.testing.assert_array_equal(first, expected.astype(np.float16))
    monkeypatch.setattr(FrameFeatures, "forward", lambda *_: pytest.fail("they are kept"))
    np.testing.assert_array_equal(make_frames(Speech(), spectra, tmp_path / "features.npy").features, first)
    other = Speech()
    other.identity = "2"
    with pytest.raises(pytest.fail.Exception, match="they are kept"):
        make_frames(other, spectra, tmp_path / "features.npy")
