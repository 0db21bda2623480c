"""What serving would give with the encoder as it is, on what the run does not learn from.

The model's own speech is of held-out sentences and voices, with other phases than the decoder's, as pairs are
heard; recordings are of held-out speakers. How likely the language model finds the codes of recordings is the
only figure that a user of the released model can trust: nobody outside knows their right codes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from revox.checkpoint.voices import Voice
from revox.coding import Coder, CodingSettings, find_codes
from revox.losses.spectral import mel_distance
from revox.metrics.codes import codebook_use, perplexity, saturated_share
from revox.metrics.likelihood import likelihood
from revox.model.codec import Codec
from revox.model.embedding import Embeddings
from revox.model.voxtral import Voxtral
from revox.synthesis.prompt import Prompter, make_prompt
from revox.training.all_pass import all_pass, draw_phases
from revox.training.spoken import Utterance

UTTERANCES = 32  # at most, whose codes are compared
SOUNDS = 4  # clips that can be listened to
ENCODER = CodingSettings("encoder")


@dataclass(frozen=True)
class ValidationClip:
    """A recording `[samples]`, its words where they are known, and who speaks."""

    samples: Tensor
    transcript: str | None = None
    speaker: str = ""


@dataclass
class Validation:
    """What a run is validated on, and where that is shown.

    `utterances` are the model's own, `clips` recordings. `language_model` loads the whole model, which is
    freed after each validation; without it no likelihood is reported. `writer` is TensorBoard's
    `SummaryWriter`, which receives the clips' sounds.
    """

    clips: Sequence[ValidationClip] = ()
    utterances: Sequence[Utterance] = ()
    language_model: Callable[[], tuple[Voxtral, Prompter]] | None = None
    writer: Any = None


def as_served(codec: Codec, encoder: dict[str, Tensor]) -> Coder:
    """What finds codes with a copy of `codec` that has the weights `encoder`, in bf16."""
    served = copy.deepcopy(codec)
    served.load_state_dict(encoder, strict=False)
    return Coder(served.to(torch.bfloat16).eval())


@torch.no_grad()
def decoded_figures(
    codec: Codec, served: Coder, spoken: Sequence[Tensor], frames: int, milliseconds: float
) -> tuple[float, float]:
    """How codes found in what the decoder makes of `spoken` compare with the right ones.

    The first `frames` of the first `UTTERANCES` of `spoken`, codes `[37, frames]`, are heard through the
    all-pass filters of `draw_phases` with this delay (0: in the decoder's own phases), the same ones every
    time. The share of semantic codes that agree, and the mean difference of acoustic ones in levels.
    """
    device, rate = codec.output_proj.conv.weight.device, codec.config.sampling_rate
    phases = draw_phases(UTTERANCES, rate, milliseconds, torch.Generator().manual_seed(0))
    agreement, error = [], []
    for i, codes in enumerate(spoken[:UTTERANCES]):
        codes = codes[:, :frames].to(device)
        audio = codec.decode(codes[None]).float()
        if milliseconds:
            audio = all_pass(audio, rate, phases[i : i + 1])
        found = find_codes(served, audio[0], ENCODER).codes.to(device)
        agreement.append(float((found[0] == codes[0]).float().mean()))
        error.append(float((found[1:] - codes[1:]).abs().float().mean()))
    return float(np.mean(agreement)), float(np.mean(error))


@torch.no_grad()
def clip_figures(
    codec: Codec, embeddings: Embeddings, clips: Sequence[ValidationClip], found: Sequence[Tensor]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Figures of `clips` with their codes `found` `[37, frames]`, and the first few before and after by name.

    Mel distance, codes in use, their perplexity, the share of acoustic codes on the first or last level, and
    the norm of the voice embedding's frames.
    """
    device, rate = codec.output_proj.conv.weight.device, codec.config.sampling_rate
    distances, norms = [], []
    sounds: dict[str, Tensor] = {}
    for i, (clip, codes) in enumerate(zip(clips, found, strict=True)):
        samples = clip.samples.to(device)
        decoded = codec.decode(codes[None].to(device))[0, : len(samples)]
        distances.append(mel_distance(decoded[None], samples[None], rate))
        norms.append(float(embeddings.voice_embedding(codes)[:-1].float().norm(dim=-1).mean()))
        if i < SOUNDS:
            sounds |= {f"{i}-original": samples.cpu(), f"{i}-decoded": decoded.cpu()}
    if not found:
        return {}, {}
    together = torch.cat(list(found), dim=1)
    return {
        "valid_mel": float(np.median(distances)),
        "valid_codes_used": float(codebook_use(together)),
        "valid_perplexity": perplexity(together),
        "valid_saturated": saturated_share(together, codec.config.acoustic_codebook_size),
        "valid_embedding_norm": float(np.mean(norms)),
    }, sounds


@torch.no_grad()
def mean_likelihood(
    model: Voxtral, prompter: Prompter, utterances: Sequence[Utterance]
) -> tuple[float, float]:
    """Nats a semantic code and squared error of the velocity (`revox.metrics.likelihood`), means over the
    `utterances`, each in the voice of its own codes."""
    nll, flow = [], []
    for one in utterances:
        codes = one.codes.to(model.device)
        voice = Voice("validation", codes, model.mm_audio_embeddings.voice_embedding(codes))
        found = likelihood(model, make_prompt(model, prompter, one.text, voice).embeddings, codes)
        nll.append(float(found.semantic_nll))
        flow.append(float(found.flow_error))
    return float(np.mean(nll)), float(np.mean(flow))
