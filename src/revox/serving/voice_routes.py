"""The endpoints of voices: list, upload, show, hear, delete; the jobs that make them; the record of consent.

Upload, list and delete have vllm-omni's shapes (its docs/serving/speech_api.md and entrypoints/openai), with
more beside; errors have OpenAI's.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated, Any, cast

from fastapi import APIRouter, File, Form, Request, UploadFile
from fastapi.responses import JSONResponse, Response

from revox.serving.errors import ApiError
from revox.serving.state import ServerState, asked_by, state_of

if TYPE_CHECKING:
    from revox.serving.references import References
    from revox.serving.voice_jobs import Voices

router = APIRouter(prefix="/v1/audio", tags=["voices"])

FIELDS = frozenset(
    {"audio_sample", "consent", "name", "subject", "ref_text", "speaker_description", "keep_sample"}
)
MAX_TEXT = 4000
_RECORDINGS = frozenset({
    "audio/mpeg", "audio/wav", "audio/x-wav", "audio/wave", "audio/ogg", "audio/opus", "audio/aac",
    "audio/flac", "audio/x-flac", "audio/webm", "audio/mp4", "audio/x-m4a", "video/mp4", "video/webm",
})  # fmt: skip

_SAFE = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


def _voices(state: ServerState) -> Voices:
    return cast("Voices", state.voices)


@router.get("/voices")
async def list_voices(request: Request) -> dict[str, Any]:
    """Every voice by name, and what is known of the uploaded ones: whose, when, of which recording."""
    voices = _voices(state_of(request))
    # Another thread may hold the voices while it writes to the disk: the server does not wait for it.
    names, records, jobs = await asyncio.gather(
        asyncio.to_thread(voices.names), asyncio.to_thread(voices.records), asyncio.to_thread(voices.jobs)
    )
    return {
        "voices": sorted(names),
        "uploaded_voices": [_uploaded(record) for record in records],
        "jobs": [job for job in jobs if job["state"] in ("queued", "running")],
    }


@router.post(
    "/voices",
    responses={200: {"description": "The voice is made."}, 202: {"description": "A job makes the voice."}},
)
async def upload_voice(
    request: Request,
    audio_sample: Annotated[UploadFile, File(description="The recording: 3 to 30 s of one person.")],
    consent: Annotated[str, Form(description="Whose voice it is, and that they agreed to it being cloned.")],
    name: Annotated[str, Form(description="The new voice's name: a-z, 0-9, _ and -.")],
    subject: Annotated[str | None, Form(description="The name of the person whose voice it is.")] = None,
    ref_text: Annotated[str | None, Form(description="What is said in the recording.")] = None,
    speaker_description: Annotated[str | None, Form(description="Kept with the voice and listed.")] = None,
    keep_sample: Annotated[bool, Form(description="Keep the recording itself on the server.")] = False,
) -> Response:
    """A new voice from a recording: at once by the checkpoint's encoder, or as a job by inversion."""
    state = state_of(request)
    unknown = sorted(set(await request.form()) - FIELDS)
    if unknown:
        field = "speaker_embedding" if "speaker_embedding" in unknown else unknown[0][:100]
        why = (
            "this model has no speaker embeddings" if field == "speaker_embedding" else "it would do nothing"
        )
        raise ApiError(400, f"the field {field!r} is not taken: {why}; leave it out", param=field)
    given = {"subject": subject, "ref_text": ref_text, "speaker_description": speaker_description}
    texts = {key: (value or "").strip() or None for key, value in given.items()}
    for key, text in {"consent": consent, **texts}.items():
        if text is not None and len(text) > MAX_TEXT:
            raise ApiError(400, f"{key} is longer than {MAX_TEXT} characters; shorten it", param=key)
    voices = _voices(state)
    await asyncio.to_thread(voices.check_name, name)
    data = await audio_sample.read(state.settings.max_body_bytes + 1)
    reference = await cast("References", state.references).read(data, "upload")
    kind = (audio_sample.content_type or "").partition(";")[0].strip().lower()
    details = {
        "created_at": int(time.time()),
        "file_size": len(data),
        "mime_type": kind if kind in _RECORDINGS else "application/octet-stream",
        "seconds": round(reference.audio.seconds, 2),
    }
    if texts["speaker_description"]:
        details["speaker_description"] = texts["speaker_description"]
    record, job = await voices.upload(
        reference,
        name=name,
        consent=consent,
        subject=texts["subject"],
        ref_text=texts["ref_text"],
        details=details,
        keep_sample=keep_sample,
        asked_by=asked_by(request),
    )
    if record is not None:
        return JSONResponse({"success": True, "voice": _uploaded(record)})
    assert job is not None
    told = voices.told(job)
    coming = {"name": name, "consent": job.consent["statement"], **details, "status": told["state"]}
    if job.ref_text:
        coming["ref_text"] = job.ref_text
    return JSONResponse(
        {"success": True, "voice": coming, "job": told},
        status_code=202,
        headers={"Location": f"/v1/audio/voice-jobs/{job.id}", "Retry-After": "5"},
    )


@router.get("/voices/{name}")
async def show_voice(request: Request, name: str) -> dict[str, Any]:
    """One voice: its length, where it comes from, and the consent on record."""
    state = state_of(request)
    voices = _voices(state)
    voice = await asyncio.to_thread(voices.voice, name)
    record = voices.record(name)
    frame_rate = state.tts.model.config.codec.frame_rate
    found = {
        "name": name,
        "kind": "uploaded" if record else "checkpoint",
        "frames": voice.frames,
        "seconds": round(voice.frames / frame_rate, 2),
        "codes_kept": voice.codes is not None,
    }
    if record:
        return {**_uploaded(record), **found, "provenance": record["provenance"]}
    return {**found, "provenance": voice.provenance}


@router.delete("/voices/{name}")
async def delete_voice(request: Request, name: str) -> dict[str, Any]:
    """Delete an uploaded voice: rows, codes, recording and what was derived; the log keeps a tombstone."""
    await asyncio.to_thread(_voices(state_of(request)).remove, name, asked_by(request))
    return {"success": True, "message": f"Voice '{name}' deleted successfully"}


@router.get("/voices/{name}/consent")
async def voice_consent(request: Request, name: str) -> dict[str, Any]:
    """Who agreed to what, when, of which recording, and every event of the voice, also of a removed one."""
    voices = _voices(state_of(request))
    found = await asyncio.to_thread(voices.files.document, name)
    if not found["voices"]:
        if name in await asyncio.to_thread(voices.names):
            found = await asyncio.to_thread(_checkpoint_consent, state_of(request), name)
        else:
            raise voices.not_found(name)
    return found


def _checkpoint_consent(state: ServerState, name: str) -> dict[str, Any]:
    from revox.checkpoint.errors import VoiceError
    from revox.checkpoint.voices import consent_document

    try:
        return consent_document(state.tts.folder, name)
    except VoiceError:
        raise ApiError(
            404, f"voice {name!r} came with the checkpoint, without a record of consent", param="name"
        ) from None


@router.get("/consent")
async def all_consent(request: Request) -> dict[str, Any]:
    """The whole record of consent of this server's uploads, removals and one-off recordings, as one JSON."""
    return await asyncio.to_thread(_voices(state_of(request)).files.document)


@router.get("/voices/{name}/sample", response_class=Response)
async def voice_sample(request: Request, name: str) -> Response:
    """The recording a voice was made of, as it came, if it was kept."""
    voices = _voices(state_of(request))
    record = voices.record(name)
    if record is None:
        await asyncio.to_thread(voices.voice, name)  # 404 with the nearest names for no voice at all
    data = await asyncio.to_thread(voices.files.sample, name) if record else None
    if data is None:
        raise ApiError(404, f"the recording of voice {name!r} was not kept", param="name", code="no_sample")
    assert record is not None
    headers = _SAFE | {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(data, media_type=record["mime_type"], headers=headers)


@router.get("/voices/{name}/preview", response_class=Response)
async def voice_preview(request: Request, name: str) -> Response:
    """What the voice was made from, as its codes sound (WAV); a preset's codes are found from its rows."""
    state = state_of(request)
    voice = await asyncio.to_thread(_voices(state).voice, name)
    data, headers = await asyncio.to_thread(_previewed, state, voice)
    return Response(data, media_type="audio/wav", headers=_SAFE | headers)


def _previewed(state: ServerState, voice: Any) -> tuple[bytes, dict[str, str]]:
    import torch

    from revox.checkpoint.voice_codes import recover_codes
    from revox.serving.encoding import encode_whole

    model = state.tts.model
    codes = voice.codes
    if codes is None:
        table = model.mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight
        codes = recover_codes(voice.embedding, table, model.config).codes
    with torch.inference_mode():
        device = model.audio_tokenizer.output_proj.conv.weight.device
        samples = model.audio_tokenizer.decode(codes[None].to(device))[0].float().cpu().numpy()
    data = encode_whole(samples, state.tts.sampling_rate, "wav")
    if not state.settings.marking:
        return data, {}
    from revox.marking import mark_bytes, new_record, stream_headers

    record = new_record(state.settings.served_name[:200], voice.name[:200])
    return mark_bytes(data, "wav", record=record, signer=state.signer), stream_headers(record)


@router.get("/voice-jobs")
async def list_jobs(request: Request) -> dict[str, Any]:
    """The clonings in the background, newest first."""
    return {"object": "list", "data": await asyncio.to_thread(_voices(state_of(request)).jobs)}


@router.get("/voice-jobs/{id}")
async def show_job(request: Request, id: str) -> dict[str, Any]:
    """How a cloning stands."""
    return await asyncio.to_thread(_voices(state_of(request)).job, id)


@router.delete("/voice-jobs/{id}")
async def cancel_job(request: Request, id: str) -> dict[str, Any]:
    """End a cloning that waits or runs."""
    return await asyncio.to_thread(_voices(state_of(request)).cancel, id, asked_by(request))


@router.post("/voice-jobs/{id}/retry", status_code=202)
async def retry_job(request: Request, id: str) -> dict[str, Any]:
    """Try a failed cloning again, if its recording was kept."""
    return await _voices(state_of(request)).retry(id, asked_by(request))


def _uploaded(record: dict[str, Any]) -> dict[str, Any]:
    """An uploaded voice as vllm-omni lists it, and whose it is, since when, of what and how it was made."""
    provenance = record["provenance"]
    consent, source = provenance["consent"], provenance.get("source", {})
    shown = {
        "name": record["name"],
        "consent": consent["statement"],
        "created_at": record["created_at"],
        "file_size": record.get("file_size"),
        "mime_type": record.get("mime_type"),
        "embedding_source": "audio",
        "subject": consent.get("subject"),
        "given_by": consent.get("given_by"),
        "consent_recorded_at": consent.get("recorded_at"),
        "sha256": source.get("sha256"),
        "method": provenance.get("method"),
        "seconds": record.get("seconds"),
        "frames": record.get("frames"),
        "ref_text": record.get("ref_text"),
        "speaker_description": record.get("speaker_description"),
        "sample_kept": record.get("sample_kept", False),
    }
    return {key: value for key, value in shown.items() if value is not None}
