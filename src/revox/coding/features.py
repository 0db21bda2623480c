"""Spectral features of each frame of codes: the input of the student encoder.

A frame of codes (80 ms) is described by 80 mel bands at each of its patches (10 ms) and by the low bins of a
longer transform, where single harmonics show the pitch, at every second patch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from revox.losses.stft import stft, to_mel
from revox.model.config import CodecConfig

MEL_FFT, MEL_BANDS, MEL_TOP = 1024, 80, 8000.0
PITCH_FFT, PITCH_BINS = 2048, slice(3, 67)  # 35 to 770 Hz at 24 kHz
FLOOR = 4e-6  # of n_fft: 40 dB under speech at -23 dB


class SpectralFeatures(nn.Module):
    """Log10 magnitudes by the frame: `[..., samples] -> [..., frames, size]`, the last frame completed with
    zeros."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.rate = config.sampling_rate
        self.patch, self.per_frame = config.pretransform_patch_size, config.patches_per_frame
        self.mel_size = self.per_frame * MEL_BANDS
        self.size = self.mel_size + self.per_frame // 2 * (PITCH_BINS.stop - PITCH_BINS.start)

    @torch.no_grad()
    def forward(self, samples: Tensor) -> Tensor:
        """Features of `samples` `[..., n]`: mel bands by patch, then low bins by two patches."""
        length = self.patch * self.per_frame
        padded = functional.pad(samples, (0, -samples.shape[-1] % length))
        frames = padded.shape[-1] // length

        def magnitudes(n_fft: int, hop: int) -> Tensor:
            return stft(padded, n_fft, hop, pad_mode="constant").abs()[..., : padded.shape[-1] // hop]

        mel = to_mel(magnitudes(MEL_FFT, self.patch), self.rate, MEL_BANDS, 0.0, MEL_TOP)
        low = magnitudes(PITCH_FFT, 2 * self.patch)[..., PITCH_BINS, :]
        parts = (
            mel.clamp_min(FLOOR * MEL_FFT).log10(),
            low.clamp_min(4 * FLOOR * PITCH_FFT).log10(),
        )
        shaped = [part.mT.reshape(*samples.shape[:-1], frames, -1) for part in parts]
        return torch.cat(shaped, dim=-1)


def frame_network(inputs: int, width: int, blocks: int, outputs: int) -> nn.Sequential:
    """A small causal network over frames: `[batch, frames, inputs] -> [batch, frames, outputs]`."""
    return nn.Sequential(
        nn.Linear(inputs, width), *(Block(width) for _ in range(blocks)),
        nn.RMSNorm(width), nn.Linear(width, outputs),
    )  # fmt: skip


class Block(nn.Module):
    """Gated causal convolution over frames with a residual: `[batch, frames, width]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.conv = nn.Conv1d(width, 4 * width, 3)
        self.out = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to `x`; the receptive field is a frame and the two before it."""
        inside = self.conv(functional.pad(self.norm(x).transpose(1, 2), (2, 0))).transpose(1, 2)
        gate, value = inside.chunk(2, dim=-1)
        return x + self.out(functional.silu(gate) * value)
