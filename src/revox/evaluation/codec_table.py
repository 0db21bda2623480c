"""The codec table: recordings against what their codes decode to."""

from __future__ import annotations

import torch
from torch import Tensor

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
    naturalness,
    reference_record,
    sound_columns,
    sound_scores,
    table_of,
    words,
)
from revox.evaluation.subject import Setup, Subject, clip_seed, noise_like, open_subject, random_codes
from revox.evaluation.tables import Column, Table, make_row
from revox.metrics.codes import perplexity, saturated_share, score_codes
from revox.speech import Audio

DECODED = "decoded"
KINDS = {
    RECORDING: "ceiling",
    DECODED: "subject",
    WRONG_SPEAKER: "floor",
    RANDOM_CODES: "floor",
    NOISE: "floor",
}


def measure(subject: Subject, clip: Clip, other: Clip | None) -> Record:
    """Everything the codec table needs of one clip; `other` is another speaker's."""
    reference = subject.reference(clip)
    codes = subject.codes(clip)
    original = words(subject, clip.text, reference)
    # Without a transcript, the recognizer's transcript of the recording is what is expected.
    expected = clip.text or original.get("transcript")
    second = embedding(subject, halves(reference)[1])
    rows: dict[str, list[Record]] = {
        RECORDING: [
            {
                **distances(reference, reference),
                **naturalness(subject, reference),
                "voice": second,
                **original,
            }
        ]
    }
    sounds = {RECORDING: subject.save_sound(clip, RECORDING, reference)}

    def add(row: str, *audios: Audio) -> None:
        rows[row] = [{**distances(reference, audio), **sound_scores(subject, audio)} for audio in audios]
        rows[row][0].update(words(subject, expected, audios[0]))
        sounds[row] = subject.save_sound(clip, row, audios[0])

    add(DECODED, subject.decoded(codes))
    if other is not None:
        add(WRONG_SPEAKER, subject.reference(other))
    seeds = [clip_seed(clip, seed) for seed in range(subject.setup.seeds)]
    add(RANDOM_CODES, *(subject.decoded(random_codes(subject.codec, codes.shape[1], s)) for s in seeds))
    add(NOISE, *(noise_like(reference, s) for s in seeds))
    record = reference_record(subject, reference, rows, sounds)
    if subject.setup.method != "encoder" and subject.coder.has_encoder:
        record["against_encoder"] = score_codes(codes, subject.encode(reference, "encoder"))
    return record


def codec_tables(setup: Setup, records: list[tuple[Clip, Record]], title: str) -> list[Table]:
    """The sound table and the code table of one group of clips."""
    sound = table_of(f"Codec: {title}", KINDS, records, sound_columns(setup, add_ranks(records)))
    if setup.recognizer != "none" and any(clip.text is None for clip, _ in records):
        sound.notes.append(
            "Word errors of clips without a transcript are counted against the recognizer's transcript of "
            "the recording; the recording's own row then counts the others only."
        )
    return [sound, _code_table(open_subject(setup), records, title)]


def _code_table(subject: Subject, records: list[tuple[Clip, Record]], title: str) -> Table:
    codes = [subject.codes(clip) for clip, _ in records]
    random = [random_codes(subject.codec, c.shape[1], i) for i, c in enumerate(codes)]
    pooled = [
        Column("semantic_codes_used", "semantic codes used", digits=0),
        Column("semantic_perplexity", "perplexity", digits=1),
    ]
    single = [Column("saturated_share", "saturated levels", "less", 3)]
    if any("against_encoder" in record for _, record in records):
        single += [
            Column("semantic_agreement", "same semantic code", "more", 3),
            Column("acoustic_exact_share", "same level", "more", 3),
            Column("acoustic_level_error", "level error", "less"),
        ]
    table = Table(f"Codes: {title}", [*pooled, *single], [])
    groups: list[tuple[str, str, list[Tensor]]] = [
        ("the presets' codes", "ceiling", subject.coder.preset_codes()),
        (f"by {subject.setup.method}", "subject", codes),
        (RANDOM_CODES, "floor", random),
    ]
    for name, kind, many in groups:
        if not many:
            continue
        scores: list[list[Record]] = [[{"saturated_share": saturated_share(c)}] for c in many]
        if kind == "subject":
            for (one,), (_, record) in zip(scores, records, strict=True):
                one |= {**record.get("against_encoder", {}), **one}
        row = make_row(name, kind, scores, single)
        # Use and perplexity are of all frames together: they grow with their number.
        together = torch.cat(many, dim=1)
        whole = {
            "semantic_codes_used": float(together[0].unique().numel()),
            "semantic_perplexity": perplexity(together),
        }
        row.cells |= make_row(name, kind, [[whole]], pooled).cells
        table.rows.append(row)
        table.notes.append(f"{name}: {together.shape[1]} frames")
    return table
