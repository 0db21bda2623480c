"""The front end of the project: one STFT, one mel filter bank, for losses, scores, features and pictures.

All functions take waveforms `[..., samples]` (full scale is 1) on any device, compute in float32 and pass
gradients. What differs between their users (window, padding, floor, bands) is a parameter.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


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
    lower, center, upper = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.minimum((bins - lower) / (center - lower), (upper - bins) / (upper - center))
    return (np.maximum(triangles, 0.0) * (2.0 / (upper - lower))).astype(np.float32)


# Cached tensors are made outside inference mode, so that a gradient may pass through them later.
@lru_cache(maxsize=128)
def _filters(rate: int, n_fft: int, n_mels: int, fmin: float, fmax: float | None, device: str) -> Tensor:
    with torch.inference_mode(False):
        return torch.from_numpy(mel_filterbank(rate, n_fft, n_mels, fmin, fmax)).T.contiguous().to(device)


@lru_cache(maxsize=128)
def _window(kind: str, length: int, device: str) -> Tensor:
    with torch.inference_mode(False):
        made: Tensor = {"hann": torch.hann_window, "hamming": torch.hamming_window}[kind](length)
        return made.to(device)


def stft(
    x: Tensor,
    n_fft: int,
    hop: int,
    *,
    window_length: int | None = None,
    window: str = "hann",
    pad_mode: str = "reflect",
) -> Tensor:
    """Complex STFT `[..., n_fft // 2 + 1, samples // hop + 1]`, its columns centered on multiples of `hop`.

    `window` ("hann" or "hamming") has `window_length` samples, `n_fft` by default. Beyond its ends the
    waveform is mirrored ("reflect") or silent ("constant"). To be mirrored, a waveform that is shorter than
    half a window is first extended with zeros.
    """
    flat = x.float().reshape(-1, x.shape[-1])
    if pad_mode == "reflect" and flat.shape[-1] <= n_fft // 2:
        flat = F.pad(flat, (0, n_fft // 2 + 1 - flat.shape[-1]))
    length = n_fft if window_length is None else window_length
    spectrum = torch.stft(
        flat, n_fft, hop, length, _window(window, length, str(x.device)), pad_mode=pad_mode,
        return_complex=True,
    )  # fmt: skip
    return spectrum.reshape(*x.shape[:-1], *spectrum.shape[1:])


def power(spectrum: Tensor) -> Tensor:
    """Squared magnitudes of a complex spectrum, real and of its shape."""
    return torch.view_as_real(spectrum).square().sum(-1)


def magnitude(spectrum: Tensor, floor: float = 1e-14) -> Tensor:
    """Magnitudes of a complex spectrum, of its shape.

    The power is clamped to `floor` before the root, whose gradient is then finite in an empty spectrum.
    """
    return power(spectrum).clamp_min(floor).sqrt()


def to_mel(
    magnitudes: Tensor, rate: int, n_mels: int, fmin: float = 0.0, fmax: float | None = None
) -> Tensor:
    """Mel bands `[..., n_mels, frames]` (`mel_filterbank`) of `magnitudes` `[..., n_fft / 2 + 1, frames]`."""
    n_fft = 2 * (magnitudes.shape[-2] - 1)
    return (magnitudes.mT @ _filters(rate, n_fft, n_mels, fmin, fmax, str(magnitudes.device))).mT


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

    Slaney filters, Hann window of `n_fft`, centered with reflection: `librosa.feature.melspectrogram(power=1,
    pad_mode="reflect")`.
    """
    return to_mel(magnitude(stft(x, n_fft, hop)), rate, n_mels, fmin, fmax)


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
