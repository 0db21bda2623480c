"""A recording to a voice: select a stretch, level it, find its codes, record whose voice it is."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from revox.checkpoint.voices import Voice
from revox.cloning.consent import Consent, Source, provenance, record_consent, source_of
from revox.cloning.errors import CloneError
from revox.cloning.speakers import SeveralSpeakers, several_speakers
from revox.coding.find import Coder, CodingResult, CodingSettings, find_codes
from revox.model.embedding import Embeddings
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech import Audio, Selection, normalize_loudness, read_audio, select_reference, whole_frames
from revox.speech.read import audio_header
from revox.speech.selection import MAX_SECONDS, MIN_SECONDS

SELECTED = "selected"
"""`Progress.what` once the stretch is selected; `reasons` and `warnings` among its facts are sentences, one a
line."""


@dataclass(frozen=True, eq=False)
class SelectedSpeech:
    """The stretch of a recording that a voice is cloned from, and the recording's name and hash."""

    selection: Selection
    source: Source


Recording = str | os.PathLike[str] | Audio
Reference = Recording | SelectedSpeech | Sequence[Recording]


@dataclass(frozen=True, eq=False)
class CloneRequest:
    """What a voice is cloned from and how.

    `reference`: a recording's file, its audio, or a stretch selected before (`select_speech`); or several of
    one speaker, which make one voice. `consent`: whose voice it is and that they agreed, a sentence or its
    record. `transcript`: what is said in the one recording, which is then used whole; it is kept with the
    voice and guides a search.
    """

    reference: Reference
    consent: str | Consent
    name: str = "clone"
    transcript: str | None = None
    coding: CodingSettings = field(default_factory=CodingSettings)


@dataclass(eq=False, kw_only=True)
class ClonedVoice(Voice):
    """A voice and how it came about.

    `selection` is the stretch of the (first) recording, `reference` what was coded (the stretches, leveled,
    one after the other, in whole frames, at the codec's rate), `decoded` the sound of the voice's codes,
    `distance` the spectral distance of the two, `coding` how the codes were found.
    """

    selection: Selection
    reference: Audio
    decoded: Audio
    distance: float
    coding: CodingResult


def select_speech(
    recording: str | os.PathLike[str] | Audio,
    rate: int,
    *,
    transcript: str | None = None,
    source: bytes | None = None,
    min_seconds: float = MIN_SECONDS,
    max_seconds: float = MAX_SECONDS,
) -> SelectedSpeech:
    """The stretch of a recording to clone from, at `rate` Hz; all of it when there is a transcript.

    Where several people speak, it is of the one who speaks most, and a warning says so (with the extra
    `eval`).

    source: the bytes that an Audio was decoded from, for its hash. Raises AudioError when the recording
    cannot be read or holds too little speech, CloneError for an empty transcript or audio that is not finite.
    """
    if transcript is not None and not transcript.strip():
        raise CloneError("the transcript is empty: write what is said in the recording, or leave it out")
    if isinstance(recording, Audio):
        audio, origin = recording, source_of(source or recording.samples.tobytes())
    else:
        # Read before the search: a file that is moved meanwhile costs nothing.
        audio, origin = read_audio(recording), source_of(Path(recording))
    if not np.isfinite(audio.samples).all():
        raise CloneError("the recording holds values that are not numbers: convert it again from its source")
    whole = transcript is not None
    several = several_speakers(audio)
    others = several.others if several and not whole else None
    selection = select_reference(audio, min_seconds, max_seconds, rate, whole, others)
    if several:
        selection.warnings.append(_several(several, whole))
    return SelectedSpeech(selection, origin)


def _several(several: SeveralSpeakers, whole: bool) -> str:
    used = (
        "all of them are used, as there is a transcript"
        if whole
        else f"the one who speaks most is used ({several.most:.0f} of {several.seconds:.0f} s of speech)"
    )
    return f"{several.count} people seem to speak in the recording; {used}."


def select_from_several(recordings: Sequence[Recording], rate: int) -> list[SelectedSpeech]:
    """The best stretch of each of several recordings of one speaker, together no longer than one may be.

    Each gets an equal share of the seconds; what short ones leave, longer ones get. Raises as
    `select_speech`.
    """
    lengths = [
        one.seconds if isinstance(one, Audio) else audio_header(one)[0] or math.inf for one in recordings
    ]
    least, left = MIN_SECONDS / len(lengths), MAX_SECONDS
    found: dict[int, SelectedSpeech] = {}
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        share = left / (len(lengths) - len(found))
        found[i] = select_speech(recordings[i], rate, min_seconds=least, max_seconds=share)
        left -= found[i].selection.seconds
    return [found[i] for i in range(len(lengths))]


def clone_voice(
    coder: Coder,
    embeddings: Embeddings,
    request: CloneRequest,
    *,
    progress: ProgressCallback = ignore_progress,
    should_stop: Callable[[], bool] | None = None,
) -> ClonedVoice:
    """The voice that `request` asks for. It is not added to any checkpoint.

    `embeddings` is the model's table. For `progress`, `should_stop` and KeyboardInterrupt see
    `revox.coding.find_codes`; a stretch that is selected here is reported as SELECTED.

    Raises CloneError without consent, CodingError for settings that this checkpoint has no use for or an
    encoder that is damaged, and what `select_speech` raises.
    """
    consent = request.consent
    if not isinstance(consent, Consent):
        consent = record_consent(consent)
    coder.ways(request.coding)
    config = coder.codec.config
    rate = config.sampling_rate
    speech = _selected(request, rate, progress)
    leveled = [normalize_loudness(one.selection.audio.at(rate).samples, rate) for one in speech]
    samples = whole_frames(np.concatenate(leveled), config.samples_per_frame, rate)
    target = torch.from_numpy(samples.copy())
    coding = find_codes(
        coder, target, request.coding, transcript=request.transcript, progress=progress,
        should_stop=should_stop,
    )  # fmt: skip
    decoded = coder.decode(coding.codes)
    distance = coder.distance(decoded, target)
    table = embeddings.audio_codebook_embeddings.embeddings.weight
    with torch.no_grad():
        embedding = embeddings.voice_embedding(coding.codes.to(table.device)).to("cpu", torch.bfloat16)
    record = provenance(
        consent,
        coding.description,
        coding.record() or {"reconstruction": round(distance, 6)},
        speech[0].source,
        start_s=round(speech[0].selection.start, 3),
        seconds=round(len(samples) / rate if len(speech) == 1 else speech[0].selection.seconds, 3),
    )
    if len(speech) > 1:
        record["more_sources"] = [_source_record(one) for one in speech[1:]]
    if request.transcript is not None:
        record["transcript"] = request.transcript
    return ClonedVoice(
        request.name,
        coding.codes,
        embedding,
        record,
        selection=speech[0].selection,
        reference=Audio(samples, rate),
        decoded=Audio(decoded.numpy(), rate),
        distance=distance,
        coding=coding,
    )


def _selected(request: CloneRequest, rate: int, progress: ProgressCallback) -> list[SelectedSpeech]:
    """The stretches to clone from; those that are selected here are reported."""
    reference = request.reference
    if isinstance(reference, SelectedSpeech):
        return [reference]
    if isinstance(reference, str | os.PathLike | Audio):
        reference = [reference]
    given = list(reference)
    if not given:
        raise CloneError("no recording was given: give one of the speaker, or several")
    if len(given) == 1:
        found = [select_speech(given[0], rate, transcript=request.transcript)]
    elif request.transcript is not None:
        raise CloneError(
            f"a transcript is of one recording, and {len(given)} were given: leave it out, or give one"
        )
    else:
        found = select_from_several(given, rate)
    for i, speech in enumerate(found):
        reasons, warnings = "\n".join(speech.selection.reasons), "\n".join(speech.selection.warnings)
        file = speech.source.file or ""
        progress(
            Progress(SELECTED, i + 1, len(found), {"file": file, "reasons": reasons, "warnings": warnings})
        )
    return found


def _source_record(speech: SelectedSpeech) -> dict[str, Any]:
    part = {"start_s": round(speech.selection.start, 3), "seconds": round(speech.selection.seconds, 3)}
    return speech.source.model_copy(update=part).model_dump(mode="json", exclude_none=True)
