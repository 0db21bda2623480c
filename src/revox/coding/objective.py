"""The distance that inversion descends: spectra of what the decoder says against spectra of the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from revox.losses.stft import magnitude, stft, to_mel

SCALES = ((256, 40), (512, 80), (1024, 160), (2048, 320))
"""(window, mel bands), hop a quarter of the window: DAC's but for the three shortest."""

# Speech at -23 LUFS peaks near 4e-4 times the window's length. Half of all bands lie more than 45 dB under
# that: a lower floor would have the search match pauses, and the band that a recording leaves empty, first.
FLOOR = 2e-6  # of a mel magnitude, times the window's length: 46 dB down
BIN_FLOOR = 1e-5  # of a bin's magnitude, times the window's length
POWER = 0.3


class SpectralTarget:
    """Distance from a fixed waveform: multi-resolution mel and STFT magnitudes, the target's computed once.

    Of each window: the mean absolute difference of log10 mel magnitudes (DAC, arXiv 2306.06546), clamped at
    `FLOOR`, and `stft_weight` times spectral convergence (arXiv 1910.11480, equation 5) plus the relative
    difference of magnitudes to the power 0.3, about as loudness is heard. The mean over windows.
    """

    def __init__(
        self,
        target: Tensor,
        rate: int,
        scales: Sequence[tuple[int, int]] = SCALES,
        stft_weight: float = 0.5,
    ) -> None:
        self.target, self.rate = target.float(), rate
        self.stft_weight = stft_weight
        self.scales = [scale for scale in scales if scale[0] <= target.shape[-1]] or [scales[0]]
        with torch.no_grad():
            self._wanted = [self._spectra(self.target[None], i) for i in range(len(self.scales))]

    def distance(self, waveform: Tensor) -> Tensor:
        """Distances `[batch]` of `waveform` `[batch, samples]`."""
        total = waveform.new_zeros(waveform.shape[0])
        for i, (wanted_m, log_mel, soft) in enumerate(self._wanted):
            m, mel, soft_m = self._spectra(waveform, i)
            term = (mel - log_mel).abs().mean(dim=(1, 2))
            if self.stft_weight:
                convergence = (m - wanted_m).flatten(1).norm(dim=1) / wanted_m.norm().clamp_min(1e-5)
                difference = (soft_m - soft).abs().mean(dim=(1, 2)) / soft.mean()
                term = term + self.stft_weight * (convergence + difference)
            total = total + term / len(self.scales)
        return total

    @torch.no_grad()
    def distance_in_time(self, waveform: Tensor, frames: int) -> Tensor:
        """The mel part alone, `[batch, frames]`: where in time `waveform` `[batch, samples]` differs."""
        total = waveform.new_zeros(waveform.shape[0], frames)
        for i, (_, log_mel, _) in enumerate(self._wanted):
            error = (self._spectra(waveform, i)[1] - log_mel).abs().mean(dim=2)
            total = total + functional.adaptive_avg_pool1d(error, frames)
        return total / len(self.scales)

    def _spectra(self, waveform: Tensor, scale: int) -> tuple[Tensor, Tensor, Tensor]:
        """Magnitudes, log10 mel magnitudes, compressed magnitudes, each `[batch, columns, bins or bands]`."""
        n, bands = self.scales[scale]
        m = magnitude(stft(waveform, n, n // 4))
        log_mel = to_mel(m, self.rate, bands).mT.clamp_min(FLOOR * n).log10()
        return m.mT, log_mel, m.mT.clamp_min(BIN_FLOOR * n) ** POWER
