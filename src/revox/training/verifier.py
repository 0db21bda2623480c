"""A small speaker network that a project trains on its own speakers, so that nothing is downloaded.

ECAPA-TDNN at a fiftieth of its size, with additive-margin softmax (arXiv 1801.05599): the cosine with the own
speaker's class must exceed the others' by a margin, so that the cosine of two embeddings means something.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech.files import replace_file
from revox.training.ecapa import EcapaSizes, EcapaTdnn, Frames, fbank
from revox.training.errors import TrainingError
from revox.training.resampling import Resampler

_FRAMES_A_SECOND = 100


_SMALL = EcapaSizes(mels=40, channels=64, aggregated=192, attention=32, squeezed=32, scale=4, dim=64)


class SpeakerNet(EcapaTdnn):
    """Embeddings `[batch, 64]` of waveforms at 16 kHz; 150,000 parameters."""

    def __init__(self, sizes: EcapaSizes = _SMALL) -> None:
        super().__init__(sizes)

    def save(self, path: Path) -> None:
        """Write the weights as safetensors, which `SpeakerLoss.load` recognizes."""
        from safetensors.torch import save

        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        replace_file(path, save(state, metadata={"format": "revox-verifier"}))


@dataclass(frozen=True)
class VerifierTraining:
    """Settings of one training. Each step takes `batch` cuts of one length, between `shortest` and `longest`
    seconds; the `margin` of the softmax of `scale` times the cosine grows over the first quarter."""

    steps: int = 1000
    batch: int = 48
    shortest: float = 1.0
    longest: float = 2.0
    learning_rate: float = 3e-3
    margin: float = 0.2
    scale: float = 30.0
    seed: int = 0


def train_verifier(
    speakers: Iterable[tuple[str, np.ndarray | Tensor]],
    rate: int,
    training: VerifierTraining | None = None,
    progress: ProgressCallback = ignore_progress,
) -> SpeakerNet:
    """A network that tells the speakers of `speakers` apart: pairs of a name and a waveform `[samples]`.

    All at `rate` Hz, in any order, read once; their mel features stay in memory (16 kB a second). Speakers
    are drawn equally often. The same seed and data give the same network (on one device). `progress` is
    called every 50 steps. Raises TrainingError with fewer than two speakers.
    """
    training = training or VerifierTraining()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        network = SpeakerNet()
        features = _features(speakers, rate, network.mels)
        names = sorted(features)
        if len(names) < 2:
            raise TrainingError(
                f"A verifier is trained on speakers to tell apart, and there are {len(names)}; "
                "give recordings of two speakers or more."
            )
        classes = nn.Parameter(torch.randn(len(names), network.fc.conv.out_channels))
    draw, steps = np.random.default_rng(training.seed), training.steps
    optimizer = torch.optim.AdamW([*network.parameters(), classes], training.learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, total_steps=steps, pct_start=0.2
    )
    lengths = (round(training.shortest * _FRAMES_A_SECOND), round(training.longest * _FRAMES_A_SECOND) + 1)
    network.train()
    for step in range(steps):
        length = int(draw.integers(*lengths))
        chosen = draw.integers(len(names), size=training.batch)
        cuts = torch.stack([_cut(features[names[i]], length, draw) for i in chosen])
        embedding = network.embed(cuts, Frames(torch.full((training.batch,), length), length))
        target = torch.from_numpy(chosen)
        cosine = F.linear(F.normalize(embedding), F.normalize(classes))
        margin = training.margin * min(1.0, 4 * step / steps)
        logits = training.scale * (cosine - margin * F.one_hot(target, len(names)))
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            progress(Progress("training the verifier", step + 1, steps, {"loss": float(loss.detach())}))
    return network.eval().requires_grad_(False)


def _features(
    speakers: Iterable[tuple[str, np.ndarray | Tensor]], rate: int, mels: int
) -> dict[str, list[Tensor]]:
    resampler = Resampler(rate, EcapaTdnn.rate)
    found: dict[str, list[Tensor]] = {}
    for name, waveform in speakers:
        samples = resampler(torch.as_tensor(waveform, dtype=torch.float32)[None])
        count = samples.shape[1] // 160 + 1
        if samples.shape[1]:
            features = fbank(samples, mels, Frames(torch.tensor([count]), count))[0]
            found.setdefault(name, []).append(features)
    return found


def _cut(recordings: list[Tensor], length: int, draw: np.random.Generator) -> Tensor:
    """`[mels, length]` from anywhere in one of them, a shorter one repeated until it is long enough."""
    features = recordings[int(draw.integers(len(recordings)))]
    if features.shape[1] < length:
        features = features.repeat(1, -(-length // features.shape[1]))
    start = int(draw.integers(features.shape[1] - length + 1))
    return features[:, start : start + length]
