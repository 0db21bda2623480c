"""All-pass augmentation: decoded audio with other phases than the decoder's own.

Codes do not determine phase. A decoder always makes the same phases of the same codes, and an encoder that is
trained on decoded audio alone reads the codes there: it fails on recordings, whose phases are arbitrary. With
random phases it learns to use the magnitudes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SPACING = 100.0  # Hz between the frequencies whose phases are drawn; about a low voice's harmonics


def draw_phases(batch: int, rate: int, milliseconds: float, rng: torch.Generator) -> Tensor:
    """Phases `[batch, points]` in radians at every `SPACING` Hz up to half the `rate` (Hz).

    Uniform at 0 Hz, and from there a random walk, whose slope is a delay of `milliseconds` (standard
    deviation) in each band.
    """
    points = math.ceil(rate / 2 / SPACING) + 1
    first = torch.rand((batch, 1), generator=rng) * (2 * math.pi)
    steps = torch.randn((batch, points - 1), generator=rng) * (2 * math.pi * SPACING * milliseconds / 1000)
    return torch.cat((first, first + steps.cumsum(dim=1)), dim=1)


def all_pass(audio: Tensor, rate: int, phases: Tensor) -> Tensor:
    """`audio` `[batch, samples]` at `rate` Hz, shifted by the `phases` of `draw_phases`, linear between them.

    Magnitudes stay, and no band is delayed by more than a few milliseconds. Sound that is moved beyond an end
    is lost there.
    """
    samples = audio.shape[1]
    size = samples + math.ceil(0.05 * rate)  # room for what is delayed, so that it does not wrap around
    place = torch.fft.rfftfreq(size, 1 / rate, device=audio.device) / SPACING
    below = place.floor().long().clamp_max(phases.shape[1] - 2)
    phases = phases.to(audio.device)
    angle = phases[:, below] + (phases[:, below + 1] - phases[:, below]) * (place - below)
    spectrum = torch.fft.rfft(audio.float(), size) * torch.polar(torch.ones_like(angle), angle)
    return torch.fft.irfft(spectrum, size)[:, :samples]
