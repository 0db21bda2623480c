"""From a request to its audio: the voice, the prompt, the engine's stream, the encoded bytes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from revox.checkpoint.errors import VoiceError
from revox.marking import MarkRecord, mark_bytes, stream_headers
from revox.serving.encoding import Shape, StreamEncoder, check_rate
from revox.serving.errors import ApiError
from revox.serving.model_routes import check_model
from revox.serving.speech_request import SpeechOptions
from revox.speech import Audio, encode_audio
from revox.synthesis.engine import Request
from revox.synthesis.prompt import make_prompt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from revox.checkpoint.voices import Voice
    from revox.serving.engine import SpeechStream
    from revox.serving.state import ServerState

log = logging.getLogger("revox.serving")


@dataclass(frozen=True)
class Usage:
    """Tokens, counted as vllm-omni counts them (its speech_usage.py).

    `text_tokens` of the text alone; `audio_tokens` are the positions of an inline reference, 0 for a voice by
    name; `output_tokens` are frames.
    """

    text_tokens: int
    audio_tokens: int
    output_tokens: int

    @property
    def input_tokens(self) -> int:
        """Tokens of text and reference."""
        return self.text_tokens + self.audio_tokens

    def body(self) -> dict[str, Any]:
        """The usage in OpenAI's form."""
        return {
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "total_tokens": self.input_tokens + self.output_tokens,
            "input_token_details": {"text_tokens": self.text_tokens, "audio_tokens": self.audio_tokens},
        }

    def headers(self) -> dict[str, str]:
        """The usage as vllm-omni's headers."""
        counts = {
            "input": self.input_tokens,
            "output": self.output_tokens,
            "total": self.input_tokens + self.output_tokens,
            "input-text": self.text_tokens,
            "input-audio": self.audio_tokens,
        }
        return {f"x-vllm-omni-{name}-tokens": str(count) for name, count in counts.items()}


@dataclass(frozen=True)
class ResolvedRequest:
    """A request whose voice is found and whose options are possible, ready for any text.

    `inline_reference`: the voice is of a recording that came with the request.
    """

    state: ServerState
    options: SpeechOptions
    voice: Voice
    asked_by: str
    inline_reference: bool

    @property
    def seed(self) -> int:
        """The request's seed, 0 by default."""
        return self.options.seed or 0

    @property
    def shape(self) -> Shape:
        """A fresh filter for speed and sample rate."""
        return Shape(self.state.tts.sampling_rate, self.options.speed or 1.0, self.options.sample_rate)

    def record(self) -> MarkRecord | None:
        """What a mark will say; None when marking is off."""
        return self.state.new_record(self.voice)

    def headers(self) -> dict[str, str]:
        """The answer's headers: the mark, and the seed."""
        record = self.record()
        return {"x-revox-seed": str(self.seed), **(stream_headers(record) if record is not None else {})}

    async def speak(self, text: str, *, streaming: bool) -> SpeechResponse:
        """Submit `text` to the engine, in a place that is held (`EngineThread.place`).

        Raises ApiError on a text that cannot be spoken.
        """
        check_text(self.state, text)
        tts, options = self.state.tts, self.options
        prompt = await asyncio.to_thread(make_prompt, tts.model, tts.prompter, text, self.voice)
        stream = self.state.engine.submit(
            Request(prompt.embeddings, self.seed, options.max_new_tokens, options.cfg_alpha),
            streaming=streaming,
            first_frames=options.initial_codec_chunk_frames,
            speed=options.speed or 1.0,
        )
        return SpeechResponse(self, stream, prompt.text_tokens)


@dataclass
class SpeechResponse:
    """The audio of one text, as it comes from the engine."""

    request: ResolvedRequest
    stream: SpeechStream
    text_tokens: int

    @property
    def usage(self) -> Usage:
        """Tokens taken and made; complete at the end."""
        positions = len(self.request.voice.embedding) if self.request.inline_reference else 0
        return Usage(self.text_tokens, positions, self.stream.frames)

    @property
    def headers(self) -> dict[str, str]:
        """The usage, and whether the speech met the limit on its length; complete at the end."""
        return {**self.usage.headers(), "x-revox-truncated": "true" if self.stream.truncated else "false"}

    @contextmanager
    def _listening(self) -> Iterator[None]:
        started = time.monotonic()
        outcome = "gone"
        try:
            yield
            outcome = "truncated" if self.stream.truncated else "done"
        except ApiError as error:
            outcome = f"failed with {error.status}"
            raise
        finally:
            self.stream.cancel()
            log.info(
                "spoke for %s in voice %s: %s, %d frames in %.2f s, %s",
                self.request.asked_by,
                self.request.voice.name,
                self.request.options.response_format,
                self.stream.frames,
                time.monotonic() - started,
                outcome,
            )

    async def whole(self) -> bytes:
        """The complete file, marked. Raises ApiError when it fails."""
        with self._listening():
            pieces, shape = [], self.request.shape
            async for chunk in self.stream:
                pieces.append(shape.push(chunk.samples))
            pieces.append(shape.finish())
            samples = np.concatenate(pieces)
            if not samples.size:
                raise _no_sound()
            return await asyncio.to_thread(self._encoded, samples, shape.rate)

    def _encoded(self, samples: np.ndarray, rate: int) -> bytes:
        format = self.request.options.response_format
        data, _ = encode_audio(Audio(samples, rate), format)
        record = self.request.record()
        if record is None:
            return data
        return mark_bytes(data, format, record=record, signer=self.request.state.signer)

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The file's bytes while it is made. Raises ApiError when it fails."""
        with self._listening():
            shape = self.request.shape
            encoder = StreamEncoder(self.request.options.response_format, shape.rate)
            async for chunk in self.stream:
                if data := encoder.push(shape.push(chunk.samples)):
                    yield data
            data = encoder.push(shape.finish()) + encoder.finish()
            if not self.stream.frames:
                raise _no_sound()
            if data:
                yield data


async def resolve(
    state: ServerState, options: SpeechOptions, asked_by: str, streaming: bool
) -> ResolvedRequest:
    """Find a request's voice and check its options. Raises ApiError on what cannot be or has no effect."""
    check_model(state, options.model)
    check_rate(options.response_format, options.sample_rate)
    if options.initial_codec_chunk_frames is not None and not streaming:
        raise _useless("initial_codec_chunk_frames", "only a stream has chunks; leave it out, or stream")
    name = options.voice_name
    if options.ref_audio is None:
        for field in ("ref_text", "consent"):
            if getattr(options, field) is not None:
                raise _useless(field, f"{field} belongs to ref_audio; leave it out, or send ref_audio")
        if options.task_type == "Base":
            raise _useless("task_type", "Base requires ref_audio; send it, or leave task_type out")
        if name is None:
            raise ApiError(
                400,
                "the request names no voice; use one of GET /v1/audio/voices, or ref_audio",
                param="voice",
                code="voice_missing",
            )
        return ResolvedRequest(state, options, await _named(state, name), asked_by, inline_reference=False)
    if name is not None:
        raise _useless("voice", "voice and ref_audio exclude each other; send one of them")
    if options.task_type == "CustomVoice":
        raise _useless(
            "task_type", "CustomVoice requires a named voice; leave it out, or leave ref_audio out"
        )
    reference = await state.references.resolve(options.ref_audio)
    voice = await state.voices.inline(
        reference, consent=options.consent, ref_text=options.ref_text, asked_by=asked_by
    )
    return ResolvedRequest(state, options, voice, asked_by, inline_reference=True)


async def _named(state: ServerState, name: str) -> Voice:
    try:
        return await asyncio.to_thread(state.voices.voice, name)
    except (ApiError, VoiceError):
        # vllm-omni accepts names in any case; the voices here are all lower case.
        if name == name.lower():
            raise
        return await asyncio.to_thread(state.voices.voice, name.lower())


def check_text(state: ServerState, text: str) -> None:
    """Raise ApiError 400 on a text that is empty or too long."""
    limit = state.settings.max_text_characters
    if not text.strip():
        raise ApiError(400, "the input is empty; send at least one word", param="input", code="empty_input")
    if len(text) > limit:
        raise ApiError(
            400,
            f"the input has {len(text):,} characters, at most {limit:,} are allowed; send it in parts",
            param="input",
            code="input_too_long",
        )


def _no_sound() -> ApiError:
    return ApiError(500, "the model ended without a sound; try another seed", param="seed", code="no_sound")


def _useless(field: str, why: str) -> ApiError:
    return ApiError(400, f"{field}: {why}", param=field, code="unsupported_parameter")
