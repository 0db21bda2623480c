"""Recordings whose codes inversion found: pairs of real speech, for an encoder to learn from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from revox.cloning.clone import float_codec
from revox.coding.invert import Guess, InversionConfig, invert
from revox.coding.prior import CodePrior
from revox.coding.student import default_training, quick_encoder_for
from revox.model.codec import Codec
from revox.training.data import ClipBatches, ClipSampler, SpeechSource
from revox.training.kept import read_kept, write_kept
from revox.training.settings import EncoderTraining

Progress = Callable[[str, int, int | None], None]


def inverted_recordings(
    codec: Codec,
    bank: Sequence[Tensor],
    sources: Sequence[SpeechSource],
    settings: EncoderTraining,
    kept: Path,
    *,
    stamp: Sequence[str],
    device: str = "cpu",
    progress: Progress = lambda what, done, of: None,
) -> list[tuple[Tensor, Tensor]]:
    """`settings.inverted` clips of `sources`, float16 `[samples]`, each with its codes `[37, frames]`.

    A search starts where the quick encoder, trained on pairs of this decoder, guesses, and stays near the
    codes of `bank`: codes that only sound right would teach the encoder what the language model never says.
    Each is kept in the file `kept` as it is found, and taken from there where `stamp`, clips and settings are
    the same. KeyboardInterrupt ends it and is raised again.
    """
    asked = (settings.seconds, settings.inversion_steps, settings.seed)
    digest = hashlib.sha256(json.dumps([*stamp, *map(str, asked)]).encode()).hexdigest()
    found = _read(kept, digest)
    if len(found) >= settings.inverted:
        return found[: settings.inverted]
    codec = float_codec(codec).to(device)
    quick = quick_encoder_for(
        codec, list(bank), default_training(codec), kept.parent,
        lambda step, steps, losses: progress("quick encoder for inversion", step, steps),
    )  # fmt: skip
    prior, rate = CodePrior.from_codes(bank, codec), codec.config.sampling_rate
    frames = max(1, round(settings.seconds * rate / codec.samples_per_frame))
    sampler = ClipSampler(sources, seconds=settings.seconds, batch=1, seed=settings.seed + 1)
    with ClipBatches(sampler, rate, workers=0) as clips:
        for i, clip in zip(range(settings.inverted), clips, strict=False):
            if i < len(found):
                continue
            samples = clip.waveforms[0][: frames * codec.samples_per_frame]
            samples = torch.nn.functional.pad(samples, (0, frames * codec.samples_per_frame - len(samples)))
            guess = None if quick is None else Guess(*quick.guess(samples.to(device)))
            config = InversionConfig().taking(settings.inversion_steps)
            result = invert(codec, samples.to(device), config=config, prior=prior, guess=guess, seed=i)
            if result.stopped:
                raise KeyboardInterrupt
            found.append((samples.half().cpu(), result.codes.cpu()))
            if (i + 1) % 8 == 0 or i + 1 == settings.inverted:
                _write(kept, digest, found)
            progress("recordings inverted", i + 1, settings.inverted)
    return found


def _write(path: Path, stamp: str, found: Sequence[tuple[Tensor, Tensor]]) -> None:
    tensors = {}
    for i, (samples, codes) in enumerate(found):
        tensors[f"{i:06d}.samples"] = samples
        tensors[f"{i:06d}.codes"] = codes.to(torch.int16)
    write_kept(path, stamp, tensors)


def _read(path: Path, stamp: str) -> list[tuple[Tensor, Tensor]]:
    kept = read_kept(path, stamp)
    names = sorted(name.removesuffix(".codes") for name in kept if name.endswith(".codes"))
    return [(kept[f"{name}.samples"], kept[f"{name}.codes"].long()) for name in names]
