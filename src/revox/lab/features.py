"""What the lab's guide hears and what its semantic codes mean: spectra by the frame, and phones.

A frame of codes (80 ms) is described by 80 mel bands at each of its patches (10 ms) and by the low bins of a
longer transform, where single harmonics show the pitch, at every second patch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from revox.metrics.spectral import mel_filterbank
from revox.model.config import CodecConfig

MEL_FFT, MEL_BANDS, MEL_TOP = 1024, 80, 8000.0
PITCH_FFT, PITCH_BINS = 2048, slice(3, 67)  # 35 to 770 Hz at 24 kHz
FLOOR = 4e-6  # of n_fft: 40 dB under speech at -23 dB
SLOTS = 4  # parts of a frame in which the phones are told apart

# flite's phones (the CMU set); flite's files need no other.
PHONES = (
    "pau", "aa", "ae", "ah", "ao", "aw", "ax", "ay", "b", "ch", "d", "dh", "eh", "er", "ey", "f", "g", "hh",
    "ih", "iy", "jh", "k", "l", "m", "n", "ng", "ow", "oy", "p", "r", "s", "sh", "t", "th", "uh", "uw", "v",
    "w", "y", "z", "zh",
)  # fmt: skip
_SAME = {"axr": "er", "el": "l", "em": "m", "en": "n", "hv": "hh", "dx": "t", "nx": "n", "ux": "uw"}


class SpectralFeatures(nn.Module):
    """Log10 magnitudes by the frame: `[samples] -> [frames, size]`, the last frame completed with zeros."""

    bank: Tensor
    mel_window: Tensor
    pitch_window: Tensor

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.patch, self.per_frame = config.pretransform_patch_size, config.patches_per_frame
        bank = mel_filterbank(config.sampling_rate, MEL_FFT, MEL_BANDS, 0.0, MEL_TOP)
        self.register_buffer("bank", torch.from_numpy(bank).float())
        self.register_buffer("mel_window", torch.hann_window(MEL_FFT))
        self.register_buffer("pitch_window", torch.hann_window(PITCH_FFT))
        self.mel_size = self.per_frame * MEL_BANDS
        self.size = self.mel_size + self.per_frame // 2 * (PITCH_BINS.stop - PITCH_BINS.start)

    @torch.no_grad()
    def forward(self, samples: Tensor) -> Tensor:
        """Features of `samples` `[n]`: first the mel bands by patch, then the low bins by two patches."""
        length = self.patch * self.per_frame
        padded = functional.pad(samples, (0, -len(samples) % length))
        frames = len(padded) // length

        def sizes(n_fft: int, hop: int, window: Tensor) -> Tensor:
            spectrum = torch.stft(padded, n_fft, hop, window=window, pad_mode="constant", return_complex=True)
            return spectrum.abs()[:, : len(padded) // hop]

        mel = self.bank @ sizes(MEL_FFT, self.patch, self.mel_window)
        low = sizes(PITCH_FFT, 2 * self.patch, self.pitch_window)[PITCH_BINS]
        parts = (
            mel.clamp_min(FLOOR * MEL_FFT).log10().T.reshape(frames, -1),
            low.clamp_min(4 * FLOOR * PITCH_FFT).log10().T.reshape(frames, -1),
        )
        return torch.cat(parts, dim=1)


def phone_occupancy(phones: Sequence[tuple[str, float]], frames: int, frame_seconds: float) -> np.ndarray:
    """How much of each of `SLOTS` parts of each frame each phone fills: float32 `[frames, SLOTS * phones]`.

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
        column = PHONES.index(_SAME.get(name, name)) if _SAME.get(name, name) in PHONES else -1
        if column < 0:
            raise KeyError(name)
        overlap = np.minimum(edges[1:], end) - np.maximum(edges[:-1], start)
        filled[:, column] += np.clip(overlap, 0, None) / slot
        start = max(start, end)
    return filled.reshape(frames, -1)


def phone_codebook(occupancy: np.ndarray, size: int, dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Clusters of frames by their phones: centroids `[size, SLOTS * phones]` and codebook rows `[size, dim]`.

    The rows are the centroids' principal components, of unit variance over all, so that like sounds lie near
    each other.
    """
    from sklearn.cluster import MiniBatchKMeans

    found = MiniBatchKMeans(size, batch_size=8192, n_init=3, random_state=seed, reassignment_ratio=0.001)
    found.fit(occupancy)
    centroids = found.cluster_centers_.astype(np.float32)
    centred = centroids - centroids.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    rows = centred @ directions[:dim].T
    if rows.shape[1] < dim:
        rows = np.pad(rows, ((0, 0), (0, dim - rows.shape[1])))
    return centroids, (rows / rows.std()).astype(np.float32)


def nearest_cluster(occupancy: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The cluster of each frame: int16 `[frames]` of `occupancy` `[frames, n]`."""
    distances = torch.cdist(torch.from_numpy(occupancy), torch.from_numpy(centroids))
    return distances.argmin(dim=1).numpy().astype(np.int16)
