"""What the language model learns from: prompts with the frames that follow them, and where in the text each
frame is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lab.level import MARGIN_SECONDS
from lab.speech.durations import UNIT, Durations

FRAMES_PER_SECOND = 12.5
MOST_FRAMES = 120  # of a spliced sequence
MOST_WORDS = 4  # of the middle of one
_WORD = re.compile(r"[A-Za-z']+")
_SPEED = re.compile(r"-\d+\.\d+$")  # of a voice that was resampled


@dataclass(frozen=True)
class TokenizedText:
    """One form of a text: its tokens, and where each plain word's begin and end `[words, 2]` among them."""

    tokens: tuple[int, ...]
    words: np.ndarray

    @classmethod
    def of(cls, text: str, tokens: tuple[int, ...]) -> TokenizedText:
        """Words found in `text` itself. With tokens that are not bytes, places among them are approximate."""
        size = len(text.encode())
        spans = [[len(text[:at].encode()) for at in m.span()] for m in _WORD.finditer(text)]
        places = np.array(spans, float).reshape(-1, 2) * (len(tokens) / size if size else 0)
        return cls(tokens, places.round().astype(int))


@dataclass(frozen=True)
class TokenizedUtterance:
    """One utterance: `codes` int16 `[37, frames]`, the forms of its text, speaker and preset.

    `times` float `[words, 2]`: from which frame to which each plain word is spoken, or None if unknown.
    `symbols` int16 `[frames]`: the synthesizer's phoneme in the middle of each frame, 0 where unknown.
    """

    codes: np.ndarray
    texts: tuple[TokenizedText, ...]
    speaker: str
    preset: str | None
    human: bool = False
    times: np.ndarray | None = None
    symbols: np.ndarray | None = None


SYMBOLS = 178  # of the synthesizer's vocabulary
STRESSED, LONG = (156, 157), 158  # the synthesizer's tokens of the marks of stress and of length
ONSET = -0.04  # seconds from the end of the synthesizer's first silence to its first sound; median of 150


def spoken_times(durations: Durations, frames: int, speed: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """`times` and `symbols` of `TokenizedUtterance`, of synthetic speech that was trimmed and brought to
    `speed`."""
    ends = _symbol_ends(durations, speed)
    starts = np.concatenate(([0.0], ends[:-1])).clip(0)
    first, last = durations.words.T.astype(int)
    times = np.stack((starts[first], ends[last - 1]), axis=1).clip(0, frames)
    return times, spoken_symbols(durations, np.arange(frames) + 0.5, speed)


def spoken_symbols(durations: Durations, moments: np.ndarray, speed: float = 1.0) -> np.ndarray:
    """The synthesizer's phonemes, int16, at `moments` in frames of speech as `spoken_times` takes it."""
    ends = _symbol_ends(durations, speed)
    at = np.searchsorted(ends, moments).clip(max=len(ends) - 1)
    # A mark of length belongs to the phoneme before it, a mark of stress to the one after.
    at = at - (durations.tokens[at] == LONG)
    at = (at + np.isin(durations.tokens[at], STRESSED)).clip(max=len(ends) - 1)
    return durations.tokens[at].astype(np.int16)


def _symbol_ends(durations: Durations, speed: float) -> np.ndarray:
    ends = np.cumsum(durations.counts) * UNIT
    before = max(ends[0] + ONSET - MARGIN_SECONDS, 0.0)
    found: np.ndarray = (ends - before) * FRAMES_PER_SECOND / speed
    return found


@dataclass(frozen=True)
class PromptTokens:
    """Ids of the prompt's special tokens, from the tokenizer."""

    bos: int
    audio: int
    begin_audio: int
    next_audio_text: int
    repeat_audio_text: int


@dataclass(frozen=True)
class TrainingItem:
    """A reference `[37, n]`, prompt tokens, and target codes `[37, frames]`.

    `places` float `[2, frames + 1]`: where in the prompt the text is that each frame says, and where the word
    it belongs to ends; for the end of the speech as for a frame. None if unknown. `symbols` as in
    `TokenizedUtterance`.
    """

    reference: np.ndarray
    prompt: list[int]
    codes: np.ndarray
    places: np.ndarray | None = None
    symbols: np.ndarray | None = None

    @property
    def positions(self) -> int:
        """Of the whole sequence."""
        return len(self.prompt) + self.codes.shape[1]


@dataclass(frozen=True)
class _Piece:
    """Text tokens and the frames that say them, with words' places in both."""

    tokens: tuple[int, ...]
    words: np.ndarray
    codes: np.ndarray
    times: np.ndarray | None
    symbols: np.ndarray | None

    @classmethod
    def whole(cls, utterance: TokenizedUtterance, form: int) -> _Piece:
        text, times = utterance.texts[form], utterance.times
        if times is not None and len(times) != len(text.words):
            times = None
        return cls(text.tokens, text.words, utterance.codes, times, utterance.symbols)

    def cut(self, first: int, last: int) -> _Piece:
        """Words `first` up to `last`, with the pause after each."""
        assert self.times is not None
        n = len(self.words)
        start, stop = (
            0 if i == 0 else int(self.words[i, 0]) if i < n else len(self.tokens) for i in (first, last)
        )
        end = self.codes.shape[1]
        begin, until = (
            0 if i == 0 else min(round(self.times[i, 0]), end) if i < n else end for i in (first, last)
        )
        return _Piece(
            self.tokens[start:stop],
            self.words[first:last] - start,
            self.codes[:, begin:until],
            self.times[first:last] - begin,
            None if self.symbols is None else self.symbols[begin:until],
        )

    def then(self, other: _Piece, space: int) -> _Piece:
        """Both, one after the other."""
        assert self.times is not None
        assert other.times is not None
        tokens = self.tokens if self.tokens[-1] == space else (*self.tokens, space)
        symbols = None
        if self.symbols is not None and other.symbols is not None:
            symbols = np.concatenate((self.symbols, other.symbols))
        return _Piece(
            tokens + other.tokens,
            np.concatenate((self.words, other.words + len(tokens))),
            np.concatenate((self.codes, other.codes), axis=1),
            np.concatenate((self.times, other.times + self.codes.shape[1])),
            symbols,
        )

    def places(self, offset: int) -> np.ndarray | None:
        """See `TrainingItem`; the text begins at `offset` of the prompt."""
        if self.times is None or not len(self.times):
            return None
        frames = self.codes.shape[1]
        middle = np.arange(frames) + 0.5
        at = np.interp(middle, self.times.ravel(), self.words.ravel())
        word = np.clip(np.searchsorted(self.times[:, 0], middle, side="right") - 1, 0, None)
        end = len(self.tokens)
        places = np.stack((np.append(at, end), np.append(self.words[word, 1], end)))
        return np.minimum(places, end) + offset


def part_of_speech(
    utterances: Sequence[TokenizedUtterance], speakers: float, speech: float
) -> list[TokenizedUtterance]:
    """Those of a share of the speakers, evenly among people and others, with all presets; of each of them a
    share of the utterances, two at least; in their order. A voice at another speed is of the same speaker."""
    found: set[int] = set()
    for human in (False, True):
        spoken: dict[str, list[TokenizedUtterance]] = {}
        for one in utterances:
            if one.human == human:
                spoken.setdefault(_SPEED.sub("", one.speaker), []).append(one)
        known = {name for name, ones in spoken.items() if any(one.preset for one in ones)}
        others = [name for name in spoken if name not in known]
        known |= {others[int(i / speakers)] for i in range(round(len(others) * speakers))}
        for name in spoken:
            if name in known:
                found |= {id(one) for one in spoken[name][: max(2, round(len(spoken[name]) * speech))]}
    return [one for one in utterances if id(one) in found]


class Shares(Protocol):
    """The settings of a run that say what is drawn."""

    @property
    def reference_frames(self) -> tuple[int, int]:
        """Fewest and most frames of a reference."""

    @property
    def preset_share(self) -> float:
        """Of sequences that are a preset's."""

    @property
    def human_share(self) -> float:
        """Of sequences that are a human's."""

    @property
    def spliced(self) -> float:
        """Of sequences made of two utterances."""


class LanguageData:
    """Random batches of prompts and the frames that follow them.

    `spliced` in the settings: the share of sequences that are the beginning of one utterance and the end of
    another of the same speaker, half of them with words of a third between, so that only the text tells what
    comes next.
    """

    def __init__(
        self,
        utterances: list[TokenizedUtterance],
        references: dict[str, np.ndarray],
        tokens: PromptTokens,
        settings: Shares,
        space: int = -1,
    ) -> None:
        self.utterances, self.references, self.tokens, self.settings = (
            utterances,
            references,
            tokens,
            settings,
        )
        self.space = space
        self.by_speaker: dict[str, list[int]] = {}
        for i, utterance in enumerate(utterances):
            self.by_speaker.setdefault(utterance.speaker, []).append(i)
        self.of_presets = [i for i, u in enumerate(utterances) if u.preset is not None]
        several = [i for i, u in enumerate(utterances) if u.preset is None and self.has_reference(i)]
        self.humans = [i for i in several if utterances[i].human]
        self.others = [i for i in several if not utterances[i].human]

    def draw(self, rng: np.random.Generator) -> TrainingItem:
        """One sequence, of a preset, a human or another speaker."""
        at = rng.random()
        pool = self.others
        if at < self.settings.preset_share:
            pool = self.of_presets
        elif at < self.settings.preset_share + self.settings.human_share:
            pool = self.humans
        pool = pool or self.others or self.of_presets or self.humans
        chosen = int(pool[rng.integers(len(pool))])
        return self.item(chosen, rng)

    def has_reference(self, index: int) -> bool:
        """Whether there is other speech of the utterance's speaker, or it is a preset's."""
        utterance = self.utterances[index]
        return utterance.preset is not None or len(self.by_speaker[utterance.speaker]) > 1

    def item(self, chosen: int, rng: np.random.Generator) -> TrainingItem:
        """As `draw`, for one utterance."""
        utterance = self.utterances[chosen]
        if utterance.preset is not None and (
            rng.random() < 0.7 or len(self.by_speaker[utterance.speaker]) < 2
        ):
            reference = self.references[utterance.preset]
        else:
            reference = self._other(utterance, chosen, rng)
        piece = self._piece(chosen, rng)
        tokens = self.tokens
        head = [
            tokens.bos,
            tokens.begin_audio,
            *[tokens.audio] * (reference.shape[1] + 1),
            tokens.next_audio_text,
        ]
        prompt = [*head, *piece.tokens, tokens.repeat_audio_text, tokens.begin_audio]
        return TrainingItem(reference, prompt, piece.codes, piece.places(len(head)), piece.symbols)

    def _piece(self, chosen: int, rng: np.random.Generator) -> _Piece:
        utterance = self.utterances[chosen]
        form = int(rng.integers(len(utterance.texts)))
        piece = _Piece.whole(utterance, form)
        if piece.times is None or len(piece.times) < 2 or rng.random() >= self.settings.spliced:
            return piece
        # The beginning of this one, now and then some words of a second, the end of the last.
        made = piece.cut(0, int(rng.integers((len(piece.words) + 1) // 2, len(piece.words) + 1)))
        mine = self.by_speaker[utterance.speaker]
        for last in (False, True) if rng.random() < 0.5 else (True,):
            other = _Piece.whole(self.utterances[mine[rng.integers(len(mine))]], form)
            words = 0 if other.times is None else len(other.words)
            if not words or not made.codes.shape[1]:
                return piece
            first = int(rng.integers(words // 2 + 1 if last else words))
            until = words if last else min(words, first + int(rng.integers(1, MOST_WORDS + 1)))
            made = made.then(other.cut(first, until), self.space)
        return made if made.codes.shape[1] <= MOST_FRAMES else piece

    def _other(self, utterance: TokenizedUtterance, chosen: int, rng: np.random.Generator) -> np.ndarray:
        low, high = self.settings.reference_frames
        wanted = int(rng.integers(low, high + 1))
        mine = [i for i in self.by_speaker[utterance.speaker] if i != chosen]
        parts: list[np.ndarray] = []
        total = 0
        for i in rng.permutation(mine):
            parts.append(self.utterances[i].codes)
            total += parts[-1].shape[1]
            if total >= wanted:
                break
        return np.concatenate(parts, axis=1)[:, :wanted]

    def batch(self, size: int, rng: np.random.Generator) -> list[TrainingItem]:
        """`size` draws of about one length, since a batch costs what its longest sequence costs."""
        drawn = sorted((self.draw(rng) for _ in range(4 * size)), key=lambda i: i.positions)
        first = size * int(rng.integers(4))
        return drawn[first : first + size]
