"""Frames of the lab's speech as features and phone labels, cached on disk; features are memory-mapped."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from lab.arrays import npz_bytes, read_npz
from lab.data import SpeechSet
from lab.phones import nearest_cluster, phone_occupancy
from revox.coding.features import SpectralFeatures
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech.files import load_stamped, replace_file, save_stamped, stamp_of


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

    def batch(self, size: int, frames: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """`size` segments: features float16 `[size, frames, n]`, labels int64 `[size, frames]`."""
        features = np.empty((size, frames, self.features.shape[1]), np.float16)
        labels = np.empty((size, frames), np.int64)
        for b in range(size):
            done = 0
            for i, start, take in self.segment(frames, rng):
                first = int(self.starts[i]) + start
                features[b, done : done + take] = self.features[first : first + take]
                labels[b, done : done + take] = self.labels[first : first + take]
                done += take
        return features, labels


def occupancies(speech: SpeechSet, per_frame: int, rate: int) -> list[np.ndarray | None]:
    """Phone occupancy of every utterance's frames; None if its phones are unknown."""
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
    progress: ProgressCallback = ignore_progress,
) -> FrameSet:
    """The frames of `speech`: features in `path` (.npy), labels in a cache next to it.

    Both are computed again when the speech or the features' sizes change.
    """
    per_frame = spectra.patch * spectra.per_frame
    total = sum(-(-u.samples // per_frame) for u in speech.utterances)
    stamp = stamp_of(speech.identity, total, spectra.size, float(centroids.sum()))
    labels_path = path.with_suffix(".labels.cache")  # written last: it says that the features are complete
    cached = load_stamped(labels_path, stamp) if path.is_file() else None
    if cached is not None:
        return FrameSet(speech, np.load(path, mmap_mode="r"), read_npz(cached)["labels"], per_frame)
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.full(total, -1, np.int16)

    def write(file: BinaryIO) -> None:
        # Written, not mapped: if the disk is full, a process that maps the file is killed.
        header = {"descr": "<f2", "fortran_order": False, "shape": (total, spectra.size)}
        np.lib.format.write_array_header_1_0(file, header)
        done = 0
        for i, occupancy in enumerate(occupancies(speech, per_frame, rate)):
            rows = spectra(torch.from_numpy(speech.waveform(i))).numpy().astype("<f2")
            file.write(rows.tobytes())
            if occupancy is not None:
                labels[done : done + len(rows)] = nearest_cluster(occupancy, centroids)
            done += len(rows)
            if i % 200 == 199:
                progress(Progress(f"features of {speech.name}", i + 1, len(speech)))

    replace_file(path, write)
    save_stamped(labels_path, stamp, npz_bytes({"labels": labels}))
    return FrameSet(speech, np.load(path, mmap_mode="r"), labels, per_frame)
