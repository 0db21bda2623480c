"""Checks of the presets: embeddings, the codes behind them, their sound, and whether the names fit."""

from __future__ import annotations

import numpy as np
import torch

from revox.checkpoint.release import END_POSITION_NORM, MEAN_COSINE, POSITION_NORM, PRESETS
from revox.doctor.checkpoint_under_test import CheckpointUnderTest, sex_of
from revox.doctor.findings import CheckResult, Figure, Value, Verdict
from revox.doctor.sound import SoundFigures

PITCH = {"male": (70.0, 200.0), "female": (135.0, 300.0)}
"""Median pitch in Hz of adult speakers: one in a hundred of 125 men and 125 women of LibriSpeech is outside
(5 s of each). Pitches in both ranges say nothing about the name."""
CLEARLY_VOICED = 0.35
"""Least share of voiced frames for a pitch that may contradict a name."""
FAINTLY_VOICED = 0.12
"""Least share for a pitch that may support what another voice's clear one says."""


def voice_embedding(subject: CheckpointUnderTest) -> CheckResult:
    """Are the presets' embeddings sums over this checkpoint's table, closed by the end frame, with the
    release's norms?"""
    rows: list[dict[str, Value]] = []
    means, explained, norms, ends = [], [], [], []
    for voice in subject.names:
        tensor = subject.voice(voice).embedding.float()
        found = subject.recovered(voice)
        body = tensor[:-1] if found.ended else tensor
        share = float(found.exact.float().mean()) if len(found.exact) else 0.0
        means.append(body.mean(0))
        explained.append(share)
        norms.append(float(body.norm(dim=1).mean()))
        ends.append(float(tensor[-1].norm()))
        rows.append(
            {
                "voice": voice,
                "frames": len(tensor),
                "explained exactly": round(share, 3),
                "end frame": found.ended,
                "norm of a frame": round(norms[-1], 3),
                "norm of the end": round(ends[-1], 2),
            }
        )
    unit = torch.nn.functional.normalize(torch.stack(means), dim=1)
    above = torch.triu(torch.ones(len(unit), len(unit), dtype=torch.bool), diagonal=1)
    cosines = (unit @ unit.T)[above]
    lowest = float(cosines.min()) if len(cosines) else None
    release = subject.is_release_sized

    def within(bounds: tuple[float, float]) -> str:
        return f"{bounds[0]:g} to {bounds[1]:g}" if release else "unknown at these sizes"

    figures = (
        Figure("frames explained exactly by the table", float(np.mean(explained)), "above 0.9"),
        Figure("norm of a frame, mean", float(np.mean(norms)), within(POSITION_NORM)),
        Figure("norm of the end frame", float(np.mean(ends)), within(END_POSITION_NORM)),
        Figure("cosine of two voices' mean frames, lowest", lowest, within(MEAN_COSINE)),
    )
    poor = [v for v, share in zip(subject.names, explained, strict=True) if share < 0.9]
    if poor:
        sentence = (
            f"The embeddings of {', '.join(poor[:5])} are not sums over this checkpoint's audio table: "
            "the voice files and the weights are of different checkpoints. Copy both again."
        )
        return CheckResult(Verdict.FAIL, sentence, figures, rows)
    odd = []
    if release:
        for figure, (low, high) in zip(
            figures[1:], (POSITION_NORM, END_POSITION_NORM, MEAN_COSINE), strict=True
        ):
            if isinstance(figure.value, float) and not low <= figure.value <= high:
                odd.append(figure.name)
        other = [r["voice"] for r in rows if PRESETS.get(str(r["voice"]), r["frames"]) != r["frames"]]
        odd += [f"the number of frames of {voice}" for voice in other]
    sentences = []
    if odd:
        sentences.append(f"All frames are explained, but {', '.join(odd)} is not as in the release.")
    endless = [str(row["voice"]) for row in rows if not row["end frame"]]
    if endless:
        sentences.append(
            f"The embeddings of {', '.join(endless[:5])} do not close with the end frame, as a reference "
            "does: they are cut off, or were made without it. Copy or make them again."
        )
    if sentences:
        return CheckResult(Verdict.WARN, " ".join(sentences), figures, rows)
    sentence = "Every voice is a sum over this checkpoint's table: its codes are known."
    return CheckResult(Verdict.PASS, sentence, figures, rows)


def decoded_presets(subject: CheckpointUnderTest) -> CheckResult:
    """Do the presets' codes decode to speech?"""
    rows: list[dict[str, Value]] = []
    good = 0
    for voice in subject.names:
        figures = subject.decoded_figures(voice)
        good += figures.is_speech
        rows.append({"voice": voice, **figures.as_row(), "not as speech": ", ".join(figures.faults)})
    share = good / max(1, len(rows))
    figures_ = (Figure("voices that decode to speech", share, "1 (0.8 and more passes)"),)
    if share >= 0.8:
        sentence = "The presets decode to speech: the codec works."
        return CheckResult(Verdict.PASS, sentence, figures_, rows)
    if share >= 0.5:
        sentence = "Some presets decode to something unlike speech; listen to them (--sounds)."
        return CheckResult(Verdict.WARN, sentence, figures_, rows)
    if subject.suspects:
        more = "" if len(subject.suspects) < 5 else f" and {len(subject.suspects) - 4} more"
        why = (
            "The codec is half-loaded: the presets do not decode to speech, and these of its tensors are "
            f"untrained: {', '.join(subject.suspects[:4])}{more}. Copy or download the weights again."
        )
    else:
        why = (
            "The presets do not decode to speech although their codes are known and every tensor looks "
            "trained: the codec's weights do not belong to this table, or its arithmetic is wrong here; try "
            "--dtype float32 and --device cpu."
        )
    return CheckResult(Verdict.FAIL, why, figures_, rows)


def pitch_and_names(subject: CheckpointUnderTest) -> CheckResult:
    """Does each preset's pitch allow what its name says, male or female?"""
    pitches = {v: subject.decoded_figures(v) for v in subject.names if sex_of(v)}
    rows: list[dict[str, Value]] = []
    wrong: list[str] = []
    faintly_wrong: list[str] = []
    clear = 0
    for voice, figures in pitches.items():
        sex = str(sex_of(voice))
        low, high = PITCH[sex]
        sure = figures.is_speech and figures.voiced >= CLEARLY_VOICED
        clear += sure
        fits = low <= figures.pitch <= high
        if sure and not fits:
            wrong.append(voice)
        elif figures.is_speech and figures.voiced >= FAINTLY_VOICED and not fits:
            faintly_wrong.append(voice)
        match = ("fits" if fits else "contradicts") if sure else "not clear"
        rows.append(
            {
                "voice": voice,
                "pitch Hz": round(figures.pitch) if np.isfinite(figures.pitch) else None,
                "voiced": round(figures.voiced, 2),
                "the name": match,
                "expected": f"{low:g} to {high:g}",
            }
        )
    figures_ = (
        Figure("voices with a clear pitch", clear, "most"),
        Figure("whose pitch contradicts the name", len(wrong), "0"),
    )
    if not pitches:
        return CheckResult(Verdict.SKIPPED, "No voice's name says male or female.", figures_)
    swapped = _swapped(wrong, wrong, pitches) or _swapped(wrong, faintly_wrong, pitches)
    if swapped:
        names = " or ".join(f"{a} and {b}" for a, b in swapped)
        sentence = (
            f"Two voices are swapped: {names}. Each has the pitch of the other's sex; exchanged, both fit. "
            "Exchange the two files in voice_embedding, or copy them again."
        )
        return CheckResult(Verdict.FAIL, sentence, figures_, rows)
    if wrong:
        sentence = (
            f"The pitch of {', '.join(wrong)} contradicts the name; listen: it may be another voice's file."
        )
        return CheckResult(Verdict.WARN, sentence, figures_, rows)
    if clear < 0.5 * len(pitches):
        sentence = "Hardly any voice is voiced clearly enough for a pitch; swapped files would not show."
        return CheckResult(Verdict.WARN, sentence, figures_, rows)
    sentence = "No preset's pitch contradicts its name. Files swapped within one sex do not show here."
    return CheckResult(Verdict.PASS, sentence, figures_, rows)


def _swapped(clear: list[str], others: list[str], pitches: dict[str, SoundFigures]) -> list[tuple[str, str]]:
    """Pairs of a male and a female name, one of `clear` and one of `others`, that fit when exchanged."""
    pairs = {tuple(sorted((a, b))) for a in clear for b in others if sex_of(a) != sex_of(b)}
    return [(a, b) for a, b in sorted(pairs) if _fits(pitches[a].pitch, b) and _fits(pitches[b].pitch, a)]


def _fits(pitch: float, name: str) -> bool:
    low, high = PITCH[str(sex_of(name))]
    return low <= pitch <= high
