"""The codec table: recordings beside what their codes decode to."""

from __future__ import annotations

import torch
from torch import Tensor

from revox.evaluation.cache import file_identity, key_of
from revox.evaluation.clips import Clip
from revox.evaluation.measured import (
    NOISE,
    RANDOM_CODES,
    RECORDING,
    WRONG_SPEAKER,
    Record,
    add_ranks,
    distances,
    embedding,
    halves,
    sound_columns,
    words,
)
from revox.evaluation.subject import Setup, Subject, chance, noise_like, open_subject, random_codes
from revox.evaluation.tables import Column, Table, make_row
from revox.metrics.codes import perplexity, saturated_share, score_codes

DECODED = "decoded"
KINDS = {
    RECORDING: "ceiling",
    DECODED: "subject",
    WRONG_SPEAKER: "floor",
    RANDOM_CODES: "floor",
    NOISE: "floor",
}


def measure(setup: Setup, clip: Clip, other: Clip | None) -> Record:
    """Everything the codec table needs of one clip; `other` is a wrong speaker's. Kept in the cache."""
    subject = open_subject(setup)
    key = key_of(
        what="codec",
        clip=file_identity(clip.path),
        name=clip.name,
        text=clip.text,
        other=file_identity(other.path) if other else None,
        **setup.key(),
    )
    return subject.cache.record(key, lambda: _measure(subject, clip, other))


def _measure(subject: Subject, clip: Clip, other: Clip | None) -> Record:
    reference = subject.reference(clip)
    codes = subject.codes(clip)
    first, second = halves(reference)
    rows: dict[str, list[Record]] = {}
    sounds = {RECORDING: subject.keep_sound(clip, RECORDING, reference)}
    original = words(subject, clip.text, reference)
    # Without a transcript, what is heard in the recording is what should be heard.
    expected = clip.text or original.get("heard")
    rows[RECORDING] = [{**distances(reference, reference), "voice": embedding(subject, second), **original}]

    def add(row: str, *audios: object) -> None:
        seeds = []
        for seed, audio in enumerate(audios):
            scores = {**distances(reference, audio), "voice": embedding(subject, audio)}  # type: ignore[arg-type]
            if seed == 0:
                scores.update(words(subject, expected, audio))  # type: ignore[arg-type]
                sounds[row] = subject.keep_sound(clip, row, audio)  # type: ignore[arg-type]
            seeds.append(scores)
        rows[row] = seeds

    add(DECODED, subject.decoded(codes))
    if other is not None:
        add(WRONG_SPEAKER, subject.reference(other))
    seeds = [chance(clip, seed) for seed in range(subject.setup.seeds)]
    add(RANDOM_CODES, *(subject.decoded(random_codes(subject.codec, codes.shape[1], s)) for s in seeds))
    add(NOISE, *(noise_like(reference, s) for s in seeds))
    record: Record = {
        "rows": rows,
        "sounds": sounds,
        "voice": embedding(subject, reference),
        "first_half": embedding(subject, first),
        "frames": codes.shape[1],
    }
    if subject.setup.method != "encoder" and subject.coder.has_encoder:
        record["against_encoder"] = score_codes(codes, subject.encode(reference, "encoder"))
    return record


def codec_tables(setup: Setup, records: list[tuple[Clip, Record]], title: str) -> list[Table]:
    """The sound table and the code table of one group of clips."""
    among = add_ranks(records)
    columns = sound_columns(setup, among)
    rows = [
        make_row(name, kind, [record["rows"].get(name, []) for _, record in records], columns)
        for name, kind in KINDS.items()
    ]
    sound = Table(f"Codec: {title}", columns, rows)
    if setup.recognizer != "none" and any(clip.text is None for clip, _ in records):
        sound.notes.append(
            "Word errors of clips without a transcript are counted against what the recognizer hears in the "
            "recording; its own line then counts the others only."
        )
    return [sound, _code_table(open_subject(setup), [clip for clip, _ in records], records, title)]


def _code_table(subject: Subject, clips: list[Clip], records: list[tuple[Clip, Record]], title: str) -> Table:
    codes = [subject.codes(clip) for clip in clips]
    random = [random_codes(subject.codec, c.shape[1], i) for i, c in enumerate(codes)]
    columns = [
        Column("semantic_codes_used", "semantic codes used", digits=0),
        Column("semantic_perplexity", "perplexity", digits=1),
        Column("saturated_share", "saturated levels", "less", 3),
    ]
    agreement = [
        Column("semantic_agreement", "same semantic code", "more", 3),
        Column("acoustic_exact_share", "same level", "more", 3),
        Column("acoustic_level_error", "level error", "less"),
    ]
    if any("against_encoder" in record for _, record in records):
        columns += agreement
    lines: list[tuple[str, str, list[Tensor]]] = [
        ("the presets' codes", "ceiling", subject.preset_codes),
        (f"by {subject.setup.method}", "subject", codes),
        (RANDOM_CODES, "floor", random),
    ]
    table = Table(f"Codes: {title}", columns, [])
    for name, kind, many in lines:
        if not many:
            continue
        scores: list[list[Record]] = [[{"saturated_share": saturated_share(c)}] for c in many]
        if kind == "subject":
            for one, (_, record) in zip(scores, records, strict=True):
                one[0].update(record.get("against_encoder", {}), saturated_share=one[0]["saturated_share"])
        row = make_row(name, kind, scores, [columns[2], *columns[3:]])
        # Use and perplexity are of all frames together: they grow with their number.
        together = torch.cat(many, dim=1)
        whole = {
            "semantic_codes_used": float(together[0].unique().numel()),
            "semantic_perplexity": perplexity(together),
        }
        row.cells |= make_row(name, kind, [[whole]], columns[:2]).cells
        table.rows.append(row)
        table.notes.append(f"{name}: {together.shape[1]} frames")
    return table
