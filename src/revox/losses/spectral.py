"""Spectral losses and distances: differentiable, pure PyTorch, any sample rate.

Losses use these and so do scores, so that a number in a training log and a number in a table mean the same.
All functions take waveforms `[..., samples]` in float (full scale is 1) on any device. A waveform shorter
than an analysis window is extended with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Window length in samples -> mel bands: the seven scales of the Descript Audio Codec (conf/base.yml).
DAC_SCALES: tuple[tuple[int, int], ...] = (
    (32, 5),
    (64, 10),
    (128, 20),
    (256, 40),
    (512, 80),
    (1024, 160),
    (2048, 320),
)
LONGEST_WINDOW = 0.1  # seconds; a longer one blurs the syllables it should compare


def hz_to_mel(frequency: np.ndarray | float, htk: bool = False) -> np.ndarray:
    """Hz to mel: Slaney's Auditory Toolbox scale (linear to 1 kHz, then logarithmic), or HTK's formula."""
    hz = np.asarray(frequency, dtype=np.float64)
    if htk:
        return 2595.0 * np.log10(1.0 + hz / 700.0)
    above = 15.0 + np.log(np.maximum(hz, 1e-9) / 1000.0) * 27.0 / math.log(6.4)
    return np.where(hz >= 1000.0, above, hz * 3.0 / 200.0)


def mel_to_hz(mel: np.ndarray | float, htk: bool = False) -> np.ndarray:
    """Mel to Hz, the inverse of `hz_to_mel`."""
    mels = np.asarray(mel, dtype=np.float64)
    if htk:
        return 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    above = 1000.0 * np.exp(math.log(6.4) / 27.0 * (mels - 15.0))
    return np.where(mels >= 15.0, above, mels * 200.0 / 3.0)


def mel_filterbank(
    rate: int, n_fft: int, n_mels: int, fmin: float = 0.0, fmax: float | None = None, htk: bool = False
) -> np.ndarray:
    """Triangular mel filters `[n_mels, n_fft // 2 + 1]`, float32, each of unit area in Hz (Slaney's norm).

    `rate`, `fmin` and `fmax` are in Hz; `fmax` is half the rate when None. Equals `librosa.filters.mel`.
    Raises ValueError when the band is empty.
    """
    fmax = rate / 2 if fmax is None else fmax
    if not 0 <= fmin < fmax <= rate / 2:
        raise ValueError(f"mel filters need 0 <= fmin < fmax <= {rate / 2:g} Hz, got {fmin:g} and {fmax:g}.")
    edges = mel_to_hz(np.linspace(hz_to_mel(fmin, htk), hz_to_mel(fmax, htk), n_mels + 2), htk)
    bins = np.fft.rfftfreq(n_fft, 1.0 / rate)
    lower, centre, upper = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.minimum((bins - lower) / (centre - lower), (upper - bins) / (upper - centre))
    return (np.maximum(triangles, 0.0) * (2.0 / (upper - lower))).astype(np.float32)


@lru_cache(maxsize=128)
def _filters(rate: int, n_fft: int, n_mels: int, fmin: float, fmax: float | None, device: str) -> Tensor:
    # As the right factor of `magnitude [..., frames, bins] @ filters [bins, n_mels]`.
    with torch.inference_mode(False):
        return torch.from_numpy(mel_filterbank(rate, n_fft, n_mels, fmin, fmax)).T.contiguous().to(device)


@lru_cache(maxsize=128)
def _hann(length: int, device: str) -> Tensor:
    with torch.inference_mode(False):
        return torch.hann_window(length).to(device)


def _magnitude(x: Tensor, n_fft: int, hop: int, window: Tensor, floor: float) -> Tensor:
    """`[batch, samples]` -> magnitudes `[batch, bins, frames]`, the power clamped to `floor` before the root.

    The clamp keeps the gradient of the root finite where the spectrum is empty.
    """
    if x.shape[-1] <= n_fft // 2:  # reflection needs more samples than it mirrors
        x = F.pad(x, (0, n_fft // 2 + 1 - x.shape[-1]))
    spectrum = torch.view_as_real(torch.stft(x, n_fft, hop, window.numel(), window, return_complex=True))
    return spectrum.square().sum(-1).clamp_min(floor).sqrt()


def magnitude_spectrogram(x: Tensor, n_fft: int, hop: int, window_length: int | None = None) -> Tensor:
    """Magnitudes of a centred, reflect-padded STFT: `[..., samples]` -> `[..., n_fft // 2 + 1, frames]`.

    Hann window of `window_length` samples (default `n_fft`); frames = samples // hop + 1.
    """
    x = x.float()
    out = _magnitude(
        x.reshape(-1, x.shape[-1]), n_fft, hop, _hann(window_length or n_fft, str(x.device)), 1e-14
    )
    return out.reshape(*x.shape[:-1], *out.shape[1:])


def mel_spectrogram(
    x: Tensor,
    rate: int,
    n_fft: int = 1024,
    hop: int = 256,
    n_mels: int = 80,
    fmin: float = 0.0,
    fmax: float | None = None,
) -> Tensor:
    """Mel spectrogram of magnitudes (power 1): `[..., samples]` -> `[..., n_mels, frames]`.

    Slaney filters, Hann window of `n_fft`, centred with reflection: `librosa.feature.melspectrogram(power=1,
    pad_mode="reflect")`.
    """
    magnitude = magnitude_spectrogram(x, n_fft, hop)
    return (magnitude.mT @ _filters(rate, n_fft, n_mels, fmin, fmax, str(x.device))).mT


def log_mel(
    x: Tensor,
    rate: int,
    n_fft: int = 1024,
    hop: int = 256,
    n_mels: int = 80,
    fmin: float = 0.0,
    fmax: float | None = None,
    floor: float = 1e-5,
) -> Tensor:
    """Natural logarithm of `mel_spectrogram`, clamped from below at `floor`: `[..., n_mels, frames]`."""
    return mel_spectrogram(x, rate, n_fft, hop, n_mels, fmin, fmax).clamp_min(floor).log()


class MelSpectrogram(nn.Module):
    """`mel_spectrogram` as a module, filters and window as (unsaved) buffers: it follows `.to(device)`.

    `[..., samples]` -> `[..., n_mels, frames]`, magnitudes; `rate`, `fmin`, `fmax` in Hz, `n_fft` and `hop`
    in samples.
    """

    filters: Tensor
    window: Tensor

    def __init__(
        self,
        rate: int,
        n_fft: int = 1024,
        hop: int = 256,
        n_mels: int = 80,
        fmin: float = 0.0,
        fmax: float | None = None,
    ) -> None:
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        bank = torch.from_numpy(mel_filterbank(rate, n_fft, n_mels, fmin, fmax)).T.contiguous()
        self.register_buffer("filters", bank, persistent=False)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., samples]` -> `[..., n_mels, frames]`."""
        flat = _magnitude(x.float().reshape(-1, x.shape[-1]), self.n_fft, self.hop, self.window, 1e-14)
        return (flat.mT @ self.filters).mT.reshape(*x.shape[:-1], self.filters.shape[1], -1)


def scales_for(rate: int) -> tuple[tuple[int, int], ...]:
    """The `(window, mel bands)` scales of DAC that suit `rate`: windows of at most 0.1 s.

    All seven at 22.05 and 24 kHz, six (32 to 1024) at 16 kHz.
    """
    return tuple(s for s in DAC_SCALES if s[0] <= LONGEST_WINDOW * rate)


def multi_resolution_mel_loss(
    x: Tensor,
    y: Tensor,
    rate: int,
    scales: Sequence[tuple[int, int]] | None = None,
    floor: float = 1e-5,
) -> Tensor:
    """Multi-resolution mel loss of the Descript Audio Codec (arXiv 2306.06546, section 3.4): a scalar.

    Mean absolute difference of log10 mel magnitudes, clamped at `floor`, **summed** over scales of (window,
    mel bands), hop a quarter of the window, as in `dac/nn/loss.py` (`MelSpectrogramLoss`, pow 1, mag_weight
    0). `x` and `y` are `[..., samples]` of one length; `scales` defaults to `scales_for(rate)`.
    """
    total = x.new_zeros(())
    for window, n_mels in scales_for(rate) if scales is None else scales:
        # Apart, not stacked: the target needs no gradient, and a backward pass through it is as dear.
        log_x, log_y = (
            mel_spectrogram(w, rate, window, max(1, window // 4), n_mels).clamp_min(floor).log10()
            for w in (x, y)
        )
        total = total + F.l1_loss(log_x, log_y)
    return total


def stft_resolutions(rate: int) -> tuple[tuple[int, int, int], ...]:
    """`(n_fft, hop, window)` in samples: 25, 50 and 10 ms windows, hop a fifth.

    At 24 kHz these are Parallel WaveGAN's (1024, 120, 600), (2048, 240, 1200), (512, 50, 240) but for
    the last hop (48).
    """
    resolutions = []
    for seconds in (0.025, 0.05, 0.01):
        window = round(rate * seconds)
        resolutions.append((1 << math.ceil(math.log2(1.5 * window)), window // 5, window))
    return tuple(resolutions)


def multi_resolution_stft_loss(
    x: Tensor, y: Tensor, rate: int = 24000, resolutions: Sequence[tuple[int, int, int]] | None = None
) -> Tensor:
    """Multi-resolution STFT loss of Parallel WaveGAN (arXiv 1910.11480, equations 4 to 6): a scalar.

    Spectral convergence `|| |Y|-|X| || / || |Y| ||` (Frobenius norm of each item, mean over items) plus the
    mean absolute difference of natural-log magnitudes, **averaged** over resolutions `(n_fft, hop, window)`.
    `x` (estimate) and `y` (target) are `[..., samples]` of one length; not symmetric.
    """
    resolutions = stft_resolutions(rate) if resolutions is None else resolutions
    x, y = x.float().reshape(-1, x.shape[-1]), y.float().reshape(-1, y.shape[-1])
    total = x.new_zeros(())
    for n_fft, hop, length in resolutions:
        window = _hann(length, str(x.device))
        mag_x, mag_y = (_magnitude(w, n_fft, hop, window, 1e-7) for w in (x, y))
        error = (mag_y - mag_x).flatten(1).norm(dim=1) / mag_y.flatten(1).norm(dim=1)
        total = total + error.mean() + F.l1_loss(mag_x.log(), mag_y.log())
    return total / len(resolutions)


def mel_distance(x: Tensor, y: Tensor, rate: int) -> float:
    """The mel distance of all tables: mean absolute difference of natural-log mel magnitudes, in nats.

    80 Slaney bands from 0 Hz to half the rate (at most 12 kHz), windows of about 43 ms (1024 samples at 24
    kHz), hop a quarter, magnitudes clamped at 1e-4 (about 90 dB under full scale, so that inaudible noise
    does not count). 1 nat is 8.7 dB. `x` and `y` are `[samples]` or `[batch, samples]` at `rate` Hz; the
    longer is cut.
    """
    samples = min(x.shape[-1], y.shape[-1])
    n_fft = 1 << round(math.log2(rate * 1024 / 24000))
    with torch.no_grad():
        both = torch.stack([x[..., :samples], y[..., :samples]])
        a, b = log_mel(both, rate, n_fft, n_fft // 4, 80, 0.0, min(rate / 2, 12000.0), floor=1e-4)
    return float((a - b).abs().mean())
