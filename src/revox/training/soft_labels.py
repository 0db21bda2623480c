"""Soft labels: the mean posterior of students and restored encoders, which an encoder learns from.

A student's posterior says which codes are near each other, which one right code does not (Hinton et al.,
arXiv 1503.02531), and it is there for recordings, whose right codes nobody knows. Several students, and
encoders that learned from them before, are asked together: their mean is better than each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from revox.coding.student import StudentEncoder
from revox.losses.codes import semantic_log_probabilities, sharpness_of
from revox.model.codec import Codec
from revox.model.voxtral import parameter_name
from revox.progress import ProgressCallback, ignore_progress
from revox.training.errors import TrainingError
from revox.training.settings import EncoderTraining
from revox.training.student import AUGMENTATION, StudentTraining, student_for


class Ensemble:
    """`students`, and `encoders` as codecs with one each; all of one decoder, on one device, frozen."""

    def __init__(self, students: Sequence[StudentEncoder], encoders: Sequence[Codec] = ()) -> None:
        self.students, self.encoders = students, encoders

    @torch.no_grad()
    def posterior(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Of clips `[batch, samples]`: probabilities of semantic codes `[batch, frames, size]` and acoustic
        values in [-1, 1] `[batch, frames, 36]`, each the mean over the members."""
        found = []
        for student in self.students:
            log_probabilities, values = student(student.features(audio))
            found.append((log_probabilities.exp(), values))
        for codec in self.encoders:
            latents, dim = codec.encode_latents(audio).transpose(1, 2), codec.config.semantic_dim
            table = codec.quantizer.semantic_codebook.embedding
            semantic = semantic_log_probabilities(latents[..., :dim], table, sharpness_of(table))
            found.append((semantic.exp(), torch.tanh(latents[..., dim:])))
        probabilities, values = zip(*found, strict=True)
        return torch.stack(probabilities).mean(dim=0), torch.stack(values).mean(dim=0)


def load_ensemble(
    codec: Codec,
    codes: Sequence[Tensor],
    settings: EncoderTraining,
    folder: Path,
    stamp: str,
    progress: ProgressCallback = ignore_progress,
) -> Ensemble:
    """The members that `settings` ask for, on the device of `codec`, which is float32.

    Students learn from `codes` `[37, frames]` with other seeds and are cached in `folder` for `stamp`;
    encoders are read from the files of earlier runs. Raises TrainingError for a file that has no encoder of
    this codec, KeyboardInterrupt when stopped.
    """
    students = []
    for seed in range(settings.students):
        training = StudentTraining(
            steps=settings.student_steps,
            width=settings.student_width,
            augmentation=settings.augmentation if settings.augmentation.changes else AUGMENTATION,
            seed=seed,
        )
        place = folder / f"{training.width}-{training.steps}-{seed}"
        students.append(student_for(codec, codes, place, stamp, progress, training))
    return Ensemble(students, [_with_encoder(codec, Path(path)) for path in settings.encoders])


def _with_encoder(codec: Codec, path: Path) -> Codec:
    found = Codec(codec.config, with_encoder=True)
    found.load_state_dict(codec.state_dict(), strict=False)
    try:
        tensors = {
            parameter_name(name).removeprefix("audio_tokenizer."): tensor.float()
            for name, tensor in load_file(path).items()
        }
        own = {name for name in found.state_dict() if name.startswith(("input_proj.", "encoder_blocks."))}
        if tensors.keys() != own:
            raise RuntimeError(f"{len(own - tensors.keys())} tensors of the encoder are missing")
        found.load_state_dict(tensors, strict=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise TrainingError(
            f"{path} cannot be read as an encoder of this checkpoint ({str(error).splitlines()[0]}): name an "
            "encoder.safetensors of `revox train encoder`"
        ) from None
    return found.to(codec.output_proj.conv.weight.device).eval().requires_grad_(False)
