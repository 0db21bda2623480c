"""From a request to its audio: the voice, the prompt, the engine's stream, the bytes that are sent."""

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
from revox.serving.encoding import Shape, StreamEncoder, check_rate, encode_whole
from revox.serving.errors import ApiError
from revox.serving.model_routes import check_model
from revox.serving.speech_request import Manner
from revox.synthesis.batch import embed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from revox.checkpoint.voices import Voice
    from revox.marking import MarkRecord
    from revox.serving.engine import Stream
    from revox.serving.state import ServerState

log = logging.getLogger("revox.serving")


@dataclass(frozen=True)
class Usage:
    """Tokens, counted as vllm-omni counts them (its speech_usage.py).

    `text_tokens` of the text alone; `audio_tokens` are the rows of a recording that came with the request, 0
    for a voice by name; `output_tokens` are frames.
    """

    text_tokens: int
    audio_tokens: int
    output_tokens: int

    def body(self) -> dict[str, Any]:
        """As an answer carries it."""
        taken = self.text_tokens + self.audio_tokens
        return {
            "input_tokens": taken,
            "output_tokens": self.output_tokens,
            "total_tokens": taken + self.output_tokens,
            "input_token_details": {"text_tokens": self.text_tokens, "audio_tokens": self.audio_tokens},
        }

    def headers(self) -> dict[str, str]:
        """As vllm-omni's headers."""
        taken = self.text_tokens + self.audio_tokens
        counts = {
            "input": taken,
            "output": self.output_tokens,
            "total": taken + self.output_tokens,
            "input-text": self.text_tokens,
            "input-audio": self.audio_tokens,
        }
        return {f"x-vllm-omni-{name}-tokens": str(count) for name, count in counts.items()}


@dataclass(frozen=True)
class Speaker:
    """Who speaks, and how: a request's fields looked up and found possible, ready for any text."""

    state: ServerState
    manner: Manner
    voice: Voice
    asked_by: str
    one_off: bool

    @property
    def seed(self) -> int:
        """The request's seed, 0 unless it says."""
        return self.manner.seed or 0

    @property
    def shape(self) -> Shape:
        """A fresh filter for speed and sample rate."""
        return Shape(self.state.tts.sampling_rate, self.manner.speed or 1.0, self.manner.sample_rate)

    def record(self) -> MarkRecord | None:
        """What a mark will say; None when marking is off."""
        if not self.state.settings.marking:
            return None
        from revox.marking import new_record

        return new_record(self.state.settings.served_name[:200], self.voice.name[:200])

    def headers(self) -> dict[str, str]:
        """What the answer's headers say of it: the mark, and the seed."""
        from revox.marking import stream_headers

        record = self.record()
        return {"x-revox-seed": str(self.seed), **(stream_headers(record) if record is not None else {})}

    async def utterance(self, text: str, *, streaming: bool, admitted: bool = False) -> Utterance:
        """Ask the engine for `text`. Raises ApiError on a text that cannot be spoken, 429 when it is full."""
        check_text(self.state, text)
        if not admitted:
            self.state.engine.check_room()
        prompt, tokens = await asyncio.to_thread(self._prompt, text)
        stream = self.state.engine.submit(
            prompt,
            self.seed,
            self.manner.max_new_tokens,
            streaming=streaming,
            first_frames=self.manner.initial_codec_chunk_frames,
            admitted=admitted,
            cfg_alpha=self.manner.cfg_alpha,
            speed=self.manner.speed or 1.0,
        )
        return Utterance(self, stream, tokens)

    def _prompt(self, text: str) -> tuple[Tensor, int]:
        tts = self.state.tts
        return embed(tts.model, tts.prompter, text, self.voice), len(tts.prompter.text_tokens(text))


@dataclass
class Utterance:
    """One text on its way through the engine."""

    speaker: Speaker
    stream: Stream
    text_tokens: int

    @property
    def usage(self) -> Usage:
        """What it took; complete at the end."""
        rows = int(self.speaker.voice.embedding.shape[0]) if self.speaker.one_off else 0
        return Usage(self.text_tokens, rows, self.stream.frames)

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
                self.speaker.asked_by,
                self.speaker.voice.name,
                self.speaker.manner.response_format,
                self.stream.frames,
                time.monotonic() - started,
                outcome,
            )

    async def whole(self) -> bytes:
        """The complete file, marked. Raises ApiError when it fails."""
        with self._listening():
            pieces, shape = [], self.speaker.shape
            async for chunk in self.stream:
                pieces.append(shape.push(chunk.samples))
            pieces.append(shape.finish())
            samples = np.concatenate(pieces)
            if not samples.size:
                raise ApiError(
                    500, "the model ended without a sound; try another seed", code="no_sound", param="seed"
                )
            return await asyncio.to_thread(self._encoded, samples, shape.rate)

    def _encoded(self, samples: np.ndarray, rate: int) -> bytes:
        format = self.speaker.manner.response_format
        data = encode_whole(samples, rate, format)
        record = self.speaker.record()
        if record is None:
            return data
        from revox.marking import mark_bytes

        return mark_bytes(data, format, record=record, signer=self.speaker.state.signer)

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The file's bytes while it is made. Raises ApiError when it fails."""
        with self._listening():
            shape = self.speaker.shape
            encoder = StreamEncoder(self.speaker.manner.response_format, shape.rate)
            async for chunk in self.stream:
                if data := encoder.push(shape.push(chunk.samples)):
                    yield data
            data = encoder.push(shape.finish()) + encoder.finish()
            if not self.stream.frames:
                raise ApiError(
                    500, "the model ended without a sound; try another seed", code="no_sound", param="seed"
                )
            if data:
                yield data


async def speaker_for(state: ServerState, manner: Manner, asked_by: str, streaming: bool) -> Speaker:
    """Look up what a request asks for. Raises ApiError on all that cannot be, or would have no effect."""
    check_model(state, manner.model)
    check_rate(manner.response_format, manner.sample_rate)
    if manner.initial_codec_chunk_frames is not None and not streaming:
        raise _useless("initial_codec_chunk_frames", "only a stream comes in chunks; leave it out, or stream")
    name = manner.voice_name
    if manner.ref_audio is None:
        for field in ("ref_text", "consent"):
            if getattr(manner, field) is not None:
                raise _useless(field, f"{field} belongs to ref_audio; leave it out, or send ref_audio")
        if manner.task_type == "Base":
            raise _useless(
                "task_type", "Base speaks like a recording; send ref_audio, or leave task_type out"
            )
        if name is None:
            raise ApiError(
                400,
                "there is no voice; give one of GET /v1/audio/voices by name, or ref_audio",
                param="voice",
                code="voice_missing",
            )
        return Speaker(state, manner, await _named(state, name), asked_by, one_off=False)
    if name is not None:
        raise _useless("voice", "voice and ref_audio both say who speaks; give one of them")
    if manner.task_type == "CustomVoice":
        raise _useless(
            "task_type", "CustomVoice speaks in a named voice; leave it out, or leave ref_audio out"
        )
    reference = await state.references.resolve(manner.ref_audio)
    voice = await state.voices.one_off(
        reference, consent=manner.consent, ref_text=manner.ref_text, asked_by=asked_by
    )
    return Speaker(state, manner, voice, asked_by, one_off=True)


async def _named(state: ServerState, name: str) -> Voice:
    try:
        return await asyncio.to_thread(state.voices.voice, name)
    except (ApiError, VoiceError):
        # vllm-omni takes names in any case; the voices here are all lower case.
        if name == name.lower():
            raise
        return await asyncio.to_thread(state.voices.voice, name.lower())


def check_text(state: ServerState, text: str) -> None:
    """Raise ApiError 400 on a text that is empty or too long."""
    limit = state.settings.max_text_characters
    if not text.strip():
        raise ApiError(
            400, "the input is empty; give at least one word to speak", param="input", code="empty_input"
        )
    if len(text) > limit:
        raise ApiError(
            400,
            f"the input has {len(text):,} characters, and {limit:,} are taken at once; send it in parts",
            param="input",
            code="input_too_long",
        )


def _useless(field: str, why: str) -> ApiError:
    return ApiError(400, f"{field}: {why}", param=field, code="unsupported_parameter")
