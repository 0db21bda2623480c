"""The bodies of the speech endpoints: OpenAI's fields and vllm-omni's; values without effect are refused.

The fields are those of OpenAI's `audio.speech.create` and of vllm-omni 0.30's
vllm_omni/entrypoints/openai/protocol/audio.py. Fields that this model does not support are accepted only with
a neutral value; any other value is refused with a message that names the alternatives.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from revox.serving.errors import NO_EFFECT, ApiError, validation_error
from revox.synthesis.engine import CFG_RANGE, DEFAULT_CFG, FLOW_STEPS_RANGE
from revox.synthesis.languages import LANGUAGES, language_code
from revox.synthesis.longform import TAKES_RANGE
from revox.synthesis.split import MAX_CHARS_RANGE


def _without_effect(why: str, *neutral: Any) -> BeforeValidator:
    def check(value: Any) -> Any:
        given = value.strip().lower() if isinstance(value, str) else value
        if value is None or any(given == n and type(given) is type(n) for n in neutral):
            return None
        raise PydanticCustomError(NO_EFFECT, why.replace("{", "{{").replace("}", "}}"))

    return BeforeValidator(check)


_STYLE = (
    "this model has no style instructions; choose a voice with that style, or clone one from a recording "
    "that has it"
)
_LANGUAGE = f"this model speaks {', '.join(LANGUAGES.values())}; leave language out for any of them"
_EMBEDDING = "this model has no speaker embeddings; use ref_audio, or a voice by name"


_NUMBER = re.compile(r"\s*-?\d{1,20}((?:\.\d{1,20})?(?:[eE][+-]?\d{1,2})?)\s*", re.ASCII)


def _number(value: Any) -> Any:
    """A number that was sent as a string, as JSON would have it, as a number; anything else as it is."""
    if isinstance(value, str) and (found := _NUMBER.fullmatch(value)) is not None:
        return float(value) if found[1] else int(value)
    return value


def _language(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "auto")):
        return None
    code = language_code(value) if isinstance(value, str) else value
    if code is None:
        raise PydanticCustomError(NO_EFFECT, _LANGUAGE)
    return code


Whole = Annotated[int | None, BeforeValidator(_number)]
Real = Annotated[float | None, BeforeValidator(_number)]
MOST_FLOW_STEPS = 16
"""More would slow down the other streams of a batch for what nobody hears."""
Text = Annotated[str, Field(description="The text to speak.")]
Format = Literal["wav", "pcm", "flac", "mp3", "aac", "opus"]  # OpenAI's


class VoiceId(BaseModel):
    """A voice in the form of OpenAI's custom voices."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str


class ExtraParams(BaseModel):
    """vllm-omni's additional parameters for this model (its voxtral_tts.py, `_extract_cfg_alpha`)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    cfg_alpha: Real = Field(
        default=None,
        ge=CFG_RANGE[0],
        le=CFG_RANGE[1],
        description="The scale of classifier-free guidance, 1.2 by default.",
    )


class SpeechOptions(BaseModel):
    """All fields but the text, shared by every endpoint."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(default=None, description="The served model's id; may be left out.")
    voice: str | VoiceId | None = Field(
        default=None,
        validation_alias=AliasChoices("voice", "speaker"),
        description="A voice of GET /v1/audio/voices, by name or as {id}.",
    )
    ref_audio: str | None = Field(
        default=None,
        description="A recording to clone instead of a voice: data URL, base64, or, if the server allows "
        "it, an http(s) or file address.",
    )
    ref_text: str | None = Field(default=None, description="The transcript of ref_audio.")
    consent: str | None = Field(
        default=None,
        max_length=4000,
        description="Whose voice ref_audio is, and that they agreed to its cloning.",
    )
    response_format: Format = "wav"
    sample_rate: Whole = Field(default=None, description="Hz; default the model's own, 24000.")
    speed: Real = Field(default=1.0, ge=0.25, le=4.0, description="Faster or slower at the same pitch.")
    seed: Whole = Field(
        default=None,
        ge=-(2**63),
        lt=2**63,
        description="The same seed gives the same speech; 0 by default.",
    )
    max_new_tokens: Whole = Field(
        default=None, ge=1, le=1 << 16, description="The limit on its length, in frames of 80 ms."
    )
    max_chars: Whole = Field(
        default=None,
        ge=MAX_CHARS_RANGE[0],
        le=MAX_CHARS_RANGE[1],
        description="The longest piece of the text that is spoken at a time; the server's own by default.",
    )
    takes: Whole = Field(
        default=None,
        ge=TAKES_RANGE[0],
        le=TAKES_RANGE[1],
        description="How often a piece is spoken at most until it is good; 1 is the model's first take.",
    )
    flow_steps: int | None = Field(
        default=None,
        ge=FLOW_STEPS_RANGE[0],
        le=MOST_FLOW_STEPS,
        description="Steps for a frame's acoustic codes; fewer are faster. Default: the checkpoint's own, 7.",
    )
    text_normalization: Literal["basic", "full", "none"] | None = Field(
        default=None,
        description="basic reads Markdown, tags and URLs as text and [pause:1s] as silence; full spells "
        "numbers as well; none changes no text; the server's own by default.",
    )
    language: Annotated[str | None, BeforeValidator(_language)] = Field(
        default=None,
        description="The language of the text, by name or code; it must be the voice's or the text's. "
        "Numbers are spelled in it (text_normalization full).",
    )
    initial_codec_chunk_frames: Whole = Field(
        default=None, ge=1, le=100, description="Frames in a stream's first chunk; 5 by default."
    )
    # Fields of other models, accepted with neutral values.
    instructions: Annotated[Literal[""] | None, _without_effect(_STYLE, "")] = None
    task_type: Annotated[
        Literal["CustomVoice", "Base"] | None, BeforeValidator(lambda value: _task(value))
    ] = Field(default=None, description="CustomVoice with a voice, Base with ref_audio; may be left out.")
    x_vector_only_mode: Annotated[Literal[False] | None, _without_effect(_EMBEDDING, False)] = None
    speaker_embedding: Annotated[None, _without_effect(_EMBEDDING)] = None
    non_streaming_mode: Annotated[
        None, _without_effect("this model has one prompt mode; leave non_streaming_mode out")
    ] = None
    word_timestamps: Annotated[
        Literal[False] | None,
        _without_effect("this server has no aligner; leave word_timestamps out", False),
    ] = None
    ref_audio_2: Annotated[
        None, _without_effect("this model speaks in one voice at a time; send two requests")
    ] = None
    ambient_sound: Annotated[
        None, _without_effect("this model generates speech only; leave ambient_sound out")
    ] = None
    duration_seconds: Annotated[
        None,
        _without_effect("this model determines the duration; use speed, or max_new_tokens as a limit"),
    ] = None
    extra_params: ExtraParams | None = Field(default=None, description="vllm-omni's additional parameters.")

    @property
    def cfg_alpha(self) -> float:
        """The scale of guidance."""
        given = self.extra_params.cfg_alpha if self.extra_params is not None else None
        return DEFAULT_CFG if given is None else given

    @property
    def voice_name(self) -> str | None:
        """The name of the voice, or None; "default" and "" count as None, for clients that must send one."""
        name = self.voice.id if isinstance(self.voice, VoiceId) else self.voice
        return None if name is None or name.strip().lower() in ("", "default") else name.strip()


def _task(value: Any) -> Any:
    if value in (None, "CustomVoice", "Base"):
        return value
    if value == "VoiceDesign":
        raise PydanticCustomError(
            NO_EFFECT,
            "this model cannot design a voice from a description; choose one of GET /v1/audio/voices, or "
            "clone one from a recording (ref_audio, or POST /v1/audio/voices)",
        )
    raise PydanticCustomError("literal_error", "Input should be 'CustomVoice' or 'Base'")


class SpeechRequest(SpeechOptions):
    """The body of POST /v1/audio/speech."""

    input: Text
    stream: bool = Field(default=False, description="Send audio as it is generated, as events.")
    stream_format: Literal["audio", "sse"] | None = Field(
        default=None, description="The form of a stream: the bytes of the audio file, or events."
    )

    timestamps: Literal["sentence"] | None = Field(
        default=None,
        description="sentence: events say when each sentence is heard; each is then spoken apart.",
    )

    @property
    def streams(self) -> Literal["audio", "sse"] | None:
        """The form of the stream; None is a complete response."""
        return self.stream_format or ("sse" if self.stream else None)


_ITEM = {
    "type": "object",
    "required": ["input"],
    "properties": {"input": {"type": "string"}},
    "description": "An input, and any fields that override those of the batch.",
}


class BatchRequest(SpeechOptions):
    """The body of POST /v1/audio/speech/batch: fields for all items, which may override them."""

    items: Annotated[
        list[Any],
        Field(min_length=1, max_length=32, json_schema_extra={"items": _ITEM}),
    ]


class SessionConfig(SpeechOptions):
    """The first message of WebSocket /v1/audio/speech/stream, without its `type`."""

    stream_audio: bool = False
    split_granularity: Literal["none", "sentence", "clause"] = "sentence"


def batch_item(batch: BatchRequest, item: Any) -> dict[str, Any]:
    """The body of one item of a batch, with the fields of the batch. Raises ApiError if it is invalid."""
    if not isinstance(item, dict):
        raise ApiError(422, "an item must be an object with an input", param="items")
    shared = batch.model_dump(exclude_unset=True, exclude={"items"})
    own = {name: value for name, value in item.items() if value is not None}
    if any(name in own for name in ("voice", "speaker")):
        shared.pop("voice", None)
        # An item's own voice replaces a recording for all items.
        if "ref_audio" not in own:
            for name in ("ref_audio", "ref_text", "consent", "task_type"):
                shared.pop(name, None)
    elif "ref_audio" in own:
        for name in ("voice", "ref_text", "task_type"):
            shared.pop(name, None)
    for name in ("stream", "stream_format"):
        if own.get(name):
            raise ApiError(400, f"a batch has one complete response; leave {name} out", param=name)
    return {**shared, **own}


def parse(kind: type[Any], data: Any) -> Any:
    """`data` as a model. Raises ApiError (400 for a field without effect, otherwise 422)."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise validation_error(error.errors()) from None
