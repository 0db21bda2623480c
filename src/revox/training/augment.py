"""Random changes of sound that leave words and voice: level, delay, equalization, room, noise.

Serving takes a reference clip as it is, at any level and from any microphone, so encoders should have heard
such clips. Codes depend on level and alignment (the original encoder gives other codes for a clip that is
quieter or later), so what is changed strongly has no right answer: small settings are meant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

Share = Annotated[float, Field(ge=0, le=1)]

REVERBERATION = (0.1, 0.5)  # seconds until the tail of a room is 60 dB down
DIRECT = (0.0, 12.0)  # dB of the direct sound over the tail
SIGNAL_TO_NOISE = (10.0, 40.0)  # dB
LOWEST_BAND = 60.0  # Hz; the curve of an equalizer has a point every octave from here on


class Augmentation(BaseModel):
    """How much recordings are changed; 0 leaves a change out.

    `gain_db`: of the level, uniform to both sides. `delay_ms`: uniform from 0. `equalization_db`: standard
    deviation of the gain of each octave. `room` and `noise`: shares of the clips that get one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    gain_db: float = Field(default=0.0, ge=0, le=24)
    delay_ms: float = Field(default=0.0, ge=0, le=80)
    equalization_db: float = Field(default=0.0, ge=0, le=12)
    room: Share = 0.0
    noise: Share = 0.0

    @property
    def changes(self) -> bool:
        """Whether anything is changed."""
        return any(self.model_dump().values())


def draw_seeds(clips: int, rng: torch.Generator) -> Tensor:
    """A seed `[clips]` for the changes of each clip, so that they do not depend on which process has it."""
    return torch.randint(2**62, (clips,), generator=rng)


def augmented(audio: Tensor, rate: int, settings: Augmentation, seeds: Tensor) -> Tensor:
    """`audio` `[clips, samples]` at `rate` Hz, each clip changed as its seed of `seeds` `[clips]` says."""
    if not settings.changes:
        return audio
    return torch.stack(
        [_changed(clip, rate, settings, int(seed)) for clip, seed in zip(audio.float(), seeds, strict=True)]
    )


def _changed(clip: Tensor, rate: int, settings: Augmentation, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=rng))

    samples = len(clip)
    # Room for what is delayed, so that it does not wrap around.
    size = samples + math.ceil(rate * (settings.delay_ms / 1000 + REVERBERATION[1] * (settings.room > 0)))
    hertz = torch.fft.rfftfreq(size, 1 / rate)
    decibels = torch.full_like(hertz, between(-settings.gain_db, settings.gain_db))
    if settings.equalization_db:
        octave = (hertz / LOWEST_BAND).clamp_min(1).log2()
        points = torch.randn(math.ceil(float(octave[-1])) + 2, generator=rng) * settings.equalization_db
        below = octave.long()
        decibels += points[below] + (points[below + 1] - points[below]) * (octave - below)
    delay = between(0.0, settings.delay_ms / 1000)
    response = torch.polar(10 ** (decibels / 20), -2 * math.pi * hertz * delay)
    if between(0, 1) < settings.room:
        response = response * torch.fft.rfft(_room(rate, between, rng), size)
    changed = torch.fft.irfft(torch.fft.rfft(clip, size) * response.to(clip.device), size)[:samples]
    if between(0, 1) < settings.noise:
        noise = _noise(samples, between(0, 1), rng) * 10 ** (-between(*SIGNAL_TO_NOISE) / 20)
        changed = changed + changed.square().mean().sqrt() * noise.to(clip.device)
    return changed


def _room(rate: int, between: Callable[[float, float], float], rng: torch.Generator) -> Tensor:
    """The response of a room: the sound itself, and an exponentially decaying tail of noise."""
    seconds, direct = between(*REVERBERATION), between(*DIRECT)
    time = torch.arange(1, math.ceil(rate * seconds)) / rate
    tail = torch.randn(len(time), generator=rng) * 10 ** (-3 * time / seconds)
    tail = tail / tail.square().sum().sqrt() * 10 ** (-direct / 20)
    return torch.cat((torch.ones(1), tail))


def _noise(samples: int, slope: float, rng: torch.Generator) -> Tensor:
    """Noise of unit power, whose power falls with frequency to the power of `slope`: 0 is white, 1 pink."""
    spectrum = torch.fft.rfft(torch.randn(samples, generator=rng))
    spectrum *= torch.arange(1, len(spectrum) + 1) ** (-slope / 2)
    noise = torch.fft.irfft(spectrum, samples)
    return noise / noise.square().mean().sqrt()
