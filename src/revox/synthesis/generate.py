"""The frame loop for several prompts at once: each speaks until it ends and leaves, unaware of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from revox.model.config import END_AUDIO_ID, N_SPECIAL_CODES
from revox.model.voxtral import Voxtral
from revox.synthesis.errors import SpeakError

MAX_POSITIONS = 4096
"""Prompt and speech together, as in serving."""
MAX_FRAMES = 2048
"""New frames, as in serving: 164 s."""
CFG_RANGE = (0.0, 10.0)
FLOW_STEPS_RANGE = (1, 100)
DEFAULT_CFG = 1.2


@dataclass(frozen=True)
class Generated:
    """Codes `[37, frames]` from 0, without the end frame, and whether the model ended by itself."""

    codes: Tensor
    ended: bool


@dataclass(frozen=True)
class Step:
    """One frame of every prompt still speaking: ids `[items, 37]` of `items` (numbers of prompts).

    `ended[i]` says that `ids[i]` is an end frame, which is no speech.
    """

    items: list[int]
    ids: Tensor
    ended: list[bool]


def check_settings(cfg: float, flow_steps: int | None, seed: int, max_frames: int | None = None) -> None:
    """Raise SpeakError when a setting is out of range."""
    low, high = CFG_RANGE
    if not (math.isfinite(cfg) and low <= cfg <= high):
        raise SpeakError(
            f"cfg {cfg:g} is out of range: {low:g} to {high:g} is possible, {DEFAULT_CFG:g} is usual"
        )
    first, last = FLOW_STEPS_RANGE
    if flow_steps is not None and not first <= flow_steps <= last:
        raise SpeakError(
            f"{flow_steps} flow steps are out of range: {first} to {last} are possible, 7 are usual"
        )
    if not -(2**63) <= seed < 2**64:
        raise SpeakError(f"the seed {seed} is out of range: take a whole number below 2^64")
    if max_frames is not None and max_frames < 1:
        raise SpeakError("the longest duration allowed is below one frame (80 ms); allow more")


def room_for_speech(prompt_length: int, max_frames: int | None = None) -> int:
    """Frames that a prompt of so many positions may speak; 0 or less when it is too long."""
    return min(MAX_FRAMES, MAX_POSITIONS - prompt_length, max_frames or MAX_FRAMES)


def noise_of(seed: int, acoustic_dim: int) -> Tensor:
    """The noise of a whole utterance, `[MAX_FRAMES, acoustic_dim]`, float32, from a seed.

    Always drawn at full length, on the CPU and in float32: neither the batch, the device, the dtype nor the
    limit on the frames changes what a seed says.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(MAX_FRAMES, acoustic_dim, generator=generator, device="cpu", dtype=torch.float32)


@torch.inference_mode()
def frames(
    model: Voxtral,
    prompts: Sequence[Tensor],
    seeds: Sequence[int],
    *,
    cfg_alpha: float = DEFAULT_CFG,
    flow_steps: int | None = None,
    max_frames: int | None = None,
) -> Iterator[Step]:
    """Speak all `prompts` (each embedded, `[time, dim]`) together, one Step a frame, with one seed each.

    A prompt takes part until its end frame (the step says so), or until it has no room left (it is then
    simply not among the next step's items). The ids are those that it gives alone, up to ties in float32.
    Raises SpeakError when a setting is out of range or a prompt leaves no room to speak.
    """
    for seed in seeds:
        check_settings(cfg_alpha, flow_steps, seed, max_frames)
    room = [room_for_speech(len(prompt), max_frames) for prompt in prompts]
    if not prompts:
        return
    if min(room) < 1:
        raise SpeakError(
            f"a prompt of {max(map(len, prompts))} positions leaves none of {MAX_POSITIONS} for speech"
        )
    acoustic_dim = model.config.codec.acoustic_dim
    noise = torch.stack([noise_of(seed, acoustic_dim)[: max(room)] for seed in seeds], dim=1)
    noise = noise.to(model.device, model.dtype)
    hidden, cache = model.prefill(list(prompts), max(room))
    items = list(range(len(prompts)))
    for n in range(max(room)):
        ids = model.acoustic_transformer.frame(hidden, noise[n], cfg_alpha, flow_steps)
        ended = [code == END_AUDIO_ID for code in ids[:, 0].tolist()]
        yield Step(items, ids, ended)
        stay = [i for i, item in enumerate(items) if not ended[i] and n + 1 < room[item]]
        if not stay:
            return
        if len(stay) < len(items):
            kept = torch.tensor(stay, device=ids.device)
            items, ids = [items[i] for i in stay], ids[kept]
            noise, cache = noise[:, kept], cache.select(kept)
        hidden = model.step(ids, cache)


def generate(
    model: Voxtral,
    prompts: Sequence[Tensor],
    seeds: Sequence[int],
    *,
    cfg_alpha: float = DEFAULT_CFG,
    flow_steps: int | None = None,
    max_frames: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Generated]:
    """What each of `prompts` (embedded, `[time, dim]`) says; see `frames`.

    `progress` is told the frames so far.
    """
    spoken: list[list[Tensor]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    steps = frames(model, prompts, seeds, cfg_alpha=cfg_alpha, flow_steps=flow_steps, max_frames=max_frames)
    for n, step in enumerate(steps, start=1):
        for i, item in enumerate(step.items):
            if step.ended[i]:
                done[item] = True
            else:
                spoken[item].append(step.ids[i])
        if progress is not None:
            progress(n)
    nothing = torch.zeros((model.config.codec.n_codebooks, 0), dtype=torch.long, device=model.device)
    return [
        Generated(torch.stack(ids, dim=1) - N_SPECIAL_CODES if ids else nothing, ended)
        for ids, ended in zip(spoken, done, strict=True)
    ]
