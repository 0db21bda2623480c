"""From a request to its audio: the voice, the prompt, the engine's stream, the encoded bytes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from revox.checkpoint.errors import VoiceError
from revox.checkpoint.release import PRESETS
from revox.marking import MarkRecord, mark_bytes, stream_headers
from revox.serving.compatible import served_name
from revox.serving.encoding import WHOLE_ONLY, Shape, StreamEncoder, check_rate
from revox.serving.engine import Chunk, SpeechStream
from revox.serving.errors import ApiError
from revox.serving.model_routes import check_model
from revox.serving.speech_request import SpeechOptions, SpeechRequest
from revox.speech import Audio, encode_audio
from revox.synthesis.languages import LANGUAGES, is_written_in
from revox.synthesis.longform import (
    AHEAD,
    LongSpeech,
    SentenceTime,
    SpeechSettings,
    Take,
    language_of,
    no_sound_advice,
    pieces_of,
)
from revox.synthesis.prompt import make_prompt
from revox.synthesis.split import PAUSES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from revox.checkpoint.voices import Voice
    from revox.serving.state import ServerState
    from revox.synthesis.split import TextPiece

Made = TypeVar("Made")
log = logging.getLogger("revox.serving")

MAX_PAUSES = 60.0
"""Seconds of pauses that a text asks for, together; those between its sentences do not count."""
_MANY = 24_000  # samples
TOGETHER = 4
"""Pieces of one text that are spoken at a time for a complete file; each takes one of the server's places."""
_NO_SAMPLES, _NO_CODES = np.zeros(0, np.float32), np.zeros(0, np.int64)


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

    `inline_reference`: the voice is of a recording that came with the request. `ignored`: fields that were
    left out of account (`--compatible`).
    """

    state: ServerState
    options: SpeechOptions
    voice: Voice
    asked_by: str
    inline_reference: bool
    ignored: list[str] = field(default_factory=list)

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

    @property
    def settings(self) -> SpeechSettings:
        """How the text is spoken: the request's wishes, or the server's settings."""
        options, server = self.options, self.state.settings
        return SpeechSettings(
            self.seed,
            options.cfg_alpha,
            options.flow_steps,
            max_chars=options.max_chars or server.max_chars,
            takes=options.takes or server.takes,
            text_normalization=options.text_normalization or server.text_normalization,
            lexicon=self.state.lexicon,
            language=options.language or language_of(self.voice.name),
            by_sentence=isinstance(options, SpeechRequest) and options.timestamps is not None,
        )

    def _check_language(self, text: str) -> None:
        """Raise ApiError 400 when the request's language is neither the voice's nor the text's."""
        code, voice = self.options.language, self.voice.name
        preset = voice in PRESETS
        if code is None or (preset and language_of(voice) == code) or is_written_in(text, code):
            return
        if not preset and not any(is_written_in(text, other) for other in LANGUAGES):
            return  # nothing speaks against it
        if self.state.settings.compatible:
            self.ignored.append("language")
            return
        spoken = f"voice {voice!r} is {LANGUAGES[language_of(voice)]}" if preset else "looks like another"
        raise _useless(
            "language",
            f"the text is not clearly {LANGUAGES[code]}, and {spoken}; leave language out (the model speaks "
            "the language of the text), or choose a voice of that language",
        )

    async def speak(self, text: str, *, streaming: bool) -> SpeechResponse:
        """Submit `text` to the engine, in a place that is held (`EngineThread.place`).

        Raises ApiError on a text that cannot be spoken.
        """
        check_text(self.state, text)
        self._check_language(text)
        pieces = await asyncio.to_thread(pieces_of, text, self.settings)
        check_pauses(pieces)
        speech = LongSpeech(
            pieces,
            self.settings,
            self.state.tts.model.config.codec,
            max_frames=self.options.max_new_tokens,
            streaming=streaming,
            together=AHEAD if streaming else TOGETHER,
        )
        response = SpeechResponse(self, speech, streaming)
        try:
            await response.start()
        except BaseException:  # cancelled, or a piece cannot be spoken: nobody will listen to the others
            response.cancel()
            raise
        return response


@dataclass
class SpeechResponse:
    """The audio of one text, as its takes come from the engine."""

    request: ResolvedRequest
    speech: LongSpeech
    streaming: bool
    text_tokens: int = 0
    _reading: dict[asyncio.Task[Chunk | None], tuple[Take, SpeechStream]] = field(default_factory=dict)

    @property
    def usage(self) -> Usage:
        """Tokens taken and made; complete at the end."""
        positions = len(self.request.voice.embedding) if self.request.inline_reference else 0
        return Usage(self.text_tokens, positions, self.speech.frames)

    @property
    def times(self) -> list[SentenceTime]:
        """When each sentence is heard whose sound is out, at the request's speed."""
        speed = self.request.options.speed or 1.0
        return [SentenceTime(one.text, one.start / speed, one.end / speed) for one in self.speech.times]

    @property
    def headers(self) -> dict[str, str]:
        """The usage, whether speech is missing, and what no take said well; complete at the end."""
        headers = {**self.usage.headers(), "x-revox-truncated": "true" if self.speech.truncated else "false"}
        if warnings := self.speech.warnings:
            headers["x-revox-warnings"] = ", ".join(f"{one.piece}:{one.fault.value}" for one in warnings[:50])
        return headers

    @property
    def outcome(self) -> dict[str, Any]:
        """For a JSON message: whether speech is missing, and what no take said well; complete at the end."""
        warnings = [asdict(warning) for warning in self.speech.warnings]
        return {"truncated": self.speech.truncated, **({"warnings": warnings} if warnings else {})}

    def cancel(self) -> None:
        """Nobody listens any more; the places are free after the next frame."""
        for task, (_, stream) in self._reading.items():
            task.cancel()
            stream.cancel()
        self._reading.clear()

    async def start(self) -> None:
        """Submit the takes whose turn it is."""
        tts, options = self.request.state.tts, self.request.options
        for take in self.speech.next_takes():
            prompt = await asyncio.to_thread(
                make_prompt, tts.model, tts.prompter, take.text, self.request.voice
            )
            stream = self.request.state.engine.submit(
                take.request(prompt),
                streaming=self.streaming,
                first_frames=options.initial_codec_chunk_frames,
                speed=options.speed or 1.0,
                opening=not self.speech.frames,
            )
            self.text_tokens += prompt.text_tokens if take.attempt == 0 else 0
            self._read(take, stream)

    def _read(self, take: Take, stream: SpeechStream) -> None:
        self._reading[asyncio.ensure_future(_next(stream))] = take, stream

    async def _samples(self) -> AsyncGenerator[np.ndarray, None]:
        """The model's samples, as they become ready. Raises ApiError when a take fails."""
        while True:
            samples = self.speech.samples()
            if len(samples):
                yield samples
            if self.speech.done:
                break
            await self.start()
            done, _ = await asyncio.wait(self._reading, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                take, stream = self._reading.pop(task)
                chunk = task.result()
                if chunk is None:
                    chunk = Chunk(_NO_SAMPLES, _NO_CODES, not stream.truncated, stream.truncated)
                self.speech.push(
                    take, chunk.semantic, chunk.samples, ended=chunk.ended, truncated=chunk.truncated
                )
                if take.stopped:
                    stream.cancel()
                elif not take.finished:
                    self._read(take, stream)
        if not self.speech.frames:
            raise _no_sound(self.request.settings.takes)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        started = time.monotonic()
        outcome = "gone"
        try:
            yield
            outcome = "truncated" if self.speech.truncated else "done"
        except ApiError as error:
            outcome = f"failed with {error.status}"
            raise
        finally:
            self.cancel()
            log.info(
                "spoke for %s in voice %s: %s, %d frames in %.2f s, %s%s",
                self.request.asked_by,
                self.request.voice.name,
                self.request.options.response_format,
                self.speech.frames,
                time.monotonic() - started,
                outcome,
                "".join(f", piece {one.piece} {one.message}" for one in self.speech.warnings),
            )

    async def whole(self) -> bytes:
        """The complete file, marked. Raises ApiError when it fails."""
        with self._listening():
            pieces, shape = [], self.request.shape
            async with aclosing(self._samples()) as parts:
                async for samples in parts:
                    pieces.append(await _shaped(samples, shape.push))
            pieces.append(shape.finish())
            return await asyncio.to_thread(self._encoded, np.concatenate(pieces), shape.rate)

    def _encoded(self, samples: np.ndarray, rate: int) -> bytes:
        format = self.request.options.response_format
        data, _ = encode_audio(Audio(samples, rate), format)
        record = self.request.record()
        if record is None:
            return data
        return mark_bytes(data, format, record=record, signer=self.request.state.signer)

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The file's bytes while it is made, or at the end (`WHOLE_ONLY`). Raises ApiError when it fails."""
        if self.request.options.response_format in WHOLE_ONLY:
            yield await self.whole()
            return
        with self._listening():
            shape = self.request.shape
            encoder = StreamEncoder(self.request.options.response_format, shape.rate)
            async with aclosing(self._samples()) as parts:
                async for samples in parts:
                    if data := await _shaped(samples, lambda these: encoder.push(shape.push(these))):
                        yield data
            if data := encoder.push(shape.finish()) + encoder.finish():
                yield data


async def _shaped(samples: np.ndarray, work: Callable[[np.ndarray], Made]) -> Made:
    """What `work` makes of `samples`; of many, such as a pause, in a thread, so that other requests go on."""
    return await asyncio.to_thread(work, samples) if len(samples) > _MANY else work(samples)


async def _next(stream: SpeechStream) -> Chunk | None:
    async for chunk in stream:
        return chunk
    return None


async def resolve(
    state: ServerState,
    options: SpeechOptions,
    asked_by: str,
    streaming: bool,
    ignored: list[str] | None = None,
) -> ResolvedRequest:
    """Find a request's voice and check its options; `ignored` lists fields that were left out already.

    Raises ApiError on what cannot be or has no effect.
    """
    ignored = [] if ignored is None else ignored
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
        voice = await _named(state, served_name(state.settings, name))
        return ResolvedRequest(state, options, voice, asked_by, inline_reference=False, ignored=ignored)
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
    return ResolvedRequest(state, options, voice, asked_by, inline_reference=True, ignored=ignored)


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


def check_pauses(pieces: Sequence[TextPiece]) -> None:
    """Raise ApiError 400 on a text whose pauses are long together: silence costs no speech, but memory."""
    seconds = sum(piece.pause for piece in pieces if piece.pause > max(PAUSES.values()))
    if seconds > MAX_PAUSES:
        raise ApiError(
            400,
            f"the input asks for {seconds:.0f} s of pauses, at most {MAX_PAUSES:.0f} are allowed; send it in "
            "parts",
            param="input",
            code="input_too_long",
        )


def _no_sound(takes: int) -> ApiError:
    return ApiError(
        500,
        f"the model ended at its first frame, without a sound; {no_sound_advice(takes)}",
        param="takes",
        code="no_sound",
    )


def _useless(field: str, why: str) -> ApiError:
    return ApiError(400, f"{field}: {why}", param=field, code="unsupported_parameter")
