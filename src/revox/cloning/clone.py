"""A recording to a voice: select a stretch, level it, find its codes, record whose voice it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from revox.checkpoint.voices import Voice
from revox.cloning.consent import Consent, Source, provenance, record_consent, source_of
from revox.cloning.errors import CloneError
from revox.coding.find import Coder, CodingResult, CodingSettings, find_codes
from revox.model.embedding import Embeddings
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech import Audio, Selection, normalize_loudness, read_audio, select_reference, whole_frames

SELECTED = "selected"
"""`Progress.what` once the stretch is selected; `reasons` and `warnings` among its facts are sentences, one a
line."""


@dataclass(frozen=True, eq=False)
class SelectedSpeech:
    """The stretch of a recording that a voice is cloned from, and the recording's name and hash."""

    selection: Selection
    source: Source


@dataclass(frozen=True, eq=False)
class CloneRequest:
    """What a voice is cloned from and how.

    `reference`: a recording's file, its audio, or a stretch selected before (`select_speech`). `consent`:
    whose voice it is and that they agreed, a sentence or its record. `transcript`: what is said in the
    recording, which is then used whole; it is kept with the voice and guides a search.
    """

    reference: str | os.PathLike[str] | Audio | SelectedSpeech
    consent: str | Consent
    name: str = "clone"
    transcript: str | None = None
    coding: CodingSettings = field(default_factory=CodingSettings)


@dataclass(eq=False, kw_only=True)
class ClonedVoice(Voice):
    """A voice and how it came about.

    `selection` is the stretch of the recording, `reference` what was coded (the stretch, leveled, in whole
    frames, at the codec's rate), `decoded` the sound of the voice's codes, `distance` the spectral distance
    of the two, `coding` how the codes were found.
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
    max_seconds: float = 30.0,
) -> SelectedSpeech:
    """The stretch of a recording to clone from, at `rate` Hz; all of it when there is a transcript.

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
    selection = select_reference(audio, max_seconds=max_seconds, rate=rate, whole=whole)
    return SelectedSpeech(selection, origin)


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
    request.coding.ways(coder.has_encoder)
    config = coder.codec.config
    rate, speech = config.sampling_rate, request.reference
    if not isinstance(speech, SelectedSpeech):
        speech = select_speech(speech, rate, transcript=request.transcript)
        reasons, warnings = (
            "\n".join(lines) for lines in (speech.selection.reasons, speech.selection.warnings)
        )
        progress(Progress(SELECTED, 1, 1, {"reasons": reasons, "warnings": warnings}))
    selection = speech.selection
    samples = normalize_loudness(selection.audio.at(rate).samples, rate)
    samples = whole_frames(samples, config.samples_per_frame, rate)
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
        "encoder, refined" if coding.method == "refined" else coding.method,
        coding.record() or {"reconstruction": round(distance, 6)},
        speech.source,
        start_s=round(selection.start, 3),
        seconds=round(len(samples) / rate, 3),
    )
    if request.transcript is not None:
        record["transcript"] = request.transcript
    return ClonedVoice(
        request.name,
        coding.codes,
        embedding,
        record,
        selection=selection,
        reference=Audio(samples, rate),
        decoded=Audio(decoded.numpy(), rate),
        distance=distance,
        coding=coding,
    )
