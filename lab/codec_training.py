"""The lab's encoder and decoder, trained apart on the teacher codec's codes; the decoder then goes on with
the encoder's.

The decoder turns codes into waveforms, quantized by the paper's schedule. Its losses are multi-resolution
mel, spectral convergence and complex STFT, an L1 that decays, and, from a chosen step, light STFT
discriminators with feature matching, balanced by their gradients. The encoder turns waveforms
into the teacher's latents, by cross-entropy over semantic codes and the absolute error of acoustic values. In
both, linear heads on the hidden states of every rate predict the frame's spectra (deep supervision, Lee et
al., arXiv 1409.5185); they are dropped afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from lab.errors import LabError
from lab.frames import PATCH_BANDS
from lab.phonetic import PhoneticDistance
from lab.teacher_codec import TeacherCodec
from lab.tokenized import TokenizedSets, TokenizedSpeech
from revox.losses.discriminator import (
    Discriminators,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
)
from revox.losses.spectral import SpectralObjective
from revox.model.codec import Codec, CodecTransformer
from revox.model.config import CodecConfig
from revox.model.layers import CausalConv1d
from revox.training.average import moving_average
from revox.training.balance import GradientBalancer
from revox.training.initial import even_input, initialize
from revox.training.quantize import quantize_acoustic
from revox.training.run import Run
from revox.training.world import World

HALVES = {"encoder": ("input_proj.", "encoder_blocks."), "decoder": ("decoder_blocks.", "output_proj.")}
"""Name prefixes of each half's parameters in the codec."""


@dataclass(frozen=True)
class DecoderTraining:
    """Settings of the decoder's run. The defaults are for one CPU core."""

    steps: int = 24000
    batch: int = 4
    frames: int = 16
    human_share: float = 0.35
    learning_rate: float = 1e-3
    warmup: int = 200
    decay_steps: int = 12000
    betas: tuple[float, float] = (0.8, 0.95)
    weight_decay: float = 0.01
    mel: float = 3.0
    """Shares of the waveform's gradient, of this and of `magnitude`, `complex`, `waveform`, `feature`,
    `adversarial`, `phonetic` (`revox.training.balance`)."""
    magnitude: float = 0.5
    complex: float = 0.0
    waveform: float = 0.0
    feature: float = 3.0
    adversarial: float = 1.5
    phonetic: float = 0.0
    """The share of `lab.phonetic`'s loss."""
    gradient: float = 0.3
    """Norm of the waveform's gradient, beside that of the deep supervision."""
    decay: float = 0.9997
    """Of the shares of `complex` and `waveform`, at each step."""
    deep: float = 1.0
    average: float = 0.0
    """Decay of the moving average of the weights (`revox.training.average`), which is validated and shipped.
    0 is none. If a resumed state has no average, it starts at that step."""
    discriminator_channels: int = 8
    discriminator_from: int = 1_000_000
    discriminator_learning_rate: float = 4e-4
    resolutions: tuple[tuple[int, int], ...] = ((2048, 160), (1024, 100), (512, 60), (256, 30))
    overlap: int = 2
    floor: float = 4e-6
    """Of the mel loss, in magnitudes of a transform of one sample: what lies below is not learned."""
    discriminated: tuple[int, ...] = (1, 2)
    discriminated_at_once: int = 0
    """How many of the discriminators a step uses, drawn at random; 0 is all. One of three makes a step with
    discriminators two thirds as long."""
    discriminated_seconds: float = 0.4
    noisy: float = 0.0
    """Share of segments whose acoustic values are as uncertain as a language model's: it predicts them before
    it knows the semantic code, and the decoder is to hear the words in that code all the same."""
    seed: int = 0
    save_every: int = 500
    report_every: int = 100
    validate_every: int = 1000


@dataclass(frozen=True)
class ReferenceEncoderTraining:
    """Settings of the encoder's run. The defaults are for one CPU core."""

    steps: int = 6000
    batch: int = 6
    frames: int = 16
    human_share: float = 0.35
    learning_rate: float = 1e-3
    warmup: int = 200
    decay_steps: int = 4000
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    semantic: float = 0.3
    acoustic: float = 1.0
    deep: float = 1.0
    front_steps: int = 0
    """Steps at the start in which the input and the first transformer learn spectra alone. The losses of the
    codes then rise to their full weight over as many steps."""
    average: float = 0.0
    """Decay of the moving average of the weights (`revox.training.average`), which is validated and shipped.
    0 is none. If a resumed state has no average, it starts at that step."""
    seed: int = 0
    save_every: int = 500
    report_every: int = 100
    validate_every: int = 1000


class Heads(nn.Module):
    """Linear predictions of the teacher codec's features from hidden states, one head for each rate.

    With `rate` states a frame, each state predicts its part of the frame: the mel bands of its patches, and
    the low bins of its pairs of patches if it covers whole pairs.
    """

    def __init__(self, width: int, rates: list[int], per_frame: int, mel_size: int, size: int) -> None:
        super().__init__()
        self.per_frame, self.mel_size, self.size, self.rates = per_frame, mel_size, size, rates
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in rates)
        self.read = nn.ModuleList(nn.Linear(width, self._goal_size(rate)) for rate in rates)

    def _pairs(self, rate: int) -> int:
        return (self.per_frame // 2) // rate

    def _goal_size(self, rate: int) -> int:
        low = (self.size - self.mel_size) // (self.per_frame // 2)
        return self.mel_size // rate + self._pairs(rate) * low

    def forward(self, states: list[Tensor], features: Tensor) -> Tensor:
        """Mean absolute error over all rates; states `[batch, frames * rate, width]`, standardized features
        `[batch, frames, size]`."""
        return torch.stack([self.error(i, state, features) for i, state in enumerate(states)]).mean()

    def error(self, index: int, state: Tensor, features: Tensor) -> Tensor:
        """Mean absolute error at one rate."""
        rate = self.rates[index]
        mel, low = features[..., : self.mel_size], features[..., self.mel_size :]
        goal = mel.reshape(len(mel), -1, self.mel_size // rate)
        if self._pairs(rate):
            goal = torch.cat((goal, low.reshape(len(low), goal.shape[1], -1)), dim=-1)
        return (self.read[index](self.norms[index](state)) - goal).abs().mean()


def _weights(module: nn.Module, decay: float) -> list[dict[str, Any]]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def seeded_codec(config: CodecConfig, teacher: TeacherCodec, seed: int) -> Codec:
    """A codec of fresh weights with the teacher codec's semantic codebook."""
    codec = Codec(config, with_encoder=True)
    initialize(codec, seed)
    use_codebook(codec, teacher)
    return codec


def use_codebook(codec: Codec, teacher: TeacherCodec) -> None:
    """Give `codec` the teacher codec's semantic codebook."""
    book = codec.quantizer.semantic_codebook
    book.cluster_usage.fill_(1.0)
    book.embedding_sum.copy_(teacher.rows.detach())


def _rates(codec: Codec, blocks: nn.ModuleList, start: int) -> list[int]:
    """States per frame after each transformer of `blocks`, whose input has `start` states per frame."""
    found, rate = [], start
    for block in blocks:
        if isinstance(block, CodecTransformer):
            found.append(rate)
        elif isinstance(block, CausalConv1d):
            rate //= block.stride
        else:
            rate *= cast(nn.ConvTranspose1d, block.conv).stride[0]
    return found


@contextmanager
def states_of(blocks: nn.ModuleList) -> Iterator[list[Tensor]]:
    """Collects the outputs of the transformers among `blocks`, in order: `[batch, time, width]` each."""
    found: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _module, _given, made: found.append(made))
        for block in blocks
        if isinstance(block, CodecTransformer)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class CodecData:
    """What both halves learn from: the teacher codec, and speech with its codes.

    `human` is None if there are synthetic speakers only; `validation` is by kind. `whisper`: the folder of
    the ASR teacher, for the decoder's loss `phonetic`.
    """

    teacher: TeacherCodec
    synthetic: TokenizedSets
    human: TokenizedSets | None
    validation: dict[str, TokenizedSpeech]
    whisper: Path | None = None


class _CodecRun(Run):
    """What the two runs share: data, heads, optimizer and state."""

    half: str
    codec: Codec
    heads: Heads
    optimizer: torch.optim.Optimizer
    averaged: AveragedModel | None

    def __init__(
        self,
        name: str,
        config: CodecConfig,
        settings: DecoderTraining | ReferenceEncoderTraining,
        data: CodecData,
        folder: Path,
        device: str,
        autocast: bool,
    ) -> None:
        super().__init__(name, settings, folder, device)
        self.autocast = autocast
        self.synthetic, self.human, self.validation = data.synthetic, data.human, data.validation
        self.teacher = data.teacher.to(device).eval()
        self.size, self.human_share, self.frames = settings.batch, settings.human_share, settings.frames
        self.codec, self.average = seeded_codec(config, self.teacher, settings.seed), settings.average
        self.mel_size = config.patches_per_frame * PATCH_BANDS

    def arithmetic(self) -> torch.autocast:
        """bf16 if `autocast` is set."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.autocast)

    def _make_heads(self, rates: list[int], seed: int) -> None:
        config = self.codec.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads = Heads(config.dim, rates, config.patches_per_frame, self.mel_size, len(self.teacher.mean))
        self.heads = heads.to(self.device)
        self.codec.to(self.device)
        self.averaged = moving_average(self.codec, self.average) if self.average else None

    @property
    def shipped(self) -> Codec:
        """The codec that is validated and shipped: the moving average if there is one."""
        return self.codec if self.averaged is None else cast(Codec, self.averaged.module)

    def state(self) -> dict[str, Any]:
        """The half of the codec that is trained, its average if there is one, heads and optimizer."""
        state: dict[str, Any] = {
            "codec": self._own(self.codec.state_dict()),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.averaged is not None:
            state["averaged"] = self._own(self.averaged.state_dict())
        return state

    def _own(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # While one half is trained, the other still has its initial weights.
        other = tuple(n for half, names in HALVES.items() if self.half != half for n in names)
        return {k: v for k, v in tensors.items() if not k.removeprefix("module.").startswith(other)}

    def _load_own(self, module: nn.Module, tensors: dict[str, Tensor]) -> None:
        lacking = self._own(module.state_dict()).keys() - tensors.keys()
        if lacking:
            raise LabError(f"{self.state_path} lacks {sorted(lacking)[0]}: it is of another build")
        module.load_state_dict(tensors, strict=False)
        # The teacher codec may have learned on since that state was saved.
        use_codebook(cast(Codec, getattr(module, "module", module)), self.teacher)

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `state` returned. An average that the state lacks starts with the loaded weights, and an
        optimizer anew."""
        self._load_own(self.codec, state["codec"])
        self.heads.load_state_dict(state["heads"])
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        if self.averaged is not None:
            self.averaged = moving_average(self.codec, self.average)
            if "averaged" in state:
                self._load_own(self.averaged, state["averaged"])

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Waveforms, codes, values and standardized features (see `TokenizedSpeech.batch`)."""
        humans = int(self.numpy_rng.binomial(self.size, self.human_share)) if self.human else 0
        parts = []
        if humans < self.size:
            parts.append(self.synthetic.batch(self.size - humans, self.frames, self.numpy_rng))
        if humans and self.human:
            parts.append(self.human.batch(humans, self.frames, self.numpy_rng))
        waves, codes, values, features = (
            torch.from_numpy(np.concatenate(arrays)).to(self.device) for arrays in zip(*parts, strict=True)
        )
        return waves, codes, values, self.teacher.standard(features)

    def update(self, losses: list[Tensor], gradients: list[Tensor] | None, modules: list[nn.Module]) -> float:
        """One step of the optimizer for `losses`, or tensors with their `gradients`; returns the norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(losses, gradients)
        parameters = [p for m in modules for p in m.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, 5.0, foreach=True)
        self.optimizer.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.codec)
        return float(norm)


def _floats(losses: dict[str, Tensor], loss: Tensor, norm: float) -> dict[str, float]:
    return {k: float(v.detach()) for k, v in losses.items()} | {"norm": norm, "loss": float(loss.detach())}


def predicted_values(values: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Acoustic values `[batch, frames, 36]`, a share of the segments as a language model might predict them.

    Of each dimension's deviation from its mean over the segment a part r, drawn from [0.3, 1], is left, and
    noise takes a part, drawn from [0, 1], of the variance that is lost.
    """
    shape = (len(values), 1, 1)
    part, temperature = (torch.rand(shape, generator=rng).to(values) for _ in range(2))
    part = 0.3 + 0.7 * part
    noise = torch.randn(values.shape, generator=rng).to(values)
    mean = values.mean(dim=1, keepdim=True)
    lost = (1 - part.square()).sqrt() * (values - mean).square().mean(dim=1, keepdim=True).sqrt()
    uncertain = mean + part * (values - mean) + temperature.sqrt() * lost * noise
    chosen = (torch.rand(shape, generator=rng) < share).to(values.device)
    return torch.where(chosen, uncertain.clamp(-1, 1), values)


class DecoderTrainer(_CodecRun):
    """The decoder's run: on the teacher codec's codes, or, named "finish" or "tune", on the encoder's."""

    half = "decoder"

    def __init__(
        self,
        config: CodecConfig,
        settings: DecoderTraining,
        data: CodecData,
        folder: Path,
        device: str = "cpu",
        autocast: bool = False,
        name: str = "decoder",
    ) -> None:
        super().__init__(name, config, settings, data, folder, device, autocast)
        self.settings = settings
        self._make_heads(_rates(self.codec, self.codec.decoder_blocks, 1), settings.seed)
        self.parts: list[nn.Module] = [self.codec.decoder_blocks, self.codec.output_proj, self.heads]
        self.objective = SpectralObjective(
            config.sampling_rate, settings.resolutions, settings.floor, settings.overlap
        )
        groups = [g for part in self.parts for g in _weights(part, settings.weight_decay)]
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=settings.betas, fused=True
        )
        names = ("mel", "magnitude", "complex", "waveform", "feature", "adversarial", "phonetic")
        self.balancer = GradientBalancer({name: getattr(settings, name) for name in names}, World())
        self.phonetic: PhoneticDistance | None = None
        if settings.phonetic:
            if data.whisper is None:
                raise LabError(f"name the folder of a Whisper (--whisper), which `{name}.phonetic` asks for")
            self.phonetic = PhoneticDistance(data.whisper, config.sampling_rate).to(device)
        self.discriminators: Discriminators | None = None
        if settings.discriminator_from < settings.steps:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed)
                discriminators = Discriminators(len(settings.discriminated), settings.discriminator_channels)
            self.discriminators = discriminators.to(device)
            self.discriminator_optimizer = torch.optim.AdamW(
                discriminators.parameters(),
                lr=settings.discriminator_learning_rate,
                betas=(0.5, 0.9),
                fused=True,
            )

    def begin(self, state: dict[str, Any]) -> None:
        """Start from the weights, discriminators included, in the saved state of another decoder's run."""
        # An average that is younger than its memory still holds the initial weights.
        grown = state["step"] * (1 - self.average) >= 3
        shipped = state.get("averaged", state["codec"]) if grown else state["codec"]
        self._load_own(self.codec, {k.removeprefix("module."): v for k, v in shipped.items()})
        self.heads.load_state_dict(state["heads"])
        self.averaged = moving_average(self.codec, self.average) if self.average else None
        if self.discriminators is not None and "discriminators" in state:
            self.discriminators.load_state_dict(state["discriminators"])

    def state(self) -> dict[str, Any]:
        """The base's state, with the discriminators if there are any."""
        state = super().state()
        if self.discriminators is not None:
            state["discriminators"] = self.discriminators.state_dict()
            state["discriminator_optimizer"] = self.discriminator_optimizer.state_dict()
        return state | {"balancer": self.balancer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `state` returned; discriminators that the state lacks start anew."""
        super().load_state(state)
        self.balancer.load_state_dict(state["balancer"])
        if self.discriminators is not None and "discriminators" in state:
            self.discriminators.load_state_dict(state["discriminators"])
            if "discriminator_optimizer" in state:
                self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])

    def _drawn_discriminators(self) -> list[int]:
        every = len(self.settings.discriminated)
        return sorted(
            self.numpy_rng.permutation(every)[: self.settings.discriminated_at_once or every].tolist()
        )

    def _windows(
        self, real: list[Tensor], fake: list[Tensor], drawn: list[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        # The discriminators cost more than the codec, so they see only a random window of each clip.
        start = self.numpy_rng.random()
        share = min(1.0, self.settings.discriminated_seconds * 12.5 / self.settings.frames)
        a, b = [], []
        for i in (self.settings.discriminated[j] for j in drawn):
            frames = real[i].shape[-1]
            first = int(start * (1 - share) * frames)
            window = slice(first, first + max(1, int(share * frames)))
            a.append(real[i][..., window])
            b.append(fake[i][..., window])
        return a, b

    def take_step(self) -> dict[str, float]:
        """One update of the decoder and, when due, of the discriminators; returns the losses."""
        settings = self.settings
        real, codes, values, features = self.batch()
        if settings.noisy:
            values = predicted_values(values, settings.noisy, self.rng)
        quantized = quantize_acoustic(values, self.codec.config.acoustic_codebook_size, self.rng)
        latents = torch.cat((self.teacher.rows[codes], quantized), dim=-1)
        # The decoder computes in float32 always: bf16's noise, 50 dB down, is louder than the top octave.
        with states_of(self.codec.decoder_blocks) as states:
            fake = self.codec.decode_latents(latents.transpose(1, 2))
        # Every loss sees the waveform only: their gradients with respect to it are weighed by their norms.
        leaf = fake.detach().requires_grad_()
        # The transforms' frames start elsewhere at every step, so every position within a patch is covered.
        offset = int(self.numpy_rng.integers(256))
        real_spectra, fake_spectra = (self.objective.spectra(x[:, offset:]) for x in (real, leaf))
        terms = self.objective(real_spectra, fake_spectra)
        losses = {"mel": terms.mel, "magnitude": terms.magnitude, "complex": terms.complex}
        losses["waveform"] = (real - leaf).abs().mean()
        if self.phonetic is not None:
            with self.arithmetic():
                losses["phonetic"] = self.phonetic(real, leaf)
        adversarial: Tensor | None = None
        drawn: list[int] = []
        if self.discriminators is not None and self.step_count >= settings.discriminator_from:
            drawn = self._drawn_discriminators()
            real_windows, fake_windows = self._windows(real_spectra, fake_spectra, drawn)
            with self.arithmetic():
                real_outputs, fake_outputs = (
                    self.discriminators(x, drawn) for x in (real_windows, fake_windows)
                )
            adversarial = discriminator_loss(real_outputs, fake_outputs)
            losses["feature"] = feature_matching_loss(real_outputs, fake_outputs)
            losses["adversarial"] = adversarial_loss(fake_outputs)
        early = settings.decay**self.step_count
        factors = {"complex": early, "waveform": early}
        weighed = {name: loss for name, loss in losses.items() if self.balancer.weights[name]}
        gradients = {
            name: torch.autograd.grad(loss, leaf, retain_graph=True)[0] for name, loss in weighed.items()
        }
        total = self.balancer.combine(gradients, factors)
        deep = settings.deep * self.heads(states, features)
        scale = settings.gradient / sum(self.balancer.weights[name] for name in weighed)
        norm = self.update([fake, deep], [total * scale, torch.ones_like(deep)], self.parts)
        shown = weighed | {"deep": deep}
        if adversarial is not None:
            shown["discriminator"] = adversarial
            self._update_discriminators(adversarial, drawn)
        figures = {k: float(v.detach()) for k, v in shown.items()}
        return figures | {"norm": norm, "loss": figures["mel"] + figures["deep"]}

    def _update_discriminators(self, loss: Tensor, drawn: list[int]) -> None:
        nets = cast(Discriminators, self.discriminators).nets
        parameters = [p for i in drawn for p in nets[i].parameters()]
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self.discriminator_optimizer.step()

    def _hard_codes(self, codes: Tensor, values: Tensor) -> Tensor:
        """Codes `[batch, 37, frames]` of validation segments."""
        half = (self.codec.config.acoustic_codebook_size - 1) / 2
        levels = (values * half + half).round().long()
        return torch.cat((codes[:, None], levels.transpose(1, 2)), dim=1)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mel and magnitude distances of validation segments decoded from hard codes."""
        row: dict[str, float] = {}
        objective = SpectralObjective(self.codec.config.sampling_rate, ((1024, 100),))
        for kind, tokenized in self.validation.items():
            arrays = tokenized.batch(12, 40, np.random.default_rng(1))[:3]
            real, codes, values = (torch.from_numpy(array).to(self.device) for array in arrays)
            fake = self.shipped.decode(self._hard_codes(codes, values)).float()
            terms = objective(objective.spectra(real), objective.spectra(fake))
            row |= {f"{kind}_mel": round(float(terms.mel), 4)}
            row |= {f"{kind}_magnitude": round(float(terms.magnitude), 4)}
        return row


class ReferenceEncoderTrainer(_CodecRun):
    """The encoder's run."""

    half = "encoder"

    def __init__(
        self,
        config: CodecConfig,
        settings: ReferenceEncoderTraining,
        data: CodecData,
        folder: Path,
        device: str = "cpu",
        autocast: bool = False,
    ) -> None:
        super().__init__("encoder", config, settings, data, folder, device, autocast)
        self.settings = settings
        rng = np.random.default_rng(settings.seed)
        sets = [data.synthetic, *([data.human] if data.human else [])]
        speech = np.concatenate([one.batch(32, 16, rng)[0] for one in sets])
        even_input(self.codec, torch.from_numpy(speech))
        rates = _rates(self.codec, self.codec.encoder_blocks, config.patches_per_frame)
        self._make_heads(rates, settings.seed)
        self.parts: list[nn.Module] = [self.codec.input_proj, self.codec.encoder_blocks, self.heads]
        groups = [g for part in self.parts for g in _weights(part, settings.weight_decay)]
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=settings.betas, foreach=True
        )

    def losses(
        self, codec: Codec, waves: Tensor, codes: Tensor, values: Tensor, features: Tensor
    ) -> dict[str, Tensor]:
        """Of `codec`: `semantic` cross-entropy (nats), `acoustic` mean level error (of 20), `deep`
        supervision, and `agreement`, the share of equal semantic codes."""
        with self.arithmetic(), states_of(codec.encoder_blocks) as states:
            latents = codec.encode_latents(waves).transpose(1, 2)
        split = self.codec.config.semantic_dim
        logits = self.teacher.semantic_logits(latents[..., :split].float())
        error = torch.tanh(latents[..., split:].float()) - values
        half = (self.codec.config.acoustic_codebook_size - 1) / 2
        return {
            "semantic": functional.cross_entropy(logits.flatten(0, 1), codes.flatten()),
            "agreement": (logits.argmax(-1) == codes).float().mean(),
            "acoustic": error.abs().mean() * half,
            "deep": self.heads([s.float() for s in states], features),
        }

    @torch.no_grad()
    def _level_latents(self, waves: Tensor) -> None:
        """Scale the last convolution so that no latent of `waves` starts at the ends of its tanh."""
        last = cast(CausalConv1d, self.codec.encoder_blocks[-1]).conv
        found = self.codec.encode_latents(waves).square().mean((0, 2)).sqrt()
        wanted = torch.full_like(found, 0.5)
        wanted[: self.codec.config.semantic_dim] = self.teacher.rows.square().mean(0).sqrt()
        last.weight = last.weight * (wanted / found.clamp_min(1e-6))[:, None, None]

    def front_loss(self, waves: Tensor, features: Tensor) -> Tensor:
        """Error of the spectra read from the first transformer's states."""
        patches = waves.unflatten(-1, (-1, self.codec.config.pretransform_patch_size)).transpose(1, 2)
        with self.arithmetic():
            states = self.codec.encoder_blocks[0](self.codec.input_proj(patches).transpose(1, 2))
        return self.heads.error(0, states.float(), features)

    def take_step(self) -> dict[str, float]:
        """One update; returns the losses."""
        settings, front = self.settings, self.settings.front_steps
        waves, codes, values, features = self.batch()
        if self.step_count < front:
            loss = self.front_loss(waves, features)
            return _floats({"front": loss}, loss, self.update([loss], None, self.parts))
        if self.step_count == front:
            self._level_latents(waves)
        losses = self.losses(self.codec, waves, codes, values, features)
        risen = min(1.0, (self.step_count - front + 1) / (front + 1))
        loss = (
            risen * (settings.semantic * losses["semantic"] + settings.acoustic * losses["acoustic"])
            + settings.deep * losses["deep"]
        )
        return _floats(losses, loss, self.update([loss], None, self.parts))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The losses on validation segments."""
        row: dict[str, float] = {}
        for kind, tokenized in self.validation.items():
            arrays = tokenized.batch(12, 40, np.random.default_rng(1))
            waves, codes, values, features = (torch.from_numpy(a).to(self.device) for a in arrays)
            losses = self.losses(self.shipped, waves, codes, values, self.teacher.standard(features))
            row |= {f"{kind}_{k}": round(float(v), 4) for k, v in losses.items()}
        return row
