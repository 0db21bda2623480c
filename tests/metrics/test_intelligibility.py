import sys
from pathlib import Path

import numpy as np
import pytest

from revox.metrics.errors import MetricError
from revox.metrics.intelligibility import (
    PocketsphinxRecognizer,
    _decode,
    _pcm,
    grammar_words,
    normalize_text,
    spell_number,
    word_error_rate,
)
from revox.speech import Audio, read_audio

CLIPS = Path(__file__).parents[1] / "speech" / "clips"
# The clip 103-1240-0000 begins "Chapter one. Missus Rachel Lynde is surprised."
GRAMMAR = """#JSGF V1.0;
grammar chapters; // a comment
public <sentence> = chapter <number> (missus | mister) (rachel | robert) lind [today] is <feeling>;
<number> = one | two | three | four;
<feeling> = surprised | delighted | /0.5/ tired {mood};
"""


def opening():
    audio = read_audio(CLIPS / "103-1240-0000.flac")
    return Audio(audio.samples[: int(4.2 * audio.rate)], audio.rate)


@pytest.fixture(scope="module")
def recognizer():
    return PocketsphinxRecognizer(GRAMMAR)


@pytest.mark.parametrize(
    ("digits", "words"),
    [
        ("0", "zero"),
        ("13", "thirteen"),
        ("40", "forty"),
        ("42", "forty two"),
        ("100", "one hundred"),
        ("317", "three hundred seventeen"),
        ("2026", "two thousand twenty six"),
        ("999999", "nine hundred ninety nine thousand nine hundred ninety nine"),
        ("1000000", "one zero zero zero zero zero zero"),
        ("007", "zero zero seven"),
    ],
)
def test_numbers_are_spelled(digits, words):
    assert spell_number(digits) == words


def test_text_is_normalised_to_words():
    assert normalize_text("It’s 1,250 metres -- isn't IT?\n(yes)") == (
        "it's one thousand two hundred fifty metres isn't it yes"
    )


def test_the_error_rate_counts_substitutions_deletions_and_insertions_per_reference_word():
    assert word_error_rate("One, two, three four.", "one two three four") == 0.0
    assert word_error_rate("one two three four", "one too three") == pytest.approx(2 / 4)
    assert word_error_rate("one", "one two three") == pytest.approx(2.0)
    assert word_error_rate(["one two", "three four"], ["one two", ""]) == pytest.approx(0.5)
    for reference, heard in (("", "one"), (["one", ""], ["one", "two"]), (["one"], ["one", "two"])):
        with pytest.raises(MetricError):
            word_error_rate(reference, heard)


def test_human_speech_is_heard_through_the_grammar(recognizer):
    assert recognizer.transcribe(opening()) == "chapter one missus rachel lind is surprised"
    assert recognizer.transcribe(opening().at(24000)) == "chapter one missus rachel lind is surprised"


def test_speech_outside_the_grammar_noise_and_silence_are_rejected(recognizer):
    audio = read_audio(CLIPS / "103-1240-0000.flac")
    rng = np.random.default_rng(0)
    assert recognizer.transcribe(Audio(audio.samples[5 * 16000 : 9 * 16000], 16000)) == ""
    assert recognizer.transcribe(Audio(rng.normal(scale=0.1, size=48000), 16000)) == ""
    assert recognizer.transcribe(Audio(np.zeros(48000), 16000)) == ""
    assert recognizer.transcribe(Audio(np.zeros(0), 16000)) == ""


def test_what_is_heard_does_not_depend_on_what_was_heard_before(recognizer):
    pcm = _pcm(opening())
    alone = _decode(recognizer._decoder, pcm)
    recognizer.transcribe(Audio(np.random.default_rng(0).normal(scale=0.1, size=48000), 16000))
    assert _decode(recognizer._decoder, pcm) == alone
    assert _decode(PocketsphinxRecognizer(GRAMMAR)._decoder, pcm) == alone


def test_without_a_grammar_it_hears_freely():
    heard = PocketsphinxRecognizer().transcribe(opening())
    assert word_error_rate("chapter one missus rachel lynde is surprised", heard) < 0.5


def test_the_words_of_a_grammar_are_found():
    assert sorted(grammar_words(GRAMMAR)) == [
        "chapter", "delighted", "four", "is", "lind", "missus", "mister", "one", "rachel", "robert",
        "surprised", "three", "tired", "today", "two",
    ]  # fmt: skip


def test_an_unknown_word_and_a_broken_grammar_are_sentences():
    with pytest.raises(MetricError, match="lacks avonlea"):
        PocketsphinxRecognizer(GRAMMAR.replace("rachel", "avonlea"))
    with pytest.raises(MetricError, match="cannot be parsed"):
        PocketsphinxRecognizer("#JSGF V1.0; grammar x; public <s> = (one | two;")


def test_missing_libraries_are_sentences(monkeypatch):
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(MetricError, match=r"revox\[eval\]"):
        PocketsphinxRecognizer()
    with pytest.raises(MetricError, match=r"revox\[eval\]"):
        word_error_rate("one", "one")
