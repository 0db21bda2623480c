"""The acceptance table: what the frozen language model thinks of clips' codes and of voices' rows."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from revox.checkpoint.errors import VoiceError
from revox.checkpoint.voices import Voice, list_voices, load_voice
from revox.evaluation.cache import file_identity, key_of
from revox.evaluation.clips import Clip
from revox.evaluation.measured import RANDOM_CODES, Record
from revox.evaluation.subject import Setup, Subject, chance, open_subject, random_codes
from revox.evaluation.tables import Column, Table, make_row
from revox.metrics.codes import semantic_variety
from revox.metrics.likelihood import likelihood
from revox.metrics.voice_embeddings import PresetEmbeddings
from revox.synthesis.errors import SpeakError
from revox.synthesis.prompt import make_prompt

OWN_SPEECH = "the model's own speech with presets"
CODED_AGAIN = "the same, decoded and coded again"
CLIPS = "the clips"
OTHER_VOICE = "the clips with another's voice"
OTHER_TEXT = "the clips with another's text"
PRESETS = "the presets, each beside the others"
KINDS = {
    OWN_SPEECH: "ceiling",
    CODED_AGAIN: "ceiling",
    CLIPS: "subject",
    OTHER_VOICE: "floor",
    OTHER_TEXT: "floor",
    RANDOM_CODES: "floor",
}
DRAWS = 32
MAX_PRESETS = 10
SPOKEN_COLUMNS = [
    Column("nll", "semantic NLL (nats a frame)", "less"),
    Column("end", "NLL of the end (nats)", "less"),
    Column("flow", "flow-matching error", "less", 3),
    Column("variety", "different semantic codes a frame", digits=2),
]
ROW_COLUMNS = [
    Column("row_norm", "row norm"),
    Column("mean_row_cosine", "cosine with the mean row", digits=3),
    Column("offset", "offset from the mean row"),
    Column("nearest_preset", "nearest preset, mean row removed", digits=3),
    Column("spread", "spread (ratio)"),
    Column("spread_mismatch", "spread mismatch", "less", 3),
    Column("sparsity", "sparsity", digits=3),
    Column("sparsity_mismatch", "sparsity mismatch", "less", 3),
]


def preset_names(setup: Setup) -> list[str]:
    """The presets that speak for the model, at most `MAX_PRESETS`, in the checkpoint's order."""
    return [e.name for e in list_voices(setup.checkpoint) if e.preset and not e.problem][:MAX_PRESETS]


def spoken_score(subject: Subject, text: str, voice: Voice, codes: Tensor) -> Record:
    """Likelihood, flow-matching error and variety of `codes` `[37, frames]` as `text` in `voice`."""
    tts = subject.tts
    prompt = make_prompt(tts.model, tts.prompter, text, voice).embeddings
    found = likelihood(tts.model, prompt, codes, draws=DRAWS)
    return {
        "nll": float(found.semantic_nll),
        "end": float(found.end_nll),
        "flow": float(found.flow_error),
        "variety": semantic_variety(codes),
    }


@lru_cache(maxsize=1)
def preset_rows(setup: Setup) -> PresetEmbeddings:
    """The presets' rows, beside which a voice is judged."""
    rows = []
    for entry in list_voices(setup.checkpoint):
        if entry.preset and not entry.problem:
            try:
                rows.append(load_voice(setup.checkpoint, entry.name).embedding)
            except VoiceError:  # a damaged preset is `revox inspect`'s business
                continue
    return PresetEmbeddings(rows)


def measure_preset(setup: Setup, preset: str, text: str) -> Record:
    """The model's own speech of `text` in a preset, with each seed; and, with an encoder, coded again."""
    subject = open_subject(setup)
    key = key_of(what="own", preset=preset, text=text, **setup.key())
    return subject.cache.record(key, lambda: _measure_preset(subject, preset, text))


def _measure_preset(subject: Subject, preset: str, text: str) -> Record:
    voice = load_voice(subject.setup.checkpoint, preset)
    rows: dict[str, list[Record]] = {OWN_SPEECH: []}
    again: list[Record] = []
    for seed in range(subject.setup.seeds):
        codes, ended = subject.spoken(text, voice, seed)
        if not ended or codes.shape[1] < 5:  # no speech of its own accord
            continue
        rows[OWN_SPEECH].append(spoken_score(subject, text, voice, codes))
        if subject.setup.method == "encoder":
            coded = subject.encode(subject.decoded(codes))
            again.append(spoken_score(subject, text, voice, coded))
    if again:
        rows[CODED_AGAIN] = again
    return {"rows": rows, "preset": preset, "text": text}


def measure_clip(setup: Setup, clip: Clip, voice_of: Clip, other: Clip | None) -> Record:
    """A clip's codes as its transcript, if it has one, in the voice of `voice_of` (itself or another clip of
    its speaker); and the rows of its own voice."""
    subject = open_subject(setup)
    key = key_of(
        what="acceptance",
        clip=file_identity(clip.path),
        text=clip.text,
        voice=file_identity(voice_of.path),
        other=[file_identity(other.path), other.text] if other else None,
        **setup.key(),
    )
    return subject.cache.record(key, lambda: _measure_clip(subject, clip, voice_of, other))


def _measure_clip(subject: Subject, clip: Clip, voice_of: Clip, other: Clip | None) -> Record:
    codes = subject.codes(clip)
    own = subject.voice(codes)
    judge = preset_rows(subject.setup)
    seeds = [chance(clip, seed) for seed in range(subject.setup.seeds)]
    random = [random_codes(subject.codec, codes.shape[1], seed) for seed in seeds]
    record: Record = {
        "rows": {},
        "voice_embedding": {
            CLIPS: [judge.score(own.embedding)],
            RANDOM_CODES: [judge.score(subject.voice(codes_).embedding) for codes_ in random],
        },
        "own_voice": voice_of.name == clip.name,
    }
    if not clip.text:
        return record
    voice = subject.voice(subject.codes(voice_of))
    try:
        rows = {
            CLIPS: [spoken_score(subject, clip.text, voice, codes)],
            RANDOM_CODES: [spoken_score(subject, clip.text, voice, codes_) for codes_ in random],
        }
        if other is not None:
            rows[OTHER_VOICE] = [spoken_score(subject, clip.text, subject.voice(subject.codes(other)), codes)]
            if other.text and other.text != clip.text:
                rows[OTHER_TEXT] = [spoken_score(subject, other.text, voice, codes)]
    except SpeakError as error:  # text and voice have no room in the model's positions
        record["problem"] = f"{clip.name}: {error}"
        return record
    record["rows"] = rows
    return record


def acceptance_tables(
    setup: Setup, own: list[Record], records: list[tuple[Clip, Record]], title: str
) -> list[Table]:
    """The table of speech and the table of rows, of one group of clips."""
    spoken = []
    for name, kind in KINDS.items():
        many = own if name in (OWN_SPEECH, CODED_AGAIN) else [record for _, record in records]
        row = make_row(name, kind, [record["rows"].get(name, []) for record in many], SPOKEN_COLUMNS)
        if row.cells:
            spoken.append(row)
    table = Table(f"Acceptance: {title}", list(SPOKEN_COLUMNS), spoken)
    scored = [(clip, record) for clip, record in records if record["rows"]]
    if len(scored) < len(records):
        table.notes.append(
            f"{len(records) - len(scored)} of {len(records)} clips have no transcript that could be scored: "
            "likelihood and flow-matching error need one, so only their voices' rows are reported"
        )
    alone = sum(record["own_voice"] for _, record in scored)
    if alone:
        table.notes.append(
            f"{alone} of {len(scored)} clips are scored in a voice made of themselves, for there is no other "
            "clip of their speaker"
        )
    table.notes += [record["problem"] for _, record in records if "problem" in record]
    presets = [[scores] for scores in preset_rows(setup).score_presets()]
    rows = [make_row(PRESETS, "ceiling", presets, ROW_COLUMNS)]
    for name, kind in ((CLIPS, "subject"), (RANDOM_CODES, "floor")):
        rows.append(
            make_row(name, kind, [record["voice_embedding"][name] for _, record in records], ROW_COLUMNS)
        )
    return [table, Table(f"Voice rows: {title}", list(ROW_COLUMNS), rows)]
