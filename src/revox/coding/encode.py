"""The codes of one clip from the checkpoint's own encoder, as serving computes them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from revox.coding.errors import CodingError
from revox.model.codec import Codec


@dataclass(frozen=True)
class Encoded:
    """The encoder's output for a clip: `codes` `[37, frames]`, int64, from 0, and the `latents` `[latent,
    frames]` they were rounded from, float32 (before the tanh). Both are on the codec's device."""

    codes: Tensor
    latents: Tensor


def float_codec(codec: Codec) -> Codec:
    """The codec in float32, for searches and for exact encoding: a copy if it is not."""
    return _in_type(codec, torch.float32)


def served_codec(codec: Codec) -> Codec:
    """The codec in bf16, in which encoders are served: a copy if it is not."""
    return _in_type(codec, torch.bfloat16)


def _in_type(codec: Codec, dtype: torch.dtype) -> Codec:
    if codec.output_proj.conv.weight.dtype == dtype:
        return codec
    return copy.deepcopy(codec).to(dtype).requires_grad_(False)


@torch.no_grad()
def encode(codec: Codec, samples: Tensor) -> Encoded:
    """The codes of one clip, `samples` `[samples]` at the codec's rate; the last frame is completed.

    A codec in bf16 (`served_codec`) encodes as vllm-omni does: the whole clip at once and by itself, under
    autocast, and the bf16 quantizer with its one tanh (`Codec.encode_as_served`). One in float32 gives the
    exact codes, which no runtime serves.

    Raises CodingError without an encoder, or when its weights give values that are not numbers; ValueError
    for samples that are empty or not a single clip.
    """
    if samples.dim() != 1 or not samples.numel():
        raise ValueError(f"a clip is samples [samples], at least one; got {list(samples.shape)}")
    if not codec.has_encoder:
        raise CodingError(
            "this checkpoint has no encoder, or only a part of one: use --method inversion, or put one in "
            "with `revox inject`"
        )
    weight = codec.output_proj.conv.weight
    waveform = samples.to(weight.device, torch.float32)[None]
    served = weight.dtype == torch.bfloat16
    with torch.autocast(waveform.device.type, dtype=torch.bfloat16, enabled=served):
        latents = codec.encode_latents(waveform)
    if not bool(latents.isfinite().all()):
        raise CodingError(
            "the encoder of this checkpoint gives values that are not numbers: its file is damaged, or its "
            "training was not finished; `revox inject --eject` takes it out"
        )
    # As `Codec.encode_as_served`: outside of autocast, on the bf16 latents.
    return Encoded(codec.quantizer.encode(latents)[0], latents[0].float())
