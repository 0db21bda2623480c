"""Does a model whose weights are held in fewer bits still choose the same codes?

Compared teacher-forced: every frame is chosen given the same prompt and the same frames before it, so that
one different code does not make all later ones different.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from revox.model.config import END_AUDIO_ID
from revox.model.voxtral import Voxtral


@dataclass(frozen=True)
class ComparedUtterance:
    """What two models are compared on.

    `tokens` of the prompt with the place of each position of `voice` `[N, dim]` taken by `audio_token`, the
    frames spoken, ids `[frames, 37]`, and the `noise` `[frames + 1, 36]` that each frame starts from.
    """

    tokens: Tensor
    audio_token: int
    voice: Tensor
    frames: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Agreement:
    """Shares of equal codes, the ends included, and the mean distance of acoustic codes in levels (of 20).

    `first` is the first frame, over all utterances, whose semantic code differs, None if none does.
    """

    frames: int
    semantic: float
    acoustic: float
    level_error: float
    first: int | None


@torch.inference_mode()
def code_agreement(reference: Voxtral, model: Voxtral, utterances: Sequence[ComparedUtterance]) -> Agreement:
    """How often `model` chooses the codes that `reference` chooses, given the same past."""
    semantic, distances = [], []
    for utterance in utterances:
        ours, theirs = next_codes(model, utterance).cpu(), next_codes(reference, utterance).cpu()
        semantic.append(ours[:, 0] == theirs[:, 0])
        spoken = theirs[:, 0] != END_AUDIO_ID
        distances.append((ours[spoken, 1:] - theirs[spoken, 1:]).abs().float())
    first = [int(equal.logical_not().nonzero()[0]) for equal in semantic if not equal.all()]
    equal, distance = torch.cat(semantic), torch.cat(distances)
    return Agreement(
        frames=len(equal),
        semantic=float(equal.float().mean()),
        acoustic=float((distance == 0).float().mean()),
        level_error=float(distance.mean()),
        first=min(first, default=None),
    )


def next_codes(model: Voxtral, utterance: ComparedUtterance) -> Tensor:
    """What the model chooses after the prompt and after each frame: `[frames + 1, 37]`, on its device.

    A semantic id, then acoustic levels from 0.
    """
    tokens, frames = utterance.tokens.to(model.device), utterance.frames.to(model.device)
    prompt = model.embed_prompt(tokens, utterance.audio_token, utterance.voice)
    rows = model.mm_audio_embeddings.frames(frames.T[None])[0].to(model.dtype)
    hidden = model.teacher_forced([torch.cat((prompt, rows))])[0, len(prompt) - 1 :]
    acoustic = model.acoustic_transformer
    semantic = acoustic.semantic_logits(hidden).argmax(dim=-1)
    point = acoustic.flow(hidden, utterance.noise.to(model.device)).float().clamp(-1, 1)
    levels = ((point + 1) / 2 * (acoustic.levels - 1)).round().long()
    return torch.cat((semantic[:, None], levels), dim=1)
