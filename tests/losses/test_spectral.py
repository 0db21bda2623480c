import librosa
import numpy as np
import pytest
import torch

from revox.losses.spectral import (
    DAC_SCALES,
    MelSpectrogram,
    log_mel,
    mel_distance,
    mel_filterbank,
    mel_spectrogram,
    multi_resolution_mel_loss,
    multi_resolution_stft_loss,
    scales_for,
    stft_resolutions,
)


def noise(*shape, seed=0, scale=0.1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("htk", [False, True])
@pytest.mark.parametrize(
    ("rate", "n_fft", "n_mels", "fmin", "fmax"),
    [
        (24000, 1024, 80, 0, None),
        (16000, 2048, 128, 20, 7600),
        (22050, 512, 40, 50, 8000),
        (24000, 32, 5, 0, None),
    ],
)
def test_the_filterbank_is_librosas(rate, n_fft, n_mels, fmin, fmax, htk):
    ours = mel_filterbank(rate, n_fft, n_mels, fmin, fmax, htk)
    theirs = librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=n_mels, fmin=fmin, fmax=fmax, htk=htk)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)


def test_an_empty_band_is_refused():
    with pytest.raises(ValueError, match="fmin < fmax <= 8000 Hz"):
        mel_filterbank(16000, 512, 40, 0, 9000)


@pytest.mark.parametrize("rate", [16000, 22050, 24000])
def test_mel_spectrogram_and_its_logarithm_are_librosas(rate):
    x = noise(3, rate // 4)
    oracle = librosa.feature.melspectrogram(
        y=x.numpy(), sr=rate, n_fft=1024, hop_length=256, n_mels=80, power=1.0, pad_mode="reflect"
    )
    np.testing.assert_allclose(mel_spectrogram(x, rate), oracle, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(MelSpectrogram(rate)(x), oracle, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(log_mel(x, rate), np.log(np.maximum(oracle, 1e-5)), atol=1e-3)


def test_the_module_keeps_leading_dimensions_and_saves_nothing():
    mel = MelSpectrogram(24000, 512, 128, 40, 20, 8000)
    assert mel(noise(2, 3, 4000)).shape == (2, 3, 40, 4000 // 128 + 1)
    assert mel(noise(4000)).shape == (40, 4000 // 128 + 1)
    assert mel.state_dict() == {}


def test_the_mel_loss_is_dacs_formula_over_librosas_mels():
    x, y = noise(1, 12000), noise(1, 12000, seed=1)
    expected = 0.0
    for window, n_mels in DAC_SCALES:
        logs = [
            np.log10(
                np.maximum(
                    librosa.feature.melspectrogram(
                        y=w[0].numpy(), sr=24000, n_fft=window, hop_length=window // 4, n_mels=n_mels,
                        power=1.0, pad_mode="reflect",
                    ),
                    1e-5,
                )
            )
            for w in (x, y)
        ]  # fmt: skip
        expected += np.abs(logs[0] - logs[1]).mean()
    assert multi_resolution_mel_loss(x, y, 24000).item() == pytest.approx(expected, rel=1e-4)


def test_windows_longer_than_a_tenth_of_a_second_are_left_out():
    assert [w for w, _ in scales_for(24000)] == [32, 64, 128, 256, 512, 1024, 2048]
    assert scales_for(22050) == DAC_SCALES
    assert [w for w, _ in scales_for(16000)] == [32, 64, 128, 256, 512, 1024]


def test_a_gain_has_the_losses_of_a_closed_form():
    # All log magnitudes shift by log(gain); spectral convergence is |1 - gain|.
    x = noise(2, 24000)
    gain = 0.5
    assert multi_resolution_mel_loss(gain * x, x, 24000).item() == pytest.approx(7 * np.log10(2), rel=1e-3)
    assert multi_resolution_stft_loss(gain * x, x).item() == pytest.approx(0.5 + np.log(2), rel=1e-2)
    assert mel_distance(gain * x, x, 24000) == pytest.approx(np.log(2), rel=1e-3)


def test_the_stft_loss_is_parallel_wavegans_formula():
    x, y = noise(12000), noise(12000, seed=1)
    expected = 0.0
    for n_fft, hop, window in stft_resolutions(24000):
        a, b = (
            np.abs(
                librosa.stft(w.numpy(), n_fft=n_fft, hop_length=hop, win_length=window, pad_mode="reflect")
            )
            for w in (x, y)
        )
        expected += np.linalg.norm(b - a) / np.linalg.norm(b) + np.abs(np.log(b) - np.log(a)).mean()
    assert multi_resolution_stft_loss(x, y, 24000).item() == pytest.approx(expected / 3, rel=1e-3)


def test_at_24_khz_the_resolutions_are_parallel_wavegans():
    assert stft_resolutions(24000) == ((1024, 120, 600), (2048, 240, 1200), (512, 48, 240))


def test_batching_does_not_change_a_loss():
    x, y = noise(3, 8000), noise(3, 8000, seed=1)
    for loss in (multi_resolution_mel_loss, multi_resolution_stft_loss):
        alone = torch.stack([loss(a, b, 24000) for a, b in zip(x, y, strict=True)]).mean()
        torch.testing.assert_close(loss(x, y, 24000), alone)


def test_gradients_along_a_gain_are_those_of_the_closed_form():
    # d/dg of 7 log10(g), and of (g - 1) + log(g), at g = 2.
    y = noise(2, 24000)
    for loss, slope in (
        (multi_resolution_mel_loss, 7 / (2 * np.log(10))),
        (multi_resolution_stft_loss, 1.5),
    ):
        x = (2 * y).requires_grad_()
        loss(x, y, 24000).backward()
        assert (x.grad * y).sum().item() == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize("samples", [1, 40, 1000, 24000])
def test_silence_and_clips_shorter_than_a_window_have_finite_losses_and_gradients(samples):
    for x, y in [
        (torch.zeros(2, samples), torch.zeros(2, samples)),
        (torch.zeros(2, samples), noise(2, samples)),
    ]:
        x = x.clone().requires_grad_()
        loss = multi_resolution_mel_loss(x, y, 24000) + multi_resolution_stft_loss(x, y)
        loss.backward()
        assert loss.isfinite()
        assert x.grad.isfinite().all()


def test_equal_audio_is_at_no_distance_and_the_longer_is_cut():
    x = noise(24000)
    assert mel_distance(x, torch.cat([x, noise(5000)]), 24000) == 0.0
    assert mel_distance(x, x[:20000], 24000) == 0.0


def test_noise_under_90_db_is_not_heard():
    x = noise(24000, scale=1e-6)
    assert mel_distance(x, torch.zeros(24000), 24000) == 0.0


def test_filters_cached_under_inference_mode_serve_training_afterwards():
    x = noise(2000)
    with torch.inference_mode():
        mel_spectrogram(x, 24000, 256, 64, 23)
    y = x.clone().requires_grad_()
    mel_spectrogram(y, 24000, 256, 64, 23).sum().backward()
    assert y.grad.isfinite().all()
