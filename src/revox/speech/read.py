"""Decode any audio or video file, with memory bounded by the seconds asked for, not by the file's length."""

from __future__ import annotations

import io
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from revox.speech.audio import Audio, resample
from revox.speech.errors import AudioError
from revox.speech.mixdown import Mixdown

Source = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO

MAX_SECONDS = 600.0
_MAX_PIPED_BYTES = 1 << 30
# Spans that begin later than this are sought, with so much decoded before them that a codec has settled.
_SEEK_BEYOND, _PREROLL = 20.0, 0.5  # seconds
# Where timestamps run ahead of the samples by so much there is a gap, as in calls and broadcasts, and silence
# stands for it.
_GAP, _LONGEST_GAP = 0.1, 3600.0  # seconds; more is a clock that was set anew
# Full scale of FFmpeg's integer sample formats (u8 is offset by 128).
_FULL_SCALE = {"u8": 2.0**7, "s16": 2.0**15, "s32": 2.0**31, "s64": 2.0**63}


def read_audio(source: Source, rate: int | None = None, max_seconds: float | None = MAX_SECONDS) -> Audio:
    """Decode the first audio stream of `source`: any container and codec FFmpeg knows, video too.

    `source` is a path, the bytes of a file, or a binary file object. The result is mono, the mean of the
    channels (or one of two that cancel each other: `one_channel`), at `rate` Hz (its own rate when None).

    At most `max_seconds` are decoded (None: all); when there was more, the result says `truncated=True`. Use
    `stream_audio` for long recordings. Raises AudioError, with a sentence, on anything that has no audio.
    """
    blocks = list(_decode(source, max_seconds))
    native, truncated = blocks[0].rate, blocks[-1].truncated
    one_channel = blocks[-1].one_channel
    samples = np.concatenate([block.samples for block in blocks])
    del blocks
    return Audio(resample(samples, native, rate or native), rate or native, truncated, one_channel)


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


def audio_layout(source: Source) -> tuple[int, int]:
    """Sample rate (Hz) and channels of the first audio stream. Raises AudioError where there is none."""
    with _container(source) as (_, _, stream):
        return stream.rate or 0, stream.channels


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


def stream_audio(source: Source, rate: int, max_seconds: float | None = None) -> Iterator[Audio]:
    """Decode like `read_audio`, in pieces of about a second at `rate` Hz, of which one is held at a time."""
    blocks = ((block.rate, block.samples) for block in _decode(source, max_seconds))
    for samples in _resampled(blocks, rate):
        yield Audio(samples, rate)


def _in_blocks(pieces: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same samples in blocks of `size`, the last one shorter."""
    pending: list[np.ndarray] = []
    held = 0
    for piece in pieces:
        pending.append(piece)
        held += len(piece)
        if held >= size:
            joined = np.concatenate(pending)
            whole = len(joined) // size * size
            yield from joined[:whole].reshape(-1, size)
            pending, held = [joined[whole:]], len(joined) - whole
    if held:
        yield np.concatenate(pending)


def _resampled(pieces: Iterable[tuple[int, np.ndarray]], rate: int) -> Iterator[np.ndarray]:
    """Pieces (their rate, samples `[n]`) at `rate`: as one sound as long as theirs stays.

    Piece by piece would break the sound at every joint. At most a second of a piece is held at a time.
    """
    import soxr

    empty = np.zeros(0, np.float32)
    for own, run in itertools.groupby(pieces, key=lambda piece: piece[0]):
        if own == rate:
            yield from (samples for _, samples in run)
            continue
        stream = soxr.ResampleStream(own, rate, 1, dtype="float32", quality="HQ")
        for _, samples in run:
            for start in range(0, len(samples), own):
                yield stream.resample_chunk(np.ascontiguousarray(samples[start : start + own]))
        yield stream.resample_chunk(empty, last=True)


def _name(source: Source) -> str:
    if isinstance(source, str | os.PathLike):
        return str(Path(source).name or source)
    return "The given audio"


@contextmanager
def _opened(source: Source) -> Iterator[BinaryIO]:
    """A seekable binary file. FFmpeg never sees a path or an address, only this file's bytes."""
    with ExitStack() as stack:
        if isinstance(source, bytes | bytearray | memoryview):
            file: BinaryIO = io.BytesIO(source)
        elif isinstance(source, str | os.PathLike):
            file = stack.enter_context(_open(Path(source)))
        else:
            file = source
        if not getattr(file, "seekable", lambda: False)():
            file = io.BytesIO(file.read(_MAX_PIPED_BYTES + 1))
            if file.getbuffer().nbytes > _MAX_PIPED_BYTES:
                raise AudioError(
                    "More than 1 GiB came through the pipe; save it to a file and give its path."
                )
        at = file.tell()
        if file.seek(0, os.SEEK_END) == 0:
            raise AudioError(f"{_name(source)} is empty (0 bytes); record or copy it again.")
        file.seek(at)
        yield file


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise AudioError(f"There is no file {path}; check the path.") from None
    except IsADirectoryError:
        raise AudioError(f"{path} is a folder; give one audio or video file.") from None
    except OSError as error:
        raise AudioError(f"{path} cannot be opened ({error.strerror}); check its permissions.") from None


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


def _decode(source: Source, max_seconds: float | None) -> Iterator[Audio]:
    """Blocks of about a second at the source's own rate; at least one; the last may be marked truncated."""
    with _container(source) as (name, container, stream):
        mixdown = Mixdown()
        pieces = _pieces(name, container, stream, mixdown)
        first = next(pieces, None)
        if first is None:
            raise AudioError(f"{name} holds no audio samples; record or copy it again.")
        rate = first[0]
        left = sys.maxsize if max_seconds is None else max(1, round(max_seconds * rate))
        # Chained streams, and concatenated ones, may change the rate: all is given at the first.
        for samples in _in_blocks(_resampled(itertools.chain([first], pieces), rate), rate):
            samples, more = samples[: min(len(samples), left)], len(samples) > left
            yield Audio(samples, rate, truncated=more, one_channel=mixdown.one_channel)
            left -= len(samples)
            if more:
                return


def _pieces(name: str, container: Any, stream: Any, mixdown: Mixdown) -> Iterator[tuple[int, np.ndarray]]:
    """The rate and samples `[n]`, n > 0, of about a second each."""
    held: list[np.ndarray] = []
    rate = length = 0
    for gap, frame in _timed(_frames(name, container, stream)):
        _check_rate(name, frame.sample_rate)
        if gap:
            if held:
                yield rate, mixdown.mix(np.concatenate(held, axis=1), rate)
                held, length = [], 0
            yield from ((frame.sample_rate, block) for block in _silence(gap, frame.sample_rate))
        channels = _channels(frame.to_ndarray(), frame)
        if held and (frame.sample_rate != rate or len(channels) != len(held[0]) or length >= rate):
            yield rate, mixdown.mix(np.concatenate(held, axis=1), rate)
            held, length = [], 0
        rate = frame.sample_rate
        if channels.size:
            held.append(channels)
            length += channels.shape[1]
    if held:
        yield rate, mixdown.mix(np.concatenate(held, axis=1), rate)


def _span(name: str, container: Any, stream: Any, start: float, seconds: float, sought: bool) -> Audio | None:
    """`seconds` from `start` on; None when nothing is left there, or a seek did not land before it.

    Frames are converted together, not one by one: that is most of the cost of codecs with short frames.
    """
    runs: list[tuple[Any, list[np.ndarray]]] = []  # frames of one format: the first, and the samples of all
    rate = position = first = wanted = lead = held = 0
    for gap, frame in _timed(_frames(name, container, stream)):
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
        kind = (frame.sample_rate, frame.format.name, frame.layout.nb_channels)
        last = runs[-1][0] if runs else None
        begins = last is None or kind != (last.sample_rate, last.format.name, last.layout.nb_channels)
        silent = round(gap * rate)
        if silent and position + silent > first:
            ahead = 0 if runs else first - position
            count = min(silent - ahead, wanted + 1)
            runs, begins = [*runs, (frame, [])] if begins else runs, False
            runs[-1][1].append(_silent_like(frame, round(count * frame.sample_rate / rate)))
            held += count
        position += silent
        length = round(frame.samples * rate / frame.sample_rate)
        if position + length > first:
            if not runs:
                lead = first - position
            if begins:
                runs.append((frame, []))
            runs[-1][1].append(frame.to_ndarray())
            held += length
            if held > lead + wanted:
                break
        position += length
    if held <= lead:
        return None
    mixdown = Mixdown()
    parts = [
        resample(
            mixdown.mix(_channels(np.concatenate(pieces, axis=1), like), like.sample_rate),
            like.sample_rate,
            rate,
        )
        for like, pieces in runs
    ]
    samples = np.concatenate(parts)[lead:]
    return Audio(samples[:wanted], rate, len(samples) > wanted, mixdown.one_channel)


def _timed(frames: Iterable[Any]) -> Iterator[tuple[float, Any]]:
    """Frames, and seconds of a gap before each; 0 where timestamps go on or do not say.

    Small gaps count together, so that samples are never further than `_GAP` from their timestamps.
    """
    end: float | None = None  # of the samples so far, gaps included
    for frame in frames:
        at = None if frame.pts is None or frame.time_base is None else float(frame.pts * frame.time_base)
        gap = 0.0
        if at is not None:
            ahead = 0.0 if end is None else at - end
            gap = ahead if _GAP < ahead <= _LONGEST_GAP else 0.0
            end = at if end is None or gap or not 0 <= ahead <= _GAP else end
        yield gap, frame
        end = None if end is None else end + frame.samples / frame.sample_rate


def _silence(seconds: float, rate: int) -> Iterator[np.ndarray]:
    left = round(seconds * rate)
    while left > 0:
        yield np.zeros(min(left, rate), np.float32)
        left -= rate


def _silent_like(frame: Any, count: int) -> np.ndarray:
    """`count` samples of silence as `frame.to_ndarray` gives them."""
    data = frame.to_ndarray()
    columns = count * (1 if frame.format.is_planar else frame.layout.nb_channels)
    return np.full((len(data), columns), 128 if frame.format.name.startswith("u8") else 0, data.dtype)


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


def _channels(data: np.ndarray, like: Any) -> np.ndarray:
    """Samples of frames of the format of `like`, as PyAV gives them, as float32 `[channels, n]`, full scale
    1."""
    if not like.format.is_planar:
        data = data.reshape(-1, like.layout.nb_channels).T
    kind = like.format.name.removesuffix("p")
    if kind in _FULL_SCALE:
        data = (data.astype(np.float64) - (128.0 if kind == "u8" else 0.0)) / _FULL_SCALE[kind]
    return np.nan_to_num(data.astype(np.float32), nan=0.0, posinf=1.0, neginf=-1.0)
