"""A text of any length -> speech: pieces spoken in batches, bad takes spoken again, the rest joined.

`LongSpeech` decides what to speak next and joins what comes; it runs no model. `speak_pieces` runs one on an
`Engine`; the server runs one on its engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from revox.model.config import CodecConfig
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech import Audio
from revox.synthesis.engine import DEFAULT_CFG, Engine, Generation, Request, check_ranges, chunk_ends
from revox.synthesis.errors import SpeakError
from revox.synthesis.normalize import Normalization, normalize_text
from revox.synthesis.prompt import Prompt
from revox.synthesis.split import DEFAULT_MAX_CHARS, TextPiece, split_text
from revox.synthesis.takes import TakeCheck, TakeWarning

if TYPE_CHECKING:
    from revox.checkpoint.voices import Voice

DEFAULT_TAKES = 3
TAKES_RANGE = (1, 10)
BATCH = 8
"""Pieces of one text that are spoken together."""
AHEAD = 2
"""The same where the first is streamed: it, and the next, which is then judged before it is needed."""
LEVEL_FRAMES = 50
"""Frames (of 80 ms) from which a piece's level is taken."""
LEVEL_STEP = 1.5
LEVEL_LIMIT = 8.0
"""Differences of level in dB below the first are left as they are; no more than the second is evened out."""
FADE_SECONDS = 0.01
_WHOLE_CHUNK = 50
_SEED_STEP = 1_000_003


@dataclass(frozen=True)
class SpeechSettings:
    """How a text is spoken.

    seed: the same seed says it in the same way. cfg: the strength of classifier-free guidance, 0 to 10; 1 is
    none. flow_steps: Euler steps for a frame's acoustic codes, 1 to 100; None is the checkpoint's own, 7.
    max_seconds: the longest speech. max_chars: the longest piece of text spoken at a time. takes: how often a
    piece is spoken at most until it is good; 1 gives the model's first take as it is, with the codes that
    vllm-omni gives. text_normalization: "basic" reads markup as text and pauses as silence, "full" spells
    numbers as well, "none" speaks the text as it is (`revox.synthesis.normalize`). lexicon: words and how to
    write them to be read rightly. language: in which numbers are spelled; None is the voice's, by its name.
    by_sentence: every sentence is a piece, so that it is known when it is heard (`LongSpeech.times`).

    Raises SpeakError when a value is out of range.
    """

    seed: int = 0
    cfg: float = DEFAULT_CFG
    flow_steps: int | None = None
    max_seconds: float | None = None
    max_chars: int = DEFAULT_MAX_CHARS
    takes: int = DEFAULT_TAKES
    text_normalization: Normalization = "basic"
    lexicon: Mapping[str, str] | None = None
    language: str | None = None
    by_sentence: bool = False

    def __post_init__(self) -> None:
        low, high = TAKES_RANGE
        if not low <= self.takes <= high:
            raise SpeakError(f"{self.takes} takes are out of range: {low} to {high} are possible")


@dataclass(frozen=True)
class Line:
    """A text to speak among others: in a voice, by name or as it is, with settings of its own."""

    text: str
    voice: Voice | str
    settings: SpeechSettings


@dataclass(frozen=True)
class SentenceTime:
    """A sentence as it is spoken, and when its sound starts and ends, in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class SpokenLine:
    """What came of a line: its number, from 0, its audio, what no take said well, when pieces are heard."""

    number: int
    audio: Audio
    warnings: list[TakeWarning]
    times: list[SentenceTime]


def no_sound_advice(takes: int) -> str:
    """What can help where the model gave no sound. More takes do, where there was one: a later one may not
    end before a quarter of its text's time. No seed does."""
    if takes == 1:
        return "allow more takes (--takes 3), or use another text or voice; no seed changes that"
    return "use another text or voice, or check the checkpoint with `revox doctor`; no seed changes that"


def pieces_of(text: str, settings: SpeechSettings) -> list[TextPiece]:
    """What is spoken one after the other. Raises SpeakError when there is nothing to speak."""
    pieces: list[TextPiece] = []
    for stretch in _stretches(text, settings):
        parts = split_text(stretch.text, settings.max_chars, settings.by_sentence) or [TextPiece("")]
        pieces += [*parts[:-1], TextPiece(parts[-1].text, stretch.pause)]
    if not any(piece.text for piece in pieces):
        raise SpeakError("the text is empty; give at least one word to speak")
    return pieces


def has_words(text: str, settings: SpeechSettings) -> bool:
    """Whether there is anything to speak in a text."""
    return any(stretch.text.strip() for stretch in _stretches(text, settings))


def language_of(voice: str) -> str:
    """The language of a voice by its name, as the release names them: `de_male`; English for others."""
    code, separator, _ = voice.partition("_")
    return code if separator and len(code) == 2 else "en"


def _stretches(text: str, settings: SpeechSettings) -> list[TextPiece]:
    how, language = settings.text_normalization, settings.language or "en"
    return normalize_text(text, how, settings.lexicon, language)


@dataclass(eq=False)
class Take:
    """One way of speaking a piece: what to ask of the engine, and what it made so far.

    attempt: 0 for a piece's first take. `stopped`: it is not needed any more; leave it. `finished`: it ended,
    or met its limit (`truncated`).
    """

    text: str
    seed: int
    cfg: float
    check: TakeCheck
    min_frames: int
    max_frames: int | None
    attempt: int = 0
    flow_steps: int | None = None
    stopped: bool = False
    finished: bool = False
    truncated: bool = False
    chunks: list[np.ndarray] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Samples made so far."""
        return sum(map(len, self.chunks))

    def request(self, prompt: Prompt) -> Request:
        """What to ask of the engine, for the prompt of `text`."""
        return Request(
            prompt.embeddings, self.seed, self.max_frames, self.cfg, self.min_frames, prompt.voice_positions,
            self.flow_steps,
        )  # fmt: skip


@dataclass(eq=False)
class _Slot:
    """A piece in its turn. `number` is the piece's, from 1, of which it may be a part."""

    piece: TextPiece
    number: int
    tries: int = 0
    take: Take | None = None
    bad: list[Take] = field(default_factory=list)
    released: int = 0  # chunks of `take`
    gain: float = 1.0
    finished: bool = False


class LongSpeech:
    """Speaks `pieces` by takes that somebody else runs: start those of `next_takes`, `push` what they make,
    and take the `samples` that are ready, until `done`.

    streaming: the first piece's samples are ready as they are made, and a later piece's once its level is
    known; a piece is spoken again only before that. Otherwise every piece is ready when it is good.

    `truncated` says at the end that speech is missing, because of `max_frames` (of the whole) or a piece that
    never ended; `warnings` what no take said well. `times` says when the pieces that are out are heard.
    """

    def __init__(
        self,
        pieces: Sequence[TextPiece],
        settings: SpeechSettings,
        codec: CodecConfig,
        *,
        max_frames: int | None = None,
        streaming: bool = False,
        together: int = BATCH,
    ) -> None:
        check_ranges(settings.seed, settings.cfg, max_frames, settings.flow_steps)
        self._settings, self._codec = settings, codec
        self._streaming, self._together = streaming, together
        self._max_frames = max_frames
        self._slots = [_Slot(piece, number) for number, piece in enumerate(pieces, 1)]
        self._ready: list[np.ndarray] = []
        self._tail = np.zeros(0, np.float32)  # held back: the end of a piece fades
        self._given = 0  # samples
        self._level: float | None = None
        self._first = True
        self._spoken = 0  # samples, without the silence between pieces
        self.truncated = False
        self.warnings: list[TakeWarning] = []
        self._texts = {slot.number: slot.piece.text for slot in self._slots}
        self._spans: dict[int, tuple[int, int]] = {}  # samples, by the pieces' numbers
        self._release()

    @property
    def done(self) -> bool:
        """Nothing more comes, when `samples` are taken."""
        return not self._slots

    @property
    def frames(self) -> int:
        """Frames of speech that were handed on."""
        return self._spoken // self._codec.samples_per_frame

    @property
    def times(self) -> list[SentenceTime]:
        """When each piece is heard whose samples are all handed on, in seconds of the whole."""
        rate, open_numbers = self._codec.sampling_rate, {slot.number for slot in self._slots}
        return [
            SentenceTime(self._texts[number], start / rate, stop / rate)
            for number, (start, stop) in self._spans.items()
            if number not in open_numbers
        ]

    def next_takes(self) -> list[Take]:
        """The takes to start now."""
        together = 1 if self._streaming and self._first else self._together
        takes = []
        for slot in self._slots[:together]:
            if slot.take is None and not slot.finished and slot.piece.text:
                slot.take = self._take(slot)
                takes.append(slot.take)
        return takes

    def push(
        self, take: Take, semantic: np.ndarray, samples: np.ndarray, *, ended: bool, truncated: bool
    ) -> None:
        """Frames that a take has made: semantic codes `[n]` and samples `[n * samples_per_frame]`, float32.

        ended, truncated: no more come, because the model ended or the take met its limit.
        """
        slot = next((slot for slot in self._slots if slot.take is take), None)
        if slot is None:
            return
        if len(samples):
            take.chunks.append(samples)
            take.check.push(semantic, samples)
        if ended or truncated:
            self._finish(slot, take, truncated)
        elif take.check.fault is not None and self._may_retry(slot):
            self._speak_again(slot)
        self._release()

    def samples(self) -> np.ndarray:
        """What became ready since the last call, float32; it may be empty."""
        ready, self._ready = self._ready, []
        return np.concatenate(ready) if ready else np.zeros(0, np.float32)

    def _take(self, slot: _Slot) -> Take:
        settings, text = self._settings, slot.piece.text
        check = TakeCheck(text, self._codec)
        limits, least = [self._max_frames], 0
        if settings.takes > 1:
            limits.append(check.max_frames)
            least = check.min_frames
        most = min((limit for limit in limits if limit is not None), default=None)
        seed = settings.seed + _SEED_STEP * slot.tries
        seed = seed if slot.tries == 0 else seed % 2**63
        cfg = settings.cfg if slot.tries < 3 else min(1.25 * settings.cfg, 10.0)
        least = least if most is None else min(least, most)
        return Take(text, seed, cfg, check, least, most, slot.tries, settings.flow_steps)

    def _may_retry(self, slot: _Slot) -> bool:
        return slot.tries + 1 < self._settings.takes and not slot.released

    def _finish(self, slot: _Slot, take: Take, truncated: bool) -> None:
        take.finished, take.truncated = True, truncated
        limit = self._max_frames
        if not (truncated and limit is not None and take.samples >= limit * self._codec.samples_per_frame):
            take.check.finish(ended=not truncated)
        fault = take.check.fault
        if fault is not None and self._may_retry(slot):
            self._speak_again(slot)
            return
        if fault is not None:
            if not slot.released:
                take = slot.take = min([*slot.bad, take], key=_badness)
            check = take.check
            assert check.fault is not None
            self.warnings.append(TakeWarning(slot.number, take.text, check.fault, check.message))
            self.warnings.sort(key=lambda warning: warning.piece)
        slot.finished, slot.bad = True, []

    def _speak_again(self, slot: _Slot) -> None:
        """Another way of speaking: first other noise, then in two parts, then with more guidance."""
        take = slot.take
        assert take is not None
        take.stopped = True
        slot.bad.append(take)
        slot.take = None
        slot.tries += 1
        if slot.tries != 2 or len(take.text) < 40:
            return
        parts = split_text(take.text, max(20, int(0.6 * len(take.text))))
        place = self._slots.index(slot)
        pauses = [part.pause for part in parts[:-1]] + [slot.piece.pause]
        self._slots[place : place + 1] = [
            _Slot(TextPiece(part.text, pause), slot.number, slot.tries)
            for part, pause in zip(parts, pauses, strict=True)
        ]

    def _release(self) -> None:
        """Hand on what is final of the pieces in turn."""
        while self._slots:
            slot = self._slots[0]
            if not slot.piece.text:
                slot.finished = True
            if not slot.finished and not self._is_released_early(slot):
                return
            chunks = slot.take.chunks[slot.released :] if slot.take is not None else []
            if chunks:
                self._hand_on(slot, np.concatenate(chunks))
            if not self._slots or not slot.finished:
                return
            self._end_piece(slot)

    def _is_released_early(self, slot: _Slot) -> bool:
        if not self._streaming or slot.take is None:
            return False
        enough = LEVEL_FRAMES * self._codec.samples_per_frame
        return self._first or slot.released > 0 or slot.take.samples >= enough

    def _hand_on(self, slot: _Slot, samples: np.ndarray) -> None:
        assert slot.take is not None
        if not slot.released:
            whole = np.concatenate(slot.take.chunks)[: LEVEL_FRAMES * self._codec.samples_per_frame]
            slot.gain = self._gain(whole)
            if not self._first:
                samples = faded(samples, self._fade, start=True)
            self._spans.setdefault(slot.number, (self._given + len(self._tail), 0))
        slot.released, before = len(slot.take.chunks), len(self._tail)
        samples = np.concatenate((self._tail, samples * np.float32(slot.gain) if slot.gain != 1 else samples))
        self._tail = samples[:0]
        room = self._room
        last = slot.finished
        if room is not None and len(samples) > room:
            samples, last = samples[:room], True
            self.truncated, self._slots = True, []
            samples = faded(samples, self._fade)
        elif last and slot.take.truncated:
            self.truncated = True
            samples = faded(samples, self._fade)
        elif len(self._slots) > 1:
            if last:
                samples = faded(samples, self._fade)
            else:
                self._tail, samples = samples[-self._fade :], samples[: -self._fade]
        self._spoken += len(samples) + len(self._tail) - before
        self._first = False
        self._give(samples)
        self._spans[slot.number] = self._spans[slot.number][0], self._given + len(self._tail)
        if self._room == 0 and len(self._slots) > 1:
            self.truncated, self._slots = True, []

    def _end_piece(self, slot: _Slot) -> None:
        self._slots.pop(0)
        if len(self._tail):  # its end came without a sample
            tail, self._tail = self._tail, self._tail[:0]
            self._give(faded(tail, self._fade))
        pause = round(slot.piece.pause * self._codec.sampling_rate)
        room = self._room
        if room is not None:
            pause = min(pause, room)
            if room == pause and self._slots:
                self.truncated, self._slots = True, []
        if pause:
            self._give(np.zeros(pause, np.float32))

    @property
    def _fade(self) -> int:
        return int(FADE_SECONDS * self._codec.sampling_rate)

    @property
    def _room(self) -> int | None:
        """Samples that may still be given."""
        if self._max_frames is None:
            return None
        return self._max_frames * self._codec.samples_per_frame - self._given

    def _give(self, samples: np.ndarray) -> None:
        self._given += len(samples)
        self._ready.append(samples)

    def _gain(self, samples: np.ndarray) -> float:
        level = _speech_level(samples, self._codec.sampling_rate)
        if level is None:
            return 1.0
        if self._level is None:
            self._level = level
        step = self._level - level
        if abs(step) < LEVEL_STEP:
            return 1.0
        return float(10 ** (np.clip(step, -LEVEL_LIMIT, LEVEL_LIMIT) / 20))


def _badness(take: Take) -> tuple[bool, float]:
    """Takes that were stopped lack words; of the others the best is nearest to the expected length."""
    seconds = max(take.check.seconds, 0.04)
    return not take.finished, abs(float(np.log(seconds / max(take.check.expected, 0.1))))


def _speech_level(samples: np.ndarray, rate: int) -> float | None:
    """Power in dB of the 20 ms windows within 20 dB of the loudest; None for silence."""
    window = rate // 50
    if len(samples) < window:
        return None
    power = np.mean(samples[: len(samples) // window * window].reshape(-1, window) ** 2, axis=1)
    if power.max() < 1e-8:
        return None
    return float(10 * np.log10(power[power > 0.01 * power.max()].mean()))


def faded(samples: np.ndarray, fade: int, start: bool = False) -> np.ndarray:
    """`samples` with the last (or first) `fade` of them going to (or from) zero along a raised cosine."""
    size = min(fade, len(samples))
    ramp = (0.5 + 0.5 * np.cos(np.pi * np.arange(1, size + 1) / size)).astype(np.float32)
    samples = samples.copy()
    if start:
        samples[:size] *= ramp[::-1]
    else:
        samples[len(samples) - size :] *= ramp
    return samples


PromptOf = Callable[[str], Prompt]
"""Makes the prompt of a piece of text."""


def speak_pieces(
    engine: Engine,
    speech: LongSpeech,
    prompt_of: PromptOf,
    *,
    streaming: bool = False,
    progress: ProgressCallback = ignore_progress,
) -> Iterator[Audio]:
    """Run a speech on an engine of its own; gives audio as it becomes ready. `progress` counts frames."""
    for _, audio in speak_together(engine, [(speech, prompt_of)], streaming=streaming, progress=progress):
        if audio is not None:
            yield audio


def speak_together(
    engine: Engine,
    speeches: Iterable[tuple[LongSpeech, PromptOf]],
    *,
    streaming: bool = False,
    progress: ProgressCallback = ignore_progress,
) -> Iterator[tuple[int, Audio | None]]:
    """Run speeches on an engine of its own, the next as soon as fewer than `BATCH` takes are running.

    Gives a speech's number, from 0, with audio as it becomes ready, and with None when it is done. `progress`
    counts frames made.
    """
    codec = engine.model.config.codec
    waiting = enumerate(speeches)
    active: dict[int, tuple[LongSpeech, PromptOf]] = {}
    running: dict[Generation, tuple[LongSpeech, Take]] = {}
    ends: dict[Generation, Iterator[int]] = {}
    due: dict[Generation, int] = {}
    frames = 0
    try:
        while True:
            for number, (speech, _) in list(active.items()):
                samples = speech.samples()
                if len(samples):
                    ended = speech.done and speech.truncated
                    yield number, Audio(samples, codec.sampling_rate, truncated=ended)
                if speech.done:
                    del active[number]
                    yield number, None
            takes = [
                (speech, take, prompt_of)
                for speech, prompt_of in active.values()
                for take in speech.next_takes()
            ]
            while len(running) + len(takes) < BATCH and (following := next(waiting, None)) is not None:
                number, (speech, prompt_of) = following
                active[number] = following[1]
                takes += [(speech, take, prompt_of) for take in speech.next_takes()]
            if not active:
                return
            joined = engine.join([take.request(prompt_of(take.text)) for _, take, prompt_of in takes])
            for one, (speech, take, _) in zip(joined, takes, strict=True):
                running[one] = speech, take
                ends[one] = chunk_ends() if streaming else count(_WHOLE_CHUNK, _WHOLE_CHUNK)
                due[one] = next(ends[one])
            made = engine.step()
            frames += sum(not one.ended for one in made)
            ready = [one for one in made if one.done or len(one.frames) >= due[one]]
            semantic = [one.codes(one.decoded)[0].cpu().numpy() for one in ready]
            for one, codes, waveform in zip(ready, semantic, engine.decode(ready), strict=True):
                due[one] = next(ends[one])
                speech, take = running[one]
                speech.push(take, codes, waveform.cpu().numpy(), ended=one.ended, truncated=one.truncated)
            for one, (speech, take) in list(running.items()):
                if one.done or take.stopped or speech.done:
                    engine.leave(one)
                    del running[one], ends[one], due[one]
            progress(Progress("speaking", frames, facts={"seconds": frames / codec.frame_rate}))
    finally:
        for one in running:
            engine.leave(one)
