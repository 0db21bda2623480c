"""The endpoints of voices: list, upload, show, hear, delete; cloning jobs; the record of consent.

Upload, list and delete have vllm-omni's format (its docs/serving/speech_api.md and entrypoints/openai), with
additional fields; errors have OpenAI's.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Annotated, Any

from fastapi import APIRouter, Form, UploadFile
from fastapi.responses import JSONResponse, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from revox.checkpoint.errors import VoiceError
from revox.checkpoint.release import PRESETS
from revox.checkpoint.voices import consent_document
from revox.marking import mark_bytes, stream_headers
from revox.serving.errors import NO_EFFECT, ApiError
from revox.serving.state import AskedBy, State
from revox.serving.voice_jobs import ACTIVE, Job
from revox.serving.voices import given_consent
from revox.speech import encode_audio

router = APIRouter(prefix="/v1/audio", tags=["voices"])

MAX_TEXT = 4000
_RECORDINGS = frozenset({
    "audio/mpeg", "audio/wav", "audio/x-wav", "audio/wave", "audio/ogg", "audio/opus", "audio/aac",
    "audio/flac", "audio/x-flac", "audio/webm", "audio/mp4", "audio/x-m4a", "video/mp4", "video/webm",
})  # fmt: skip

_SAFE = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


def _short(text: str | None) -> str | None:
    if text is not None and len(text) > MAX_TEXT:
        raise PydanticCustomError(NO_EFFECT, f"it is longer than {MAX_TEXT} characters; shorten it")
    return text


def _stripped(text: str | None) -> str | None:
    return (text or "").strip() or None


Note = Annotated[str | None, AfterValidator(_short), AfterValidator(_stripped)]


class UploadForm(BaseModel):
    """The form of POST /v1/audio/voices."""

    model_config = ConfigDict(extra="forbid")

    audio_sample: UploadFile = Field(description="The recording: 3 to 30 s of one person.")
    consent: Annotated[str, AfterValidator(_short)] = Field(
        description="Whose voice it is, and that they agreed to its cloning."
    )
    name: str = Field(description="The new voice's name: a-z, 0-9, _ and -.")
    subject: Note = Field(default=None, description="The name of the person whose voice it is.")
    ref_text: Note = Field(default=None, description="The transcript of the recording.")
    speaker_description: Note = Field(default=None, description="Stored with the voice and listed.")
    keep_sample: bool = Field(default=False, description="Keep the recording itself on the server.")


@router.get("/voices")
def list_voices(state: State) -> dict[str, Any]:
    """Every voice by name, which are presets of the release, and for uploaded ones whose it is, when it was
    made, and of which recording."""
    voices = state.voices
    names = sorted(voices.names())
    return {
        "voices": names,
        "presets": [name for name in names if name in PRESETS],
        "uploaded_voices": [_uploaded(record) for record in voices.records()],
        "jobs": [job for job in voices.jobs.listed() if job["state"] in ACTIVE],
    }


@router.post(
    "/voices",
    responses={200: {"description": "The voice is made."}, 202: {"description": "A job makes the voice."}},
)
async def upload_voice(
    state: State, who: AskedBy, form: Annotated[UploadForm, Form(media_type="multipart/form-data")]
) -> Response:
    """Make a voice of a recording: at once with the checkpoint's encoder, or by inversion as a job."""
    await asyncio.to_thread(state.voices.check_name, form.name)
    data = await form.audio_sample.read()
    reference = await state.references.read(data)
    kind = (form.audio_sample.content_type or "").partition(";")[0].strip().lower()
    details = {
        "created_at": int(time.time()),
        "file_size": len(data),
        "mime_type": kind if kind in _RECORDINGS else "application/octet-stream",
        "seconds": round(reference.audio.seconds, 2),
    }
    if form.speaker_description:
        details["speaker_description"] = form.speaker_description
    job = Job(
        name=form.name,
        asked_by=who,
        consent=given_consent(form.consent, form.subject, who).model_dump(mode="json", exclude_none=True),
        sha256=hashlib.sha256(data).hexdigest(),
        details=details,
        ref_text=form.ref_text,
        keep_sample=form.keep_sample or state.settings.keep_samples,
    )
    record = await state.voices.upload(reference, job)
    if record is not None:
        return JSONResponse({"success": True, "voice": _uploaded(record)})
    shown = state.voices.jobs.show(job)
    voice = {"name": job.name, "consent": job.consent["statement"], **details, "status": shown["state"]}
    if job.ref_text:
        voice["ref_text"] = job.ref_text
    return JSONResponse(
        {"success": True, "voice": voice, "job": shown},
        status_code=202,
        headers={"Location": f"/v1/audio/voice-jobs/{job.id}", "Retry-After": "5"},
    )


@router.get("/voices/{name}")
def show_voice(state: State, name: str) -> dict[str, Any]:
    """One voice: its length, its provenance, and the consent on record."""
    voice = state.voices.voice(name)
    record = state.voices.files.records.get(name)
    found = {
        "name": name,
        "kind": "uploaded" if record else "checkpoint",
        "frames": voice.frames,
        "seconds": round(voice.frames / state.tts.model.config.codec.frame_rate, 2),
        "codes_kept": voice.codes is not None,
    }
    if record:
        return {**_uploaded(record), **found, "provenance": record["provenance"]}
    return {**found, "provenance": voice.provenance}


@router.delete("/voices/{name}")
def delete_voice(state: State, who: AskedBy, name: str) -> dict[str, Any]:
    """Delete an uploaded voice: embedding, codes, recording and derived data; the log keeps a tombstone."""
    state.voices.remove(name, who)
    return {"success": True, "message": f"Voice '{name}' deleted successfully"}


@router.get("/voices/{name}/consent")
def voice_consent(state: State, name: str) -> dict[str, Any]:
    """Who agreed to what, when, for which recording, and every event of the voice, also of a removed one."""
    found = state.voices.files.document(name)
    if found["voices"]:
        return found
    if name in state.voices.names():
        try:
            return consent_document(state.tts.folder, name)
        except VoiceError:
            raise ApiError(
                404, f"voice {name!r} came with the checkpoint, without a record of consent", param="name"
            ) from None
    raise state.voices.not_found(name)


@router.get("/consent")
def all_consent(state: State) -> dict[str, Any]:
    """The complete record of consent: this server's uploads, removals and inline references."""
    return state.voices.files.document()


@router.get("/voices/{name}/sample", response_class=Response)
def voice_sample(state: State, name: str) -> Response:
    """The recording of a voice as it was uploaded, if it was kept."""
    record = state.voices.files.records.get(name)
    if record is None:
        state.voices.voice(name)  # 404 with the nearest names for an unknown voice
    data = state.voices.files.sample(name) if record else None
    if record is None or data is None:
        raise ApiError(404, f"the recording of voice {name!r} was not kept", param="name", code="no_sample")
    headers = _SAFE | {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(data, media_type=record["mime_type"], headers=headers)


@router.get("/voices/{name}/preview", response_class=Response)
def voice_preview(state: State, name: str) -> Response:
    """The recording as the voice's codes reproduce it (WAV); a preset's codes are recovered first."""
    voice = state.voices.voice(name)
    data, _ = encode_audio(state.tts.decode(voice), "wav")
    headers = dict(_SAFE)
    if (record := state.new_record(voice)) is not None:
        data = mark_bytes(data, "wav", record=record, signer=state.signer)
        headers |= stream_headers(record)
    return Response(data, media_type="audio/wav", headers=headers)


@router.get("/voice-jobs")
def list_jobs(state: State) -> dict[str, Any]:
    """The cloning jobs, newest first."""
    return {"object": "list", "data": state.voices.jobs.listed()}


@router.get("/voice-jobs/{id}")
def show_job(state: State, id: str) -> dict[str, Any]:
    """The state of a cloning job."""
    return state.voices.jobs.get(id)


@router.delete("/voice-jobs/{id}")
def cancel_job(state: State, who: AskedBy, id: str) -> dict[str, Any]:
    """Cancel a cloning job that waits or runs."""
    return state.voices.jobs.cancel(id, who)


@router.post("/voice-jobs/{id}/retry", status_code=202)
async def retry_job(state: State, who: AskedBy, id: str) -> dict[str, Any]:
    """Retry a failed cloning job, if its recording was kept."""
    return await state.voices.retry(id, who)


def _uploaded(record: dict[str, Any]) -> dict[str, Any]:
    """An uploaded voice as vllm-omni lists it, with its consent, recording and method."""
    provenance = record["provenance"]
    consent, source = provenance["consent"], provenance.get("source", {})
    shown = {
        "name": record["name"],
        "consent": consent["statement"],
        "created_at": record["created_at"],
        "embedding_source": "audio",
        "consent_recorded_at": consent.get("recorded_at"),
        "sha256": source.get("sha256"),
        "method": provenance.get("method"),
        "sample_kept": record.get("sample_kept", False),
        **{key: consent.get(key) for key in ("subject", "given_by")},
        **{key: record.get(key) for key in ("file_size", "mime_type", "seconds", "frames", "ref_text")},
        "speaker_description": record.get("speaker_description"),
    }
    return {key: value for key, value in shown.items() if value is not None}
