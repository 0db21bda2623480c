"""Another sample rate, in PyTorch: on the device where the training is, and differentiable.

Files and recordings are resampled by `revox.speech.resample` (soxr); this is for networks of 16 kHz in the
losses of a codec of 24 kHz.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ZEROS = 48  # zero crossings of the sinc on each side
_BETA = 10.0  # of the Kaiser window: 100 dB
_ROLLOFF = 0.95  # of the lower Nyquist frequency: half of what is there passes, 5 % above it nothing


class Resampler(nn.Module):
    """`[..., samples]` at `from_rate` Hz to `[..., ceil(samples * to_rate / from_rate)]` at `to_rate` Hz.

    A windowed sinc at the exact times of the new samples (J. O. Smith, "Digital Audio Resampling"), with
    silence before and after. Flat to 0.9 of the lower Nyquist frequency, 80 dB down from 1.02 of it on.
    """

    kernel: Tensor

    def __init__(self, from_rate: int, to_rate: int) -> None:
        super().__init__()
        divisor = math.gcd(from_rate, to_rate)
        self.down, self.up = from_rate // divisor, to_rate // divisor
        cutoff = _ROLLOFF * min(1.0, self.up / self.down)  # of the old Nyquist frequency
        self.radius = math.ceil(_ZEROS / cutoff)
        # Every `up` new samples the old ones stand alike: one filter each, `down` old samples apart.
        taps = torch.arange(-self.radius, self.radius + self.down, dtype=torch.float64)
        phases = torch.arange(self.up, dtype=torch.float64)[:, None] * self.down / self.up
        time = (taps - phases) * cutoff
        inside = (1 - (time / _ZEROS).square()).clamp(min=0)
        window = torch.special.i0(_BETA * inside.sqrt()) / torch.special.i0(torch.tensor(_BETA).double())
        kernel = cutoff * torch.sinc(time) * window * (inside > 0)
        self.register_buffer("kernel", kernel[:, None].float(), persistent=False)

    def length(self, samples: int) -> int:
        """The number of new samples for `samples` old ones."""
        return -(-samples * self.up // self.down)

    def forward(self, waveform: Tensor) -> Tensor:
        """`[..., samples]`, float32; the same tensor where the rates are equal."""
        if self.up == self.down:
            return waveform
        samples = waveform.shape[-1]
        flat = waveform.float().reshape(-1, 1, samples)
        groups = -(-self.length(samples) // self.up)
        right = max(0, (groups - 1) * self.down + self.kernel.shape[-1] - self.radius - samples)
        out = F.conv1d(F.pad(flat, (self.radius, right)), self.kernel, stride=self.down)[..., :groups]
        return out.mT.reshape(*waveform.shape[:-1], -1)[..., : self.length(samples)]
