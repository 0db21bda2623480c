"""The cloning table: new words in cloned voices, against the recordings that the voices came from."""

from __future__ import annotations

import numpy as np

from revox.checkpoint.voices import Voice, load_voice
from revox.evaluation.acceptance_table import preset_embeddings, spoken_score
from revox.evaluation.clips import Clip
from revox.evaluation.measured import (
    NOISE,
    RECORDING,
    WRONG_SPEAKER,
    Record,
    add_ranks,
    embedding,
    halves,
    naturalness,
    reference_record,
    sound_scores,
    table_of,
    voice_columns,
    words,
)
from revox.evaluation.subject import Setup, Subject, clip_seed, noise_like
from revox.evaluation.tables import Column, Table
from revox.speech import Audio

DECODED = "decoded from its codes"
CLONED = "cloned speech"
PRESET = "the same words by a preset"
KINDS = {
    RECORDING: "ceiling",
    DECODED: "ceiling",
    CLONED: "subject",
    PRESET: "floor",
    WRONG_SPEAKER: "floor",
    NOISE: "floor",
}
FASTEST = 40.0
"""Characters a second: speech faster than this, about twice the fastest speakers, ended too early."""
PAUSE = 0.2  # seconds between the texts of one sound


def measure(subject: Subject, clip: Clip, other: Clip | None, preset: str | None) -> Record:
    """Everything the cloning table needs of one clip; `other` is another speaker's."""
    reference = subject.reference(clip)
    codes = subject.codes(clip)
    decoded = subject.decoded(codes)
    second = embedding(subject, halves(reference)[1])
    rows: dict[str, list[Record]] = {
        RECORDING: [
            {
                "voice": second,
                **naturalness(subject, reference),
                **words(subject, clip.text, reference),
            }
        ],
        DECODED: [{**sound_scores(subject, decoded), **words(subject, clip.text, decoded)}],
    }
    sounds = {
        RECORDING: subject.save_sound(clip, RECORDING, reference),
        DECODED: subject.save_sound(clip, DECODED, decoded),
    }
    voices = {CLONED: subject.voice(codes)}
    if preset is not None:
        voices[PRESET] = load_voice(subject.setup.checkpoint, preset)
    for name, voice in voices.items():
        spoken = [_speak(subject, voice, seed) for seed in range(subject.setup.seeds)]
        rows[name] = [scores for scores, _ in spoken]
        if len(spoken[0][1].samples):
            sounds[name] = subject.save_sound(clip, name, spoken[0][1])
    rows[CLONED][0].update(preset_embeddings(subject.setup).score(voices[CLONED].embedding))
    if other is not None:
        rows[WRONG_SPEAKER] = [sound_scores(subject, subject.reference(other))]
    noises = [noise_like(reference, clip_seed(clip, seed)) for seed in range(subject.setup.seeds)]
    rows[NOISE] = [sound_scores(subject, noise) for noise in noises]
    rows[NOISE][0].update(words(subject, " ".join(subject.setup.texts), noises[0]))
    return reference_record(subject, reference, rows, sounds)


def _speak(subject: Subject, voice: Voice, seed: int) -> tuple[Record, Audio]:
    """Scores of all texts spoken in a voice with one seed, and their sound, one after the other."""
    pieces: list[np.ndarray] = []
    missing, early, found, likelihoods = 0, 0, [], []
    for text in subject.setup.texts:
        codes, ended = subject.spoken(text, voice, seed)
        sound = subject.decoded(codes)
        missing += not ended
        early += ended and sound.seconds < len(text) / FASTEST
        if len(sound.samples):
            pieces += [sound.samples, np.zeros(round(PAUSE * sound.rate), np.float32)]
        found.append(words(subject, text, sound))
        if ended and codes.shape[1] >= 5:
            likelihoods.append(spoken_score(subject, text, voice, codes))
    sound = Audio(np.concatenate(pieces) if pieces else np.zeros(0, np.float32), subject.rate)
    texts = len(subject.setup.texts)
    scores: Record = {"missing": missing / texts, "early": early / texts, **naturalness(subject, sound)}
    # Under half a second there is no voice to compare.
    scores["voice"] = [0.0] * 256 if sound.seconds < 0.5 else embedding(subject, sound)
    if subject.recognizer is not None:
        scores["transcript"] = " / ".join(one.get("transcript", "") for one in found)
        scores |= {key: sum(one.get(key, 0) for one in found) for key in ("word_errors", "words")}
    if likelihoods:
        scores |= {key: float(np.mean([one[key] for one in likelihoods])) for key in ("nll", "flow")}
    return scores, sound


def cloning_tables(setup: Setup, records: list[tuple[Clip, Record]], title: str) -> list[Table]:
    """The cloning table of one group of clips."""
    columns = [
        *voice_columns(setup, add_ranks(records)),
        Column("missing", "did not end", "less", statistic="mean"),
        Column("early", "ended too early", "less", statistic="mean"),
        Column("nll", "semantic NLL (nats a frame)", "less"),
        Column("flow", "flow-matching error", "less", 3),
        Column("nearest_preset", "nearest preset, mean frame removed", digits=3),
        Column("spread_mismatch", "spread mismatch of the embedding", "less", 3),
    ]
    table = table_of(f"Cloning: {title}", KINDS, records, columns)
    table.notes.append(
        "NLL and flow-matching error are of the model's own speech in that voice: in an unlikely voice the "
        "model is unsure. A preset is a floor of similarity only: its words and likelihood are the best "
        "that the model does. The shares that did not end, or too early, are of all texts and seeds."
    )
    return [table]
