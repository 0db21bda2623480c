"""Pseudo-labels: recordings with the codes that inversion finds for them, to learn from as from pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from revox.coding import Coder, CodingSettings, find_codes
from revox.model.codec import Codec
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech.files import load_stamped, save_stamped, stamp_of
from revox.training.data import ClipBatches, ClipSampler, SpeechSource
from revox.training.settings import EncoderTraining
from revox.training.student import student_for


def pseudo_labeled(
    codec: Codec,
    preset_codes: Sequence[Tensor],
    sources: Sequence[SpeechSource],
    settings: EncoderTraining,
    cache: Path,
    *,
    stamp: Sequence[str],
    device: str = "cpu",
    progress: ProgressCallback = ignore_progress,
) -> list[tuple[Tensor, Tensor]]:
    """`settings.pseudo_labeled` clips of `sources`, float16 `[samples]`, each with its codes `[37, frames]`.

    They are whole frames, fewer than the settings' `seconds` where a clip is shorter.

    A search starts at the posterior of the student encoder, which is trained on pairs of this decoder, and
    stays near `preset_codes`: codes that only sound right would teach the encoder what the language model
    never says. Each is cached in the folder `cache` as it is found, and taken from there where `stamp`, clips
    and settings are the same. KeyboardInterrupt ends it and is raised again.
    """
    facts = (*stamp, settings.seconds, settings.inversion_steps, settings.seed)
    found: list[tuple[Tensor, Tensor]] = []
    for i in range(settings.pseudo_labeled):
        content = load_stamped(cache / f"{i:06d}.safetensors", stamp_of(*facts, i))
        if content is None:
            break
        tensors = load(content)
        found.append((tensors["samples"], tensors["codes"].long()))
    if len(found) == settings.pseudo_labeled:
        return found
    student = student_for(codec.to(device), preset_codes, cache / "student", stamp_of(*facts), progress)
    coder, rate = Coder(codec, preset_codes, student=lambda codec: student), codec.config.sampling_rate
    length = settings.frames(codec.config) * codec.samples_per_frame
    sampler = ClipSampler(sources, seconds=length / rate, batch=1, seed=settings.seed + 1)
    with ClipBatches(sampler, rate, workers=0) as clips:
        for i, clip in zip(range(settings.pseudo_labeled), clips, strict=False):
            if i < len(found):
                continue
            frames = max(1, min(length, int(clip.lengths[0])) // codec.samples_per_frame)
            samples = clip.fitted(length).waveforms[0, : frames * codec.samples_per_frame]
            search = CodingSettings("student", refine=settings.inversion_steps, seed=i)
            coding = find_codes(coder, samples, search)
            if coding.stopped:
                raise KeyboardInterrupt
            found.append((samples.half().cpu(), coding.codes))
            content = save({"samples": found[-1][0], "codes": found[-1][1].to(torch.int16)})
            save_stamped(cache / f"{i:06d}.safetensors", stamp_of(*facts, i), content)
            progress(Progress("recordings inverted", i + 1, settings.pseudo_labeled))
    return found
