"""Audio as an array: samples and their rate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from revox.speech.errors import AudioError


@dataclass(frozen=True, eq=False)
class Audio:
    """Samples (float32, full scale 1) and their rate in Hz.

    `samples` is `[n]` for mono or `[channels, n]`; any float or integer array is converted to float32
    (integers are taken as they are, not scaled). `truncated`: the source went on beyond these samples.
    """

    samples: np.ndarray
    rate: int
    truncated: bool = False

    def __post_init__(self) -> None:
        samples = np.ascontiguousarray(self.samples, dtype=np.float32)
        if samples.ndim not in (1, 2):
            raise AudioError(f"Audio is [samples] or [channels, samples], not {list(samples.shape)}.")
        if self.rate <= 0:
            raise AudioError(f"A sample rate is a positive number of Hz, not {self.rate}.")
        object.__setattr__(self, "samples", samples)
        object.__setattr__(self, "rate", int(self.rate))

    @property
    def channels(self) -> int:
        """Number of channels."""
        return 1 if self.samples.ndim == 1 else self.samples.shape[0]

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.samples.shape[-1] / self.rate

    def mono(self) -> Audio:
        """The mean of the channels, `[n]`."""
        if self.samples.ndim == 1:
            return self
        return Audio(self.samples.mean(axis=0), self.rate, self.truncated)

    def at(self, rate: int) -> Audio:
        """The same at another sample rate (Hz)."""
        return Audio(resample(self.samples, self.rate, rate), rate, self.truncated)


def resample(samples: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Resample float32 `[n]` or `[channels, n]` with soxr at its HQ setting, as mistral-common does.

    The result has about `n * to_rate / from_rate` samples. Rates in Hz.
    """
    samples = np.asarray(samples, dtype=np.float32)
    if from_rate == to_rate:
        return samples
    if samples.shape[-1] == 0:
        return samples
    import soxr

    out = soxr.resample(np.ascontiguousarray(samples.T), from_rate, to_rate, quality="HQ")
    return np.ascontiguousarray(out.T)
