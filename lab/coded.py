"""Speech beside the guide's codes of it: what the lab's encoder and decoder learn from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lab.data import SpeechSet
from lab.frames import FrameSet
from lab.guide import Guide
from revox.speech.files import replacing


class CodedSpeech:
    """Waveforms of a `SpeechSet`, with features, semantic codes and acoustic values of every frame.

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
        """`size` stretches of `frames` frames: waveforms float32 `[size, samples]`, codes int64
        `[size, frames]`, values float32 `[size, frames, 36]`, features float32 `[size, frames, n]`."""
        waves = np.zeros((size, frames * self.per_frame), np.float32)
        codes = np.empty((size, frames), np.int64)
        values = np.empty((size, frames, self.values.shape[1]), np.float32)
        features = np.empty((size, frames, self.frames.features.shape[1]), np.float32)
        for b in range(size):
            done = 0
            for i, start, take in self.frames.stretch(frames, rng):
                first = int(self.frames.starts[i]) + start
                rows, here = slice(first, first + take), slice(done, done + take)
                codes[b, here] = self.codes[rows]
                values[b, here] = self.values[rows]
                features[b, here] = self.frames.features[rows]
                wave = self.speech.waveform(i)[start * self.per_frame : (start + take) * self.per_frame]
                waves[b, done * self.per_frame : done * self.per_frame + len(wave)] = wave
                done += take
        return waves, codes, values, features


def code_speech(
    guide: Guide,
    speech: SpeechSet,
    frames: FrameSet,
    per_frame: int,
    cache: Path,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> CodedSpeech:
    """The guide's codes of every utterance, kept in `cache` (.npz) for this guide and this speech."""
    weights = sum(float(p.double().sum()) for p in guide.parameters())
    stamp = f"{len(speech)} {speech.seconds:.3f} {weights:.9e}"
    if cache.is_file():
        with np.load(cache) as kept:
            if str(kept["stamp"]) == stamp:
                return CodedSpeech(speech, frames, kept["codes"], kept["values"], per_frame)
    codes, values = [], []
    guide.to(device).eval()
    for i, (start, end) in enumerate(zip(frames.starts, frames.ends, strict=True)):
        x = torch.from_numpy(frames.features[start:end].astype(np.float32))[None]
        semantic, acoustic = guide.encode(x.to(device))
        codes.append(semantic[0].cpu().numpy().astype(np.int16))
        values.append(torch.tanh(acoustic[0]).cpu().numpy().astype(np.float16))
        if i % 500 == 499:
            progress(i + 1, len(speech))
    cache.parent.mkdir(parents=True, exist_ok=True)
    with replacing(cache) as beside, beside.open("wb") as file:
        np.savez(file, stamp=stamp, codes=np.concatenate(codes), values=np.concatenate(values))
    return CodedSpeech(speech, frames, np.concatenate(codes), np.concatenate(values), per_frame)
