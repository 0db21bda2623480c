"""Frames of the lab's speech as features and labels, computed once and memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lab.data import SpeechSet
from lab.phones import nearest_cluster, phone_occupancy
from revox.coding.features import SpectralFeatures
from revox.speech.files import replacing


class FrameSet:
    """Features float16 `[frames, size]` and labels int16 `[frames]` (-1: unknown) of a `SpeechSet`."""

    def __init__(self, speech: SpeechSet, features: np.ndarray, labels: np.ndarray, per_frame: int) -> None:
        self.features, self.labels = features, labels
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
        return rows.mean(axis=0), rows.std(axis=0) + 0.05

    def stretch(self, frames: int, rng: np.random.Generator) -> list[tuple[int, int, int]]:
        """(utterance, first frame, frames) that make `frames` frames of one speaker, uniform over speakers; a
        short utterance goes on with another."""
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

    def batch(self, size: int, frames: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """`size` stretches: features float16 `[size, frames, n]`, labels int64 `[size, frames]`."""
        features = np.empty((size, frames, self.features.shape[1]), np.float16)
        labels = np.empty((size, frames), np.int64)
        for b in range(size):
            done = 0
            for i, start, take in self.stretch(frames, rng):
                first = int(self.starts[i]) + start
                features[b, done : done + take] = self.features[first : first + take]
                labels[b, done : done + take] = self.labels[first : first + take]
                done += take
        return features, labels


def occupancies(speech: SpeechSet, per_frame: int, rate: int) -> list[np.ndarray | None]:
    """Phones of every utterance's frames, None where they are not known."""
    return [
        None if u.phones is None else phone_occupancy(u.phones, -(-u.samples // per_frame), per_frame / rate)
        for u in speech.utterances
    ]


def make_frames(
    speech: SpeechSet,
    spectra: SpectralFeatures,
    centroids: np.ndarray,
    path: Path,
    rate: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> FrameSet:
    """The frames of `speech`, kept in `path` (.npy, labels beside it), made anew when the speech changed."""
    per_frame = spectra.patch * spectra.per_frame
    total = sum(-(-u.samples // per_frame) for u in speech.utterances)
    stamp = json.dumps([len(speech), round(speech.seconds, 3), total, spectra.size, float(centroids.sum())])
    labels_path = path.with_suffix(".labels.npz")
    if path.is_file() and labels_path.is_file():
        with np.load(labels_path) as kept:
            if str(kept["stamp"]) == stamp:
                return FrameSet(speech, np.load(path, mmap_mode="r"), kept["labels"], per_frame)
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.full(total, -1, np.int16)
    done = 0
    # Written, not mapped: a full disk would end a process that maps it.
    with replacing(path) as beside, beside.open("wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": (total, spectra.size)}
        np.lib.format.write_array_header_1_0(file, header)
        for i, occupancy in enumerate(occupancies(speech, per_frame, rate)):
            rows = spectra(torch.from_numpy(speech.waveform(i))).numpy().astype("<f2")
            file.write(rows.tobytes())
            if occupancy is not None:
                labels[done : done + len(rows)] = nearest_cluster(occupancy, centroids)
            done += len(rows)
            if i % 200 == 199:
                progress(i + 1, len(speech))
    with replacing(labels_path) as beside, beside.open("wb") as file:
        np.savez(file, labels=labels, stamp=stamp)
    return FrameSet(speech, np.load(path, mmap_mode="r"), labels, per_frame)
