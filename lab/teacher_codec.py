"""The teacher codec: a small codec of spectra that settles what the lab's 37 codes mean.

Training encoder and decoder jointly on waveforms from scratch is slow on a CPU: for hours the bottleneck
learns from a decoder that cannot speak yet. The teacher codec has the same bottleneck between spectra, where
a step costs a hundredth as much. The lab's encoder then learns the teacher's latents (regression) and its
decoder learns waveforms from the teacher's codes.

The semantic codes are given (`lab.semantic`); what they do not say is left to the acoustic values, which are
to be few bits that can be foreseen.
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

from lab.frames import FrameFeatures, FrameSet
from lab.semantic import SemanticNetwork
from revox.coding.features import frame_network
from revox.model.config import CodecConfig
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
    rate: float = 0.0
    """Weight of the bits that an acoustic value takes, given those before and the semantic code
    (`acoustic_bits`): what no language model could foresee is to be left to the decoder."""
    foreseen: float = 0.0
    """Share of clips that are decoded from foreseen acoustic values (`foreseen_values`)."""
    predictable_from: int = 0
    """The step from which `rate` and `foreseen` count: a codec that says nothing yet would begin by saying
    little."""
    spread: float = 0.5
    gain_db: float = 3.0
    seed: int = 0
    save_every: int = 500
    report_every: int = 100
    validate_every: int = 500


class TeacherCodec(nn.Module):
    """Features `[batch, frames, size]` and semantic codes `[batch, frames]` <-> acoustic latents, causal in
    both directions.

    `rows` `[codes, semantic_dim]` is the semantic codebook and `distance` the mean squared distance of
    latents to it (`use_codebook`). `mean` and `scale` `[size]` standardize features; `gain` `[36]` brings
    acoustic latents to where the levels are, once they are learned.
    """

    rows: Tensor
    distance: Tensor
    gain: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, config: CodecConfig, size: int, width: int, blocks: int) -> None:
        super().__init__()
        self.levels = config.acoustic_codebook_size
        self.register_buffer("rows", torch.zeros(config.semantic_codebook_size, config.semantic_dim))
        self.register_buffer("distance", torch.ones(()))
        self.register_buffer("gain", torch.ones(config.acoustic_dim))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.encoder = frame_network(size + config.semantic_dim, width, blocks, config.acoustic_dim)
        self.decoder = frame_network(config.latent_dim, width, blocks, size)

    def use_codebook(self, semantic: SemanticNetwork) -> None:
        """Take the codebook of the network that makes the semantic codes."""
        self.rows.copy_(semantic.rows)
        self.distance.copy_(semantic.distance)

    def standard(self, features: Tensor) -> Tensor:
        """Features with zero mean and unit variance."""
        return (features - self.mean) / self.scale

    def stamp(self) -> str:
        """Identifies the weights, for caches of what they give."""
        return f"{sum(float(p.double().sum()) for p in self.state_dict().values()):.9e}"

    def encode_latents(self, features: Tensor, codes: Tensor) -> Tensor:
        """Acoustic latents `[batch, frames, 36]` before the tanh."""
        found: Tensor = self.encoder(torch.cat((self.standard(features), self.rows[codes]), dim=-1))
        return found

    def semantic_logits(self, semantic: Tensor) -> Tensor:
        """Negative squared distance of semantic latents `[batch, frames, semantic_dim]` to every row, in
        units of `distance`: `[batch, frames, codes]`."""
        distances = torch.cdist(semantic.flatten(0, 1), self.rows).square()
        return (-distances / self.distance).unflatten(0, semantic.shape[:2])

    def decode(self, semantic: Tensor, acoustic: Tensor) -> Tensor:
        """Standardized features from codebook rows and acoustic values in [-1, 1]."""
        found: Tensor = self.decoder(torch.cat((semantic, acoustic), dim=-1))
        return found

    @torch.no_grad()
    def encode(self, features: Tensor, codes: Tensor) -> Tensor:
        """Acoustic values `[batch, frames, 36]` in [-1, 1], with their gain, before rounding to levels."""
        return torch.tanh(self.encode_latents(features, codes) * self.gain)


def foreseen_values(network: nn.Module, values: Tensor, semantic: Tensor) -> Tensor:
    """Acoustic values `[batch, frames, 36]` as `network` tells them from the two true ones before, the mean
    of all before, and the semantic rows `[batch, frames, dim]` of this frame and the one before.

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


def is_leveled(state: dict[str, Any]) -> bool:
    """Whether the teacher codec in the state of a run has the gain that its last steps ask for."""
    # States of earlier versions do not say it. Theirs is not 1 once it has been found.
    return bool(state.get("leveled", (state["teacher"]["gain"] != 1).any()))


@dataclass(frozen=True)
class TeacherData:
    """Frames of one set of speech with their semantic codes int16 `[frames]`."""

    frames: FrameSet
    codes: np.ndarray


def _batch(
    sets: Sequence[TeacherData], size: int, frames: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Features `[size, frames, n]` and codes `[size, frames]` of segments, of sets drawn by their frames."""
    counts = np.array([len(one.codes) for one in sets])
    drawn = rng.multinomial(size, counts / counts.sum())
    places = [one.frames.places(n, frames, rng) for one, n in zip(sets, drawn, strict=True)]
    features = [one.frames.features[at] for one, at in zip(sets, places, strict=True)]
    codes = [one.codes[at] for one, at in zip(sets, places, strict=True)]
    return (
        torch.from_numpy(np.concatenate(features).astype(np.float32)),
        torch.from_numpy(np.concatenate(codes).astype(np.int64)),
    )


class TeacherCodecTrainer(Run):
    """One run over synthetic and human speech, one or more sets of each kind, whose semantic codes are those
    of `semantic`."""

    def __init__(
        self,
        config: CodecConfig,
        settings: TeacherCodecTraining,
        train: dict[str, list[TeacherData]],
        validation: dict[str, TeacherData],
        semantic: SemanticNetwork,
        folder: Path,
        device: str = "cpu",
        autocast: bool = False,
    ) -> None:
        super().__init__("teacher", settings, folder, device)
        self.autocast = autocast
        self.settings, self.train, self.validation = settings, train, validation
        self.semantic = semantic
        frames = train["synthetic"][0].frames
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            teacher = TeacherCodec(config, frames.features.shape[1], settings.width, settings.blocks)
            self.foreseen = nn.Sequential(
                nn.Linear(3 * config.acoustic_dim + 2 * config.semantic_dim, 256),
                nn.SiLU(),
                nn.Linear(256, config.acoustic_dim),
            ).to(device)
        mean, scale = frames.statistics()
        teacher.mean.copy_(torch.from_numpy(mean))
        teacher.scale.copy_(torch.from_numpy(scale))
        teacher.use_codebook(semantic)
        self.teacher = teacher.to(device)
        self.leveled = False  # whether the gain is that of the present weights
        self.spectra = FrameFeatures(config).to(device)
        self.mel_size = self.spectra.mel_size
        self.optimizer = torch.optim.AdamW(
            [*self.teacher.parameters(), *self.foreseen.parameters()],
            lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, foreach=True,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """The teacher codec, what foresees its values, their optimizer, and the network of the semantic
        codes."""
        return {
            "semantic": self.semantic.state_dict(),
            "teacher": self.teacher.state_dict(),
            "foreseen": self.foreseen.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "leveled": self.leveled,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `state` returned."""
        self.teacher.load_state_dict(state["teacher"])
        self.foreseen.load_state_dict(state["foreseen"])
        self.leveled = is_leveled(state)
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])

    def _arithmetic(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.autocast)

    def losses(self, features: Tensor, codes: Tensor, training: bool) -> dict[str, Tensor]:
        """Terms for `features` `[batch, frames, size]`: `mel` and `pitch` (mean absolute error of
        standardized features), `spread`, `rate`, and in validation `foreseen_mel`, the `mel` from foreseen
        acoustic values."""
        teacher, settings = self.teacher, self.settings
        with self._arithmetic():
            acoustic = teacher.encode_latents(features, codes).float()
        given, values = teacher.rows[codes], torch.tanh(acoustic)
        foreseen = foreseen_values(self.foreseen, values, given)
        figures = {"rate": acoustic_bits(values, foreseen, teacher.levels)}
        standard = teacher.standard(features)
        if training:
            share = settings.foreseen * (self.step_count >= settings.predictable_from)
            blind = torch.rand((len(codes), 1, 1), generator=self.rng) < share
            values = quantize_acoustic(values, teacher.levels, self.rng)
            values = torch.where(blind.to(values.device), foreseen, values)
        else:
            values = (values * (teacher.levels - 1) / 2).round() * 2 / (teacher.levels - 1)
            blindly = (teacher.decode(given, foreseen) - standard).abs()
            figures["foreseen_mel"] = blindly[:, KNOWN_FRAMES:, : self.mel_size].mean()
        with self._arithmetic():
            decoded = teacher.decode(given, values)
        error = (decoded.float() - standard).abs()
        return figures | {
            "mel": error[..., : self.mel_size].mean(),
            "pitch": error[..., self.mel_size :].mean(),
            "spread": functional.relu(acoustic.abs() - 1.2).square().mean(),
        }

    def take_step(self) -> dict[str, float]:
        """One update; gives the losses."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        humans = round(settings.batch * settings.human_share) if "human" in self.train else 0
        shares = {"synthetic": settings.batch - humans, "human": humans}
        parts = [
            _batch(self.train[kind], count, settings.frames, self.numpy_rng)
            for kind, count in shares.items()
            if count
        ]
        features, codes = (torch.cat(found).to(self.device) for found in zip(*parts, strict=True))
        gains = (
            self.numpy_rng.uniform(-1, 1, (len(features), 1, 1)).astype(np.float32) * settings.gain_db / 20
        )
        features = self.spectra.changed(features, torch.from_numpy(gains).to(self.device))
        losses = self.losses(features, codes, training=True)
        loss = losses["mel"] + settings.pitch * losses["pitch"] + settings.spread * losses["spread"]
        if self.step_count >= settings.predictable_from:
            loss = loss + settings.rate * losses["rate"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.teacher.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.leveled = False
        if self.step_count + 1 == settings.steps:
            self.use_levels()
        return {k: float(v.detach()) for k, v in losses.items()} | {
            "norm": float(norm),
            "loss": float(loss.detach()),
        }

    @torch.no_grad()
    def use_levels(self) -> None:
        """Set the gain that brings the acoustic latents to the size of the levels."""
        # What costs bits becomes small, a level or two; a language model's flow starts from noise of size 1.
        rng = np.random.default_rng(self.settings.seed)
        parts = [_batch(sets, 400, 32, rng) for sets in self.train.values()]
        features, codes = (torch.cat(found).to(self.device) for found in zip(*parts, strict=True))
        sizes = self.teacher.encode_latents(features, codes).square().mean((0, 1)).sqrt()
        self.teacher.gain.copy_(ACOUSTIC_SCALE / sizes.clamp_min(SMALLEST_SIZE))
        self.leveled = True

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The losses on validation speech from hard codes, and the share of levels at the ends."""
        row: dict[str, float] = {}
        for kind, data in self.validation.items():
            features, codes = _batch([data], 48, 48, np.random.default_rng(1))
            features, codes = features.to(self.device), codes.to(self.device)
            found = self.losses(features, codes, training=False)
            row |= {f"{kind}_{k}": round(float(v), 4) for k, v in found.items()}
            levels = (self.teacher.encode(features, codes) * (self.teacher.levels - 1) / 2).round().abs()
            ends = (levels == (self.teacher.levels - 1) / 2).float().mean()
            row[f"{kind}_saturated"] = round(float(ends), 4)
        return row
