"""A small phone classifier, used as a perceptual loss of the lab's decoder.

Spectral losses weight a frame by its energy; intelligibility depends on quiet consonants. The classifier
learns the phones of the source speech from the synthesizer's own times and is then frozen. The decoder's loss
is how differently it classifies decoded speech and the original (a perceptual loss: Johnson et al., arXiv
1603.08155). This is the lab's counterpart of the recognizer from which the release's codec was distilled. It
is independent of the recognizer that scores intelligibility.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lab.data import RATE, SpeechSet
from lab.phones import PHONES, phone_index
from revox.coding.features import FLOOR, MEL_BANDS, MEL_FFT, MEL_TOP
from revox.losses.stft import power, stft, to_mel
from revox.training.run import Run

HOP = RATE // 100  # 10 ms
_MIDDLE = 1.5  # of log10 mel magnitudes of speech at -23 LUFS, so that the network's input is near zero


@dataclass(frozen=True)
class PhoneClassifierTraining:
    """Settings of the classifier's run. The defaults take two minutes of one CPU core."""

    steps: int = 2500
    batch: int = 12
    seconds: float = 1.0
    width: int = 96
    learning_rate: float = 2e-3
    warmup: int = 50
    decay_steps: int = 800
    noise_db: tuple[float, float] = (-90.0, -46.0)
    gain_db: tuple[float, float] = (-6.0, 4.0)
    seed: int = 0
    save_every: int = 500
    report_every: int = 100


class PhoneClassifier(nn.Module):
    """Waveforms -> phones every 10 ms: convolutions with a receptive field of 130 ms, not causal."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(MEL_BANDS, width, 5, padding=2)
        self.convs = nn.ModuleList(
            nn.Conv1d(width, width, 5, padding=2 * dilation, dilation=dilation) for dilation in (1, 2, 2)
        )
        self.out = nn.Conv1d(width, len(PHONES), 1)

    def forward(self, waveforms: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits `[batch, phones, time]` and hidden states `[batch, width, time]` of `waveforms`
        `[batch, samples]`; differentiable."""
        magnitudes = (power(stft(waveforms, MEL_FFT, HOP, pad_mode="constant")) + 1e-12).sqrt()
        mel = to_mel(magnitudes, RATE, MEL_BANDS, 0.0, MEL_TOP)
        x = mel.clamp_min(FLOOR * MEL_FFT).log10() + _MIDDLE
        x = functional.silu(self.first(x))
        states = [x]
        for conv in self.convs:
            x = x + functional.silu(conv(x))
            states.append(x)
        return self.out(x), states

    def difference(self, real: Tensor, fake: Tensor) -> Tensor:
        """How differently `fake` and `real` `[batch, samples]` are classified: a scalar.

        Kullback-Leibler divergence of the phones (nats every 10 ms) plus the relative difference of hidden
        states, the mean over layers.
        """
        with torch.no_grad():
            wanted, wanted_states = self(real)
        found, states = self(fake)
        divergence = functional.kl_div(
            functional.log_softmax(found, 1), functional.log_softmax(wanted, 1),
            log_target=True, reduction="none",
        ).sum(1).mean()  # fmt: skip
        differences = [
            (a - b).abs().mean() / a.abs().mean().clamp_min(1e-5)
            for a, b in zip(wanted_states, states, strict=True)
        ]
        return divergence + torch.stack(differences).mean()


def phone_labels(phones: Sequence[tuple[str, float]], count: int) -> np.ndarray:
    """The phone at each 10 ms, int64 `[count]`, of `phones` (name, end in seconds); a pause afterwards."""
    labels = np.zeros(count, np.int64)
    start = 0.0
    for name, end in phones:
        labels[round(start * 100) : round(end * 100)] = phone_index(name)
        start = end
    return labels


class PhoneClassifierTrainer(Run):
    """The classifier's run on synthetic speech with known phones, at random levels and with added noise."""

    def __init__(
        self, settings: PhoneClassifierTraining, speech: SpeechSet, folder: Path, device: str = "cpu"
    ) -> None:
        super().__init__("phones", settings, folder, device)
        self.settings, self.speech = settings, speech
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.classifier = PhoneClassifier(settings.width).to(device)
        self.optimizer = torch.optim.AdamW(self.classifier.parameters(), settings.learning_rate)

    def state(self) -> dict[str, Any]:
        """The classifier and its optimizer."""
        return {"classifier": self.classifier.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `state` returned."""
        self.classifier.load_state_dict(state["classifier"])
        self.optimizer.load_state_dict(state["optimizer"])

    def batch(self) -> tuple[Tensor, Tensor]:
        """Waveforms `[batch, samples]` and the phones at every 10 ms `[batch, time]`."""
        settings, rng = self.settings, self.numpy_rng
        ticks = round(settings.seconds * 100)
        waves = np.zeros((settings.batch, ticks * HOP), np.float32)
        labels = np.zeros((settings.batch, ticks), np.int64)
        for b in range(settings.batch):
            i = int(rng.integers(len(self.speech.utterances)))
            wave = self.speech.waveform(i)
            first = int(rng.integers(max(0, len(wave) // HOP - ticks) + 1))
            phones = self.speech.utterances[i].phones
            assert phones is not None  # the build refuses synthetic speech without them
            labels[b] = phone_labels(phones, first + ticks)[first:]
            piece = wave[first * HOP : (first + ticks) * HOP]
            waves[b, : len(piece)] = piece * 10 ** (rng.uniform(*settings.gain_db) / 20)
            noise = rng.standard_normal(waves.shape[1]) * 10 ** (rng.uniform(*settings.noise_db) / 20)
            waves[b] += noise.astype(np.float32)
        return torch.from_numpy(waves).to(self.device), torch.from_numpy(labels).to(self.device)

    def take_step(self) -> dict[str, float]:
        """One update; returns the cross-entropy (nats) and the share of phones classified correctly."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        waves, labels = self.batch()
        logits = self.classifier(waves)[0][..., : labels.shape[1]]
        loss = functional.cross_entropy(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return {"loss": float(loss.detach()), "accuracy": float(accuracy)}
