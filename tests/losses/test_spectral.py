import math

import librosa
import numpy as np
import pytest
import torch

from revox.losses.spectral import (
    SpectralObjective,
    mel_distance,
    multi_resolution_stft_loss,
    stft_resolutions,
)

RESOLUTIONS = ((512, 40), (256, 20))


def noise(*shape, seed=0, scale=0.1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def test_a_gain_has_the_losses_of_a_closed_form():
    # All log magnitudes shift by log(gain); spectral convergence is |1 - gain|.
    x = noise(2, 24000)
    gain = 0.5
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
    alone = torch.stack([multi_resolution_stft_loss(a, b) for a, b in zip(x, y, strict=True)]).mean()
    torch.testing.assert_close(multi_resolution_stft_loss(x, y), alone)


def test_gradients_along_a_gain_are_those_of_the_closed_form():
    # d/dg of (g - 1) + log(g), and of log10(g), at g = 2.
    y = noise(2, 24000)
    objective = SpectralObjective(24000, RESOLUTIONS, floor=1e-12)
    for loss, slope in (
        (multi_resolution_stft_loss, 1.5),
        (lambda x, y: objective(objective.spectra(y), objective.spectra(x)).mel, 1 / (2 * np.log(10))),
    ):
        x = (2 * y).requires_grad_()
        loss(x, y).backward()
        assert (x.grad * y).sum().item() == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize("samples", [1, 40, 1000, 24000])
def test_silence_and_clips_shorter_than_a_window_have_finite_losses_and_gradients(samples):
    objective = SpectralObjective(24000, RESOLUTIONS)
    for x, y in [
        (torch.zeros(2, samples), torch.zeros(2, samples)),
        (torch.zeros(2, samples), noise(2, samples)),
    ]:
        x = x.clone().requires_grad_()
        terms = objective(objective.spectra(y), objective.spectra(x))
        loss = terms.mel + terms.magnitude + terms.complex + multi_resolution_stft_loss(x, y)
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


def test_a_waveform_has_no_distance_to_itself():
    objective = SpectralObjective(16000, RESOLUTIONS)
    spectra = objective.spectra(torch.randn(2, 4000, generator=torch.Generator().manual_seed(0)))
    terms = objective(spectra, spectra)
    assert terms.mel == 0
    assert terms.magnitude == 0
    assert terms.complex == 0


def test_the_mel_term_is_dacs_formula_over_librosas_mels():
    x, y = noise(1, 12000), noise(1, 12000, seed=1)
    expected = []
    for window, n_mels in RESOLUTIONS:
        a, b = (
            librosa.feature.melspectrogram(
                y=w[0].numpy(), sr=24000, n_fft=window, hop_length=window // 4, n_mels=n_mels, power=1.0,
                pad_mode="reflect",
            )
            for w in (x, y)
        )  # fmt: skip
        floor = 4e-6 * window
        expected.append(np.abs(np.log10(np.maximum(a, floor)) - np.log10(np.maximum(b, floor))).mean())
    objective = SpectralObjective(24000, RESOLUTIONS)
    found = objective(objective.spectra(x), objective.spectra(y)).mel
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_ten_decibels_quieter_is_half_a_decade_of_mel():
    objective = SpectralObjective(16000, RESOLUTIONS, floor=1e-12)
    loud = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    terms = objective(objective.spectra(loud), objective.spectra(loud * 10**-0.5))
    assert math.isclose(float(terms.mel), 0.5, rel_tol=1e-4)
    # ||a - sqrt(0.1) a|| / ||a||, phase or no phase
    assert math.isclose(float(terms.complex), 1 - 10**-0.5, rel_tol=1e-4)


def test_an_opposite_phase_is_heard_by_the_complex_term_alone():
    objective = SpectralObjective(16000, RESOLUTIONS)
    spectra = objective.spectra(torch.randn(1, 8000, generator=torch.Generator().manual_seed(0)))
    terms = objective(spectra, [-s for s in spectra])
    assert terms.mel == 0
    assert math.isclose(float(terms.complex), 2.0, rel_tol=1e-5)


def test_what_lies_below_the_floor_costs_nothing():
    objective = SpectralObjective(16000, RESOLUTIONS)
    silence, hiss = torch.zeros(1, 8000), 1e-6 * torch.ones(1, 8000).cumsum(1).cos()
    assert float(objective(objective.spectra(silence), objective.spectra(hiss)).mel) == 0
