"""Other phases for what a decoder made.

Codes say nothing of phase: a decoder makes up its own, always the same for the same codes. An encoder that
learns from decoded sound alone learns to read them there, and hears nothing in a recording, whose phases are
its own. Turned at random, they teach it to listen to the rest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SPACING = 100.0  # Hz between the frequencies whose phases are drawn; about a low voice's harmonics


def draw_turns(batch: int, rate: int, milliseconds: float, rng: torch.Generator) -> Tensor:
    """Phases `[batch, points]` in radians at every `SPACING` Hz up to half the `rate`: any at 0 Hz, and from
    there a walk whose slope is a delay of `milliseconds` (standard deviation) in each band."""
    points = math.ceil(rate / 2 / SPACING) + 1
    first = torch.rand((batch, 1), generator=rng) * (2 * math.pi)
    steps = torch.randn((batch, points - 1), generator=rng) * (2 * math.pi * SPACING * milliseconds / 1000)
    return torch.cat((first, first + steps.cumsum(dim=1)), dim=1)


def turn_phases(audio: Tensor, rate: int, turns: Tensor) -> Tensor:
    """`audio` `[batch, samples]` with its phases turned by `draw_turns`, linear between the points.

    All-pass: magnitudes stay, and nothing is delayed by more than a few milliseconds. Sound that is moved
    beyond an end is lost there.
    """
    samples = audio.shape[1]
    size = samples + math.ceil(0.05 * rate)  # room for what is delayed, so that it does not come round
    place = torch.fft.rfftfreq(size, 1 / rate, device=audio.device) / SPACING
    below = place.floor().long().clamp_max(turns.shape[1] - 2)
    turns = turns.to(audio.device)
    angle = turns[:, below] + (turns[:, below + 1] - turns[:, below]) * (place - below)
    spectrum = torch.fft.rfft(audio.float(), size) * torch.polar(torch.ones_like(angle), angle)
    return torch.fft.irfft(spectrum, size)[:, :samples]
