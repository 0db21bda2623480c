"""A codec encoder from a file: read for scoring and for nothing else."""

from __future__ import annotations

from pathlib import Path

import torch

from revox.checkpoint.load import load_model
from revox.checkpoint.tensors import open_tensors
from revox.evaluation.errors import EvaluationError
from revox.model.codec import Codec
from revox.model.voxtral import Voxtral


def original_codec(checkpoint: Path, encoder: Path) -> Codec:
    """The checkpoint's codec with the encoder of the file `encoder`, float32, frozen.

    The file is a safetensors file, as `revox encoder export` and training runs write it. For scoring only: a
    method that restores the encoder must never see this. Raises CheckpointError when the file is missing or
    damaged, EvaluationError when it is not this checkpoint's encoder.
    """
    released: Voxtral = load_model(checkpoint, dtype=torch.float32, parts=("audio_tokenizer",))
    codec = Codec(released.audio_tokenizer.config, with_encoder=True)
    state = dict(released.audio_tokenizer.state_dict())
    with open_tensors(encoder) as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            state[name.removeprefix("audio_tokenizer.")] = file.get_tensor(name).float()
    try:
        codec.load_state_dict(state)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:300]
        raise EvaluationError(f"{encoder} is not an encoder of {checkpoint.name}: {why}") from None
    return codec.eval().requires_grad_(False)
