"""The cloning table: new words in cloned voices, beside the recordings that the voices came from."""

from __future__ import annotations

import numpy as np

from revox.checkpoint.voices import Voice, load_voice
from revox.evaluation.acceptance_table import preset_names, preset_rows, spoken_score
from revox.evaluation.cache import file_identity, key_of
from revox.evaluation.clips import Clip
from revox.evaluation.measured import (
    NOISE,
    RECORDING,
    WRONG_SPEAKER,
    Record,
    add_ranks,
    embedding,
    halves,
    speaker_columns,
    word_column,
    words,
)
from revox.evaluation.subject import Setup, Subject, chance, noise_like, open_subject
from revox.evaluation.tables import Column, Table, make_row
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
"""Characters a second: speech faster than this, about twice the quickest speakers, ended too early."""
PAUSE = 0.2  # seconds between the texts of one sound


def measure(setup: Setup, clip: Clip, other: Clip | None, preset: str | None) -> Record:
    """Everything the cloning table needs of one clip. Kept in the cache."""
    subject = open_subject(setup)
    key = key_of(
        what="cloning",
        clip=file_identity(clip.path),
        name=clip.name,
        text=clip.text,
        other=file_identity(other.path) if other else None,
        preset=preset,
        **setup.key(),
    )
    return subject.cache.record(key, lambda: _measure(subject, clip, other, preset))


def _measure(subject: Subject, clip: Clip, other: Clip | None, preset: str | None) -> Record:
    reference = subject.reference(clip)
    first, second = halves(reference)
    codes = subject.codes(clip)
    voice = subject.voice(codes)
    decoded = subject.decoded(codes)
    rows: dict[str, list[Record]] = {
        RECORDING: [{"voice": embedding(subject, second), **words(subject, clip.text, reference)}],
        DECODED: [{"voice": embedding(subject, decoded), **words(subject, clip.text, decoded)}],
    }
    sounds = {
        RECORDING: subject.keep_sound(clip, RECORDING, reference),
        DECODED: subject.keep_sound(clip, DECODED, decoded),
    }
    speakers = [(CLONED, voice)]
    if preset is not None:
        speakers.append((PRESET, load_voice(subject.setup.checkpoint, preset)))
    for name, speaker in speakers:
        rows[name] = []
        for seed in range(subject.setup.seeds):
            scores, sound = _speak(subject, speaker, seed)
            rows[name].append(scores)
            if seed == 0 and len(sound.samples):
                sounds[name] = subject.keep_sound(clip, name, sound)
    rows[CLONED][0].update(preset_rows(subject.setup).score(voice.embedding))
    if other is not None:
        rows[WRONG_SPEAKER] = [{"voice": embedding(subject, subject.reference(other))}]
    rows[NOISE] = []
    for seed in range(subject.setup.seeds):
        noise = noise_like(reference, chance(clip, seed))
        heard = words(subject, " ".join(subject.setup.texts), noise) if seed == 0 else {}
        rows[NOISE].append({"voice": embedding(subject, noise), **heard})
    return {
        "rows": rows,
        "sounds": sounds,
        "voice": embedding(subject, reference),
        "first_half": embedding(subject, first),
    }


def _speak(subject: Subject, voice: Voice, seed: int) -> tuple[Record, Audio]:
    """Scores of all texts spoken in a voice with one seed, and their sound, one after the other."""
    pieces: list[np.ndarray] = []
    errors, count, missing, early, nll, flow = 0, 0, 0, 0, [], []
    heard: list[str] = []
    for text in subject.setup.texts:
        codes, ended = subject.spoken(text, voice, seed)
        sound = subject.decoded(codes)
        missing += not ended
        early += ended and sound.seconds < len(text) / FASTEST
        if len(sound.samples):
            pieces += [sound.samples, np.zeros(round(PAUSE * sound.rate), np.float32)]
        found = words(subject, text, sound)
        errors, count = errors + found.get("word_errors", 0), count + found.get("words", 0)
        heard.append(found.get("heard", ""))
        if ended and codes.shape[1] >= 5:
            score = spoken_score(subject, text, voice, codes)
            nll.append(score["nll"])
            flow.append(score["flow"])
    sound = Audio(np.concatenate(pieces) if pieces else np.zeros(0, np.float32), subject.rate)
    texts = len(subject.setup.texts)
    scores: Record = {"missing": missing / texts, "early": early / texts}
    # Under half a second there is no voice to judge.
    silent = sound.seconds < 0.5
    scores["voice"] = [0.0] * 256 if silent else embedding(subject, sound)
    if subject.recognizer is not None:
        scores.update(word_errors=errors, words=count, heard=" / ".join(heard))
    if nll:
        scores.update(nll=float(np.mean(nll)), flow=float(np.mean(flow)))
    return scores, sound


def cloning_tables(setup: Setup, records: list[tuple[Clip, Record]], title: str) -> list[Table]:
    """The cloning table of one group of clips."""
    among = add_ranks(records)
    columns = [
        *speaker_columns(among),
        word_column(setup),
        Column("missing", "did not end", "less", statistic="mean"),
        Column("early", "ended too early", "less", statistic="mean"),
        Column("nll", "semantic NLL (nats a frame)", "less"),
        Column("flow", "flow-matching error", "less", 3),
        Column("nearest_preset", "nearest preset, mean row removed", digits=3),
        Column("spread_mismatch", "spread mismatch of rows", "less", 3),
    ]
    rows = [
        make_row(name, kind, [record["rows"].get(name, []) for _, record in records], columns)
        for name, kind in KINDS.items()
    ]
    table = Table(f"Cloning: {title}", columns, [row for row in rows if row.cells])
    table.notes.append(
        "NLL and flow-matching error are of what the model spoke itself in that voice: a voice that it does "
        "not accept makes it unsure. A preset is a floor of likeness only: its words and acceptance are the "
        "best that the model does. The shares that did not end, or too early, are of all texts and seeds."
    )
    return [table]


__all__ = ["cloning_tables", "measure", "preset_names"]
