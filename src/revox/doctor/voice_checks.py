"""Checks of the presets: rows, the codes behind them, how they sound, and whether the names fit."""

from __future__ import annotations

import numpy as np
import torch

from revox.checkpoint.release import END_POSITION_NORM, MEAN_COSINE, POSITION_NORM, PRESETS
from revox.doctor.findings import Figure, Finding, Value, Verdict
from revox.doctor.patient import Patient, sex_of
from revox.doctor.sound import SoundFigures

PITCH = {"male": (70.0, 200.0), "female": (135.0, 300.0)}
"""Median pitch in Hz of adult speakers: one in a hundred of 125 men and 125 women of LibriSpeech lies outside
(5 s of each). Between the inner two pitch says nothing about the name."""
CLEARLY_VOICED = 0.35
"""Least share of voiced frames for a pitch that may contradict a name."""
FAINTLY_VOICED = 0.12
"""Least share for a pitch that may support what another voice's clear one says."""


def voice_embedding(patient: Patient) -> Finding:
    """Are the presets' rows sums of this checkpoint's table, and of the length known of the release?"""
    name = "voice rows"
    rows: list[dict[str, Value]] = []
    means, explained, norms, ends = [], [], [], []
    for voice in patient.names:
        tensor = patient.voice(voice).embedding.float()
        found = patient.recovered(voice)
        body = tensor[:-1] if found.ended else tensor
        share = float(found.exact.float().mean()) if len(found.exact) else 0.0
        means.append(body.mean(0))
        explained.append(share)
        norms.append(float(body.norm(dim=1).mean()))
        ends.append(float(tensor[-1].norm()))
        rows.append(
            {
                "voice": voice,
                "rows": len(tensor),
                "explained exactly": round(share, 3),
                "end frame": found.ended,
                "row norm": round(norms[-1], 3),
                "end row norm": round(ends[-1], 2),
            }
        )
    unit = torch.nn.functional.normalize(torch.stack(means), dim=1)
    above = torch.triu(torch.ones(len(unit), len(unit), dtype=torch.bool), diagonal=1)
    cosines = (unit @ unit.T)[above]
    release = patient.is_release_sized

    def within(bounds: tuple[float, float]) -> str:
        return f"{bounds[0]:g} to {bounds[1]:g}" if release else "the release's do not apply to these sizes"

    figures = (
        Figure("rows explained exactly by the table", float(np.mean(explained)), "above 0.9"),
        Figure("row norm, mean", float(np.mean(norms)), within(POSITION_NORM)),
        Figure("norm of the end row", float(np.mean(ends)), within(END_POSITION_NORM)),
        Figure(
            "cosine of two voices' mean rows, lowest",
            float(cosines.min()) if len(cosines) else None,
            within(MEAN_COSINE),
        ),
    )
    poor = [v for v, share in zip(patient.names, explained, strict=True) if share < 0.9]
    if poor:
        sentence = (
            f"The rows of {', '.join(poor[:5])} are not sums over this checkpoint's audio embedding table: "
            "the voice files and the weights are not of one checkpoint. Copy both again."
        )
        return Finding(name, Verdict.FAIL, sentence, figures, tuple(rows))
    odd = []
    if release:
        for figure, (low, high) in zip(
            figures[1:], (POSITION_NORM, END_POSITION_NORM, MEAN_COSINE), strict=True
        ):
            if isinstance(figure.value, float) and not low <= figure.value <= high:
                odd.append(figure.name)
        other = [r["voice"] for r in rows if PRESETS.get(str(r["voice"]), r["rows"]) != r["rows"]]
        odd += [f"the number of rows of {voice}" for voice in other]
    if odd:
        sentence = f"All rows are explained, but {', '.join(odd)} is not as in the release."
        return Finding(name, Verdict.WARN, sentence, figures, tuple(rows))
    sentence = "Every voice is a sum of rows of this checkpoint's table: its codes are known."
    return Finding(name, Verdict.PASS, sentence, figures, tuple(rows))


def decoded_presets(patient: Patient) -> Finding:
    """Do the presets' codes decode to speech?"""
    name = "decoded presets"
    rows: list[dict[str, Value]] = []
    good = 0
    for voice in patient.names:
        figures = patient.decoded_figures(voice)
        good += figures.is_speech
        rows.append({"voice": voice, **figures.as_row(), "not as speech": ", ".join(figures.faults)})
    share = good / max(1, len(rows))
    figures_ = (Figure("voices that decode to speech", share, "1 (0.8 and more passes)"),)
    if share >= 0.8:
        sentence = "The presets decode to what has the signs of speech: the codec works."
        return Finding(name, Verdict.PASS, sentence, figures_, tuple(rows))
    if share >= 0.5:
        sentence = "Some presets decode to what hardly resembles speech; listen to them (--sounds)."
        return Finding(name, Verdict.WARN, sentence, figures_, tuple(rows))
    if patient.suspects:
        more = "" if len(patient.suspects) < 5 else f" and {len(patient.suspects) - 4} more"
        why = (
            "The codec is half-loaded: the presets do not decode to speech, and these of its tensors hold no "
            f"training: {', '.join(patient.suspects[:4])}{more}. Copy or download the weights again."
        )
    else:
        why = (
            "The presets do not decode to speech although their codes are known and every tensor looks "
            "trained: the codec's weights are not those of this table, or its arithmetic is wrong here; try "
            "--dtype float32 and --device cpu."
        )
    return Finding(name, Verdict.FAIL, why, figures_, tuple(rows))


def pitch_and_names(patient: Patient) -> Finding:
    """Does each preset's pitch allow what its name says, male or female?"""
    name = "pitch and names"
    pitches = {v: patient.decoded_figures(v) for v in patient.names if sex_of(v)}
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
        said = ("fits" if fits else "contradicts") if sure else "not clear"
        rows.append(
            {
                "voice": voice,
                "pitch Hz": round(figures.pitch) if np.isfinite(figures.pitch) else None,
                "voiced": round(figures.voiced, 2),
                "the name": said,
                "expected": f"{low:g} to {high:g}",
            }
        )
    figures_ = (
        Figure("voices with a clear pitch", clear, "most"),
        Figure("whose pitch contradicts the name", len(wrong), "0"),
    )
    if not pitches:
        return Finding(name, Verdict.SKIPPED, "No voice's name says male or female.", figures_)
    swapped = _swapped(wrong, wrong, pitches) or _swapped(wrong, faintly_wrong, pitches)
    if swapped:
        told = " or ".join(f"{a} and {b}" for a, b in swapped)
        sentence = (
            f"Two voices are swapped: {told}. Each has the pitch of the other's sex, and exchanged both fit. "
            "Exchange the two files in voice_embedding, or copy them again."
        )
        return Finding(name, Verdict.FAIL, sentence, figures_, tuple(rows))
    if wrong:
        sentence = (
            f"The pitch of {', '.join(wrong)} contradicts the name; listen whether a file is another voice's."
        )
        return Finding(name, Verdict.WARN, sentence, figures_, tuple(rows))
    if clear < 0.5 * len(pitches):
        sentence = "Hardly any voice is voiced clearly enough for a pitch; swapped files would not show."
        return Finding(name, Verdict.WARN, sentence, figures_, tuple(rows))
    sentence = "No preset's pitch contradicts its name. Files swapped within one sex do not show here."
    return Finding(name, Verdict.PASS, sentence, figures_, tuple(rows))


def _swapped(clear: list[str], others: list[str], pitches: dict[str, SoundFigures]) -> list[tuple[str, str]]:
    """Pairs of a male and a female name, one of `clear` and one of `others`, that fit when exchanged."""
    pairs = {tuple(sorted((a, b))) for a in clear for b in others if sex_of(a) != sex_of(b)}
    return [(a, b) for a, b in sorted(pairs) if _fits(pitches[a].pitch, b) and _fits(pitches[b].pitch, a)]


def _fits(pitch: float, name: str) -> bool:
    low, high = PITCH[str(sex_of(name))]
    return low <= pitch <= high
