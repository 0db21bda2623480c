"""Encode audio: WAV, FLAC, MP3, Opus, AAC and raw PCM, with the encoders inside PyAV's wheels only."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from revox.speech.audio import Audio
from revox.speech.errors import AudioError
from revox.speech.files import replace_file


@dataclass(frozen=True)
class AudioFormat:
    """An output format: FFmpeg's container, codec and sample format, and what the codec accepts."""

    container: str
    codec: str
    samples: str
    media_type: str
    rates: tuple[int, ...] = ()  # Hz, ascending; empty: any
    bit_rate: int | None = None  # bits/s


@dataclass(frozen=True)
class Chapter:
    """A chapter of a file: its title, start and end in seconds."""

    start: float
    end: float
    title: str


_MPEG_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_OPUS_RATES = (8000, 12000, 16000, 24000, 48000)

FORMATS: dict[str, AudioFormat] = {
    "wav": AudioFormat("wav", "pcm_s16le", "s16", "audio/wav"),
    "wav-float": AudioFormat("wav", "pcm_f32le", "flt", "audio/wav"),
    "flac": AudioFormat("flac", "flac", "s16", "audio/flac"),
    "mp3": AudioFormat("mp3", "libmp3lame", "s16p", "audio/mpeg", _MPEG_RATES, 96_000),
    "opus": AudioFormat("ogg", "libopus", "flt", "audio/ogg", _OPUS_RATES, 64_000),
    "aac": AudioFormat("adts", "aac", "fltp", "audio/aac", _MPEG_RATES, 96_000),
    "m4a": AudioFormat("ipod", "aac", "fltp", "audio/mp4", _MPEG_RATES, 96_000),
    "pcm": AudioFormat("s16le", "pcm_s16le", "s16", "audio/pcm"),
}
EXTENSIONS: dict[str, str] = {
    ".wav": "wav",
    ".flac": "flac",
    ".mp3": "mp3",
    ".opus": "opus",
    ".ogg": "opus",
    ".aac": "aac",
    ".m4a": "m4a",
    ".m4b": "m4a",
    ".mp4": "m4a",
    ".pcm": "pcm",
    ".raw": "pcm",
}


def format_for(target: str | os.PathLike[str] | BinaryIO | None, format: str | None = None) -> str:
    """The name in `FORMATS` that `format`, or else the extension of `target`, asks for.

    Raises AudioError when neither names a known format.
    """
    known = ", ".join(name for name in FORMATS)
    if format is not None:
        name = format.lower().lstrip(".")
        if name in FORMATS:
            return name
        if f".{name}" in EXTENSIONS:
            return EXTENSIONS[f".{name}"]
        raise AudioError(f"Unknown audio format {format!r}; choose one of {known}.")
    if not isinstance(target, str | os.PathLike):
        raise AudioError(f"Writing to a stream needs a format; choose one of {known}.")
    extension = Path(target).suffix.lower()
    if extension in EXTENSIONS:
        return EXTENSIONS[extension]
    ending = f"ends in {extension!r}, which names no audio format" if extension else "has no extension"
    raise AudioError(f"{Path(target).name!r} {ending}; end it in .wav or choose a format of {known}.")


def write_audio(target: str | os.PathLike[str] | BinaryIO, audio: Audio, format: str | None = None) -> int:
    """Encode `audio` to a path (replaced in one step) or a binary file; returns the samples clipped.

    The format is `format` (a key of `FORMATS`: wav 16 bit, wav-float, flac 16 bit, mp3, opus in Ogg, aac in
    ADTS, m4a, pcm raw little-endian 16 bit) or follows the path's extension. Samples outside [-1, 1] are
    clipped, and counted in the return value; wav-float keeps them. A rate that the codec does not know is
    resampled to the next higher one it does. Raises AudioError on an unknown format, non-finite samples or a
    path that cannot be written.
    """
    data, clipped = encode_audio(audio, format_for(target, format))
    write_bytes(target, data)
    return clipped


def encode_audio(audio: Audio, format: str = "wav", bit_rate: int | None = None) -> tuple[bytes, int]:
    """The bytes of `audio` as a file of `format` (see `write_audio`), and the number of samples clipped.

    `bit_rate` is in bits/s; by default the format's own.
    """
    kind = FORMATS[format_for(None, format)]
    if kind.rates and audio.rate not in kind.rates:
        audio = audio.at(next((rate for rate in kind.rates if rate >= audio.rate), kind.rates[-1]))
    starts = range(0, len(audio.samples), audio.rate)
    parts = (Audio(audio.samples[start : start + audio.rate], audio.rate) for start in starts)
    file = io.BytesIO()
    clipped = encode_parts(file, parts, format, bit_rate)
    return file.getvalue(), clipped


def encode_parts(
    file: BinaryIO,
    parts: Iterable[Audio],
    format: str = "wav",
    bit_rate: int | None = None,
    chapters: Sequence[Chapter] = (),
) -> int:
    """Encode parts of one audio, which may come while it is made, into a file; the samples clipped.

    `chapters` are written where the container has a place for them: m4a, mp3.

    Raises AudioError as `write_audio` does, and where the format does not know the parts' rate.
    """
    import av

    parts = (part for part in parts if part.samples.size)
    first = next(parts, None)
    if first is None:
        raise AudioError("There are no samples to write; the audio is empty.")
    rate = first.rate
    try:
        with AudioEncoder(file, FORMATS[format_for(None, format)], rate, bit_rate) as encoder:
            encoder.set_chapters(chapters)
            for part in chain([first], parts):
                if not np.isfinite(part.samples).all():
                    raise AudioError(
                        "The audio contains samples that are not finite numbers; it cannot be written."
                    )
                encoder.write(part.samples)
    except (av.error.FFmpegError, ValueError) as error:
        if not (isinstance(error, av.error.FFmpegError) or type(error) is ValueError):
            raise  # of whoever makes the parts
        raise AudioError(f"Audio at {rate} Hz cannot be written as {format} ({error}); try wav.") from None
    return encoder.clipped


class AudioEncoder:
    """Encodes mono float32 samples into a binary file, which is complete when the `with` block ends.

    `clipped` counts the samples outside [-1, 1], which are clipped in every format but wav-float. A file that
    cannot seek gets a container as it is streamed: its header does not know the length. options: FFmpeg's,
    for the container.
    """

    def __init__(
        self,
        file: BinaryIO,
        kind: AudioFormat,
        rate: int,
        bit_rate: int | None = None,
        options: dict[str, str] | None = None,
    ) -> None:
        import av

        self._kind, self._rate, self._written, self.clipped = kind, rate, 0, 0
        options = {"fflags": "+bitexact", **(options or {})}
        container: Any = av.open(file, "w", format=kind.container, options=options)
        self._container = container
        self._stream = container.add_stream(kind.codec, rate=rate, layout="mono", format=kind.samples)
        self._stream.codec_context.flags |= 1 << 23  # AV_CODEC_FLAG_BITEXACT: no encoder name inside
        if kind.bit_rate:
            self._stream.bit_rate = bit_rate or kind.bit_rate

    def __enter__(self) -> AudioEncoder:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._container.mux(self._stream.encode(None))
        self._container.close()

    def set_chapters(self, chapters: Sequence[Chapter]) -> None:
        """Name chapters, before anything is written; containers without a place for them have none."""
        if chapters:
            self._container.set_chapters(
                [
                    {
                        "id": number,
                        "start": round(1000 * one.start),
                        "end": round(1000 * one.end),
                        "time_base": Fraction(1, 1000),
                        "metadata": {"title": one.title},
                    }
                    for number, one in enumerate(chapters)
                ]
            )

    def write(self, samples: np.ndarray) -> None:
        """Encode `samples` `[n]`."""
        import av

        if not samples.size:
            return
        if self._kind.codec != "pcm_f32le":
            self.clipped += int(np.count_nonzero(np.abs(samples) > 1.0))
            samples = np.clip(samples, -1.0, 1.0)
        if self._kind.samples.startswith("s16"):
            # 32768 a unit, as on reading: 16-bit audio that was only read comes back bit for bit.
            samples = np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples)[None], format=self._kind.samples, layout="mono"
        )
        frame.sample_rate, frame.pts = self._rate, self._written
        self._written += samples.size
        self._container.mux(self._stream.encode(frame))


def write_bytes(target: str | os.PathLike[str] | BinaryIO, data: bytes | BinaryIO) -> None:
    """Write an encoded file's bytes, or a file's from where it stands, to a path (replaced in one step) or a
    binary file. Raises AudioError."""
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    if not isinstance(target, str | os.PathLike):
        shutil.copyfileobj(source, target)
        return
    path = Path(target)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # /dev/stdout, a named pipe
            with open(path, "wb") as device:
                shutil.copyfileobj(source, device)
        else:
            replace_file(path, lambda file: shutil.copyfileobj(source, file))
    except FileNotFoundError:
        raise AudioError(f"There is no folder {path.parent}; create it or choose another path.") from None
    except OSError as error:
        raise AudioError(f"{path} cannot be written ({error.strerror}); choose another path.") from None
