"""Words: recognizers of speech, and the word error rate by jiwer.

A rate means something only if the recognizer understands the source: report that of the original speech, of
noise and of another sentence with that of the speech under test.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np

from revox.metrics.errors import MetricError
from revox.speech.audio import Audio

_RATE = 16000
# Rejection: nats a 10 ms frame by which the path through the grammar may be less likely than the best free
# path through phones. With the lab's grammar, 23 of 24 of its sentences by espeak-ng and flite pass, all
# without a word error, and outside it 27 of 40 pieces of LibriSpeech and 13 of 16 synthetic sentences are
# rejected; white noise has no path at all.
_REJECT_BELOW = -2.0


def normalize_text(text: str) -> str:
    """English words as they are compared: "5:45" and "Five forty-five!" are both "545".

    This is the normalizer of Whisper's paper (arXiv 2212.04356, appendix C), from the package
    whisper-normalizer: lower case, no punctuation, numbers as digits, contractions in full, American
    spelling; numbers said one after another are one word. Three things are rewritten before, since it takes
    an ellipsis for a word, the o of "o'clock" for a zero, and a time with a colon for two numbers. Raises
    MetricError when the package is missing.
    """
    text = re.sub(r"\bo'? ?clock\b", "oclock", text.replace("’", "'"), flags=re.I)
    text = re.sub(r"\.{2,}", " ", text)
    text = re.sub(r"(?<![\d:])(\d{1,2}):(?:00|(\d\d))(?![\d:])", r"\1\2", text)
    return _normalizer()(text)


@cache
def _normalizer() -> Callable[[str], str]:
    try:
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError:
        raise MetricError(
            "comparing words needs whisper-normalizer; install it with `pip install 'revox[eval]'`"
        ) from None
    return EnglishTextNormalizer()


def word_errors(reference: str | Sequence[str], hypothesis: str | Sequence[str]) -> tuple[int, int]:
    """Substitutions, deletions and insertions, and reference words, over all pairs, after `normalize_text`.

    Raises MetricError when a reference holds no words, or when jiwer or whisper-normalizer is missing.
    """
    try:
        import jiwer
    except ImportError:
        raise MetricError(
            "the word error rate needs jiwer; install it with `pip install 'revox[eval]'`"
        ) from None
    references = [reference] if isinstance(reference, str) else list(reference)
    hypotheses = [hypothesis] if isinstance(hypothesis, str) else list(hypothesis)
    if len(references) != len(hypotheses):
        raise MetricError(
            f"{len(references)} transcripts cannot be compared with {len(hypotheses)}; give one for each"
        )
    references = [normalize_text(text) for text in references]
    if not references or not all(references):
        raise MetricError("a reference transcript holds no words; the word error rate needs at least one")
    found = jiwer.process_words(references, [normalize_text(text) for text in hypotheses])
    missed = found.substitutions + found.deletions
    return missed + found.insertions, missed + found.hits


def word_error_rate(reference: str | Sequence[str], hypothesis: str | Sequence[str]) -> float:
    """`word_errors` per reference word; may exceed 1."""
    errors, words = word_errors(reference, hypothesis)
    return errors / words


class Recognizer(Protocol):
    """Transcribes speech: `PocketsphinxRecognizer` or `revox.metrics.whisper.WhisperRecognizer`."""

    def transcribe(self, audio: Audio) -> str:
        """The words in `audio`."""


class PocketsphinxRecognizer:
    """Transcribes English speech within a JSGF grammar, offline; its acoustic model is in its wheel.

    `grammar` is the text of a JSGF grammar whose words pocketsphinx's dictionary knows. With `reject`, speech
    that fits the grammar much worse than a free loop of phones gives "". Raises MetricError when pocketsphinx
    is missing or the grammar cannot be used.
    """

    def __init__(self, grammar: str, reject: bool = True) -> None:
        self._phones = None
        self._decoder = _decoder(lm=None)
        unknown = sorted(w for w in grammar_words(grammar) if self._decoder.lookup_word(w) is None)
        if unknown:
            raise MetricError(
                f"the recognizer's dictionary lacks {', '.join(unknown[:5])}; use other words in the grammar"
            )
        try:
            self._decoder.add_jsgf_string("domain", grammar)
            self._decoder.activate_search("domain")
        except (RuntimeError, ValueError):
            raise MetricError("the JSGF grammar cannot be parsed; check its syntax") from None
        if reject:
            from pocketsphinx import get_model_path

            model = f"{get_model_path('en-us')}/en-us-phone.lm.bin"
            self._phones = _decoder(lm=None, allphone=model, lw=1.0, beam=1e-20, pbeam=1e-20)

    def transcribe(self, audio: Audio) -> str:
        """The words, lower case; "" when there are none, or when they were rejected."""
        pcm = _pcm(audio)
        if not pcm:
            return ""
        words, score = _decode(self._decoder, pcm)
        if words and self._phones is not None:
            frames = len(pcm) / 2 / _RATE * 100
            if (score - _decode(self._phones, pcm)[1]) / frames < _REJECT_BELOW:
                return ""
        return words


def grammar_words(grammar: str) -> set[str]:
    """The terminal words of a JSGF grammar."""
    bodies = re.sub(r"//[^\n]*|/\*.*?\*/", "", grammar, flags=re.S)
    bodies = re.sub(r"^\s*(#JSGF|grammar|import)[^;]*;", "", bodies, flags=re.M)
    bodies = re.sub(r"/[\d.]+/|\{[^}]*\}", " ", bodies)
    words: set[str] = set()
    for rule in bodies.split(";"):
        _, _, body = rule.partition("=")
        words.update(re.findall(r"[^\s|()\[\]*+<>]+", re.sub(r"<[^>]*>", " ", body)))
    return words


def _decoder(**settings: Any) -> Any:
    try:
        import pocketsphinx
    except ImportError:
        raise MetricError(
            "recognizing words needs pocketsphinx; install it with `pip install 'revox[eval]'`"
        ) from None
    return pocketsphinx.Decoder(samprate=float(_RATE), loglevel="FATAL", dither=False, **settings)


def _pcm(audio: Audio) -> bytes:
    samples = audio.at(_RATE).samples
    peak = float(np.abs(samples).max(initial=0.0))
    if not peak:
        return b""
    # A tenth of a second of near silence on both sides: the models expect to enter and leave through it.
    padded = np.pad(samples * (0.5 / peak), 1600)
    noise = np.random.default_rng(0).normal(scale=1e-4, size=padded.shape)
    return ((padded + noise) * 32767).astype("<i2").tobytes()


def _decode(decoder: Any, pcm: bytes) -> tuple[str, float]:
    """The hypothesis and its path's log likelihood (natural)."""
    # Earlier clips must not matter: the front end starts afresh, its means come from the whole clip.
    decoder.reinit_feat()
    decoder.start_utt()
    decoder.process_raw(pcm, full_utt=True)
    decoder.end_utt()
    hypothesis = decoder.hyp()
    if hypothesis is None:
        return "", float("-inf")
    # pocketsphinx returns exp(log likelihood / 1024): its integer scores are shifted by 10 bits.
    return hypothesis.hypstr or "", 1024.0 * math.log(hypothesis.score)


def load_recognizer(name: str, grammar: str | None = None, device: str = "cpu") -> Recognizer | None:
    """The recognizer by name: "none", "pocketsphinx" (with a JSGF `grammar`) or a faster-whisper model.

    A model is a folder or a hub id, also with "whisper:" before it. Raises MetricError when the recognizer
    cannot be loaded.
    """
    if name == "none":
        return None
    if name == "pocketsphinx":
        if grammar is None:
            raise MetricError(
                "pocketsphinx recognizes only the sentences of a grammar: give it one with --grammar FILE, "
                "or use --recognizer whisper:FOLDER_OR_HUB_ID for any sentence"
            )
        return PocketsphinxRecognizer(grammar)
    from revox.metrics.whisper import WhisperRecognizer

    return WhisperRecognizer(name.removeprefix("whisper:"), device)
