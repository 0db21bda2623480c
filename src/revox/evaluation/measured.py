"""What all tables measure of a sound against its original."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from revox.evaluation.clips import Clip
from revox.evaluation.subject import Setup, Subject
from revox.evaluation.tables import Column, Table, candidates, make_row, rank
from revox.losses.spectral import mel_distance, multi_resolution_stft_loss
from revox.metrics.intelligibility import normalize_text, word_errors
from revox.metrics.perceptual import estoi, installed, pesq
from revox.speech import Audio

RECORDING = "the recording itself"
WRONG_SPEAKER = "a wrong speaker"
RANDOM_CODES = "random codes"
NOISE = "noise"

Record = dict[str, Any]
"""Of one clip: `rows`, {row: [scores of each seed]}; `sounds`, {row: path}; `voice`, its embedding."""


def embedding(subject: Subject, audio: Audio) -> list[float]:
    """The voice of `audio` `[256]`, rounded for a file."""
    return [round(float(x), 5) for x in subject.verifier.embed(audio)]


def reference_record(
    subject: Subject, reference: Audio, rows: dict[str, list[Record]], sounds: Record
) -> Record:
    """A clip's record; the voice of its first half is what the recording itself is compared with."""
    first, _ = halves(reference)
    return {
        "rows": rows,
        "sounds": sounds,
        "voice": embedding(subject, reference),
        "first_half": embedding(subject, first),
    }


def halves(audio: Audio) -> tuple[Audio, Audio]:
    """The first and the second half."""
    middle = len(audio.samples) // 2
    return Audio(audio.samples[:middle], audio.rate), Audio(audio.samples[middle:], audio.rate)


def distances(reference: Audio, audio: Audio) -> Record:
    """Mel and STFT distance, PESQ and ESTOI (where installed) of `audio` from `reference`."""
    length = min(len(reference.samples), len(audio.samples))
    x, y = (torch.from_numpy(a.samples[:length].copy()) for a in (audio, reference))
    scores: Record = {
        "mel": mel_distance(x, y, reference.rate),
        "stft": float(multi_resolution_stft_loss(x, y, reference.rate)),
    }
    if installed("pesq"):
        scores["pesq"] = pesq(reference, audio)
    if installed("pystoi"):
        scores["estoi"] = estoi(reference, audio)
    return scores


def words(subject: Subject, expected: str | None, audio: Audio) -> Record:
    """The `transcript` of `audio`, its `word_errors` against `expected` and the number of `words` there."""
    if subject.recognizer is None:
        return {}
    transcript = subject.recognizer.transcribe(audio)
    scores: Record = {"transcript": transcript}
    if expected and normalize_text(expected):
        scores["word_errors"], scores["words"] = word_errors(expected, transcript)
    return scores


def naturalness(subject: Subject, audio: Audio) -> Record:
    """The `naturalness` of `audio`, where it is measured."""
    return {} if subject.naturalness is None else {"naturalness": subject.naturalness.score(audio)}


def sound_scores(subject: Subject, audio: Audio) -> Record:
    """The scores of a sound that need no reference: its `voice` and its `naturalness`."""
    return {"voice": embedding(subject, audio), **naturalness(subject, audio)}


def add_ranks(records: list[tuple[Clip, Record]], ceiling: str = RECORDING) -> int:
    """Add `similarity` and `rank` of every sound's voice among the recordings'; returns how many it is among.

    A recording is compared with its own first half, not with itself.
    """
    references = np.array([record["voice"] for _, record in records])
    speakers = [clip.speaker for clip, _ in records]
    for own, (_, record) in enumerate(records):
        for row, seeds in record["rows"].items():
            for scores in seeds:
                if scores.get("voice") is None:
                    continue
                voice, among = np.array(scores["voice"]), references
                if row == ceiling:
                    among = references.copy()
                    among[own] = record["first_half"]
                scores["similarity"] = float(among[own] @ voice)
                scores["rank"] = rank(voice, among, speakers, own)
    return candidates(speakers)


def table_of(
    title: str, kinds: dict[str, str], records: list[tuple[Clip, Record]], columns: list[Column]
) -> Table:
    """A table with a row for each of `kinds` (name -> kind) that has scores."""
    rows = [
        make_row(name, kind, [record["rows"].get(name, []) for _, record in records], columns)
        for name, kind in kinds.items()
    ]
    return Table(title, columns, [row for row in rows if row.cells])


def sound_columns(setup: Setup, among: int) -> list[Column]:
    """Columns of the distances, the speaker and the words."""

    def reason(library: str) -> str:
        return "" if installed(library) else "not installed"

    return [
        Column("mel", "mel distance (nats)", "less"),
        Column("stft", "STFT distance", "less"),
        Column("pesq", "PESQ", "more", unavailable=reason("pesq")),
        Column("estoi", "ESTOI", "more", unavailable=reason("pystoi")),
        *voice_columns(setup, among),
    ]


def voice_columns(setup: Setup, among: int) -> list[Column]:
    """Similarity to the recording, its rank, the word error rate pooled over clips, and naturalness."""
    reason = "" if setup.recognizer != "none" else "no recognizer"
    return [
        Column("similarity", "speaker similarity", "more"),
        Column("rank", f"rank of {among}", "less", 1),
        Column("word_errors", "word errors (%)", "less", 1, "ratio", "words", reason),
        *([Column("naturalness", "naturalness (DistillMOS, 1 to 5)", "more")] if setup.naturalness else []),
    ]
