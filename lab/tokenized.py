"""Speech with the teacher codec's codes of it, which the lab's encoder and decoder learn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lab.arrays import Arrays, cached_arrays
from lab.data import SpeechSet
from lab.frames import FrameSet
from lab.teacher_codec import TeacherCodec, TeacherData
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech.files import stamp_of


class TokenizedSpeech:
    """Waveforms of a `SpeechSet` with the features, semantic codes and acoustic values of every frame.

    `codes` int16 `[frames]`; `values` float16 `[frames, 36]`, in [-1, 1], before rounding to levels.
    """

    def __init__(
        self, speech: SpeechSet, frames: FrameSet, codes: np.ndarray, values: np.ndarray, per_frame: int
    ) -> None:
        self.speech, self.frames, self.codes, self.values = speech, frames, codes, values
        self.per_frame = per_frame

    def batch(
        self, size: int, frames: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """`size` segments of `frames` frames: waveforms float32 `[size, samples]`, codes int64
        `[size, frames]`, values float32 `[size, frames, 36]`, features float32 `[size, frames, n]`."""
        waves = np.zeros((size, frames * self.per_frame), np.float32)
        codes = np.empty((size, frames), np.int64)
        values = np.empty((size, frames, self.values.shape[1]), np.float32)
        features = np.empty((size, frames, self.frames.features.shape[1]), np.float32)
        for b in range(size):
            done = 0
            for i, start, take in self.frames.segment(frames, rng):
                first = int(self.frames.starts[i]) + start
                rows, here = slice(first, first + take), slice(done, done + take)
                codes[b, here] = self.codes[rows]
                values[b, here] = self.values[rows]
                features[b, here] = self.frames.features[rows]
                wave = self.speech.waveform(i)[start * self.per_frame : (start + take) * self.per_frame]
                waves[b, done * self.per_frame : done * self.per_frame + len(wave)] = wave
                done += take
        return waves, codes, values, features


class TokenizedSets:
    """Several sets of speech as one; each segment is of one set, drawn by its frames, or, for a `share` of
    them, of `further`."""

    def __init__(
        self, sets: list[TokenizedSpeech], further: TokenizedSpeech | None = None, share: float = 0.0
    ) -> None:
        self.sets = sets if further is None else [*sets, further]
        frames = np.array([len(one.codes) for one in sets])
        shares = frames / frames.sum()
        self.shares = shares if further is None else np.append(shares * (1 - share), share)

    def batch(
        self, size: int, frames: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """See `TokenizedSpeech.batch`."""
        counts = rng.multinomial(size, self.shares)
        parts = [one.batch(n, frames, rng) for one, n in zip(self.sets, counts, strict=True) if n]
        waves, codes, values, features = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return waves, codes, values, features


def tokenize_speech(
    teacher: TeacherCodec,
    speech: SpeechSet,
    data: TeacherData,
    per_frame: int,
    cache: Path,
    device: str = "cpu",
    progress: ProgressCallback = ignore_progress,
) -> TokenizedSpeech:
    """The semantic codes of every utterance of `data` with the teacher codec's acoustic values, cached in
    `cache` for these weights and this speech."""
    frames = data.frames

    def encode() -> Arrays:
        values = []
        teacher.to(device).eval()
        for i, (start, end) in enumerate(zip(frames.starts, frames.ends, strict=True)):
            x = torch.from_numpy(frames.features[start:end].astype(np.float32))[None]
            codes = torch.from_numpy(data.codes[start:end].astype(np.int64))[None]
            values.append(teacher.encode(x.to(device), codes.to(device))[0].cpu().numpy().astype(np.float16))
            if i % 500 == 499:
                progress(Progress(f"codes of {speech.name}", i + 1, len(speech)))
        return {"values": np.concatenate(values)}

    arrays = cached_arrays(cache, stamp_of(speech.identity, teacher.stamp()), encode)
    return TokenizedSpeech(speech, frames, data.codes, arrays["values"], per_frame)
