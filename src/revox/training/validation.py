"""What serving would give with the encoder as it is: codes of decoded presets, and of validation clips."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from revox.coding import Coder, CodingSettings, find_codes
from revox.losses.spectral import mel_distance
from revox.metrics.codes import codebook_use, perplexity, saturated_share
from revox.model.codec import Codec
from revox.model.embedding import Embeddings

PRESETS = 20  # at most, whose codes are compared
SOUNDS = 4  # clips that can be listened to
ENCODER = CodingSettings("encoder")


@dataclass
class Validation:
    """Clips `[samples]` to validate on, and TensorBoard's `SummaryWriter`, which receives their sounds."""

    clips: Sequence[Tensor] = ()
    writer: Any = None


def as_served(codec: Codec, encoder: dict[str, Tensor]) -> Coder:
    """What finds codes with a copy of `codec` that has the weights `encoder`, in bf16."""
    served = copy.deepcopy(codec)
    served.load_state_dict(encoder, strict=False)
    return Coder(served.to(torch.bfloat16).eval())


@torch.no_grad()
def preset_figures(codec: Codec, served: Coder, presets: Sequence[Tensor], frames: int) -> dict[str, float]:
    """How codes of decoded presets compare with the right ones.

    `presets` are codes `[37, frames]`, of which the first `frames` are taken: the share of semantic codes
    that agree, and the mean difference of acoustic ones in levels.
    """
    device = codec.output_proj.conv.weight.device
    agreement, error = [], []
    for codes in presets[:PRESETS]:
        codes = codes[:, :frames].to(device)
        audio = codec.decode(codes[None])
        found = find_codes(served, audio[0], ENCODER).codes.to(device)
        agreement.append(float((found[0] == codes[0]).float().mean()))
        error.append(float((found[1:] - codes[1:]).abs().float().mean()))
    return {"valid_agreement": float(np.mean(agreement)), "valid_levels": float(np.mean(error))}


@torch.no_grad()
def clip_figures(
    codec: Codec, served: Coder, embeddings: Embeddings, clips: Sequence[Tensor]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Figures of `clips` `[samples]` through the codec, and the first few before and after by name.

    Mel distance, codes in use, their perplexity, the share of acoustic codes on the first or last level, and
    the norm of the voice embedding's frames.
    """
    device, rate = codec.output_proj.conv.weight.device, codec.config.sampling_rate
    found, distances, norms = [], [], []
    sounds: dict[str, Tensor] = {}
    for i, clip in enumerate(clips):
        clip = clip.to(device)
        codes = find_codes(served, clip, ENCODER).codes
        decoded = codec.decode(codes[None].to(device))[0, : len(clip)]
        distances.append(mel_distance(decoded[None], clip[None], rate))
        found.append(codes)
        norms.append(float(embeddings.voice_embedding(found[-1])[:-1].float().norm(dim=-1).mean()))
        if i < SOUNDS:
            sounds |= {f"{i}-original": clip.cpu(), f"{i}-decoded": decoded.cpu()}
    if not found:
        return {}, {}
    together = torch.cat(found, dim=1)
    return {
        "valid_mel": float(np.median(distances)),
        "valid_codes_used": float(codebook_use(together)),
        "valid_perplexity": perplexity(together),
        "valid_saturated": saturated_share(together, codec.config.acoustic_codebook_size),
        "valid_embedding_norm": float(np.mean(norms)),
    }, sounds
