"""Encode audio: WAV, FLAC, MP3, Opus, AAC and raw PCM, with the encoders inside PyAV's wheels only."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from revox.speech.audio import Audio, resample
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
    bit_rate: int | None = None  # bits/s a channel


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

    `bit_rate` is in bits/s a channel; by default the format's own.
    """
    import av

    kind = FORMATS[format_for(None, format)]
    samples = np.atleast_2d(audio.samples)
    if not np.isfinite(samples).all():
        raise AudioError("The audio contains samples that are not finite numbers; it cannot be written.")
    rate = audio.rate
    if kind.rates and rate not in kind.rates:
        rate = next((r for r in kind.rates if r >= audio.rate), kind.rates[-1])
        samples = resample(samples, audio.rate, rate)
    if samples.shape[1] == 0:
        raise AudioError("There are no samples to write; the audio is empty.")
    clipped = 0
    if kind.codec != "pcm_f32le":
        clipped = int(np.count_nonzero(np.abs(samples) > 1.0))
        samples = np.clip(samples, -1.0, 1.0)
    if kind.samples.startswith("s16"):
        # 32768 a unit, as on reading: 16-bit audio that was only read comes back bit for bit.
        samples = np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)
    if kind.container == "s16le":
        return samples.T.astype("<i2").tobytes(), clipped

    channels = samples.shape[0]
    layout = {1: "mono", 2: "stereo"}.get(channels, f"{channels}c")
    file = io.BytesIO()
    try:
        with av.open(file, "w", format=kind.container, options={"fflags": "+bitexact"}) as container:
            stream = container.add_stream(kind.codec, rate=rate, layout=layout, format=kind.samples)
            stream.codec_context.flags |= 1 << 23  # AV_CODEC_FLAG_BITEXACT: no encoder name inside
            if kind.bit_rate:
                stream.bit_rate = (bit_rate or kind.bit_rate) * channels
            for start in range(0, samples.shape[1], rate):
                piece = samples[:, start : start + rate]
                if not kind.samples.endswith("p"):
                    piece = piece.T.reshape(1, -1)
                frame = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(piece), format=kind.samples, layout=layout
                )
                frame.sample_rate, frame.pts = rate, start
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except (av.error.FFmpegError, ValueError) as error:
        raise AudioError(
            f"{channels} channels at {rate} Hz cannot be written as {format} ({error}); try wav."
        ) from None
    return file.getvalue(), clipped


def write_bytes(target: str | os.PathLike[str] | BinaryIO, data: bytes) -> None:
    """Write an encoded file's bytes to a path (replaced in one step) or a binary file. Raises AudioError."""
    if not isinstance(target, str | os.PathLike):
        target.write(data)
        return
    path = Path(target)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # /dev/stdout, a named pipe
            path.write_bytes(data)
        else:
            replace_file(path, data)
    except FileNotFoundError:
        raise AudioError(f"There is no folder {path.parent}; create it or choose another path.") from None
    except OSError as error:
        raise AudioError(f"{path} cannot be written ({error.strerror}); choose another path.") from None
