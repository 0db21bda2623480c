"""The meaning of the lab's semantic codes: the phones of a frame."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

SLOTS = 4  # parts of a frame with their own phone occupancy

# flite's phones (the CMU set).
PHONES = (
    "pau", "aa", "ae", "ah", "ao", "aw", "ax", "ay", "b", "ch", "d", "dh", "eh", "er", "ey", "f", "g", "hh",
    "ih", "iy", "jh", "k", "l", "m", "n", "ng", "ow", "oy", "p", "r", "s", "sh", "t", "th", "uh", "uw", "v",
    "w", "y", "z", "zh",
)  # fmt: skip
_SAME = {"axr": "er", "el": "l", "em": "m", "en": "n", "hv": "hh", "dx": "t", "nx": "n", "ux": "uw"}


def phone_index(name: str) -> int:
    """The index of a phone in `PHONES`. Raises KeyError for one that is not there."""
    name = _SAME.get(name, name)
    if name not in PHONES:
        raise KeyError(name)
    return PHONES.index(name)


def phone_occupancy(phones: Sequence[tuple[str, float]], frames: int, frame_seconds: float) -> np.ndarray:
    """The share of each of a frame's `SLOTS` parts that each phone fills: float32 `[frames, SLOTS * phones]`.

    `phones` are (name, end in seconds); what comes after the last is a pause. Raises KeyError for a phone
    that is not in `PHONES`.
    """
    slot = frame_seconds / SLOTS
    count = frames * SLOTS
    filled = np.zeros((count, len(PHONES)), np.float32)
    edges = np.arange(count + 1) * slot
    start = 0.0
    spans = [*phones, ("pau", max(count * slot, phones[-1][1] if phones else 0.0))]
    for name, end in spans:
        column = phone_index(name)
        overlap = np.minimum(edges[1:], end) - np.maximum(edges[:-1], start)
        filled[:, column] += np.clip(overlap, 0, None) / slot
        start = max(start, end)
    return filled.reshape(frames, -1)


def phone_codebook(occupancy: np.ndarray, size: int, dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Clusters of frames by their phones: centroids `[size, SLOTS * phones]` and codebook rows `[size, dim]`.

    The rows are the centroids' principal components, scaled to unit variance, so that similar sounds are
    close to each other.
    """
    from sklearn.cluster import MiniBatchKMeans

    found = MiniBatchKMeans(size, batch_size=8192, n_init=3, random_state=seed, reassignment_ratio=0.001)
    found.fit(occupancy)
    centroids = found.cluster_centers_.astype(np.float32)
    centered = centroids - centroids.mean(axis=0)
    _, _, directions = np.linalg.svd(centered, full_matrices=False)
    rows = centered @ directions[:dim].T
    if rows.shape[1] < dim:
        rows = np.pad(rows, ((0, 0), (0, dim - rows.shape[1])))
    return centroids, (rows / rows.std()).astype(np.float32)


def nearest_cluster(occupancy: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The cluster of each frame: int16 `[frames]` of `occupancy` `[frames, n]`."""
    distances = torch.cdist(torch.from_numpy(occupancy), torch.from_numpy(centroids))
    return distances.argmin(dim=1).numpy().astype(np.int16)
