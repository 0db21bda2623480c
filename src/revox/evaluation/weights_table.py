"""What fewer bits change: the codes that a quantized folder chooses, beside the original's."""

from __future__ import annotations

import torch

from revox.api import Revox
from revox.evaluation.evaluate import DEFAULT_TEXTS
from revox.metrics.agreement import Agreement, ComparedUtterance, code_agreement
from revox.model.config import N_SPECIAL_CODES
from revox.progress import ProgressCallback, ignore_progress
from revox.synthesis.engine import noise_of


def weights_agreement(
    original: Revox,
    quantized: Revox,
    utterances: int,
    max_seconds: float,
    progress: ProgressCallback = ignore_progress,
) -> Agreement:
    """Agreement on what the original speaks: the default texts in turn, in its voices in turn."""
    voices, spoken = original.voices(), []
    for seed in range(utterances):
        text, voice = DEFAULT_TEXTS[seed % len(DEFAULT_TEXTS)], original.voice(voices[seed % len(voices)])
        speech = original.synthesize(text, voice, seed=seed, max_seconds=max_seconds, progress=progress)
        spoken.append(
            ComparedUtterance(
                tokens=torch.tensor(original.prompter.tokens(text, len(voice.embedding))),
                audio_token=original.prompter.audio_token,
                voice=voice.embedding,
                frames=speech.codes.T + N_SPECIAL_CODES,
                noise=noise_of(seed, len(speech.codes) - 1)[: speech.codes.shape[1] + 1],
            )
        )
    return code_agreement(original.model, quantized.model, spoken)


def quality_table(found: Agreement, utterances: int, original: Revox, quantized: Revox) -> str:
    """A paragraph and a Markdown table for the card."""
    first = "none" if found.first is None else str(found.first)
    return (
        "The share of codes that are the original's, given the same past: "
        f"{utterances} utterances in {min(utterances, len(original.voices()))} voices, {found.frames} "
        f"frames; the original in {original.weights}.\n\n"
        "| weights | semantic codes | acoustic codes | levels off (of 20) | first frame that differs |\n"
        "| --- | --- | --- | --- | --- |\n"
        f"| {quantized.weights} | {found.semantic:.3f} | {found.acoustic:.3f} | {found.level_error:.3f} | "
        f"{first} |"
    )
