"""Audio in the speed, sample rate and format of a request, whole or in pieces."""

from __future__ import annotations

from typing import Any, BinaryIO, cast

import numpy as np

from revox.serving.errors import ApiError
from revox.speech import FORMATS
from revox.speech.stretch import TimeStretch
from revox.speech.write import AudioEncoder

RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
PAGES = {"ogg": {"page_duration": "200000"}}
"""Microseconds of audio in a page of Ogg, which is sent when it is full; FFmpeg's default is a second."""


WHOLE_ONLY = ("flac",)
"""Formats that a stream sends at its end: libsndfile reads a FLAC only if its header has the true length."""


class Shape:
    """Applies a request's speed and sample rate to samples as they arrive."""

    def __init__(self, rate: int, speed: float, sample_rate: int | None) -> None:
        self.rate = sample_rate or rate
        self._stretch = TimeStretch(rate, speed)
        self._resampler: Any = None
        if self.rate != rate:
            import soxr

            self._resampler = soxr.ResampleStream(rate, self.rate, 1, dtype="float32", quality="HQ")

    def push(self, samples: np.ndarray) -> np.ndarray:
        """The output samples that are final so far."""
        return self._resampled(self._stretch.push(samples), last=False)

    def finish(self) -> np.ndarray:
        """The rest."""
        return self._resampled(self._stretch.finish(), last=True)

    def _resampled(self, samples: np.ndarray, last: bool) -> np.ndarray:
        if self._resampler is None:
            return samples
        return self._resampler.resample_chunk(np.ascontiguousarray(samples, np.float32), last=last)


def check_rate(format: str, rate: int | None) -> None:
    """Raise ApiError 400 when a format cannot have a sample rate."""
    allowed = FORMATS[format].rates or RATES
    if rate is not None and rate not in allowed:
        expected = ", ".join(str(one) for one in allowed)
        raise ApiError(
            400,
            f"{format} cannot have a sample rate of {rate} Hz; use one of {expected}",
            param="sample_rate",
        )


class StreamEncoder:
    """Samples in, bytes of a format out, as soon as the codec returns them.

    The header of a WAV has the largest possible sizes, as OpenAI and vllm-omni stream it; players read until
    the end of the stream.
    """

    def __init__(self, format: str, rate: int) -> None:
        kind = FORMATS[format]
        self._sink = _Sink()
        options = {"flush_packets": "1", **PAGES.get(kind.container, {})}
        self._encoder = AudioEncoder(cast(BinaryIO, self._sink), kind, rate, options=options)

    def push(self, samples: np.ndarray) -> bytes:
        """The bytes that are final so far; there may be none."""
        self._encoder.write(samples)
        return self._sink.take()

    def finish(self) -> bytes:
        """The rest."""
        with self._encoder:
            pass
        return self._sink.take()


class _Sink:
    """FFmpeg's output; it cannot seek, so every container is written front to back."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        data = b"".join(self._parts)
        self._parts.clear()
        return data
