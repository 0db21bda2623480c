"""How each kind of server is asked: paths, fields, and where its answers have the audio.

An adapter is data and at most three small functions, so that a new kind is a few lines here. The sources of
each are named; requests and answers of each are recorded in tests/endpoints.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from revox.endpoints.endpoint import ReferenceClip, SpeechQuery

Body = dict[str, Any]


@dataclass(frozen=True)
class EndpointAdapter:
    """A kind of server.

    fields: the JSON of a request, from the query and the model's name. stream: what is added to it to
    stream, None where the server cannot; `stream_format` is what then comes, and `events` says that it comes
    as server-sent events. unwrap: the bytes of the file in a whole answer. reference: "", "audio" or "audio
    and text", what cloning needs. Promised: `rate` in Hz (None: the server's own). For hosted APIs `url` and
    `key_variable` are known, and `model` is the one asked for unless another is named.
    """

    kind: str
    fields: Callable[[SpeechQuery, str | None], Body]
    rate: int | None = 24_000
    formats: tuple[str, ...] = ("wav", "pcm", "flac", "mp3", "opus")
    stream: Mapping[str, Any] | None = None
    stream_format: str = "pcm"
    events: bool = False
    reference: str = ""
    path: str = "/v1/audio/speech"
    voices_path: str | None = "/v1/audio/voices"
    unwrap: Callable[[bytes], bytes] = bytes
    url: str | None = None
    key_variable: str | None = None
    model: str | None = None


def data_url(clip: ReferenceClip) -> str:
    """A recording as a `data:` URL, which servers decode by its content."""
    return f"data:audio/wav;base64,{_base64(clip.content)}"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _present(**fields: Any) -> Body:
    return {name: value for name, value in fields.items() if value is not None}


def _openai(query: SpeechQuery, model: str | None) -> Body:
    """platform.openai.com/docs/api-reference/audio/createSpeech: model and voice are required there."""
    return _present(model=model, input=query.text, voice=query.voice, response_format=query.response_format)


def _with_seed(query: SpeechQuery, model: str | None) -> Body:
    return _openai(query, model) | _present(seed=query.seed)


def _vllm_omni(query: SpeechQuery, model: str | None) -> Body:
    """vllm-omni 0.30.0, entrypoints/openai/protocol/audio.py."""
    body = _with_seed(query, model)
    if query.reference is not None:
        body |= _present(ref_audio=data_url(query.reference), ref_text=query.reference.transcript)
    return body


def _revox(query: SpeechQuery, model: str | None) -> Body:
    return _vllm_omni(query, model) | _present(consent=query.reference and query.reference.consent)


def _qwen3(query: SpeechQuery, model: str | None) -> Body:
    """vllm-omni 0.30.0, tts_adapters/qwen3_tts.py: Base clones, CustomVoice has speakers."""
    task = "Base" if query.reference is not None else "CustomVoice"
    return _vllm_omni(query, model) | {"task_type": task}


def _sglang_omni(query: SpeechQuery, model: str | None) -> Body:
    """sglang-omni, serve/protocol.py (CreateSpeechRequest) and docs/basic_usage/tts_s2pro.md."""
    return _vllm_omni(query, model)


def _kokoro(query: SpeechQuery, model: str | None) -> Body:
    """Kokoro-FastAPI, api/src/structures/schemas.py: it streams unless it is asked not to."""
    return _openai(query, model) | {"stream": False}


def _chatterbox(query: SpeechQuery, model: str | None) -> Body:
    """Chatterbox-TTS-Server, server.py (OpenAISpeechRequest): the model's name is required and not used."""
    return _with_seed(query, model or "chatterbox")


def _mistral(query: SpeechQuery, model: str | None) -> Body:
    """docs.mistral.ai/studio/audio/text-to-speech and mistralai/client-python (SpeechRequest)."""
    clip = query.reference
    return _present(
        model=model,
        input=query.text,
        voice_id=query.voice,
        ref_audio=_base64(clip.content) if clip else None,
        response_format=query.response_format,
    )


def _mistral_file(content: bytes) -> bytes:
    """The file in `{"audio_data": base64}`. Raises ValueError on anything else."""
    import json

    found = json.loads(content)
    if not isinstance(found, dict) or not isinstance(found.get("audio_data"), str):
        raise ValueError("the answer has no audio_data")
    return base64.b64decode(found["audio_data"], validate=True)


def _fish_speech(query: SpeechQuery, model: str | None) -> Body:
    """fish-speech, fish_speech/utils/schema.py (ServeTTSRequest): its own server, not vllm-omni's."""
    clip = query.reference
    return _present(
        text=query.text,
        format=query.response_format,
        reference_id=query.voice,
        references=[{"audio": _base64(clip.content), "text": clip.transcript or ""}] if clip else None,
        seed=query.seed,
    )


def event_audio(event: Any) -> bytes | None:
    """The audio of a server-sent event, None where it has none.

    OpenAI, revox and vllm-omni: {"type": "speech.audio.delta", "audio"}; Mistral: the same with
    "audio_data"; sglang-omni: {"object": "audio.speech.chunk", "audio": {"data"}}. Raises ValueError when the
    audio is not base64, or the event reports an error.
    """
    if not isinstance(event, dict):
        return None
    if event.get("error") or str(event.get("type", "")).endswith("error"):
        error = event.get("error")
        message = error.get("message") if isinstance(error, dict) else error or event.get("message")
        raise ValueError(str(message or "the stream reports an error"))
    found = event.get("audio_data", event.get("audio"))
    if isinstance(found, dict):
        found = found.get("data")
    return base64.b64decode(found, validate=True) if isinstance(found, str) and found else None


_RAW = {"response_format": "pcm", "stream": True, "stream_format": "audio"}
_OMNI = EndpointAdapter("vllm-omni", _vllm_omni, stream=_RAW, reference="audio")

ADAPTERS: dict[str, EndpointAdapter] = {
    adapter.kind: adapter
    for adapter in (
        EndpointAdapter(
            "openai", _openai, stream={"response_format": "pcm", "stream_format": "audio"}, model="tts-1"
        ),
        EndpointAdapter(
            "revox",
            _revox,
            formats=("wav", "pcm", "flac", "mp3", "aac", "opus"),
            stream={"response_format": "pcm", "stream_format": "audio"},
            reference="audio",
        ),
        _OMNI,
        # fishaudio/s2-pro gives 44.1 kHz and openbmb/VoxCPM2 48 kHz (vllm-omni's docs/serving/speech_api).
        EndpointAdapter("fish-s2-pro", _vllm_omni, 44_100, stream=_RAW, reference="audio and text"),
        EndpointAdapter("voxcpm2", _vllm_omni, 48_000, stream=_RAW, reference="audio"),
        EndpointAdapter("qwen3-tts", _qwen3, stream=_RAW, reference="audio and text"),
        EndpointAdapter(
            "sglang-omni",
            _sglang_omni,
            None,
            stream={"response_format": "pcm", "stream": True},
            events=True,
            reference="audio",
            voices_path=None,
        ),
        EndpointAdapter(
            "kokoro",
            _kokoro,
            formats=("wav", "pcm", "flac", "mp3", "aac", "opus"),
            stream={"response_format": "pcm", "stream": True},
            model="kokoro",
        ),
        EndpointAdapter("chatterbox", _chatterbox, formats=("wav", "mp3", "opus")),
        EndpointAdapter(
            "mistral",
            _mistral,
            stream={"response_format": "pcm", "stream": True},
            stream_format="pcm-float",
            events=True,
            reference="audio",
            voices_path="/v1/audio/voices?limit=100",
            unwrap=_mistral_file,
            url="https://api.mistral.ai",
            key_variable="MISTRAL_API_KEY",
            model="voxtral-mini-tts-2603",
        ),
        EndpointAdapter(
            "fish-speech",
            _fish_speech,
            44_100,
            formats=("wav", "mp3"),
            stream={"format": "wav", "streaming": True},
            stream_format="wav",
            reference="audio and text",
            path="/v1/tts",
            voices_path="/v1/references/list?format=json",
        ),
    )
}
