"""Distances between the spectra of two waveforms: losses and the scores of all tables.

Both use the front end of `revox.losses.stft`, so that a number in a training log and a number in a table mean
the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from revox.losses.stft import log_mel, magnitude, stft, to_mel


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
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    total = x.new_zeros((), dtype=torch.float32)
    for n_fft, hop, length in resolutions:
        mag_x, mag_y = (magnitude(stft(w, n_fft, hop, window_length=length), 1e-7) for w in (x, y))
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


@dataclass(frozen=True)
class SpectralTerms:
    """Scalars: `mel` (log), `magnitude` (spectral convergence), `complex` (phase included, relative)."""

    mel: Tensor
    magnitude: Tensor
    complex: Tensor


@dataclass(frozen=True)
class SpectralObjective:
    """Multi-resolution mel, magnitude and complex STFT losses of a reconstruction.

    `resolutions` are (n_fft, mel bands), hop n_fft / `overlap`. The mel term is the mean absolute difference
    of log10 mel magnitudes, averaged over resolutions (DAC, arXiv 2306.06546, sums it), clamped at `floor *
    n_fft`: speech at -23 dB peaks near 4e-4 * n_fft, so the default looks 40 dB down. A lower floor spends
    the loss on silence and on the band that recordings leave empty: half of all bands lie more than 45 dB
    down. The magnitude term is the spectral convergence of Parallel WaveGAN (arXiv 1910.11480, eq. 5), which
    weighs harmonics before noise. Each clip is measured against itself and all count alike: the mean of a
    batch is the mean of its parts.
    """

    rate: int
    resolutions: tuple[tuple[int, int], ...]
    floor: float = 4e-6
    overlap: int = 4

    def spectra(self, x: Tensor) -> list[Tensor]:
        """Complex STFTs `[batch, bins, frames]` of `x` `[batch, samples]`, one for each resolution."""
        return [stft(x, n, n // self.overlap) for n, _ in self.resolutions]

    def __call__(self, real: list[Tensor], fake: list[Tensor]) -> SpectralTerms:
        """The three terms between the `spectra` of the original and of the reconstruction."""
        mel, convergence, phase = [], [], []
        for (n, bands), a, b in zip(self.resolutions, real, fake, strict=True):
            size_a, size_b = magnitude(a, 1e-8), magnitude(b, 1e-8)
            log_a, log_b = (
                to_mel(size, self.rate, bands).clamp_min(self.floor * n).log10() for size in (size_a, size_b)
            )
            mel.append((log_a - log_b).abs().mean())
            # A silent clip is measured against the floor.
            norm = size_a.norm(dim=(-2, -1)).clamp_min(self.floor * n * size_a[0].numel() ** 0.5)
            convergence.append(((size_a - size_b).norm(dim=(-2, -1)) / norm).mean())
            apart = torch.view_as_real(a) - torch.view_as_real(b)
            phase.append((torch.linalg.vector_norm(apart, dim=(-3, -2, -1)) / norm).mean())
        return SpectralTerms(*(torch.stack(t).mean() for t in (mel, convergence, phase)))
