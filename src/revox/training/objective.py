"""Losses between a waveform and its reconstruction, computed from one set of STFTs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from revox.losses.spectral import mel_filterbank


@dataclass(frozen=True)
class SpectralTerms:
    """Scalars: `mel` (log), `magnitude` (spectral convergence), `complex` (phase included, relative)."""

    mel: Tensor
    magnitude: Tensor
    complex: Tensor


class SpectralObjective(nn.Module):
    """Multi-resolution mel, magnitude and complex STFT losses; the spectra are kept for the discriminators.

    `resolutions` are (n_fft, mel bands), hop n_fft / `overlap`. The mel term is the mean absolute difference
    of log10 mel magnitudes, averaged over resolutions (DAC, arXiv 2306.06546, sums it), clamped at `floor *
    n_fft`: speech at -23 dB peaks near 4e-4 * n_fft, so the default looks 40 dB down. A lower floor spends
    the loss on silence and on the band that recordings leave empty: half of all bands lie more than 45 dB
    down. The magnitude term is the spectral convergence of Parallel WaveGAN (arXiv 1910.11480, eq. 5), which
    weighs harmonics before noise. Every clip is measured against itself and counts alike: the mean of a
    batch is the mean of its parts.
    """

    def __init__(
        self,
        rate: int,
        resolutions: tuple[tuple[int, int], ...],
        floor: float = 4e-6,
        overlap: int = 4,
    ) -> None:
        super().__init__()
        self.resolutions, self.floor, self.overlap = resolutions, floor, overlap
        for n_fft, bands in resolutions:
            self.register_buffer(f"window_{n_fft}", torch.hann_window(n_fft), persistent=False)
            bank = torch.from_numpy(mel_filterbank(rate, n_fft, bands))
            self.register_buffer(f"bank_{n_fft}", bank, persistent=False)

    def spectra(self, x: Tensor) -> list[Tensor]:
        """Complex STFTs `[batch, bins, frames]` of `x` `[batch, samples]`, one for each resolution."""
        return [
            torch.stft(
                x.float(), n, n // self.overlap, window=getattr(self, f"window_{n}"), return_complex=True
            )
            for n, _ in self.resolutions
        ]

    def forward(self, real: list[Tensor], fake: list[Tensor]) -> SpectralTerms:
        """The three terms between spectra of the original and of the reconstruction."""
        mel, magnitude, phase = [], [], []
        for (n, _), a, b in zip(self.resolutions, real, fake, strict=True):
            size_a, size_b = _size(a), _size(b)
            bank = getattr(self, f"bank_{n}")
            log_a, log_b = ((bank @ s).clamp_min(self.floor * n).log10() for s in (size_a, size_b))
            mel.append((log_a - log_b).abs().mean())
            # A silent clip is measured against the floor.
            norm = size_a.norm(dim=(-2, -1)).clamp_min(self.floor * n * size_a[0].numel() ** 0.5)
            magnitude.append(((size_a - size_b).norm(dim=(-2, -1)) / norm).mean())
            apart = torch.view_as_real(a) - torch.view_as_real(b)
            phase.append((torch.linalg.vector_norm(apart, dim=(-3, -2, -1)) / norm).mean())
        return SpectralTerms(*(torch.stack(t).mean() for t in (mel, magnitude, phase)))


def _size(spectrum: Tensor) -> Tensor:
    return torch.view_as_real(spectrum).square().sum(-1).clamp_min(1e-8).sqrt()
