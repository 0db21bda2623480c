"""The lab's reference encoder: read for scoring and for nothing else."""

from __future__ import annotations

from pathlib import Path

import torch

from revox.checkpoint.load import load_model
from revox.checkpoint.tensors import open_tensors
from revox.evaluation.errors import EvaluationError
from revox.model.codec import Codec
from revox.model.voxtral import Voxtral


def original_codec(checkpoint: Path, encoder: Path) -> Codec:
    """The lab's codec with the reference encoder in the file `encoder`, float32, frozen.

    For scoring only: a method that restores the encoder must never see this. Raises EvaluationError when
    the file is missing or is not this checkpoint's encoder.
    """
    if not encoder.is_file():
        raise EvaluationError(
            f"{encoder} is missing; the lab's reference encoder is lab/reference-encoder/encoder.safetensors"
        )
    released: Voxtral = load_model(checkpoint, dtype=torch.float32, parts=("audio_tokenizer",))
    codec = Codec(released.audio_tokenizer.config, with_encoder=True)
    state = dict(released.audio_tokenizer.state_dict())
    with open_tensors(encoder) as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            state[name.removeprefix("audio_tokenizer.")] = file.get_tensor(name).float()
    try:
        codec.load_state_dict(state)
    except RuntimeError as error:
        raise EvaluationError(f"{encoder} is not the encoder of {checkpoint}: {error}") from error
    return codec.eval().requires_grad_(False)
