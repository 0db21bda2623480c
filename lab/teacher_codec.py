"""The teacher codec: a small codec of spectra that settles what the lab's 37 codes mean.

Training encoder and decoder jointly on waveforms from scratch is slow on a CPU: for hours the bottleneck
learns from a decoder that cannot speak yet. The teacher codec has the same bottleneck between spectra, where
a step costs a hundredth as much. The lab's encoder then learns the teacher's latents (regression) and its
decoder learns waveforms from the teacher's codes. The two train independently, and the language model can
start at once.

The meaning of the semantic codes is fixed beforehand: the phones of a frame, as the synthesizer timed them.
This is the lab's counterpart of the distillation from a speech recognizer that made the release's codes
(Voxtral TTS paper, arXiv 2603.25551). Human clips have no phones; their frames take the nearest code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lab.frames import FrameSet
from revox.coding.features import MEL_BANDS, frame_network
from revox.model.config import CodecConfig
from revox.training.quantize import quantize_acoustic
from revox.training.run import Run


@dataclass(frozen=True)
class TeacherCodecTraining:
    """Settings of the teacher codec's run. The defaults are for two CPU cores."""

    steps: int = 4000
    batch: int = 32
    frames: int = 32
    human_share: float = 0.3
    learning_rate: float = 2e-3
    warmup: int = 100
    decay_steps: int = 2500
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    width: int = 256
    blocks: int = 2
    pitch: float = 0.3
    semantic: float = 0.1
    commitment: float = 0.02
    spread: float = 0.5
    gain_db: float = 3.0
    seed: int = 0
    save_every: int = 500
    report_every: int = 100
    validate_every: int = 500


class TeacherCodec(nn.Module):
    """Features `[batch, frames, size]` <-> latents, causal in both directions.

    `rows` `[codes, semantic_dim]` is the semantic codebook. `mean` and `scale` `[size]` standardize features.
    """

    rows: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, config: CodecConfig, size: int, width: int, blocks: int) -> None:
        super().__init__()
        self.semantic_dim, self.levels = config.semantic_dim, config.acoustic_codebook_size
        self.register_buffer("rows", torch.zeros(config.semantic_codebook_size, config.semantic_dim))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.encoder = frame_network(size, width, blocks, config.latent_dim)
        self.decoder = frame_network(config.latent_dim, width, blocks, size)

    def standard(self, features: Tensor) -> Tensor:
        """Features with zero mean and unit variance."""
        return (features - self.mean) / self.scale

    def stamp(self) -> str:
        """Identifies the weights, for caches of what they give."""
        return f"{sum(float(p.double().sum()) for p in self.parameters()):.9e}"

    def encode_latents(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Semantic latents `[batch, frames, semantic_dim]` and acoustic latents before the tanh."""
        latents = self.encoder(self.standard(features))
        return latents[..., : self.semantic_dim], latents[..., self.semantic_dim :]

    def semantic_logits(self, semantic: Tensor) -> Tensor:
        """Negative squared distance to every codebook row, divided by 8: `[batch, frames, codes]`."""
        distances = torch.cdist(semantic.flatten(0, 1), self.rows).square()
        return (-distances / 8).unflatten(0, semantic.shape[:2])

    def decode(self, semantic: Tensor, acoustic: Tensor) -> Tensor:
        """Standardized features from codebook rows and acoustic values in [-1, 1]."""
        return self.decoder(torch.cat((semantic, acoustic), dim=-1))

    @torch.no_grad()
    def encode(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Semantic codes `[batch, frames]` and acoustic latents before the tanh `[batch, frames, 36]`."""
        semantic, acoustic = self.encode_latents(features)
        return self.semantic_logits(semantic).argmax(dim=-1), acoustic


class TeacherCodecTrainer(Run):
    """One run over frames of synthetic and human speech."""

    def __init__(
        self,
        config: CodecConfig,
        settings: TeacherCodecTraining,
        synthetic: FrameSet,
        human: FrameSet | None,
        validation: dict[str, FrameSet],
        rows: np.ndarray,
        folder: Path,
        device: str = "cpu",
    ) -> None:
        super().__init__("teacher", settings, folder, device)
        self.settings, self.synthetic, self.human, self.validation = settings, synthetic, human, validation
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            teacher = TeacherCodec(config, synthetic.features.shape[1], settings.width, settings.blocks)
        teacher.rows.copy_(torch.from_numpy(rows))
        mean, scale = synthetic.statistics()
        teacher.mean.copy_(torch.from_numpy(mean))
        teacher.scale.copy_(torch.from_numpy(scale))
        self.teacher = teacher.to(device)
        self.mel_size = config.patches_per_frame * MEL_BANDS
        self.optimizer = torch.optim.AdamW(
            self.teacher.parameters(), lr=settings.learning_rate, betas=settings.betas,
            weight_decay=settings.weight_decay, foreach=True,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """The teacher codec and its optimizer."""
        return {"teacher": self.teacher.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `state` returned."""
        self.teacher.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])

    def losses(self, features: Tensor, labels: Tensor, training: bool) -> dict[str, Tensor]:
        """Terms for `features` `[batch, frames, size]` with phone `labels` `[batch, frames]`, -1 unknown."""
        teacher = self.teacher
        semantic, acoustic = teacher.encode_latents(features)
        logits = teacher.semantic_logits(semantic)
        codes = logits.argmax(dim=-1)
        known = labels >= 0
        quantized = torch.tanh(acoustic)
        seen = semantic + (teacher.rows[codes] - semantic).detach()
        if training:
            keep = torch.rand((len(features), 1, 1), generator=self.rng).to(features.device) < 0.5
            seen = torch.where(keep, seen, semantic)
            # Frames without phones do not train the semantic codes: trained on reconstruction alone, human
            # speech collapsed to four codes.
            seen = torch.where(known[..., None], seen, teacher.rows[codes])
            quantized = quantize_acoustic(quantized, teacher.levels, self.rng)
        else:
            quantized = (quantized * (teacher.levels - 1) / 2).round() * 2 / (teacher.levels - 1)
        made = teacher.decode(seen, quantized)
        error = (made - teacher.standard(features)).abs()
        wanted = functional.cross_entropy(logits[known], labels[known]) if known.any() else logits.sum() * 0
        return {
            "mel": error[..., : self.mel_size].mean(),
            "pitch": error[..., self.mel_size :].mean(),
            "semantic": wanted,
            "agreement": (codes == labels)[known].float().mean() if known.any() else logits.sum() * 0,
            "commitment": (semantic - teacher.rows[labels.clamp_min(0)])[known].square().mean()
            if known.any()
            else logits.sum() * 0,
            "spread": functional.relu(acoustic.abs() - 1.2).square().mean(),
        }

    def take_step(self) -> dict[str, float]:
        """One update; gives the losses."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        humans = round(settings.batch * settings.human_share) if self.human else 0
        features, labels = self.synthetic.batch(settings.batch - humans, settings.frames, self.numpy_rng)
        if self.human and humans:
            more, unknown = self.human.batch(humans, settings.frames, self.numpy_rng)
            features, labels = np.concatenate((features, more)), np.concatenate((labels, unknown))
        gains = self.numpy_rng.uniform(-1, 1, (len(features), 1, 1)) * settings.gain_db / 20
        x = torch.from_numpy((features + gains).astype(np.float32)).to(self.device)
        losses = self.losses(x, torch.from_numpy(labels).to(self.device), training=True)
        loss = (
            losses["mel"]
            + settings.pitch * losses["pitch"]
            + settings.semantic * losses["semantic"]
            + settings.commitment * losses["commitment"]
            + settings.spread * losses["spread"]
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.teacher.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        return {k: float(v.detach()) for k, v in losses.items()} | {
            "norm": float(norm),
            "loss": float(loss.detach()),
        }

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The losses on validation frames from hard codes, and how the codes are used."""
        row: dict[str, float] = {}
        for kind, frames in self.validation.items():
            features, labels = frames.batch(48, 48, np.random.default_rng(1))
            x = torch.from_numpy(features.astype(np.float32)).to(self.device)
            losses = self.losses(x, torch.from_numpy(labels).to(self.device), training=False)
            codes, acoustic = self.teacher.encode(x)
            share = torch.bincount(codes.flatten(), minlength=len(self.teacher.rows)).float()
            share = share / share.sum()
            levels = (torch.tanh(acoustic) * (self.teacher.levels - 1) / 2).round().abs()
            row |= {f"{kind}_{k}": round(float(v), 4) for k, v in losses.items()}
            row[f"{kind}_perplexity"] = round(float(torch.exp(-(share * (share + 1e-12).log()).sum())), 1)
            row[f"{kind}_saturated"] = round(
                float((levels == (self.teacher.levels - 1) / 2).float().mean()), 4
            )
        return row
