"""Channels to one: the mean, or one channel where the two of a stereo sound cancel each other."""

from __future__ import annotations

import numpy as np

# A mean this far under the louder channel is cancellation; back from it is less, for a decision that stands.
# Two unlike channels lose 3 dB, and a silent one 6 dB.
_CANCELS, _AGREES = 10**-1.0, 10**-0.8  # ratios of power
_SILENT = 1e-12  # mean square
_FADE = 0.01  # seconds from one to the other


class Mixdown:
    """Mono from the blocks of one sound. `one_channel`: somewhere one channel was taken instead of the mean.

    Stereo whose channels are inverted, nearly too, keeps nothing but noise in its mean. Each block, of about
    a second, is decided by itself, and the same channel is taken everywhere.
    """

    def __init__(self) -> None:
        self.one_channel = False
        self._cancels = False
        self._channel: int | None = None

    def mix(self, channels: np.ndarray, rate: int) -> np.ndarray:
        """`[channels, n]` float32 at `rate` Hz to `[n]`."""
        mean = channels.mean(axis=0)
        if len(channels) != 2 or not mean.size:
            return mean
        power = np.square(channels, dtype=np.float64).mean(axis=1)
        before = self._cancels
        if power.max() > _SILENT:
            share = float(np.square(mean, dtype=np.float64).mean() / power.max())
            self._cancels = share < (_AGREES if self._cancels else _CANCELS)
        if self._cancels and self._channel is None:
            self._channel, self.one_channel, before = int(power.argmax()), True, True
        if self._channel is None or not (self._cancels or before):
            return mean
        one = channels[self._channel]
        if self._cancels == before:
            return one
        fade = np.clip(np.arange(len(mean), dtype=np.float32) / (_FADE * rate), 0, 1)
        weight = fade if self._cancels else 1 - fade
        return weight * one + (1 - weight) * mean
