"""Language-model guidance: how likely the model finds codes as speech of a known text."""

from __future__ import annotations

import torch
from torch import Tensor

from revox.coding.regularizers import Guidance
from revox.metrics.likelihood import soft_likelihood, soft_voice_embedding
from revox.model.voxtral import Voxtral
from revox.synthesis.prompt import Prompter

GRADIENT_DRAWS = 2  # of noise and time for a gradient; other ones each time
COMPARISON_DRAWS = 6  # for comparing codes; always the same ones


def language_model_guidance(model: Voxtral, prompter: Prompter, text: str) -> Guidance:
    """How unlikely `model` finds soft codes as speech of `text`: a scalar, differentiable in the codes.

    The voice is that of the codes themselves: would a speaker who sounds like this say it like this? Nats a
    semantic code, spread over a frame's codes, plus the squared error of the velocity, over a few draws of
    noise and time: other ones at every gradient, the same ones wherever codes are compared.
    """
    gradients = 0

    def guidance(probabilities: Tensor, values: Tensor) -> Tensor:
        nonlocal gradients
        draws, seed = COMPARISON_DRAWS, 0
        if torch.is_grad_enabled():
            gradients += 1
            draws, seed = GRADIENT_DRAWS, gradients
        embedding = soft_voice_embedding(model, probabilities.detach(), values.detach())
        tokens = torch.tensor(prompter.tokens(text, len(embedding)), device=model.device)
        prompt = model.embed_prompt(tokens, prompter.audio_token, embedding)
        found = soft_likelihood(model, prompt, probabilities, values, draws=draws, seed=seed)
        return found.semantic_nll / values.shape[0] + found.flow_error

    return guidance
