"""Audio in the speed, sample rate and format of a request, whole or in pieces."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from revox.serving.errors import ApiError
from revox.speech import FORMATS
from revox.speech.stretch import TimeStretch

RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
PAGES = {"ogg": {"page_duration": "200000"}}
"""Microseconds of audio in a page of Ogg, which is sent when it is full; FFmpeg's default is a second."""


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


def wav_header(rate: int) -> bytes:
    """The 44 bytes before mono 16-bit samples of unknown number: both sizes are the maximum.

    As OpenAI and vllm-omni stream WAV; players read until the end of the stream.
    """
    riff = struct.pack("<4sI4s", b"RIFF", 0xFFFFFFFF, b"WAVE")
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, rate * 2, 2, 16)
    return riff + fmt + struct.pack("<4sI", b"data", 0xFFFFFFFF)


class StreamEncoder:
    """Samples in, bytes of a format out, as soon as the codec returns them."""

    def __init__(self, format: str, rate: int) -> None:
        self.rate = rate
        self._kind = FORMATS[format]
        self._header = wav_header(rate) if format == "wav" else b""
        self._container: Any = None
        if format not in ("wav", "pcm"):
            self._open()

    def push(self, samples: np.ndarray) -> bytes:
        """The bytes that are final so far; there may be none."""
        if self._container is not None:
            return self._encode(samples)
        header, self._header = self._header, b""
        return header + _as_int16(samples).tobytes()

    def finish(self) -> bytes:
        """The rest."""
        if self._container is None:
            return self._header
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._sink.take()

    def _open(self) -> None:
        import av

        kind = self._kind
        self._sink = _Sink()
        self._container = av.open(
            self._sink,
            "w",
            format=kind.container,
            options={"fflags": "+bitexact", "flush_packets": "1", **PAGES.get(kind.container, {})},
        )
        self._stream = self._container.add_stream(
            kind.codec, rate=self.rate, layout="mono", format=kind.samples
        )
        self._stream.codec_context.flags |= 1 << 23  # AV_CODEC_FLAG_BITEXACT: no encoder name inside
        if kind.bit_rate:
            self._stream.bit_rate = kind.bit_rate
        self._samples = 0

    def _encode(self, samples: np.ndarray) -> bytes:
        import av

        if not samples.size:
            return b""
        is_int16 = self._kind.samples.startswith("s16")
        samples = _as_int16(samples) if is_int16 else np.clip(samples, -1, 1).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(samples[None], format=self._kind.samples, layout="mono")
        frame.sample_rate, frame.pts = self.rate, self._samples
        self._samples += samples.size
        self._container.mux(self._stream.encode(frame))
        return self._sink.take()


def _as_int16(samples: np.ndarray) -> np.ndarray:
    """Little-endian 16-bit samples, clipped, as `revox.speech.encode_audio` writes them."""
    return np.clip(np.rint(samples * 32768.0), -32768, 32767).astype("<i2")


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
