"""What the frozen language model thinks of a recording's codes, as a loss of the encoder that gives them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from revox.checkpoint.load import load_model
from revox.coding.likelihood import DRAWS, unlikelihood
from revox.synthesis.prompt import Prompter


def accepting(checkpoint: Path, device: str) -> Callable[[Tensor, Tensor, str, int], Tensor]:
    """The checkpoint's language model as `Teachers.acceptance`: bf16 on a GPU, where it takes 8 GB.

    What it gives is `revox.coding.likelihood.unlikelihood` of soft codes as speech of a text. Raises
    CheckpointError as loading does.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = load_model(checkpoint, device=device, dtype=dtype).requires_grad_(False)
    prompter = Prompter(checkpoint)

    def acceptance(probabilities: Tensor, values: Tensor, text: str, seed: int) -> Tensor:
        return unlikelihood(
            model, partial(prompter.tokens_for_rows, text), prompter.audio_token, probabilities, values,
            draws=DRAWS, seed=seed,
        )  # fmt: skip

    return acceptance
