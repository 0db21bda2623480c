"""What can be asked of the speech endpoints: OpenAI's fields and vllm-omni's, and nothing without effect.

The fields are those of OpenAI's `audio.speech.create` and of vllm-omni 0.30's
vllm_omni/entrypoints/openai/protocol/audio.py. One that this model cannot follow is taken only with the value
that asks for nothing; with any other it is refused, with the ways out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from revox.serving.errors import NO_EFFECT, ApiError, validation_error
from revox.synthesis.engine import CFG_RANGE, DEFAULT_CFG, MAX_FRAMES


def _without_effect(why: str, *neutral: Any) -> BeforeValidator:
    def check(value: Any) -> Any:
        asked = value.strip().lower() if isinstance(value, str) else value
        if value is None or any(asked == n and type(asked) is type(n) for n in neutral):
            return None
        raise PydanticCustomError(NO_EFFECT, why.replace("{", "{{").replace("}", "}}"))

    return BeforeValidator(check)


_STYLE = (
    "this model takes no instructions about style; choose a voice that speaks so, or clone one from a "
    "recording that does"
)
_LANGUAGE = (
    "this model speaks the language that the text is written in; leave language out, and choose a voice of "
    "that language"
)
_EMBEDDING = "this model reads no speaker embedding; give ref_audio, or a voice by name"

Text = Annotated[str, Field(description="What to say.")]
Format = Literal["wav", "pcm", "flac", "mp3", "aac", "opus"]


class VoiceId(BaseModel):
    """A voice as OpenAI's custom voices are named."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str


class ExtraParams(BaseModel):
    """What vllm-omni takes for this model beside its fields (its voxtral_tts.py, `_extract_cfg_alpha`)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    cfg_alpha: float | None = Field(
        default=None,
        ge=CFG_RANGE[0],
        le=CFG_RANGE[1],
        description="How much the speech is held to text and voice: the scale of guidance, 1.2 by default.",
    )


class Manner(BaseModel):
    """How something is to be spoken: all fields but the text, shared by every endpoint."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(default=None, description="The served model's id; it may be left out.")
    voice: str | VoiceId | None = Field(
        default=None,
        validation_alias=AliasChoices("voice", "speaker"),
        description="A voice of GET /v1/audio/voices, by name or as {id}.",
    )
    ref_audio: str | None = Field(
        default=None,
        description="A recording to speak like, in place of a voice: data URL, base64, or where the server "
        "allows it an http(s) or file address.",
    )
    ref_text: str | None = Field(default=None, description="What is said in ref_audio.")
    consent: str | None = Field(
        default=None,
        max_length=4000,
        description="Whose voice ref_audio is, and that they agreed to its cloning.",
    )
    response_format: Format = "wav"
    sample_rate: int | None = Field(default=None, description="Hz; else the model's own, 24000.")
    speed: float | None = Field(
        default=1.0, ge=0.25, le=4.0, description="Faster or slower at the same pitch."
    )
    seed: int | None = Field(
        default=None,
        ge=-(2**63),
        lt=2**63,
        description="The same seed says it in the same way; 0 by default.",
    )
    max_new_tokens: int | None = Field(
        default=None, ge=1, le=MAX_FRAMES, description="The longest that it may speak, in frames of 80 ms."
    )
    initial_codec_chunk_frames: int | None = Field(
        default=None, ge=1, le=100, description="Frames in a stream's first chunk; 5 by default."
    )
    # Of other models; taken with the values that ask for nothing.
    instructions: Annotated[Literal[""] | None, _without_effect(_STYLE, "")] = None
    task_type: Annotated[
        Literal["CustomVoice", "Base"] | None, BeforeValidator(lambda value: _task(value))
    ] = Field(default=None, description="CustomVoice with a voice, Base with ref_audio; it may be left out.")
    language: Annotated[Literal["Auto"] | None, _without_effect(_LANGUAGE, "auto", "")] = None
    x_vector_only_mode: Annotated[Literal[False] | None, _without_effect(_EMBEDDING, False)] = None
    speaker_embedding: Annotated[None, _without_effect(_EMBEDDING)] = None
    non_streaming_mode: Annotated[
        None, _without_effect("this model has one way to read a prompt; leave non_streaming_mode out")
    ] = None
    word_timestamps: Annotated[
        Literal[False] | None,
        _without_effect("this server has no aligner and cannot give word_timestamps; leave it out", False),
    ] = None
    ref_audio_2: Annotated[
        None, _without_effect("this model speaks with one voice at a time; send two requests")
    ] = None
    ambient_sound: Annotated[
        None, _without_effect("this model makes speech only; leave ambient_sound out")
    ] = None
    duration_seconds: Annotated[
        None,
        _without_effect("this model decides how long it speaks; use speed, or max_new_tokens as a limit"),
    ] = None
    extra_params: ExtraParams | None = Field(default=None, description="As vllm-omni takes them.")

    @property
    def cfg_alpha(self) -> float:
        """The scale of guidance."""
        asked = self.extra_params.cfg_alpha if self.extra_params is not None else None
        return DEFAULT_CFG if asked is None else asked

    @property
    def voice_name(self) -> str | None:
        """The voice asked for, or None; a client that must name one may call it "default" or nothing."""
        name = self.voice.id if isinstance(self.voice, VoiceId) else self.voice
        return None if name is None or name.strip().lower() in ("", "default") else name.strip()


def _task(value: Any) -> Any:
    if value in (None, "CustomVoice", "Base"):
        return value
    if value == "VoiceDesign":
        raise PydanticCustomError(
            NO_EFFECT,
            "this model cannot make a voice from a description; choose a voice of GET /v1/audio/voices, or "
            "clone one from a recording (ref_audio, or POST /v1/audio/voices)",
        )
    raise PydanticCustomError("literal_error", "Input should be 'CustomVoice' or 'Base'")


class SpeechRequest(Manner):
    """The body of POST /v1/audio/speech."""

    input: Text
    stream: bool = Field(default=False, description="Send audio while it is made, as events.")
    stream_format: Literal["audio", "sse"] | None = Field(
        default=None, description="How a stream is sent: as the audio's own bytes, or as events."
    )

    @property
    def streams(self) -> Literal["audio", "sse"] | None:
        """How to stream; None is one whole answer."""
        return self.stream_format or ("sse" if self.stream else None)


_ITEM = {
    "type": "object",
    "required": ["input"],
    "properties": {"input": {"type": "string"}},
    "description": "An input, and any field of the batch that this item overrides.",
}


class BatchRequest(Manner):
    """The body of POST /v1/audio/speech/batch: fields that hold for all items, which may override them."""

    items: Annotated[
        list[Any],
        Field(min_length=1, max_length=32, json_schema_extra={"items": _ITEM}),
    ]


class SessionConfig(Manner):
    """The first message of WebSocket /v1/audio/speech/stream, less its `type`."""

    stream_audio: bool = False
    split_granularity: Literal["none", "sentence", "clause"] = "sentence"


def batch_item(batch: BatchRequest, item: Any) -> SpeechRequest:
    """One item of a batch with what the batch says for all. Raises ApiError when it cannot be."""
    if not isinstance(item, dict):
        raise ApiError(422, "an item is an object with an input", param="items")
    shared = batch.model_dump(exclude_unset=True, exclude={"items"})
    own = {name: value for name, value in item.items() if value is not None}
    if any(name in own for name in ("voice", "speaker")):
        shared.pop("voice", None)
        # Its own voice stands against a recording for all.
        if "ref_audio" not in own:
            for name in ("ref_audio", "ref_text", "consent", "task_type"):
                shared.pop(name, None)
    elif "ref_audio" in own:
        for name in ("voice", "ref_text", "task_type"):
            shared.pop(name, None)
    for name in ("stream", "stream_format"):
        if own.get(name):
            raise ApiError(400, f"a batch is answered as a whole; leave {name} out", param=name)
    return parse(SpeechRequest, {**shared, **own})


def parse(kind: type[Any], data: Any) -> Any:
    """`data` as a model. Raises ApiError (400 for a field without effect, or else 422)."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise validation_error(error.errors()) from None
