"""Codes -> audio in chunks, each with as much left context as makes it equal to decoding all at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from revox.model.codec import Codec, decoder_reach
from revox.model.config import N_SPECIAL_CODES
from revox.model.voxtral import Voxtral
from revox.synthesis.generate import DEFAULT_CFG, frames, room_for_speech

FIRST_ENDS = (5, 10, 15, 20)
CHUNK = 25
"""Chunks end at frames 5, 10, 15, 20, 25, 50, 75 ..., as in serving: audio starts early, then costs less."""
PIECE = 100
"""Frames decoded at a time when nobody waits. The codec's attention has a mask of patches squared: the
longest speech in one piece would take 9 GB."""


def chunk_ends() -> Iterator[int]:
    """Frame numbers at which chunks of a stream end, without end."""
    yield from FIRST_ENDS
    end = CHUNK
    while True:
        yield end
        end += CHUNK


def decode_after(codec: Codec, codes: Tensor, start: int) -> Tensor:
    """Samples, float32, of `codes` `[37, frames]` from frame `start` on; earlier frames are context."""
    context = max(0, start - decoder_reach(codec))
    audio = codec.decode(codes[None, :, context:])[0]
    return audio[(start - context) * codec.samples_per_frame :].float()


@torch.inference_mode()
def decode(codec: Codec, codes: Tensor) -> Tensor:
    """Samples, float32, of all of `codes` `[37, frames]` (from 0), in bounded memory; never clipped."""
    if codes.shape[1] == 0:
        return torch.zeros(0, device=codes.device)
    pieces = [
        decode_after(codec, codes[:, : start + PIECE], start) for start in range(0, codes.shape[1], PIECE)
    ]
    return torch.cat(pieces)


@torch.inference_mode()
def stream(
    model: Voxtral,
    prompt: Tensor,
    seed: int = 0,
    *,
    cfg_alpha: float = DEFAULT_CFG,
    flow_steps: int | None = None,
    max_frames: int | None = None,
) -> Iterator[tuple[Tensor, bool]]:
    """Speak one `prompt` `[time, dim]` and give its audio while it is made: float32 samples, chunk by chunk.

    With each chunk comes whether the speech was cut there, at the limit on its length. Laid end to end the
    chunks are what `generate` and `decode` give. Raises SpeakError as `frames` does.
    """
    limit = room_for_speech(len(prompt), max_frames)
    ends = chunk_ends()
    end, start = next(ends), 0
    spoken: list[Tensor] = []
    steps = frames(model, [prompt], [seed], cfg_alpha=cfg_alpha, flow_steps=flow_steps, max_frames=max_frames)
    for step in steps:
        if not step.ended[0]:
            spoken.append(step.ids[0])
            if len(spoken) < min(end, limit):
                continue
        if len(spoken) > start:
            yield _chunk(model.audio_tokenizer, spoken, start), len(spoken) == limit and not step.ended[0]
            start, end = len(spoken), next(ends)


def _chunk(codec: Codec, ids: list[Tensor], start: int) -> Tensor:
    first = max(0, start - decoder_reach(codec))
    codes = torch.stack(ids[first:], dim=1) - N_SPECIAL_CODES
    return decode_after(codec, codes, start - first)
