"""The codes of one clip from the checkpoint's own encoder, as serving takes them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from revox.coding.errors import CodingError
from revox.model.codec import Codec


@dataclass(frozen=True)
class Encoded:
    """What the encoder says of a clip: `codes` `[37, frames]`, int64, from 0, and the `latents` `[latent,
    frames]` they were rounded from, float32 (before the tanh). Both lie on the codec's device."""

    codes: Tensor
    latents: Tensor


def served(codec: Codec) -> Codec:
    """The codec in bf16, in which encoders are served: a copy if it is not.

    Make it once where many clips are encoded. Raises CodingError without an encoder.
    """
    if not codec.has_encoder:
        raise CodingError(
            "this checkpoint has no encoder (or a part of one): take --method inversion, or put one in with "
            "`revox inject`"
        )
    if codec.output_proj.conv.weight.dtype == torch.bfloat16:
        return codec
    return copy.deepcopy(codec).bfloat16().requires_grad_(False)


@torch.no_grad()
def encode(codec: Codec, samples: Tensor) -> Encoded:
    """The codes of one clip, `samples` `[samples]` at the codec's rate; the last frame is completed.

    The whole clip goes in at once and by itself, through weights in bf16 under autocast, and the bf16
    quantizer with its one tanh: the rows of these codes are those that vllm-omni gives the same samples
    (`Codec.encode_as_served`). A codec in another type is copied (`served`).

    Raises CodingError without an encoder, or when its weights give values that are not numbers; ValueError
    for samples that are empty or not a single clip.
    """
    if samples.dim() != 1 or not samples.numel():
        raise ValueError(f"a clip is samples [samples], at least one; got {list(samples.shape)}")
    codec = served(codec)
    waveform = samples.to(codec.output_proj.conv.weight.device, torch.float32)[None]
    with torch.autocast(waveform.device.type, dtype=torch.bfloat16):
        latents = codec.encode_latents(waveform)
    if not bool(latents.isfinite().all()):
        raise CodingError(
            "the encoder of this checkpoint gives values that are not numbers: it is damaged or was not "
            "trained to an end; `revox inject --eject` takes it out"
        )
    # As `Codec.encode_as_served`: outside of autocast, on the bf16 latents.
    return Encoded(codec.quantizer.encode(latents)[0], latents[0].float())
