"""The teacher codec: a small codec of spectra that settles what the lab's 37 codes mean.

Training encoder and decoder jointly on waveforms from scratch is slow on a CPU: for hours the bottleneck
learns from a decoder that cannot speak yet. The teacher codec has the same bottleneck between spectra, where
a step costs a hundredth as much. The lab's encoder then learns the teacher's latents (regression) and its
decoder learns waveforms from the teacher's codes. The two train independently, and the language model can
start at once.

The semantic codes are distilled from Whisper as the release's are (Voxtral TTS paper, arXiv 2603.25551,
section 2: `revox.training.distill`), from states computed once (`lab.whisper_states`). The paper's loss has a
word of text for a target; as the lab hears three hours where the paper's codec hears thousands, the states of
Whisper's encoder are a target of every frame besides. The codebook starts as clusters of the latents learned
without quantization, then follows them by moving averages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lab.frames import FrameFeatures, FrameSet
from lab.language_data import SYMBOLS
from lab.whisper_states import WhisperStates
from revox.coding.features import frame_network
from revox.model.config import CodecConfig
from revox.training.distill import AsrDistillation, DistillTargets
from revox.training.quantize import quantize_acoustic
from revox.training.run import Run

ACOUSTIC_SCALE = 0.4  # of acoustic latents before the tanh: their root mean square
SMALLEST_SIZE = 0.02  # of a latent that is brought to it: one that tells nothing is to stay small
KNOWN_FRAMES = 4  # of a segment, after which its speaker can be known


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
    words: float = 1.0
    """Weight of the paper's distillation: Whisper's decoder states, placed by its cross-attention."""
    sounds: float = 1.0
    """Weight of the distillation of Whisper's encoder states, frame by frame."""
    distilled: int = 12
    """Utterances a step that are distilled."""
    quantized_from: int = 1200
    """The step at which the semantic codebook is made. Until then semantic latents are not quantized."""
    codebook_decay: float = 0.99
    phonemes: float = 0.0
    """Weight of the cross-entropy of the synthesizer's phonemes, a quarter and three quarters of a frame in,
    read from the semantic code."""
    rate: float = 0.0
    """Weight of the bits that an acoustic value takes, given those before and the semantic code
    (`acoustic_bits`): what no language model could foresee is to be left to the decoder."""
    foreseen: float = 0.0
    """Share of clips that are decoded from foreseen acoustic values (`foreseen_values`) and semantic codes,
    so that the semantic code says what a language model must not miss."""
    rarest: float = 0.1
    """A code used less often than this share of the mean is put where a latent is."""
    commitment: float = 0.1
    spread: float = 0.5
    gain_db: float = 3.0
    seed: int = 0
    save_every: int = 500
    report_every: int = 100
    validate_every: int = 500


class TeacherCodec(nn.Module):
    """Features `[batch, frames, size]` <-> latents, causal in both directions.

    The semantic codebook is `sums / usage`, `[codes, semantic_dim]`. `mean` and `scale` `[size]` standardize
    features; `distance` is the mean squared distance of latents to their codes; `gain` `[36]` brings acoustic
    latents to where the levels are, once they are learned.
    """

    usage: Tensor
    sums: Tensor
    distance: Tensor
    gain: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, config: CodecConfig, size: int, width: int, blocks: int) -> None:
        super().__init__()
        self.semantic_dim, self.levels = config.semantic_dim, config.acoustic_codebook_size
        codes = config.semantic_codebook_size
        self.register_buffer("usage", torch.ones(codes))
        self.register_buffer("sums", torch.zeros(codes, config.semantic_dim))
        self.register_buffer("distance", torch.ones(()))
        self.register_buffer("gain", torch.ones(config.acoustic_dim))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.encoder = frame_network(size, width, blocks, config.latent_dim)
        self.decoder = frame_network(config.latent_dim, width, blocks, size)

    @property
    def rows(self) -> Tensor:
        """The semantic codebook `[codes, semantic_dim]`."""
        return self.sums / self.usage[:, None]

    def standard(self, features: Tensor) -> Tensor:
        """Features with zero mean and unit variance."""
        return (features - self.mean) / self.scale

    def stamp(self) -> str:
        """Identifies the weights, for caches of what they give."""
        return f"{sum(float(p.double().sum()) for p in self.state_dict().values()):.9e}"

    def encode_latents(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Semantic latents `[batch, frames, semantic_dim]` and acoustic latents before the tanh."""
        latents = self.encoder(self.standard(features))
        return latents[..., : self.semantic_dim], latents[..., self.semantic_dim :]

    def semantic_logits(self, semantic: Tensor) -> Tensor:
        """Negative squared distance to every row, in units of `distance`: `[batch, frames, codes]`."""
        distances = torch.cdist(semantic.flatten(0, 1), self.rows).square()
        return (-distances / self.distance).unflatten(0, semantic.shape[:2])

    def decode(self, semantic: Tensor, acoustic: Tensor) -> Tensor:
        """Standardized features from codebook rows and acoustic values in [-1, 1]."""
        return self.decoder(torch.cat((semantic, acoustic), dim=-1))

    @torch.no_grad()
    def encode(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Semantic codes `[batch, frames]` and acoustic latents before the tanh `[batch, frames, 36]`, with
        their gain."""
        semantic, acoustic = self.encode_latents(features)
        return self.semantic_logits(semantic).argmax(dim=-1), acoustic * self.gain

    @torch.no_grad()
    def make_codebook(self, latents: Tensor, rng: torch.Generator, rounds: int = 20) -> None:
        """Rows from clusters (k-means) of semantic `latents` `[n, semantic_dim]`."""
        rows = latents[torch.randperm(len(latents), generator=rng)[: len(self.usage)].to(latents.device)]
        for _ in range(rounds):
            nearest = torch.cdist(latents, rows).argmin(dim=-1)
            count = torch.bincount(nearest, minlength=len(rows)).float()
            sums = torch.zeros_like(rows).index_add_(0, nearest, latents)
            rows = torch.where(count[:, None] > 0, sums / count[:, None].clamp_min(1), rows)
        self.usage.fill_(1.0)
        self.sums.copy_(rows)
        self.distance.copy_(torch.cdist(latents, rows).min(dim=-1).values.square().mean())

    @torch.no_grad()
    def follow(
        self, latents: Tensor, codes: Tensor, settings: TeacherCodecTraining, rng: torch.Generator
    ) -> None:
        """Move the codebook towards the `latents` `[n, semantic_dim]` of `codes` `[n]`."""
        keep, size = settings.codebook_decay, len(self.usage)
        rows = self.rows
        # usage stays at a mean of 1, so that a row in use moves by the same share at every batch size
        count = torch.bincount(codes, minlength=size).float() * size / len(codes)
        sums = torch.zeros_like(self.sums).index_add_(0, codes, latents) * size / len(codes)
        self.usage.mul_(keep).add_(count, alpha=1 - keep)
        self.sums.mul_(keep).add_(sums, alpha=1 - keep)
        nearest = (latents - rows[codes]).square().sum(-1).mean()
        self.distance.mul_(keep).add_(nearest, alpha=1 - keep)
        rare = torch.nonzero(self.usage < settings.rarest)[:, 0]
        if len(rare):
            taken = torch.randint(len(latents), (len(rare),), generator=rng).to(latents.device)
            self.usage[rare] = 0.5
            self.sums[rare] = latents[taken] * 0.5


def foreseen_values(network: nn.Module, values: Tensor, semantic: Tensor) -> Tensor:
    """Acoustic values `[batch, frames, 36]` as `network` tells them from the two true ones before, the mean
    of all before, and the semantic latents `[batch, frames, dim]` of this frame and the one before.

    The first `KNOWN_FRAMES` are the true ones.
    """
    count = torch.arange(1, values.shape[1] + 1, device=values.device)[None, :, None]

    def before(x: Tensor, n: int) -> Tensor:
        return functional.pad(x, (0, 0, n, 0))[:, : x.shape[1]]

    mean = before(values.cumsum(1) / count, 1)
    past = torch.cat((before(values, 1), before(values, 2), mean, semantic, before(semantic, 1)), dim=-1)
    return torch.cat((values[:, :KNOWN_FRAMES], network(past)[:, KNOWN_FRAMES:]), dim=1)


def acoustic_bits(values: Tensor, foreseen: Tensor, levels: int) -> Tensor:
    """Mean bits of an acoustic value of `values` `[batch, frames, 36]`, in [-1, 1], where `foreseen` was
    expected: log2(1 + (e / d)^2) / 2, the capacity of a Gaussian channel whose noise is one step d of the
    `levels`, for the error e. The first `KNOWN_FRAMES` do not count."""
    error = (values - foreseen)[:, KNOWN_FRAMES:] * (levels - 1) / 2
    return torch.log2(1 + error.square()).mean() / 2


@dataclass(frozen=True)
class TeacherData:
    """Frames of one kind of speech, Whisper's states of its utterances, and, where they are known, the
    phonemes of each half of a frame, int16 `[2 * frames]` by utterance."""

    frames: FrameSet
    states: WhisperStates
    symbols: dict[int, np.ndarray] = field(default_factory=dict)

    def distill(
        self, size: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, DistillTargets, np.ndarray, np.ndarray]:
        """Whole utterances: features `[size, frames, n]`, which frames are filled, the targets of their
        words, Whisper's encoder states `[size, frames, width]`, and phonemes `[size, frames, 2]`, 0 where
        unknown."""
        known = [i for i, found in self.states.hidden.items() if len(found)]
        chosen = [known[i] for i in rng.integers(len(known), size=size)]
        parts = [self.frames.features[self.frames.starts[i] : self.frames.ends[i]] for i in chosen]
        longest = max(map(len, parts))
        features = np.zeros((size, longest, parts[0].shape[1]), np.float32)
        filled = np.zeros((size, longest), bool)
        encoded = np.zeros((size, longest, self.states.width), np.float32)
        symbols = np.zeros((size, longest, 2), np.int64)
        for b, (i, part) in enumerate(zip(chosen, parts, strict=True)):
            features[b, : len(part)] = part
            features[b, len(part) :] = part[-1]
            filled[b, : len(part)] = True
            encoded[b, : len(part)] = self.states.encoded[i]
            if i in self.symbols:
                symbols[b, : len(part)] = self.symbols[i].reshape(-1, 2)
        return features, filled, self.states.batch(chosen), encoded, symbols


class TeacherCodecTrainer(Run):
    """One run over synthetic and human speech, which is at least one of `train` and `validation`."""

    def __init__(
        self,
        config: CodecConfig,
        settings: TeacherCodecTraining,
        train: dict[str, TeacherData],
        validation: dict[str, TeacherData],
        folder: Path,
        device: str = "cpu",
    ) -> None:
        super().__init__("teacher", settings, folder, device)
        self.settings, self.train, self.validation = settings, train, validation
        frames, states = train["synthetic"].frames, train["synthetic"].states
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            teacher = TeacherCodec(config, frames.features.shape[1], settings.width, settings.blocks)
            self.words = AsrDistillation(config.semantic_dim, states.width).to(device)
            self.sounds = nn.Linear(config.semantic_dim, states.width).to(device)
            self.phonemes = nn.Linear(config.semantic_dim, 2 * SYMBOLS).to(device)
            self.foreseen = nn.Sequential(
                nn.Linear(3 * config.acoustic_dim + 2 * config.semantic_dim, 256),
                nn.SiLU(),
                nn.Linear(256, config.acoustic_dim),
            ).to(device)
        mean, scale = frames.statistics()
        teacher.mean.copy_(torch.from_numpy(mean))
        teacher.scale.copy_(torch.from_numpy(scale))
        self.teacher = teacher.to(device)
        self.spectra = FrameFeatures(config).to(device)
        self.mel_size = self.spectra.mel_size
        # Whisper's states share a large constant part, which would be most of a cosine.
        some = np.concatenate([found[:20] for found in list(states.encoded.values())[:500]])
        self.center = torch.from_numpy(some.astype(np.float32).mean(axis=0)).to(device)
        self.optimizer = torch.optim.AdamW(
            [p for part in (self.teacher, *self._further().values()) for p in part.parameters()],
            lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, foreach=True,
        )  # fmt: skip

    def _further(self) -> dict[str, nn.Module]:
        names = ("words", "sounds", "phonemes", "foreseen")
        return {name: getattr(self, name) for name in names}

    def state(self) -> dict[str, Any]:
        """The teacher codec, what is read from its codes, and their optimizer."""
        further = {name: part.state_dict() for name, part in self._further().items()}
        return {
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **further,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `state` returned."""
        self.teacher.load_state_dict(state["teacher"])
        for name, part in self._further().items():
            part.load_state_dict(state[name])
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])

    @property
    def quantizes(self) -> bool:
        """Whether the codebook has been made."""
        return self.step_count >= self.settings.quantized_from

    def _quantized(
        self, semantic: Tensor, training: bool, always: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Semantic latents as the decoder is given them, straight-through, and their codes. In training half
        of the clips are not quantized, but for those of `always` `[batch, 1, 1]`."""
        codes = self.teacher.semantic_logits(semantic.detach()).argmax(dim=-1)
        if not self.quantizes:
            return semantic, codes
        hard = semantic + (self.teacher.rows[codes] - semantic).detach()
        if not training:
            return hard, codes
        keep = torch.rand((len(semantic), 1, 1), generator=self.rng).to(semantic.device) < 0.5
        return torch.where(keep if always is None else keep | always, hard, semantic), codes

    def reconstruction(self, features: Tensor, training: bool) -> dict[str, Tensor]:
        """Terms for `features` `[batch, frames, size]`: `mel` and `pitch` (mean absolute error of
        standardized features), `commitment`, `spread`, `rate`, and in validation `foreseen_mel`, the `mel`
        from foreseen acoustic values."""
        teacher = self.teacher
        semantic, acoustic = teacher.encode_latents(features)
        blind = torch.rand((len(semantic), 1, 1), generator=self.rng) < self.settings.foreseen * training
        blind = blind.to(semantic.device)
        given, codes = self._quantized(semantic, training, blind)
        values = torch.tanh(acoustic)
        foreseen = foreseen_values(self.foreseen, values, given)
        bits = acoustic_bits(values, foreseen, teacher.levels)
        if training:
            values = quantize_acoustic(values, teacher.levels, self.rng)
            values = torch.where(blind, foreseen, values)
            if self.quantizes:
                teacher.follow(semantic.flatten(0, 1), codes.flatten(), self.settings, self.rng)
        else:
            values = (values * (teacher.levels - 1) / 2).round() * 2 / (teacher.levels - 1)
        error = (teacher.decode(given, values) - teacher.standard(features)).abs()
        figures = {}
        if not training:
            blindly = (teacher.decode(given, foreseen) - teacher.standard(features)).abs()
            figures["foreseen_mel"] = blindly[:, KNOWN_FRAMES:, : self.mel_size].mean()
        commitment = (semantic - teacher.rows[codes].detach()).square().sum(-1).mean() / teacher.distance
        return {
            "mel": error[..., : self.mel_size].mean(),
            "pitch": error[..., self.mel_size :].mean(),
            "commitment": commitment if self.quantizes else commitment.detach() * 0,
            "spread": functional.relu(acoustic.abs() - 1.2).square().mean(),
            "rate": bits,
            **figures,
        }

    def distillation(
        self, data: TeacherData, size: int, rng: np.random.Generator, training: bool
    ) -> dict[str, Tensor]:
        """`words`, the paper's loss, `sounds`, 1 - cosine to the centered states of Whisper's encoder, and
        `phonemes` (nats)."""
        features, filled, targets, encoded, symbols = data.distill(size, rng)
        semantic, _ = self.teacher.encode_latents(torch.from_numpy(features).to(self.device))
        given, _ = self._quantized(semantic, training)
        goal = torch.from_numpy(encoded).to(self.device) - self.center
        cosine = functional.cosine_similarity(self.sounds(given), goal, dim=-1)
        return {
            "words": self.words(given, targets),
            "sounds": 1 - cosine[torch.from_numpy(filled).to(self.device)].mean(),
            "phonemes": self._phonemes(given, torch.from_numpy(symbols).to(self.device)),
        }

    def _phonemes(self, given: Tensor, symbols: Tensor) -> Tensor:
        known = symbols > 0
        if not known.any():
            return given.new_zeros(())
        logits = self.phonemes(given).unflatten(-1, (2, SYMBOLS))
        return functional.cross_entropy(logits[known], symbols[known])

    def take_step(self) -> dict[str, float]:
        """One update; gives the losses."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        humans = round(settings.batch * settings.human_share) if "human" in self.train else 0
        shares = {"synthetic": settings.batch - humans, "human": humans}
        parts = [
            self.train[kind].frames.batch(count, settings.frames, self.numpy_rng)
            for kind, count in shares.items()
            if count
        ]
        features = np.concatenate(parts)
        gains = (
            self.numpy_rng.uniform(-1, 1, (len(features), 1, 1)).astype(np.float32) * settings.gain_db / 20
        )
        x = torch.from_numpy(features.astype(np.float32)).to(self.device)
        x = self.spectra.changed(x, torch.from_numpy(gains).to(self.device))
        losses = self.reconstruction(x, training=True)
        human = "human" in self.train and self.numpy_rng.random() < settings.human_share
        data = self.train["human" if human else "synthetic"]
        losses |= self.distillation(data, settings.distilled, self.numpy_rng, training=True)
        loss = losses["mel"] + sum(
            getattr(settings, name) * losses[name]
            for name in ("pitch", "commitment", "spread", "words", "sounds", "phonemes", "rate")
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.teacher.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        if self.step_count + 1 == settings.quantized_from:
            self._make_codebook()
        if self.step_count + 1 == settings.steps:
            self._use_levels()
        return {k: float(v.detach()) for k, v in losses.items()} | {
            "norm": float(norm),
            "loss": float(loss.detach()),
        }

    @torch.no_grad()
    def _make_codebook(self) -> None:
        self.teacher.make_codebook(self._some_latents()[0].flatten(0, 1), self.rng)

    @torch.no_grad()
    def _use_levels(self) -> None:
        # What costs bits becomes small, a level or two; a language model's flow starts from noise of size 1.
        sizes = self._some_latents()[1].square().mean((0, 1)).sqrt()
        self.teacher.gain.copy_(ACOUSTIC_SCALE / sizes.clamp_min(SMALLEST_SIZE))

    def _some_latents(self) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng(self.settings.seed)
        parts = [data.frames.batch(400, 32, rng) for data in self.train.values()]
        features = torch.from_numpy(np.concatenate(parts).astype(np.float32)).to(self.device)
        return self.teacher.encode_latents(features)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The losses on validation speech from hard codes, and how the codes are used."""
        row: dict[str, float] = {}
        for kind, data in self.validation.items():
            rng = np.random.default_rng(1)
            x = torch.from_numpy(data.frames.batch(48, 48, rng).astype(np.float32)).to(self.device)
            losses = self.reconstruction(x, training=False) | self.distillation(data, 48, rng, training=False)
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
