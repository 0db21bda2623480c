"""How differently Whisper hears two waveforms: the distance of its encoder's states, as a loss of the
decoder.

Spectral losses weigh a frame by its energy, while words hang on short quiet consonants; a recognizer's states
weigh what tells words apart (deep features as a loss: Johnson et al., arXiv 1603.08155).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from revox.losses.stft import power, stft
from revox.training.distill import WhisperTeacher
from revox.training.errors import library
from revox.training.resampling import Resampler

_RATE, _N_FFT, _HOP = 16000, 400, 160  # of Whisper's spectra
LAYERS = (2, 4)  # of the encoder, after which states are compared


class PhoneticDistance(nn.Module):
    """The distance of two batches of waveforms at `rate` Hz for the Whisper in a folder, which does not
    learn.

    Raises TrainingError as `WhisperTeacher.load` does.
    """

    filters: Tensor

    def __init__(self, whisper: Path, rate: int) -> None:
        super().__init__()
        features = library("transformers").WhisperFeatureExtractor.from_pretrained(str(whisper))
        filters = torch.from_numpy(features.mel_filters).float()
        self.register_buffer("filters", filters, persistent=False)
        self.resampler = Resampler(rate, _RATE)
        encoder: Any = WhisperTeacher.load(str(whisper)).encoder
        self.encoder = encoder
        self.layers = [n for n in LAYERS if n < len(encoder.layers)] or [0]

    def spectra(self, waves: Tensor) -> Tensor:
        """Log mel spectra `[batch, bands, frames]` of `waves` `[batch, samples]`, as Whisper takes them, but
        for the loudest value, under which they are cut: it is the batch's."""
        found = power(stft(self.resampler(waves.float()), _N_FFT, _HOP))[..., :-1]
        mel = (self.filters.T @ found).clamp_min(1e-10).log10()
        return (mel.maximum(mel.detach().max() - 8) + 4) / 4

    def states(self, spectra: Tensor) -> list[Tensor]:
        """States `[batch, positions, width]` after each of `layers`, as the next layer normalizes them.

        The encoder itself takes 30 s only; a shorter clip has the first positions.
        """
        encoder: Any = self.encoder
        found = []
        x = functional.gelu(encoder.conv1(spectra))
        x = functional.gelu(encoder.conv2(x)).mT
        x = x + encoder.embed_positions.weight[: x.shape[1]]
        for n, layer in enumerate(encoder.layers[: self.layers[-1] + 1]):
            if n in self.layers:
                found.append(layer.self_attn_layer_norm(x))
            if n < self.layers[-1]:
                x = layer(x, None)
                x = x[0] if isinstance(x, tuple) else x
        return found

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Mean absolute difference of the states of `fake` from those of `real`, both `[batch, samples]`,
        over the mean absolute value of the latter; the mean over `layers`."""
        with torch.no_grad():
            wanted = self.states(self.spectra(real))
        found = self.states(self.spectra(fake))
        terms = [(a - b).abs().mean() / b.abs().mean() for a, b in zip(found, wanted, strict=True)]
        return torch.stack(terms).mean().float()
