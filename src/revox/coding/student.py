"""The student encoder, trained in minutes from the decoder alone: inversion starts at its posterior.

It maps spectra to codes and is trained on pairs that the decoder makes (`PresetPairs`). It does not replace
the missing encoder: it is never trained on a recording. But its codes are ones that the model would use,
where a search from anywhere else ends in codes that only sound right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from revox.coding.features import SpectralFeatures, frame_network
from revox.coding.pairs import PairSettings, PresetPairs
from revox.coding.regularizers import Posterior
from revox.model.codec import Codec
from revox.model.config import CodecConfig
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech.files import load_stamped, save_stamped

ENCODER_PARTS = ("input_proj.", "encoder_blocks.")  # of a codec; nothing here depends on them
STUDENT_TRAINING = "training the student encoder"
"""The phase of its training, as `Progress.what` names it."""


@dataclass(frozen=True)
class StudentTraining:
    """Settings of one training; `seconds` ends it earlier than `steps` would."""

    steps: int = 1500
    seconds: float | None = None
    batch: int = 12
    frames: int = 24
    learning_rate: float = 2e-3
    warmup: int = 50
    width: int = 256
    blocks: int = 2
    gain_db: float = 3.0
    seed: int = 0


def default_training(codec: Codec) -> StudentTraining:
    """Ten minutes at most at the release's size, the whole number of steps at the lab's."""
    big = sum(p.numel() for p in codec.parameters()) > 30e6
    return StudentTraining(seconds=600.0 if big else None)


class StudentEncoder(nn.Module):
    """Features `[batch, frames, size]` -> a posterior over codes.

    Semantic codes as log probabilities (by the distance of a latent to the codebook's rows, so that those
    that were rare in training share in what their neighbors learned), acoustic values in [-1, 1].
    """

    table: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, config: CodecConfig, table: Tensor, width: int, blocks: int) -> None:
        super().__init__()
        self.features = SpectralFeatures(config)
        self.semantic_dim, self.width, self.blocks = config.semantic_dim, width, blocks
        self.register_buffer("table", (table - table.mean(dim=0)) / table.std().clamp_min(1e-8))
        self.register_buffer("mean", torch.zeros(self.features.size))
        self.register_buffer("scale", torch.ones(self.features.size))
        self.sharpness = nn.Parameter(torch.zeros(()))
        self.net = frame_network(self.features.size, width, blocks, config.latent_dim)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Log probabilities `[batch, frames, codes]`, values `[batch, frames, 36]`."""
        latents = self.net((features - self.mean) / self.scale)
        semantic = latents[..., : self.semantic_dim]
        distances = torch.cdist(semantic.flatten(0, 1), self.table).square()
        logits = -distances * self.sharpness.exp() / self.table.shape[1] * 4
        values = torch.tanh(latents[..., self.semantic_dim :])
        return logits.unflatten(0, semantic.shape[:2]).log_softmax(dim=-1), values

    @torch.no_grad()
    def posterior(self, waveform: Tensor) -> Posterior:
        """Of one clip `[samples]`, on the encoder's device."""
        log_probabilities, values = self(self.features(waveform)[None])
        return Posterior(log_probabilities[0], values[0].T)


def train_student(
    codec: Codec,
    preset_codes: Sequence[Tensor],
    training: StudentTraining | None = None,
    pairs: PairSettings | None = None,
    progress: ProgressCallback = ignore_progress,
) -> StudentEncoder:
    """Train on pairs from `preset_codes`, each `[37, frames]`; the codec's weights must be float32.

    Ends after `training.steps` or `training.seconds`. The facts of its progress are `semantic`, in nats, and
    `acoustic`, in levels. KeyboardInterrupt ends it and is raised again.
    """
    training = training or StudentTraining()
    device = codec.output_proj.conv.weight.device
    source = PresetPairs(codec, preset_codes, pairs)
    rng = torch.Generator().manual_seed(training.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        encoder = _new_encoder(codec, training)
    encoder.to(device)
    half = (codec.config.acoustic_codebook_size - 1) / 2
    with torch.no_grad():
        sample = encoder.features(source.draw(24, training.frames, rng)[1])
        encoder.mean.copy_(sample.mean(dim=(0, 1)))
        encoder.scale.copy_(sample.std(dim=(0, 1)) + 0.05)
    optimizer = torch.optim.AdamW(
        encoder.net.parameters(), lr=training.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    optimizer.add_param_group({"params": [encoder.sharpness], "weight_decay": 0.0})
    began = time.monotonic()
    for step in range(training.steps):
        spent = time.monotonic() - began
        done = step / training.steps
        if training.seconds is not None:
            done = max(done, spent / training.seconds)
            if done >= 1:
                break
        rate = training.learning_rate * min(1.0, (step + 1) / training.warmup, max(0.02, 2 * (1 - done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        codes, audio = source.draw(training.batch, training.frames, rng)
        gains = (torch.rand((len(audio), 1), generator=rng) * 2 - 1) * training.gain_db
        features = encoder.features(audio * 10 ** (gains.to(device) / 20))
        log_probabilities, values = encoder(features)
        semantic = functional.nll_loss(log_probabilities.flatten(0, 1), codes[:, 0].flatten())
        wanted = codes[:, 1:].transpose(1, 2) / half - 1
        acoustic = (values - wanted).abs().mean() * half
        optimizer.zero_grad(set_to_none=True)
        (0.5 * semantic + acoustic).backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        facts = {"semantic": semantic.item(), "acoustic": acoustic.item()}
        progress(Progress(STUDENT_TRAINING, step + 1, training.steps, facts))
    return encoder.eval().requires_grad_(False)


def is_useful(encoder: StudentEncoder, codec: Codec, preset_codes: Sequence[Tensor], seed: int = 1) -> bool:
    """Whether its posterior of fresh pairs is clearly better than the presets' code frequencies: by half a
    nat a semantic code, and a fifth of the acoustic error of their median levels."""
    source = PresetPairs(codec, preset_codes)
    codes, audio = source.draw(8, 24, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        log_probabilities, values = encoder(encoder.features(audio))
    half = (codec.config.acoustic_codebook_size - 1) / 2
    usual = (source.counts / source.counts.sum()).log().to(codes.device)
    semantic = functional.nll_loss(log_probabilities.flatten(0, 1), codes[:, 0].flatten())
    blind = -usual[codes[:, 0]].mean()
    wanted = codes[:, 1:].transpose(1, 2).float()
    error = ((values + 1) * half - wanted).abs().mean()
    middle = torch.cat(source.preset_codes, dim=1)[1:].float().median(dim=1).values.to(codes.device)
    return bool(semantic < blind - 0.5 and error < 0.8 * (wanted - middle).abs().mean())


def student_encoder_for(
    codec: Codec,
    preset_codes: Sequence[Tensor],
    training: StudentTraining | None = None,
    cache: Path | None = None,
    progress: ProgressCallback = ignore_progress,
) -> StudentEncoder | None:
    """The student encoder of this codec and these preset codes: from the folder `cache`, or trained and
    saved there.

    None when it is of no use after the training's time (`is_useful`).
    """
    training = training or default_training(codec)
    digest = hashlib.sha256(repr(dataclasses.replace(training, seconds=None)).encode())
    for name, tensor in sorted(codec.state_dict().items()):
        if not name.startswith(ENCODER_PARTS):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    for codes in preset_codes:
        digest.update(codes.cpu().numpy().tobytes())
    stamp = digest.hexdigest()
    path = None if cache is None else cache / f"student-encoder-{stamp[:16]}"
    content = None if path is None else load_stamped(path, stamp)
    if content is not None:
        encoder = _new_encoder(codec, training)
        encoder.load_state_dict(load(content))
        return encoder.to(codec.output_proj.conv.weight.device).eval().requires_grad_(False)
    encoder = train_student(codec, preset_codes, training, progress=progress)
    if not is_useful(encoder, codec, preset_codes):
        return None
    if path is not None:
        # A cache that cannot be written costs time in the next clone; this one is not affected.
        with contextlib.suppress(OSError):
            save_stamped(
                path, stamp, save({k: v.cpu().contiguous() for k, v in encoder.state_dict().items()})
            )
    return encoder


def _new_encoder(codec: Codec, training: StudentTraining) -> StudentEncoder:
    table = codec.quantizer.semantic_codebook.embedding.detach().float()
    return StudentEncoder(codec.config, table, training.width, training.blocks)
