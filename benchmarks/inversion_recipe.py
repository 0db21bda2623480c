"""The published way to find a clip's codes without an encoder, as described, for comparison.

Gradient descent through the frozen decoder: semantic codes by a Gumbel-softmax over the codebook
(straight-through), acoustic codes by a tanh (straight-through); L1 of samples, multi-resolution STFT, log-mel
and MFCC distances and a speaker embedding's; Adam at 0.1, up to 5,000 steps. Written from that description:
its authors' weights of the terms are not known here and are 1. Their speaker network (ECAPA-TDNN) cannot be
had here; `speaker` takes any other that is not the judge's, and the row says whether there was one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from revox.losses.stft import stft, to_mel
from revox.model.codec import Codec

STFT = (512, 1024, 2048)
MEL_FFT, MEL_BANDS, MFCCS = 1024, 80, 13
RATE = 0.1


@dataclass(frozen=True)
class Found:
    """Hard codes `[37, frames]` after `steps` steps and `seconds` of the processor, and the loss there."""

    codes: Tensor
    steps: int
    seconds: float
    loss: float


def _dct(count: int, bands: int) -> Tensor:
    n = torch.arange(bands) + 0.5
    return torch.cos(torch.pi / bands * torch.arange(count)[:, None] * n) * (2 / bands) ** 0.5


class _Distance:
    def __init__(self, target: Tensor, rate: int, speaker: Callable[[Tensor], Tensor] | None) -> None:
        self.target, self.rate, self.speaker = target, rate, speaker
        self.dct = _dct(MFCCS, MEL_BANDS)
        with torch.no_grad():
            self.wanted = self._parts(target)

    def _parts(self, x: Tensor) -> list[Tensor]:
        sizes = [stft(x, n, n // 4).abs() for n in STFT]
        mel = to_mel(sizes[STFT.index(MEL_FFT)], self.rate, MEL_BANDS).clamp_min(1e-5).log()
        parts = [*sizes, mel, self.dct @ mel]
        if self.speaker is not None:
            parts.append(self.speaker(x))
        return parts

    def __call__(self, x: Tensor) -> Tensor:
        found, n = self._parts(x), len(STFT)
        loss = (x - self.target).abs().mean()
        for size, wanted in zip(found[:n], self.wanted[:n], strict=True):
            convergence = (size - wanted).norm() / wanted.norm()
            logs = (size.clamp_min(1e-5).log() - wanted.clamp_min(1e-5).log()).abs().mean()
            loss = loss + (convergence + logs) / n
        loss = loss + (found[n] - self.wanted[n]).abs().mean()
        loss = loss + (found[n + 1] - self.wanted[n + 1]).abs().mean()
        if self.speaker is not None:
            loss = loss + 1 - functional.cosine_similarity(found[-1], self.wanted[-1], dim=-1).mean()
        return loss


def recipe(
    codec: Codec,
    target: Tensor,
    at_steps: list[int],
    *,
    seed: int = 0,
    speaker: Callable[[Tensor], Tensor] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Found]:
    """Codes of `target` `[samples]` (whole frames) after each number of steps in `at_steps`, ascending."""
    config = codec.config
    frames = len(target) // codec.samples_per_frame
    rng = torch.Generator().manual_seed(seed)
    table = codec.quantizer.semantic_codebook.embedding.detach()
    logits = (0.01 * torch.randn((frames, len(table)), generator=rng)).requires_grad_()
    acoustic = (0.1 * torch.randn((config.acoustic_dim, frames), generator=rng)).requires_grad_()
    half = (config.acoustic_codebook_size - 1) / 2
    distance = _Distance(target, config.sampling_rate, speaker)
    optimizer = torch.optim.Adam([logits, acoustic], lr=RATE)
    found: list[Found] = []
    began, spent = time.process_time(), 0.0

    def hard() -> Tensor:
        levels = (torch.tanh(acoustic.detach()) * half + half).round().long()
        return torch.cat((logits.detach().argmax(dim=1)[None], levels))

    for step in range(1, max(at_steps) + 1):
        noise = -torch.log(-torch.log(torch.rand(logits.shape, generator=rng).clamp(1e-9, 1 - 1e-9)))
        soft = functional.softmax(logits + noise, dim=1)
        one = functional.one_hot(soft.argmax(dim=1), len(table)).float()
        rows = (one + soft - soft.detach()) @ table
        values = torch.tanh(acoustic)
        rounded = (values.detach() * half + half).round() / half - 1
        heard = values + (rounded - values).detach()
        waveform = codec.decode_latents(torch.cat((rows.T, heard))[None])[0, : len(target)]
        loss = distance(waveform)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step in at_steps:
            spent = time.process_time() - began
            found.append(Found(hard(), step, spent, float(loss.detach())))
            if should_stop():
                break
    return found


def usual_seconds(found: list[Found]) -> float:
    """Seconds a step took, in the median."""
    return float(np.median([f.seconds / f.steps for f in found]))
