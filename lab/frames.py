"""Frames of the lab's speech as features, cached on disk and memory-mapped."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lab.data import SpeechSet
from revox.losses.stft import stft, to_mel
from revox.model.config import CodecConfig
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech.files import load_stamped, replace_file, save_stamped, stamp_of

PATCH_FFT, PATCH_BANDS = 1024, 96
PITCH_FFT, PITCH_BINS = 2048, slice(3, 67)  # 35 to 770 Hz at 24 kHz
FLOOR = 4e-6  # of n_fft: 40 dB under speech at -23 dB


class FrameFeatures(nn.Module):
    """Log10 magnitudes of a frame: mel bands up to half the rate by patch, then low bins by two patches."""

    floor: Tensor

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.rate, self.patch = config.sampling_rate, config.pretransform_patch_size
        self.per_frame = config.patches_per_frame
        self.mel_size = self.per_frame * PATCH_BANDS
        low = self.per_frame // 2 * (PITCH_BINS.stop - PITCH_BINS.start)
        self.size = self.mel_size + low
        levels = torch.tensor([FLOOR * PATCH_FFT, 4 * FLOOR * PITCH_FFT]).log10()
        self.register_buffer("floor", levels.repeat_interleave(torch.tensor([self.mel_size, low])))

    @torch.no_grad()
    def forward(self, samples: Tensor) -> Tensor:
        """Features `[frames, size]` of `samples` `[n]`, the last frame completed with zeros."""
        padded = functional.pad(samples, (0, -len(samples) % (self.patch * self.per_frame)))
        frames = len(padded) // (self.patch * self.per_frame)

        def magnitudes(n_fft: int, hop: int) -> Tensor:
            return stft(padded, n_fft, hop, pad_mode="constant").abs()[..., : len(padded) // hop]

        mel = to_mel(magnitudes(PATCH_FFT, self.patch), self.rate, PATCH_BANDS)
        low = magnitudes(PITCH_FFT, 2 * self.patch)[PITCH_BINS]
        return torch.cat([part.log10().mT.reshape(frames, -1) for part in (mel, low)], dim=-1).maximum(
            self.floor
        )

    def changed(self, features: Tensor, gains: Tensor) -> Tensor:
        """`features` `[batch, frames, size]` of the same sounds changed by `gains` `[batch, 1, 1]` in log10.

        What lies at the floor stays there: moved with the rest, it would tell the gain.
        """
        moved = (features + gains).maximum(self.floor)
        return torch.where(features <= self.floor + 1e-3, self.floor, moved)


class FrameSet:
    """Features float16 `[frames, size]` of a `SpeechSet`."""

    def __init__(self, speech: SpeechSet, features: np.ndarray, per_frame: int) -> None:
        self.features = features
        counts = [-(-u.samples // per_frame) for u in speech.utterances]
        ends = np.cumsum(counts)
        if len(features) != ends[-1]:
            raise ValueError(f"{len(features)} rows of features for {ends[-1]} frames of speech")
        self.starts, self.ends = ends - counts, ends
        by_speaker: dict[str, list[int]] = {}
        for i, utterance in enumerate(speech.utterances):
            by_speaker.setdefault(utterance.speaker, []).append(i)
        self._speakers = list(by_speaker.values())

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation `[size]` of a fixed sample of frames."""
        some = np.random.default_rng(0).choice(len(self.features), min(20000, len(self.features)), False)
        rows = self.features[np.sort(some)].astype(np.float32)
        return rows.mean(axis=0), np.maximum(rows.std(axis=0), 0.2)

    def segment(self, frames: int, rng: np.random.Generator) -> list[tuple[int, int, int]]:
        """(utterance, first frame, frames) pieces that add up to `frames` frames of one speaker.

        The speaker is drawn uniformly. A short utterance is continued with another of the same speaker.
        """
        mine = self._speakers[rng.integers(len(self._speakers))]
        parts: list[tuple[int, int, int]] = []
        left = frames
        while left:
            i = mine[rng.integers(len(mine))]
            length = int(self.ends[i] - self.starts[i])
            start = 0 if parts else int(rng.integers(max(1, length - frames + 1)))
            take = min(left, length - start)
            parts.append((i, start, take))
            left -= take
        return parts

    def places(self, size: int, frames: int, rng: np.random.Generator) -> np.ndarray:
        """Rows int64 `[size, frames]` of `size` segments."""
        rows = np.empty((size, frames), np.int64)
        for b in range(size):
            parts = [
                np.arange(start, start + take) + self.starts[i]
                for i, start, take in self.segment(frames, rng)
            ]
            rows[b] = np.concatenate(parts)
        return rows


def make_frames(
    speech: SpeechSet, spectra: FrameFeatures, path: Path, progress: ProgressCallback = ignore_progress
) -> FrameSet:
    """The frames of `speech`, cached in `path` (.npy) for this speech and these features."""
    per_frame = spectra.patch * spectra.per_frame
    total = sum(-(-u.samples // per_frame) for u in speech.utterances)
    stamp = stamp_of(speech.identity, total, spectra.size)
    done_path = path.with_suffix(".done")  # written last: it says that the features are complete
    if not (path.is_file() and load_stamped(done_path, stamp) is not None):
        path.parent.mkdir(parents=True, exist_ok=True)

        def write(file: BinaryIO) -> None:
            # Written, not mapped: if the disk is full, a process that maps the file is killed.
            header = {"descr": "<f2", "fortran_order": False, "shape": (total, spectra.size)}
            np.lib.format.write_array_header_1_0(file, header)
            for i in range(len(speech)):
                rows = spectra(torch.from_numpy(speech.waveform(i))).numpy().astype("<f2")
                file.write(rows.tobytes())
                if i % 200 == 199:
                    progress(Progress(f"features of {speech.name}", i + 1, len(speech)))

        replace_file(path, write)
        save_stamped(done_path, stamp, b"done")
    return FrameSet(speech, np.load(path, mmap_mode="r"), per_frame)
