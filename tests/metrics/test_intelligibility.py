import sys
from pathlib import Path

import numpy as np
import pytest

from revox.metrics import intelligibility
from revox.metrics.errors import MetricError
from revox.metrics.intelligibility import (
    PocketsphinxRecognizer,
    _decode,
    _pcm,
    grammar_words,
    load_recognizer,
    normalize_text,
    word_error_rate,
    word_errors,
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
    ("written", "spoken"),
    [
        ("545", "five forty five"),
        ("At 5:45!", "at five forty-five"),
        ("10:00", "ten"),
        ("10 o'clock", "ten o’clock"),
        ("1,250 metres", "one thousand two hundred fifty meters"),
        ("March 3rd", "march third"),
        ("It isn't Mr. Smith's.", "it is not mister smith's"),
        ("2026", "twenty twenty six"),
        ("3.14", "three point one four"),
        ("He waited... quietly...", "he waited quietly"),
    ],
)
def test_however_a_number_or_a_word_is_written_it_is_compared_as_one(written, spoken):
    assert normalize_text(written) == normalize_text(spoken)
    assert word_error_rate(written, spoken) == 0


def test_words_that_differ_stay_different():
    assert normalize_text("5:45") != normalize_text("5:54")
    assert normalize_text("It’s half past nine -- isn't IT?\n(yes)") == "it is half past 9 is not it"
    assert normalize_text("ten o'clock") == "10 oclock"


def test_the_errors_are_those_of_jiwer_on_normalized_words():
    import jiwer

    texts = ["one cat sat on the mat", "please come at nine"], ["a cat sat on mat today", "please come"]
    errors, words = word_errors(*texts)
    assert words == 10
    assert errors / words == pytest.approx(jiwer.wer(*([normalize_text(t) for t in ts] for ts in texts)))


def test_the_error_rate_counts_substitutions_deletions_and_insertions_per_reference_word():
    assert word_error_rate("Red, green, blue black.", "red green blue black") == 0.0
    assert word_error_rate("red green blue black", "red grin blue") == pytest.approx(2 / 4)
    assert word_error_rate("red", "red green blue") == pytest.approx(2.0)
    assert word_error_rate(["red green", "blue black"], ["red green", ""]) == pytest.approx(0.5)
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


def test_without_a_grammar_pocketsphinx_names_what_to_give():
    with pytest.raises(MetricError, match=r"--grammar FILE.*whisper:FOLDER_OR_HUB_ID"):
        load_recognizer("pocketsphinx")
    assert load_recognizer("pocketsphinx", GRAMMAR).transcribe(Audio(np.zeros(16000), 16000)) == ""
    assert load_recognizer("none") is None


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
    with pytest.raises(MetricError, match=r"revox\[eval\]"):
        PocketsphinxRecognizer(GRAMMAR)
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(MetricError, match=r"jiwer.*revox\[eval\]"):
        word_error_rate("one", "one")
    intelligibility._normalizer.cache_clear()
    monkeypatch.setitem(sys.modules, "whisper_normalizer.english", None)
    with pytest.raises(MetricError, match=r"whisper-normalizer.*revox\[eval\]"):
        normalize_text("one")
