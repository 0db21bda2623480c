"""Checks of cloning: codes found again through the decoder, and, where there is one, through the encoder."""

from __future__ import annotations

import numpy as np
import torch

from revox.cloning.clone import float_codec
from revox.coding.encode import encode, served
from revox.coding.invert import InversionConfig, InversionProgress, invert
from revox.coding.prior import CodePrior
from revox.doctor.findings import NO_RANGE, Figure, Finding, Value, Verdict
from revox.doctor.patient import Patient
from revox.metrics.codes import acoustic_level_error, row_cosine, semantic_agreement
from revox.speech import Audio

STEPS = 30
CLONED_FRAMES = 37  # 3 s
ENCODED_VOICES = 4


def clone(patient: Patient) -> Finding:
    """One preset's decoded sound, inverted for a few steps: does the search come nearer to it?"""
    name = "cloning by inversion"
    if patient.quick:
        return Finding(name, Verdict.SKIPPED, "Left out by --quick.")
    voice = patient.pair()[0]
    codec = float_codec(patient.model.model.audio_tokenizer)
    truth = patient.recovered(voice).codes[:, :CLONED_FRAMES]
    samples = patient.decoded(voice).samples[: truth.shape[1] * codec.samples_per_frame]
    # Its own codes must not be among those that the search starts from.
    bank = [patient.recovered(other).codes for other in patient.names if other != voice][:3]
    prior = CodePrior.from_codes(bank, codec) if bank else None

    def progress(at: InversionProgress) -> None:
        patient.say(f"{voice}: {at.phase} {at.step} of {at.steps}")

    settings = InversionConfig(steps=STEPS, polish_rounds=0)
    result = invert(
        codec,
        torch.from_numpy(samples.copy()),
        config=settings,
        prior=prior,
        seed=patient.seed,
        progress=progress,
    )
    with torch.inference_mode():
        found = codec.decode(result.codes[None].to(patient.model.model.device))[0].float().cpu().numpy()
    first, last = result.losses[0], result.loss
    figures = [
        Figure("objective at the start", first),
        Figure(f"after {result.steps} steps", last, "below the start"),
        Figure("semantic codes found again", semantic_agreement(result.codes, truth), NO_RANGE),
        Figure(
            "acoustic level error", acoustic_level_error(result.codes, truth), "below 7, that of random codes"
        ),
        Figure("seconds a step", result.seconds / max(1, result.steps)),
    ]
    judge = patient.judge
    if not isinstance(judge, str):
        rate = patient.model.sampling_rate
        likeness = judge.similarity(Audio(found, rate), Audio(samples, rate))
        figures.append(Figure("similarity of the decoded codes to the reference", likeness, "above 0.6"))
    if result.stopped:
        raise KeyboardInterrupt
    if not last < first:
        sentence = (
            f"Inverting {voice} came no nearer in {STEPS} steps: cloning with these weights will not work."
        )
        return Finding(name, Verdict.FAIL, sentence, tuple(figures))
    if last > 0.95 * first:
        sentence = (
            f"Inverting {voice} hardly came nearer in {STEPS} steps; a clone needs `revox clone --budget`."
        )
        return Finding(name, Verdict.WARN, sentence, tuple(figures))
    sentence = f"Inverting {voice} comes nearer to it with every step; {STEPS} steps are a beginning only."
    return Finding(name, Verdict.PASS, sentence, tuple(figures))


def encoder(patient: Patient) -> Finding:
    """Where there is an encoder: decoded presets encoded again, against the codes they came from."""
    name = "encoder"
    model = patient.model.model
    codec = model.audio_tokenizer
    if not codec.has_encoder:
        return Finding(name, Verdict.SKIPPED, "There is no (whole) encoder in this checkpoint.")
    codec = served(codec)
    rows: list[dict[str, Value]] = []
    voices = patient.names[: 1 if patient.quick else ENCODED_VOICES]
    mean_row = torch.cat([patient.voice(voice).embedding[:-1].float() for voice in patient.names]).mean(0)
    for voice in voices:
        patient.say(f"{voice}: encoding")
        truth, sound = patient.recovered(voice).codes, patient.decoded(voice)
        codes = encode(codec, torch.from_numpy(sound.samples)).codes.cpu()
        with torch.inference_mode():
            made = model.mm_audio_embeddings.voice_embedding(codes.to(model.device)).float().cpu()
        rows.append(
            {
                "voice": voice,
                "semantic codes agree": round(semantic_agreement(codes, truth), 3),
                "acoustic level error": round(acoustic_level_error(codes, truth), 2),
                "row cosine, mean row off": round(
                    row_cosine(made[:-1], patient.voice(voice).embedding[:-1].float(), mean_row), 3
                ),
            }
        )

    def median(key: str) -> float:
        return float(np.median([float(row[key] or 0.0) for row in rows]))

    agree, error = median("semantic codes agree"), median("acoustic level error")
    figures = (
        Figure("semantic codes agree, median", agree, "above 0.3"),
        Figure("acoustic level error, median", error, "below 4 (random codes: 7)"),
        Figure("row cosine without the mean row, median", median("row cosine, mean row off"), "above 0.3"),
    )
    if agree < 0.05 and (error > 5.5 or median("row cosine, mean row off") < 0.1):
        sentence = (
            "The encoder gives codes unrelated to those of the sound: it is not this decoder's, or untrained."
        )
        return Finding(name, Verdict.FAIL, sentence, figures, tuple(rows))
    if agree < 0.3 or error > 4 or median("row cosine, mean row off") < 0.3:
        sentence = "The encoder finds only part of the codes again; compare clones through it with inversion."
        return Finding(name, Verdict.WARN, sentence, figures, tuple(rows))
    return Finding(
        name, Verdict.PASS, "The encoder finds the codes of decoded speech again.", figures, tuple(rows)
    )
