"""What the language model thinks of codes that say a known text, for a search that can be bent by it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from revox.cloning.invert import Opinion
from revox.metrics.acceptance import soft_acceptance, soft_voice_rows
from revox.model.voxtral import Voxtral

DRAWS = 2  # of noise and time a question; the next question has others


def opinion_on(model: Voxtral, prompt_of: Callable[[Tensor], Tensor]) -> Opinion:
    """How unlikely `model` finds soft codes as speech of the text of `prompt_of`: a scalar, differentiable.

    `prompt_of` makes a prompt `[time, dim]` of a voice's rows `[frames + 1, dim]` and the text. The voice is
    that of the codes themselves: would a speaker who sounds like this say it like this? Nats a semantic code,
    spread over a frame's codes as the search's other terms are, plus the squared error of the velocity.
    """
    asked = 0

    def opinion(probabilities: Tensor, values: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        rows = soft_voice_rows(model, probabilities.detach(), values.detach())
        found = soft_acceptance(model, prompt_of(rows), probabilities, values, draws=DRAWS, seed=asked)
        return found.semantic_nll / values.shape[0] + found.flow_error

    return opinion
