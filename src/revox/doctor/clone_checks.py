"""Checks of cloning: codes recovered through the decoder and, if there is one, the encoder."""

from __future__ import annotations

import numpy as np
import torch

from revox.coding import Coder, CodingSettings, find_codes
from revox.doctor.checkpoint_under_test import CheckpointUnderTest
from revox.doctor.findings import NO_RANGE, CheckResult, Figure, Value, Verdict
from revox.metrics.codes import acoustic_level_error, embedding_cosine, semantic_agreement
from revox.progress import Progress
from revox.speech import Audio

STEPS = 30
CLONED_FRAMES = 37  # 3 s
ENCODED_VOICES = 4
RANDOM_LEVEL_ERROR = 7.0  # of random codes against any others
LEAST_SIMILARITY = 0.6


def clone(subject: CheckpointUnderTest) -> CheckResult:
    """One preset's decoded sound, inverted for a few steps: does the objective fall, and towards its codes?

    The objective alone falls with any decoder that has a gradient. How many semantic codes are recovered is
    not a limit: so few steps find one in thirty, or none, where clones are good.
    """
    if subject.quick:
        return CheckResult(Verdict.SKIPPED, "Left out by --quick.")
    voice = subject.pair()[0]
    codec = subject.model.model.audio_tokenizer
    truth = subject.recovered(voice).codes[:, :CLONED_FRAMES]
    samples = subject.decoded(voice).samples[: truth.shape[1] * codec.samples_per_frame]
    # Its own codes must not be among those that inversion starts from.
    others = [subject.recovered(other).codes for other in subject.names if other != voice][:3]
    coder = Coder(codec, others)

    def progress(at: Progress) -> None:
        subject.update(f"{voice}: {at.what} {at.done:.0f} of {at.total:.0f}")

    settings = CodingSettings("inversion", steps=STEPS, seed=subject.seed, local_search=0)
    coding = find_codes(coder, torch.from_numpy(samples.copy()), settings, progress=progress)
    if coding.stopped:
        raise KeyboardInterrupt
    found = coder.decode(coding.codes).numpy()
    result = coding.searches["inversion"]
    first, last = result.losses[0], result.loss
    error = acoustic_level_error(result.codes, truth)
    astray = [f"the acoustic codes are {error:.1f} levels off"] if error >= RANDOM_LEVEL_ERROR else []
    figures = [
        Figure("objective at the start", first),
        Figure(f"after {result.steps} steps", last, "below the start"),
        Figure("semantic codes recovered", semantic_agreement(result.codes, truth), NO_RANGE),
        Figure("acoustic level error", error, f"below {RANDOM_LEVEL_ERROR:g}, that of random codes"),
        Figure("seconds a step", result.seconds / max(1, result.steps)),
    ]
    verifier = subject.verifier
    if not isinstance(verifier, str):
        rate = subject.model.sampling_rate
        likeness = verifier.similarity(Audio(found, rate), Audio(samples, rate))
        figures.append(
            Figure(
                "similarity of the decoded codes to the reference", likeness, f"above {LEAST_SIMILARITY:g}"
            )
        )
        if likeness <= LEAST_SIMILARITY:
            astray.append(f"the similarity to the reference is {likeness:.2f}")
    if not last < first:
        verdict = Verdict.FAIL
        sentence = f"The objective did not fall in {STEPS} steps: cloning with these weights will not work."
    elif astray:
        verdict = Verdict.WARN
        sentence = f"The objective falls, but not towards the voice: {' and '.join(astray)}."
    elif last > 0.95 * first:
        verdict = Verdict.WARN
        sentence = f"The objective hardly fell in {STEPS} steps; a clone needs `revox clone --budget`."
    else:
        verdict = Verdict.PASS
        sentence = f"The objective falls steadily; {STEPS} steps are only a beginning."
    return CheckResult(verdict, sentence, figures)


def encoder(subject: CheckpointUnderTest) -> CheckResult:
    """Where there is an encoder: decoded presets encoded again, against the codes they came from."""
    model = subject.model.model
    if not model.audio_tokenizer.has_encoder:
        return CheckResult(Verdict.SKIPPED, "There is no complete encoder in this checkpoint.")
    rows: list[dict[str, Value]] = []
    voices = subject.names[: 1 if subject.quick else ENCODED_VOICES]
    mean = torch.cat([subject.voice(voice).embedding[:-1].float() for voice in subject.names]).mean(0)
    for voice in voices:
        subject.update(f"{voice}: encoding")
        truth, sound = subject.recovered(voice).codes, subject.decoded(voice)
        own = subject.voice(voice).embedding[:-1].float()
        codes = subject.model.find_codes(sound, CodingSettings("encoder")).codes
        with torch.inference_mode():
            made = model.mm_audio_embeddings.voice_embedding(codes.to(model.device)).float().cpu()
        rows.append(
            {
                "voice": voice,
                "semantic codes agree": round(semantic_agreement(codes, truth), 3),
                "acoustic level error": round(acoustic_level_error(codes, truth), 2),
                "embedding cosine": round(embedding_cosine(made[:-1], own, mean), 3),
            }
        )
    agree, error, cosine = (
        float(np.median([float(row[key] or 0.0) for row in rows])) for key in list(rows[0])[1:]
    )
    figures = (
        Figure("semantic codes agree, median", agree, "above 0.3"),
        Figure("acoustic level error, median", error, "below 4 (random codes: 7)"),
        Figure("embedding cosine without the presets' mean, median", cosine, "above 0.3"),
    )
    if agree < 0.05 and (error > 5.5 or cosine < 0.1):
        verdict = Verdict.FAIL
        sentence = "The encoder's codes are unrelated to the sound: it is not this decoder's, or untrained."
    elif agree < 0.3 or error > 4 or cosine < 0.3:
        verdict = Verdict.WARN
        sentence = "The encoder recovers only part of the codes; compare its clones with inversion's."
    else:
        verdict, sentence = Verdict.PASS, "The encoder recovers the codes of decoded speech."
    return CheckResult(verdict, sentence, figures, rows)
