"""The front end against librosa, and what its users had before against their own formulas."""

import re
import tokenize
from pathlib import Path

import librosa
import numpy as np
import pytest
import torch

from revox.coding.features import SpectralFeatures
from revox.coding.objective import SpectralTarget
from revox.losses.spectral import SpectralObjective
from revox.losses.stft import log_mel, magnitude, mel_filterbank, mel_spectrogram, power, stft, to_mel
from revox.model.config import CodecConfig


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
    np.testing.assert_allclose(log_mel(x, rate), np.log(np.maximum(oracle, 1e-5)), atol=1e-3)


def test_filters_cached_under_inference_mode_serve_training_afterwards():
    x = noise(2000)
    with torch.inference_mode():
        mel_spectrogram(x, 24000, 256, 64, 23)
    y = x.clone().requires_grad_()
    mel_spectrogram(y, 24000, 256, 64, 23).sum().backward()
    assert y.grad.isfinite().all()


def literally(x, n_fft, hop, window, pad_mode="reflect"):
    """`torch.stft` as each of the former front ends called it."""
    return torch.stft(x, n_fft, hop, len(window), window, pad_mode=pad_mode, return_complex=True)


def bank(n_fft, n_mels, fmax=None):
    return torch.from_numpy(librosa.filters.mel(sr=24000, n_fft=n_fft, n_mels=n_mels, fmax=fmax))


def same(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_what_inversion_descends_has_the_spectra_it_had():
    target, other = noise(12000), noise(2, 12000, seed=1)
    scales = ((256, 40), (1024, 160))
    expected = torch.zeros(2)
    for n, bands in scales:
        a, b = (literally(x, n, n // 4, torch.hann_window(n)).abs() for x in (other, target[None]))
        mels = [(bank(n, bands) @ m).clamp_min(2e-6 * n).log10() for m in (a, b)]
        soft = [m.clamp_min(1e-5 * n) ** 0.3 for m in (a, b)]
        convergence = (a - b).flatten(1).norm(dim=1) / b.norm()
        softly = (soft[0] - soft[1]).abs().mean(dim=(1, 2)) / soft[1].mean()
        expected += ((mels[0] - mels[1]).abs().mean(dim=(1, 2)) + 0.5 * (convergence + softly)) / 2
    same(SpectralTarget(target, 24000, scales).distance(other), expected)


def test_the_students_features_are_what_they_were():
    x, config = noise(2, 5 * 1920), CodecConfig()
    mel = literally(x, 1024, 240, torch.hann_window(1024), "constant").abs()[..., :40]
    low = literally(x, 2048, 480, torch.hann_window(2048), "constant").abs()[:, 3:67, :20]
    mel = (bank(1024, 80, 8000.0) @ mel).clamp_min(4e-6 * 1024).log10()
    low = low.clamp_min(1.6e-5 * 2048).log10()
    expected = torch.cat([part.mT.reshape(2, 5, -1) for part in (mel, low)], dim=-1)
    features = SpectralFeatures(config)
    same(features(x), expected)
    assert features.state_dict() == {}


def test_training_losses_and_discriminators_have_the_spectra_they_had():
    x = noise(2, 6000)
    found = SpectralObjective(24000, ((512, 40), (128, 15)), overlap=2).spectra(x)
    for n, spectrum in zip((512, 128), found, strict=True):
        expected = literally(x, n, n // 2, torch.hann_window(n))
        same(torch.view_as_real(spectrum), torch.view_as_real(expected))
        same(power(spectrum), expected.real.square() + expected.imag.square())
        same(magnitude(spectrum), expected.abs())


def test_the_recipes_mels_are_what_they_were():
    x = noise(2, 6000)
    recipe = bank(1024, 80) @ literally(x, 1024, 256, torch.hann_window(1024)).abs()
    same(to_mel(stft(x, 1024, 256).abs(), 24000, 80), recipe)


def test_a_hamming_window_and_any_leading_dimensions():
    x = noise(2, 3, 6000)
    found = stft(x, 400, 160, window="hamming", pad_mode="constant")
    assert found.shape == (2, 3, 201, 38)
    expected = literally(x[1], 400, 160, torch.hamming_window(400), "constant")
    same(torch.view_as_real(found[1]), torch.view_as_real(expected))


def test_only_the_front_end_makes_spectrograms():
    root = Path(__file__).parents[2]
    files = [
        *(root / "src").rglob("*.py"),
        *(root / "lab").rglob("*.py"),
        *(root / "benchmarks").rglob("*.py"),
    ]
    made = re.compile(r"torch\.stft|torchaudio|melscale|librosa\.(stft|feature)")
    assert [path.name for path in files if made.search(code_of(path))] == ["stft.py"]


def code_of(path: Path) -> str:
    """The text of a module without comments, docstrings and messages, which are the tokens with spaces."""
    with tokenize.open(path) as text:
        return "".join(t.string for t in tokenize.generate_tokens(text.readline) if " " not in t.string)
