"""Decode any audio or video file, with memory bounded by the seconds asked for, not by the file's length."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from revox.speech.audio import Audio, resample
from revox.speech.errors import AudioError

Source = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO

MAX_SECONDS = 600.0
_MAX_PIPED_BYTES = 1 << 30
# Spans that begin later than this are sought, with so much decoded before them that a codec has settled.
_SEEK_BEYOND, _PREROLL = 20.0, 0.5  # seconds
# Full scale of FFmpeg's integer sample formats (u8 is offset by 128).
_FULL_SCALE = {"u8": 2.0**7, "s16": 2.0**15, "s32": 2.0**31, "s64": 2.0**63}


def read_audio(
    source: Source, rate: int | None = None, mono: bool = True, max_seconds: float | None = MAX_SECONDS
) -> Audio:
    """Decode the first audio stream of `source`: any container and codec FFmpeg knows, video too.

    `source` is a path, the bytes of a file, or a binary file object. The result is at `rate` Hz (its own rate
    when None), mono `[n]` (the mean of the channels) or `[channels, n]` if `mono` is False.

    At most `max_seconds` are decoded (None: all); when there was more, the result says `truncated=True`. Use
    `stream_audio` for long recordings. Raises AudioError, with a sentence, on anything that has no audio.
    """
    blocks = list(_decode(source, mono, max_seconds))
    native, truncated = blocks[0].rate, blocks[-1].truncated
    samples = np.concatenate([block.samples for block in blocks], axis=-1)
    del blocks
    if rate is not None and rate != native:
        samples = resample(samples, native, rate)
    return Audio(samples, rate or native, truncated)


def audio_header(source: Source) -> tuple[float | None, int]:
    """Seconds and sample rate (Hz) of the first audio stream as the file's header has them, undecoded.

    The seconds are None where the format does not say, and an estimate for some (MP3 without a table).
    Raises AudioError, with a sentence, on anything that has no audio.
    """
    with _container(source) as (name, container, stream):
        rate = stream.rate or 0
        _check_rate(name, rate)
        if stream.duration is not None and stream.time_base is not None:
            seconds = float(stream.duration * stream.time_base)
        else:
            seconds = (container.duration or 0) / 1_000_000
    return (seconds if seconds > 0 else None), rate


def read_span(source: Source, start: float, seconds: float) -> Audio:
    """Decode `seconds` from `start` (seconds) on, mono at the source's own rate; less where it ends before.

    What lies before is skipped, where the format can, and never held: a span of an hour costs what a span of
    a minute does. `truncated` says that the source goes on. Raises AudioError as `read_audio` does, and when
    nothing is left at `start`.
    """
    import av

    with _opened(source) as file:  # opened once: a pipe cannot be read twice
        if start > _SEEK_BEYOND:
            with _container(file, _name(source)) as (name, container, stream):
                try:
                    container.seek(int((start - _PREROLL) / stream.time_base), stream=stream)
                    if span := _span(name, container, stream, start, seconds, sought=True):
                        return span
                except (av.error.FFmpegError, AudioError):
                    pass  # a format that cannot seek is read from its beginning
            file.seek(0)
        with _container(file, _name(source)) as (name, container, stream):
            span = _span(name, container, stream, start, seconds, sought=False)
    if span is None:
        raise AudioError(f"{name} ends before {start:.2f} s; ask for an earlier span.")
    return span


def stream_audio(
    source: Source,
    rate: int,
    mono: bool = True,
    max_seconds: float | None = None,
    block_seconds: float = 10.0,
) -> Iterator[Audio]:
    """Decode like `read_audio`, in blocks of `block_seconds` at `rate` Hz (the last is shorter).

    Holds one block at a time, however long the source is.
    """
    size = max(1, round(block_seconds * rate))
    pending: list[np.ndarray] = []
    held = 0
    blocks = ((block.rate, block.samples) for block in _decode(source, mono, max_seconds))
    for piece in _resampled(blocks, rate):
        pending.append(piece)
        held += piece.shape[-1]
        if held >= size:
            joined = np.concatenate(pending, axis=-1)
            while joined.shape[-1] >= size:
                yield Audio(joined[..., :size], rate)
                joined = joined[..., size:]
            pending, held = [joined], joined.shape[-1]
    if held:
        yield Audio(np.concatenate(pending, axis=-1), rate)


def _resampled(pieces: Iterable[tuple[int, np.ndarray]], rate: int) -> Iterator[np.ndarray]:
    """Pieces (their rate, samples `[n]` or `[channels, n]`) at `rate`: as one sound as long as theirs stays.

    Piece by piece would break the sound at every joint. At most a second of a piece is held at a time.
    """
    import soxr

    own = rate
    stream: soxr.ResampleStream | None = None
    empty: np.ndarray | None = None
    for given, samples in pieces:
        if given != own:
            if stream is not None:
                yield np.ascontiguousarray(stream.resample_chunk(empty, last=True).T)
            own, stream = given, None
        if own == rate:
            yield samples
            continue
        if stream is None:
            channels = 1 if samples.ndim == 1 else samples.shape[0]
            stream = soxr.ResampleStream(own, rate, channels, dtype="float32", quality="HQ")
            empty = np.ascontiguousarray(samples[..., :0].T)
        for start in range(0, samples.shape[-1], own):
            second = np.ascontiguousarray(samples[..., start : start + own].T)
            yield np.ascontiguousarray(stream.resample_chunk(second).T)
    if stream is not None:
        yield np.ascontiguousarray(stream.resample_chunk(empty, last=True).T)


def _name(source: Source) -> str:
    if isinstance(source, str | os.PathLike):
        return str(Path(source).name or source)
    return "The given audio"


@contextmanager
def _opened(source: Source) -> Iterator[BinaryIO]:
    """A seekable binary file. FFmpeg never sees a path or an address, only this file's bytes."""
    if isinstance(source, bytes | bytearray | memoryview):
        if len(source) == 0:
            raise AudioError("The given audio is empty (0 bytes); give the bytes of a whole audio file.")
        yield io.BytesIO(source)
        return
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        try:
            if path.is_dir():
                raise AudioError(f"{path} is a folder; give one audio or video file.")
            if path.is_file() and path.stat().st_size == 0:
                raise AudioError(f"{path.name} is empty (0 bytes); record or copy it again.")
            file: BinaryIO = open(path, "rb")  # noqa: SIM115 (closed below, whatever happens)
        except FileNotFoundError:
            raise AudioError(f"There is no file {path}; check the path.") from None
        except OSError as error:
            raise AudioError(f"{path} cannot be opened ({error.strerror}); check its permissions.") from None
        with file:
            yield _seekable(file)
        return
    yield _seekable(source)


def _seekable(file: BinaryIO) -> BinaryIO:
    if getattr(file, "seekable", lambda: False)():
        return file
    data = file.read(_MAX_PIPED_BYTES + 1)
    if len(data) > _MAX_PIPED_BYTES:
        raise AudioError("More than 1 GiB came through the pipe; save it to a file and give its path.")
    if not data:
        raise AudioError("The given audio is empty (0 bytes); give the bytes of a whole audio file.")
    return io.BytesIO(data)


def _decode(source: Source, mono: bool, max_seconds: float | None) -> Iterator[Audio]:
    """Blocks of about a second at the source's own rate; at least one; the last may be marked truncated."""
    with _container(source) as (name, container, stream):
        yield from _blocks(name, container, stream, mono, max_seconds)


@contextmanager
def _container(source: Source, name: str | None = None) -> Iterator[tuple[str, Any, Any]]:
    """What to call the source in a sentence, its FFmpeg container and its first audio stream."""
    import av

    name = name or _name(source)
    not_audio = f"{name} is not an audio or video file that can be decoded; convert it to WAV or FLAC."
    with _opened(source) as file:
        try:
            # Playlist formats could make FFmpeg open other files or addresses: no protocol is allowed.
            container = av.open(file, "r", metadata_errors="ignore", options={"protocol_whitelist": "none"})
        except (av.error.FFmpegError, ValueError, OSError, EOFError):
            raise AudioError(not_audio) from None
        with container:
            if not container.streams.audio:
                raise AudioError(f"{name} has no audio stream; give a file with sound.")
            yield name, container, container.streams.audio[0]


def _check_rate(name: str, rate: int) -> None:
    if not 1000 <= rate <= 768_000:
        raise AudioError(f"{name} claims a sample rate of {rate} Hz; give 1 to 768 kHz.")


def _blocks(name: str, container: Any, stream: Any, mono: bool, max_seconds: float | None) -> Iterator[Audio]:
    pieces = _pieces(name, container, stream, mono)
    first = next(pieces, None)
    if first is None:
        raise AudioError(f"{name} holds no audio samples; record or copy it again.")
    rate = first[0]
    limit = None if max_seconds is None else max(1, round(max_seconds * rate))
    pending: list[np.ndarray] = []
    held = given = 0
    # Chained streams, and concatenated ones, may change the rate: all is given at the first.
    for samples in _resampled(itertools.chain([first], pieces), rate):
        if limit is not None and given + held + samples.shape[1] > limit:
            pending.append(samples[:, : limit - given - held])
            yield _block(pending, rate, mono, truncated=True)
            return
        pending.append(samples)
        held += samples.shape[1]
        if held >= rate:
            yield _block(pending, rate, mono)
            given, held, pending = given + held, 0, []
    if held:
        yield _block(pending, rate, mono)


def _pieces(name: str, container: Any, stream: Any, mono: bool) -> Iterator[tuple[int, np.ndarray]]:
    """The rate and samples `[channels, n]`, n > 0, of each frame."""
    channels = 0
    for frame in _frames(name, container, stream):
        _check_rate(name, frame.sample_rate)
        samples = _samples(frame)
        channels = channels or samples.shape[0]
        if mono:
            samples = samples.mean(axis=0, keepdims=True)
        elif samples.shape[0] != channels:
            raise AudioError(f"{name} changes its number of channels midway; read it as mono.")
        if samples.shape[1]:
            yield frame.sample_rate, samples


def _span(name: str, container: Any, stream: Any, start: float, seconds: float, sought: bool) -> Audio | None:
    """`seconds` from `start` on; None when nothing is left there, or a seek did not land before it.

    Frames are converted together, not one by one: that is most of the cost of codecs with short frames.
    """
    runs: list[tuple[Any, list[np.ndarray]]] = []  # frames of one format: the first, and the samples of all
    rate = position = first = wanted = lead = held = 0
    for frame in _frames(name, container, stream):
        _check_rate(name, frame.sample_rate)
        if not rate:
            rate = frame.sample_rate
            first, wanted = round(start * rate), max(1, round(seconds * rate))
            if sought:
                if frame.pts is None:
                    return None
                at = (frame.pts - (stream.start_time or 0)) * frame.time_base
                position = round(at * rate)
                if position > first:
                    return None
        length = round(frame.samples * rate / frame.sample_rate)
        if position + length > first:
            if not runs:
                lead = first - position
            kind = (frame.sample_rate, frame.format.name, frame.layout.nb_channels)
            last = runs[-1][0] if runs else None
            if last is None or kind != (last.sample_rate, last.format.name, last.layout.nb_channels):
                runs.append((frame, []))
            runs[-1][1].append(frame.to_ndarray())
            held += length
            if held > lead + wanted:
                break
        position += length
    if held <= lead:
        return None
    parts = [
        resample(_converted(np.concatenate(pieces, axis=1), like).mean(axis=0), like.sample_rate, rate)
        for like, pieces in runs
    ]
    samples = np.concatenate(parts)[lead:]
    return Audio(samples[:wanted], rate, truncated=len(samples) > wanted)


def _block(pending: list[np.ndarray], rate: int, mono: bool, truncated: bool = False) -> Audio:
    samples = np.concatenate(pending, axis=1)
    return Audio(samples[0] if mono else samples, rate, truncated)


def _frames(name: str, container: Any, stream: Any) -> Iterator[Any]:
    """Decoded frames; damaged packets are skipped as players do, unless most of them are."""
    import av

    good = bad = 0
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            break
        except (av.error.FFmpegError, EOFError, OSError):
            bad += 1
            break
        try:
            frames = packet.decode()
        except (av.error.FFmpegError, ValueError):
            bad += 1
            continue
        good += bool(frames)
        yield from frames
    if bad > good:
        raise AudioError(
            f"{name} is damaged: {bad} of {good + bad} packets cannot be decoded; copy it again."
        )


def _samples(frame: Any) -> np.ndarray:
    """An av.AudioFrame as float32 `[channels, n]`, full scale 1."""
    return _converted(frame.to_ndarray(), frame)


def _converted(data: np.ndarray, like: Any) -> np.ndarray:
    """Samples of frames of the format of `like`, as PyAV gives them, as float32 `[channels, n]`."""
    if not like.format.is_planar:
        data = data.reshape(-1, like.layout.nb_channels).T
    kind = like.format.name.removesuffix("p")
    if kind in _FULL_SCALE:
        data = (data.astype(np.float64) - (128.0 if kind == "u8" else 0.0)) / _FULL_SCALE[kind]
    return np.nan_to_num(data.astype(np.float32), nan=0.0, posinf=1.0, neginf=-1.0)
