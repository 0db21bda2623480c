"""What the language model thinks of codes that say a known text, for a search that can be bent by it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from revox.coding.invert import Opinion
from revox.metrics.likelihood import soft_likelihood, soft_voice_embedding
from revox.model.voxtral import Voxtral

DRAWS = 2  # of noise and time for a slope; the next one has others
JUDGING_DRAWS = 6  # for comparing codes: always the same ones


def unlikelihood(
    model: Voxtral,
    tokens_of: Callable[[int], list[int]],
    audio_token: int,
    probabilities: Tensor,
    values: Tensor,
    *,
    draws: int,
    seed: int,
) -> Tensor:
    """How unlikely `model` finds soft codes as speech of a text: a scalar, differentiable in the codes
    (probabilities `[frames, size]`, values `[36, frames]`).

    `tokens_of` gives the prompt's tokens for a voice of so many rows, as `Prompter.tokens_for_rows` does for
    one text; `audio_token` is the id whose places the rows take. The voice is that of the codes themselves:
    would a speaker who sounds like this say it like this? Nats a semantic code, spread over a frame's codes,
    plus the squared error of the velocity, over `draws` of noise and time.
    """
    rows = soft_voice_embedding(model, probabilities.detach(), values.detach())
    tokens = torch.tensor(tokens_of(len(rows)), device=model.device)
    prompt = model.embed_prompt(tokens, audio_token, rows)
    found = soft_likelihood(model, prompt, probabilities, values, draws=draws, seed=seed)
    return found.semantic_nll / values.shape[0] + found.flow_error


def opinion_on(model: Voxtral, tokens_of: Callable[[int], list[int]], audio_token: int) -> Opinion:
    """`unlikelihood` for a search: other draws at every slope, the same ones wherever codes are compared."""
    asked = 0

    def opinion(probabilities: Tensor, values: Tensor) -> Tensor:
        nonlocal asked
        draws, seed = JUDGING_DRAWS, 0
        if torch.is_grad_enabled():
            asked += 1
            draws, seed = DRAWS, asked
        return unlikelihood(model, tokens_of, audio_token, probabilities, values, draws=draws, seed=seed)

    return opinion
