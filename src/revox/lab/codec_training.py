"""The lab's codec, encoder and decoder together, from scratch on synthetic and human speech.

The paper's objective without its speech-recognition teacher: L1 and complex STFT that decay,
multi-resolution mel, feature matching by light STFT discriminators from early on, commitment, and the
paper's quantization schedule
(semantic quantized with probability 0.5; acoustic half quantized, a quarter dithered, a quarter passed).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from revox.model.codec import Codec
from revox.model.config import CodecConfig
from revox.model.layers import CausalConv1d, CausalConvTranspose1d
from revox.model.quantizer import SemanticCodebook
from revox.training.discriminator import (
    Discriminators,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
)
from revox.training.objective import SpectralObjective
from revox.training.run import Run


class CropSource(Protocol):
    """Where training audio comes from."""

    def crop(self, rng: np.random.Generator, seconds: float) -> np.ndarray:
        """A random crop, float32 `[seconds * rate]`."""
        ...


@dataclass(frozen=True)
class CodecTraining:
    """Settings of one codec run. The defaults are for two CPU cores."""

    steps: int = 16000
    batch: int = 4
    seconds: float = 1.28
    human_share: float = 0.45
    learning_rate: float = 1e-3
    warmup: int = 200
    decay_steps: int = 4000
    betas: tuple[float, float] = (0.8, 0.95)
    weight_decay: float = 0.01
    mel: float = 15.0
    magnitude: float = 3.0
    complex: float = 0.5
    waveform: float = 2.0
    decay: float = 0.9997
    commitment: float = 0.5
    spread: float = 2.0
    feature: float = 4.0
    adversarial: float = 1.0
    decoder_only_from: int = 9000
    discriminator_channels: int = 8
    discriminator_from: int = 2000
    discriminator_every: int = 2
    discriminator_learning_rate: float = 4e-4
    resolutions: tuple[tuple[int, int], ...] = ((2048, 160), (1024, 100), (256, 25))
    discriminated: tuple[int, ...] = (1, 2)
    discriminated_seconds: float = 0.4
    seed: int = 0
    save_every: int = 500
    report_every: int = 100
    validate_every: int = 1000


class Codebook:
    """Keeps a semantic codebook alive: exponential moving averages, and restarts of rows that nobody uses.

    The averages are the two tensors that the release stores (van den Oord et al., arXiv 1711.00937, appendix
    A.1); a row whose use falls below `floor` points a step is placed on a recent latent (Jukebox, arXiv
    2005.00341).
    """

    def __init__(self, codebook: SemanticCodebook, decay: float = 0.99, floor: float = 0.03) -> None:
        self.codebook, self.decay, self.floor = codebook, decay, floor
        self.recent = torch.zeros((0, codebook.embedding_sum.shape[1]), device=codebook.embedding_sum.device)

    @torch.no_grad()
    def update(self, latents: Tensor, codes: Tensor, rng: torch.Generator) -> int:
        """Take in `latents` `[n, dim]` and their `codes` `[n]`; gives how many rows were restarted."""
        book = self.codebook
        self.recent = torch.cat((latents.float(), self.recent))[:4096]
        usage = torch.zeros_like(book.cluster_usage).index_add_(
            0, codes, torch.ones_like(codes, dtype=torch.float32)
        )
        sums = torch.zeros_like(book.embedding_sum).index_add_(0, codes, latents.float())
        book.cluster_usage.mul_(self.decay).add_(usage, alpha=1 - self.decay)
        book.embedding_sum.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        dead = (book.cluster_usage < self.floor).nonzero()[:, 0]
        if len(dead):
            picks = torch.randint(len(self.recent), (len(dead),), generator=rng)
            fresh = self.recent[picks.to(self.recent.device)]
            start = max(self.floor * 4, float(book.cluster_usage.mean()) * 0.5)
            book.cluster_usage[dead] = start
            book.embedding_sum[dead] = fresh * start
        return len(dead)


def quantize_in_training(
    codec: Codec, latents: Tensor, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's stochastic quantization of encoder `latents` `[batch, latent_dim, frames]`, straight
    through.

    Gives what the decoder reads `[batch, latent_dim, frames]`, the semantic codes `[batch, frames]` and the
    semantic rows they stand for. Each clip draws for itself: semantic quantized with probability 0.5;
    acoustic
    quantized 50 %, dithered by uniform noise of +-1/21 25 %, passed 25 %.
    """
    split = codec.config.semantic_dim
    semantic, acoustic = latents[:, :split].float(), torch.tanh(latents[:, split:].float())
    codes = codec.quantizer.semantic_codebook.encode(semantic.detach())
    rows = codec.quantizer.semantic_codebook.decode(codes)
    device = latents.device

    def draw() -> Tensor:
        return torch.rand((len(latents), 1, 1), generator=rng).to(device)

    seen = torch.where(draw() < 0.5, semantic + (rows - semantic).detach(), semantic)
    levels = codec.config.acoustic_codebook_size
    rounded = ((acoustic.detach() + 1) / 2 * (levels - 1)).round() * 2 / (levels - 1) - 1
    noise = (torch.rand(acoustic.shape, generator=rng).to(device) * 2 - 1) / levels
    chance = draw()
    heard = torch.where(
        chance < 0.5,
        acoustic + (rounded - acoustic).detach(),
        torch.where(chance < 0.75, acoustic + noise, acoustic),
    )
    return torch.cat((seen, heard), dim=1), codes, rows


def initialise(codec: Codec, seed: int, speech_level: float = 0.07) -> None:
    """Weights so that activations start near unit size everywhere, whatever the level of the waveform.

    The norms' eps is 0.01: activations far below 0.1 would pass them almost unscaled, every layer would stay
    at nearly nothing, and the codec would be its convolutions alone. `speech_level` is the waveform's RMS.
    """
    rng = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size, std: float) -> Tensor:
        return torch.randn(shape, generator=rng) * std

    with torch.no_grad():
        for parameter in codec.parameters():
            if parameter.dim() == 2:
                parameter.copy_(normal(parameter.shape, parameter.shape[1] ** -0.5))
        for name, module in codec.named_modules():
            if not isinstance(module, (CausalConv1d, CausalConvTranspose1d)):
                continue
            weight = module.conv.weight
            inputs, kernel, stride = (
                module.conv.in_channels,
                module.conv.kernel_size[0],
                module.conv.stride[0],
            )
            transposed = isinstance(module, CausalConvTranspose1d)
            std = (inputs * kernel / (stride if transposed else 1)) ** -0.5
            std *= {"input_proj": 1 / speech_level, "output_proj": speech_level, "decoder_blocks.0": 2.0}.get(
                name, 1
            )
            module.conv.weight = normal(weight.shape, std)


class CodecTrainer(Run):
    """One run: steps, validation, log and resumable state in `folder`."""

    def __init__(
        self,
        config: CodecConfig,
        settings: CodecTraining,
        synthetic: CropSource,
        human: CropSource | None,
        folder: Path,
        device: str = "cpu",
        autocast: bool = False,
    ) -> None:
        super().__init__("codec", settings, folder, device)
        self.settings, self.autocast = settings, autocast
        self.synthetic, self.human = synthetic, human
        self.codec = Codec(config, with_encoder=True)
        initialise(self.codec, settings.seed)
        self.codec.to(device)
        self.objective = SpectralObjective(config.sampling_rate, settings.resolutions).to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            judges = Discriminators(len(settings.discriminated), settings.discriminator_channels)
        self.judges = judges.to(device)
        decayed = [p for p in self.codec.parameters() if p.dim() > 1]
        plain = [p for p in self.codec.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": settings.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
            betas=settings.betas,
            foreach=True,
        )
        self.judge_optimizer = torch.optim.AdamW(
            self.judges.parameters(), lr=settings.discriminator_learning_rate, betas=(0.5, 0.9), foreach=True
        )
        # No row is in use yet: the first update places them all on latents.
        self.codec.quantizer.semantic_codebook.cluster_usage.zero_()
        self.upkeep = Codebook(self.codec.quantizer.semantic_codebook)

    def state(self) -> dict[str, Any]:
        """Codec, discriminators, both optimizers, and the latents that dead codebook rows are placed on."""
        return {
            "codec": self.codec.state_dict(),
            "judges": self.judges.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "judge_optimizer": self.judge_optimizer.state_dict(),
            "recent": self.upkeep.recent,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self.codec.load_state_dict(state["codec"])
        self.judges.load_state_dict(state["judges"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.judge_optimizer.load_state_dict(state["judge_optimizer"])
        self.upkeep.recent = state["recent"]

    def batch(self) -> Tensor:
        """A batch of crops `[batch, samples]`, each at a gain of its own within +-3 dB."""
        settings = self.settings
        clips = []
        for _ in range(settings.batch):
            human = self.human is not None and self.numpy_rng.random() < settings.human_share
            source = self.human if human and self.human is not None else self.synthetic
            gain = 10 ** (self.numpy_rng.uniform(-3, 3) / 20)
            clips.append(source.crop(self.numpy_rng, settings.seconds) * np.float32(gain))
        return torch.from_numpy(np.stack(clips)).to(self.device)

    def _windows(self, real: list[Tensor], fake: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        # The discriminators cost more than the codec: they see a random window of each clip, not all of it.
        start = self.numpy_rng.random()
        share = min(1.0, self.settings.discriminated_seconds / self.settings.seconds)
        a, b = [], []
        for i in self.settings.discriminated:
            frames = real[i].shape[-1]
            first = int(start * (1 - share) * frames)
            window = slice(first, first + max(1, int(share * frames)))
            a.append(real[i][..., window])
            b.append(fake[i][..., window])
        return a, b

    def take_step(self) -> dict[str, float]:
        """One update of the codec and, when due, of the discriminators; gives the losses."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        real = self.batch()
        # Late in the run the codes are settled: the decoder alone learns on from what it will be given, hard
        # codes.
        settled = self.step_count >= settings.decoder_only_from
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.autocast):
            with torch.set_grad_enabled(not settled):
                latents = self.codec.encode_latents(real)
            if settled:
                codes = self.codec.quantizer.encode(latents.float())
                read = self.codec.quantizer.decode(codes)
                codes, rows = codes[:, 0], read[:, : self.codec.config.semantic_dim]
            else:
                read, codes, rows = quantize_in_training(self.codec, latents, self.rng)
            fake = self.codec.decode_latents(read.to(latents.dtype))[:, : real.shape[1]].float()
        semantic = latents[:, : self.codec.config.semantic_dim].float()
        commitment = functional.mse_loss(semantic, rows.detach())
        # Noise in the bottleneck drives the acoustic latents into the tanh's ends, where no gradient returns
        # and 21 levels become two: what lies beyond 1.2 (level 18) pays.
        acoustic = latents[:, self.codec.config.semantic_dim :].float()
        spread = functional.relu(acoustic.abs() - 1.2).square().mean()
        real_spectra, fake_spectra = self.objective.spectra(real), self.objective.spectra(fake)
        terms = self.objective(real_spectra, fake_spectra)
        early = settings.decay**self.step_count
        wave = (real - fake).abs().mean()
        loss = (
            settings.mel * terms.mel
            + settings.magnitude * terms.magnitude
            + settings.complex * max(early, 0.2) * terms.complex
            + settings.waveform * early * wave
            + settings.commitment * commitment
            + settings.spread * spread
        )
        losses = {
            "mel": terms.mel,
            "magnitude": terms.magnitude,
            "complex": terms.complex,
            "wave": wave,
            "commitment": commitment,
            "spread": spread,
        }
        judged_now = self.step_count % settings.discriminator_every == 0
        if self.step_count >= settings.discriminator_from and judged_now:
            a, b = self._windows(real_spectra, fake_spectra)
            self.judges.requires_grad_(True)
            judged = discriminator_loss(self.judges(a), self.judges([s.detach() for s in b]))
            self.judge_optimizer.zero_grad(set_to_none=True)
            judged.backward()
            self.judge_optimizer.step()
            losses["discriminator"] = judged
            self.judges.requires_grad_(False)
            with torch.no_grad():
                judged_real = self.judges(a)
            judged_fake = self.judges(b)
            feature = feature_matching_loss(judged_real, judged_fake)
            fooled = adversarial_loss(judged_fake)
            loss = loss + settings.feature * feature + settings.adversarial * fooled
            losses |= {"feature": feature, "adversarial": fooled}
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.codec.parameters(), 5.0, foreach=True)
        self.optimizer.step()
        flat = semantic.detach().transpose(1, 2).flatten(0, 1)
        restarted = 0 if settled else self.upkeep.update(flat, codes.flatten(), self.rng)
        return {k: float(v.detach()) for k, v in losses.items()} | {
            "norm": float(norm),
            "loss": float(loss.detach()),
            "restarted": float(restarted),
        }


@torch.no_grad()
def validate(codec: Codec, clips: list[np.ndarray]) -> dict[str, float]:
    """Mel distance of whole `clips` decoded from their hard codes, the codebook's use, and saturated
    levels."""
    codec.eval()
    device = codec.output_proj.conv.weight.device
    objective = SpectralObjective(codec.config.sampling_rate, ((1024, 100),)).to(device)
    distances, semantic, saturated = [], [], []
    for clip in clips:
        real = torch.from_numpy(clip).to(device)[None]
        codes = codec.encode(real)
        fake = codec.decode(codes)[:, : real.shape[1]]
        distances.append(float(objective(objective.spectra(real), objective.spectra(fake)).mel))
        semantic.append(codes[0, 0])
        edges = (codes[0, 1:] == 0) | (codes[0, 1:] == codec.config.acoustic_codebook_size - 1)
        saturated.append(float(edges.float().mean()))
    codec.train()
    used = torch.cat(semantic)
    share = torch.bincount(used, minlength=codec.config.semantic_codebook_size).float() / len(used)
    perplexity = float(torch.exp(-(share * (share + 1e-12).log()).sum()))
    return {
        "valid_mel": round(float(np.median(distances)), 4),
        "codes_used": int((share > 0).sum()),
        "perplexity": round(perplexity, 1),
        "saturated": round(float(np.mean(saturated)), 4),
    }
