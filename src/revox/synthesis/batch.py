"""Requests -> speech: one, or several texts and voices at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from revox.model.voxtral import Voxtral
from revox.speech import Audio
from revox.synthesis.errors import SpeakError
from revox.synthesis.generate import DEFAULT_CFG, MAX_POSITIONS, generate
from revox.synthesis.prompt import Prompter
from revox.synthesis.stream import decode

if TYPE_CHECKING:
    from revox.checkpoint.voices import Voice


@dataclass(frozen=True)
class Request:
    """A text to be spoken in a voice; the seed decides between equally good ways of saying it."""

    text: str
    voice: Voice
    seed: int = 0


@dataclass(frozen=True)
class Speech:
    """Audio, `truncated` when it met the limit on its length, and its codes `[37, frames]` from 0."""

    audio: Audio
    codes: Tensor


def embed(model: Voxtral, prompter: Prompter, text: str, voice: Voice) -> Tensor:
    """The prompt of `text` in `voice` as the backbone reads it, `[time, dim]`.

    Raises SpeakError on text that is empty, not valid Unicode or too long, and on a voice of another model.
    """
    dim, vocabulary = model.config.backbone.dim, model.config.backbone.vocab_size
    if voice.embedding.ndim != 2 or voice.embedding.shape[1] != dim:
        raise SpeakError(
            f"voice {voice.name!r} has an embedding {list(voice.embedding.shape)}, this model reads "
            f"[N, {dim}]: the voice is of another model, make it again with this checkpoint"
        )
    tokens = prompter.tokens(text, voice)
    spare = MAX_POSITIONS - 1 - len(tokens)
    if spare < 0:
        length = len(prompter.text_tokens(text))
        if length + spare < 1:
            raise SpeakError(
                f"voice {voice.name!r} has {voice.embedding.shape[0]} rows, which leave no room for text in "
                f"{MAX_POSITIONS} positions; make it from a shorter reference"
            )
        raise SpeakError(
            f"the text has {length} tokens, and with voice {voice.name!r} at most {length + spare} fit into "
            f"{MAX_POSITIONS} positions; speak it in parts"
        )
    if max(tokens) >= vocabulary:
        raise SpeakError(
            f"{prompter.path} gives token {max(tokens)}, and the model knows {vocabulary}: they are not of "
            "one checkpoint, download it again"
        )
    with torch.inference_mode():
        ids = torch.tensor(tokens, device=model.device)
        return model.embed_prompt(ids, prompter.audio_token, voice.embedding.to(model.device))


def speak(
    model: Voxtral,
    prompter: Prompter,
    requests: Sequence[Request],
    *,
    cfg_alpha: float = DEFAULT_CFG,
    flow_steps: int | None = None,
    max_frames: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Speech]:
    """Speak all `requests` together; each gives what it gives alone.

    `cfg_alpha`, `flow_steps` (the checkpoint's own by default) and `max_frames` (of 80 ms) are for all.
    `progress` is told the frames so far. Raises SpeakError when a request cannot be spoken.
    """
    prompts = [embed(model, prompter, request.text, request.voice) for request in requests]
    spoken = generate(
        model,
        prompts,
        [request.seed for request in requests],
        cfg_alpha=cfg_alpha,
        flow_steps=flow_steps,
        max_frames=max_frames,
        progress=progress,
    )
    rate = model.config.codec.sampling_rate
    results = []
    for one in spoken:
        samples = decode(model.audio_tokenizer, one.codes).cpu().numpy()
        results.append(Speech(Audio(samples, rate, truncated=not one.ended), one.codes))
    return results
