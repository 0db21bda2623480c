"""The acceptance table: the teacher-forced likelihood (NLL) of clips' codes, and their voices' embeddings."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from revox.checkpoint.errors import VoiceError
from revox.checkpoint.voices import Voice, list_voices, load_voice
from revox.evaluation.clips import Clip
from revox.evaluation.measured import RANDOM_CODES, Record
from revox.evaluation.subject import Setup, Subject, clip_seed, random_codes
from revox.evaluation.tables import Column, Table, make_row
from revox.metrics.codes import semantic_variety
from revox.metrics.likelihood import likelihood
from revox.metrics.voice_embeddings import PresetEmbeddings
from revox.synthesis.errors import SpeakError
from revox.synthesis.prompt import make_prompt

OWN_SPEECH = "the model's own speech with presets"
ENCODED_AGAIN = "the same, decoded and encoded again"
CLIPS = "the clips"
OTHER_VOICE = "the clips with another's voice"
OTHER_TEXT = "the clips with another's text"
PRESETS = "the presets, each against the others"
KINDS = {
    OWN_SPEECH: "ceiling",
    ENCODED_AGAIN: "ceiling",
    CLIPS: "subject",
    OTHER_VOICE: "floor",
    OTHER_TEXT: "floor",
    RANDOM_CODES: "floor",
}
DRAWS = 32
MAX_PRESETS = 10
SPEECH_COLUMNS = [
    Column("nll", "semantic NLL (nats a frame)", "less"),
    Column("end", "NLL of the end (nats)", "less"),
    Column("flow", "flow-matching error", "less", 3),
    Column("variety", "different semantic codes a frame", digits=2),
]
EMBEDDING_COLUMNS = [
    Column("frame_norm", "norm of a frame"),
    Column("mean_cosine", "cosine with the mean frame", digits=3),
    Column("offset", "offset from the mean frame"),
    Column("nearest_preset", "nearest preset, mean frame removed", digits=3),
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
def preset_embeddings(setup: Setup) -> PresetEmbeddings:
    """The presets' embeddings, with which a voice is compared. Raises MetricError with fewer than two."""
    embeddings = []
    for entry in list_voices(setup.checkpoint):
        if entry.preset and not entry.problem:
            try:
                embeddings.append(load_voice(setup.checkpoint, entry.name).embedding)
            except VoiceError:  # `revox inspect` names a damaged preset
                continue
    return PresetEmbeddings(embeddings)


def measure_preset(subject: Subject, preset: str, text: str) -> Record:
    """The model's own speech of `text` in a preset, with each seed; with an encoder, also encoded again."""
    voice = load_voice(subject.setup.checkpoint, preset)
    rows: dict[str, list[Record]] = {OWN_SPEECH: [], ENCODED_AGAIN: []}
    for seed in range(subject.setup.seeds):
        codes, ended = subject.spoken(text, voice, seed)
        if not ended or codes.shape[1] < 5:  # it did not end by itself, or has nothing to score
            continue
        rows[OWN_SPEECH].append(spoken_score(subject, text, voice, codes))
        if subject.setup.method == "encoder":
            again = subject.encode(subject.decoded(codes))
            rows[ENCODED_AGAIN].append(spoken_score(subject, text, voice, again))
    return {"rows": rows, "preset": preset, "text": text}


def measure(subject: Subject, clip: Clip, voice_of: Clip, other: Clip | None) -> Record:
    """A clip's codes as its transcript, if it has one, in the voice of `voice_of` (itself or another clip of
    its speaker); and the embedding of its own voice."""
    codes = subject.codes(clip)
    presets = preset_embeddings(subject.setup)
    seeds = [clip_seed(clip, seed) for seed in range(subject.setup.seeds)]
    random = [random_codes(subject.codec, codes.shape[1], seed) for seed in seeds]
    record: Record = {
        "rows": {},
        "embeddings": {
            CLIPS: [presets.score(subject.voice(codes).embedding)],
            RANDOM_CODES: [presets.score(subject.voice(one).embedding) for one in random],
        },
        "own_voice": voice_of.name == clip.name,
    }
    if not clip.text:
        return record
    voice = subject.voice(subject.codes(voice_of))
    try:
        rows = {
            CLIPS: [spoken_score(subject, clip.text, voice, codes)],
            RANDOM_CODES: [spoken_score(subject, clip.text, voice, one) for one in random],
        }
        if other is not None:
            rows[OTHER_VOICE] = [spoken_score(subject, clip.text, subject.voice(subject.codes(other)), codes)]
            if other.text and other.text != clip.text:
                rows[OTHER_TEXT] = [spoken_score(subject, other.text, voice, codes)]
    except SpeakError as error:  # text and voice are too long for the model's positions
        record["problem"] = f"{clip.name}: {error}"
        return record
    record["rows"] = rows
    return record


def acceptance_tables(
    setup: Setup, own: list[Record], records: list[tuple[Clip, Record]], title: str
) -> list[Table]:
    """The table of speech and the table of voice embeddings, of one group of clips."""
    rows = []
    for name, kind in KINDS.items():
        many = own if name in (OWN_SPEECH, ENCODED_AGAIN) else [record for _, record in records]
        rows.append(make_row(name, kind, [record["rows"].get(name, []) for record in many], SPEECH_COLUMNS))
    table = Table(f"Acceptance: {title}", SPEECH_COLUMNS, [row for row in rows if row.cells])
    scored = [record for _, record in records if record["rows"]]
    if len(scored) < len(records):
        table.notes.append(
            f"{len(records) - len(scored)} of {len(records)} clips have no transcript that could be scored: "
            "likelihood and flow-matching error need one, so only their voice embeddings are reported"
        )
    alone = sum(record["own_voice"] for record in scored)
    if alone:
        table.notes.append(
            f"{alone} of {len(scored)} clips are scored in a voice made of themselves, because there is no "
            "other clip of their speaker"
        )
    table.notes += [record["problem"] for _, record in records if "problem" in record]
    presets = [[scores] for scores in preset_embeddings(setup).score_presets()]
    embeddings = [make_row(PRESETS, "ceiling", presets, EMBEDDING_COLUMNS)]
    for name, kind in ((CLIPS, "subject"), (RANDOM_CODES, "floor")):
        found = [record["embeddings"][name] for _, record in records]
        embeddings.append(make_row(name, kind, found, EMBEDDING_COLUMNS))
    return [table, Table(f"Voice embeddings: {title}", EMBEDDING_COLUMNS, embeddings)]
