"""Music under speech: its level computed for every sample from when somebody speaks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from revox.render.errors import RenderError
from revox.render.script import Music
from revox.speech import Audio, loudness, stream_audio, true_peak

_LOUDNESS_SECONDS = 120


def duck_gain(
    start: int, count: int, spans: Sequence[tuple[int, int]], rate: int, music: Music
) -> np.ndarray:
    """The music's gain `[count]` from sample `start` on, while speech lasts from sample to sample of `spans`.

    `duck` dB down in each span; the way there takes `attack` seconds and ends where the span begins, the way
    back `release` seconds. Both are straight lines in dB, without a step.
    """
    at = np.arange(start, start + count)
    depth = np.zeros(count)  # 1: all the way down
    attack, release = music.attack * rate, music.release * rate
    for first, last in spans:
        if last + release < start or first - attack > start + count:
            continue
        before = 1 - np.maximum(first - at, 0) / attack
        after = 1 - np.maximum(at - (last - 1), 0) / release
        depth = np.maximum(depth, np.minimum(before, after))
    return 10 ** (-music.duck * np.maximum(depth, 0.0) / 20)


@dataclass
class MusicBed:
    """A recording at its loudness, again and again.

    gain: from the file to `Music.loudness`; peak: the largest magnitude after it, between samples too.
    """

    music: Music
    rate: int
    gain: float
    peak: float

    @classmethod
    def of(cls, music: Music, rate: int, ceiling: float) -> MusicBed:
        """Measure a recording: its first two minutes for the loudness, all of it for the peak.

        It stays under `ceiling` (dBTP). Raises AudioError and RenderError for what is not music to hear.
        """
        peak, parts, seconds = -math.inf, [], 0.0
        for part in stream_audio(music.file, rate):
            peak = max(peak, true_peak(part.samples, rate))
            if seconds < _LOUDNESS_SECONDS:
                parts.append(part.samples)
            seconds += part.seconds
        level = loudness(np.concatenate(parts), rate) if parts else -math.inf
        if not math.isfinite(level):
            raise RenderError(f"{music.file} is silent; give other music, or none")
        gain = min(music.loudness - level, ceiling - peak)
        return cls(music, rate, 10 ** (gain / 20), 10 ** ((peak + gain) / 20))

    @property
    def ducked_peak(self) -> float:
        """Its largest magnitude under speech."""
        return self.peak * 10 ** (-self.music.duck / 20)

    def blocks(self) -> Iterator[np.ndarray]:
        """The samples, from the beginning again at the end, for ever."""
        for part in itertools.chain.from_iterable(
            stream_audio(self.music.file, self.rate) for _ in itertools.count()
        ):
            yield part.samples * np.float32(self.gain)


def mixed(
    speech: Iterator[Audio], spans: Sequence[tuple[int, int]], length: int, bed: MusicBed
) -> Iterator[Audio]:
    """Speech with music under it; `length` samples in all, of which the speech may come in any blocks."""
    music, rate, at = bed.music, bed.rate, 0
    source, held = bed.blocks(), np.zeros(0, np.float32)
    fade = max(1, round(min(music.fade, length / rate / 2) * rate))
    for part in speech:
        count = len(part.samples)
        while len(held) < count:
            held = np.concatenate((held, next(source)))
        under, held = held[:count], held[count:]
        where = np.arange(at, at + count)
        ends = np.clip(np.minimum(where + 1, length - where) / fade, 0.0, 1.0)
        under = under * (duck_gain(at, count, spans, rate, music) * ends).astype(np.float32)
        yield Audio(part.samples + under, rate)
        at += count
