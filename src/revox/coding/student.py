"""The student encoder: a small network from spectra to codes, which `revox train student` trains in minutes.

It learns from the model's own speech alone (`revox.training.student`) and does not replace the missing
encoder. But it gives codes that the model would use, where a search from anywhere else ends in codes that
only sound right. One file holds it for each decoder, in the user's cache.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from revox.checkpoint.encoder_file import decoder_sha256
from revox.checkpoint.locate import user_cache
from revox.coding.features import SpectralFeatures, frame_network
from revox.coding.regularizers import Posterior
from revox.model.codec import Codec
from revox.model.config import CodecConfig
from revox.speech.files import load_stamped, save_stamped

STUDENT_FILE = "student"


class StudentEncoder(nn.Module):
    """Features `[batch, frames, size]` -> a posterior over codes.

    Semantic codes as log probabilities (by the distance of a latent to the codebook's rows, so that those
    that were rare in training share in what their neighbors learned), acoustic values in [-1, 1]. `record`
    says how it was trained.
    """

    table: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, config: CodecConfig, table: Tensor, width: int = 256, blocks: int = 2) -> None:
        super().__init__()
        self.features = SpectralFeatures(config)
        self.semantic_dim, self.width, self.blocks = config.semantic_dim, width, blocks
        self.levels = config.acoustic_codebook_size
        self.record: dict[str, Any] = {}
        self.register_buffer("table", (table - table.mean(dim=0)) / table.std().clamp_min(1e-8))
        self.register_buffer("mean", torch.zeros(self.features.size))
        self.register_buffer("scale", torch.ones(self.features.size))
        self.sharpness = nn.Parameter(torch.zeros(()))
        self.net = frame_network(self.features.size, width, blocks, config.latent_dim)

    @classmethod
    def for_codec(cls, codec: Codec, width: int = 256, blocks: int = 2) -> StudentEncoder:
        """An untrained one for the codes of `codec`, on the CPU."""
        table = codec.quantizer.semantic_codebook.embedding.detach().float().cpu()
        return cls(codec.config, table, width, blocks)

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


def student_folder(checkpoint: Path) -> Path:
    """Where the student of the folder `checkpoint`, its training and the model's speech are cached.

    It is named by the decoder's hash: an injected encoder or an adapted language model leaves the student
    valid. Raises CheckpointError when the weights lack a part of the decoder.
    """
    return user_cache() / "students" / decoder_sha256(checkpoint)[:16]


def trained_student(checkpoint: Path, codec: Codec) -> StudentEncoder | None:
    """The student that was trained for the folder `checkpoint`, on the device of `codec`; None without."""
    folder = student_folder(checkpoint)
    return load_student(folder / STUDENT_FILE, decoder_sha256(checkpoint), codec)


def has_trained_student(checkpoint: Path) -> bool:
    """Whether a student was trained for the folder `checkpoint`; says nothing about its file."""
    return (student_folder(checkpoint) / STUDENT_FILE).is_file()


def save_student(path: Path, stamp: str, student: StudentEncoder) -> None:
    """Write `student` to `path` as valid for `stamp`. Raises OSError."""
    about = {"width": student.width, "blocks": student.blocks, "record": student.record}
    weights = {name: tensor.cpu().contiguous() for name, tensor in student.state_dict().items()}
    save_stamped(path, stamp, json.dumps(about).encode() + b"\n" + save(weights))


def load_student(path: Path, stamp: str, codec: Codec) -> StudentEncoder | None:
    """The student in `path`, on the device of `codec`; None where there is none that is valid for `stamp`."""
    content = load_stamped(path, stamp)
    if content is None:
        return None
    line, _, weights = content.partition(b"\n")
    about = json.loads(line)
    student = StudentEncoder.for_codec(codec, about["width"], about["blocks"])
    student.load_state_dict(load(weights))
    student.record = about["record"]
    return student.to(codec.output_proj.conv.weight.device).eval().requires_grad_(False)
