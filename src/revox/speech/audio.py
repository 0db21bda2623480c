"""Audio as an array: samples and their rate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from revox.speech.errors import AudioError
from revox.speech.mixdown import Mixdown


@dataclass(frozen=True, eq=False)
class Audio:
    """Mono samples `[n]` (float32, full scale 1) and their rate in Hz.

    Any float or integer array is converted to float32 (integers are taken as they are, not scaled), and of
    `[channels, n]` the mean is taken, or one channel where two cancel each other. `truncated`: the source
    went on beyond these samples. `one_channel`: its channels cancel each other, so that one was taken.
    """

    samples: np.ndarray
    rate: int
    truncated: bool = False
    one_channel: bool = False

    def __post_init__(self) -> None:
        samples = np.asarray(self.samples, dtype=np.float32)
        if samples.ndim == 2:
            mixdown = Mixdown()
            samples = mixdown.mix(samples, self.rate)
            object.__setattr__(self, "one_channel", self.one_channel or mixdown.one_channel)
        if samples.ndim != 1:
            raise AudioError(f"Audio is [samples] or [channels, samples], not {list(samples.shape)}.")
        if self.rate <= 0:
            raise AudioError(f"A sample rate is a positive number of Hz, not {self.rate}.")
        object.__setattr__(self, "samples", np.ascontiguousarray(samples))
        object.__setattr__(self, "rate", int(self.rate))

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return len(self.samples) / self.rate

    def at(self, rate: int) -> Audio:
        """The same at another sample rate (Hz)."""
        return Audio(resample(self.samples, self.rate, rate), rate, self.truncated, self.one_channel)


def resample(samples: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Resample float32 `[n]` with soxr at its HQ setting, as mistral-common does.

    The result has about `n * to_rate / from_rate` samples. Rates in Hz.
    """
    samples = np.asarray(samples, dtype=np.float32)
    if from_rate == to_rate or not samples.size:
        return samples
    import soxr

    return soxr.resample(np.ascontiguousarray(samples), from_rate, to_rate, quality="HQ")
