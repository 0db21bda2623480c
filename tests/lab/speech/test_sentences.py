from __future__ import annotations

import pytest

from lab.speech.sentences import (
    body_of_book,
    by_coverage,
    is_plain,
    runs,
    sentences_of,
    without_rare_words,
    without_unknown_names,
)


def test_sentences_end_at_their_marks_and_not_at_titles_or_initials():
    text = "It was late. Mr. Brown\nslept well! Did he? J. Smith left.\n\nA new\nday."
    assert sentences_of(text) == [
        "It was late.",
        "Mr@ Brown slept well!",
        "Did he?",
        "J@ Smith left.",
        "A new day.",
    ]


def test_single_marks_are_speech_in_a_book_without_double_ones_and_dialect_in_others():
    assert sentences_of("'It's th' wind,' he said.") == ["It's th wind, he said."]
    assert sentences_of("\"It's th' wind,\" he said.") == ["It's th' wind, he said."]


@pytest.mark.parametrize(
    "sentence",
    [
        "Two words.",
        "A boy of 12 years.",
        "It's th' wind again.",
        "He met Gordon there.",
        "One two; three four.",
    ],
)
def test_short_sentences_figures_dialect_names_and_odd_marks_are_left_out(sentence):
    assert not is_plain(sentence)
    assert is_plain("On Monday I met Mary, didn't I?")


def test_only_the_book_is_read_from_a_gutenberg_text():
    text = (
        "Notice.\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\nBook.\n*** END OF THIS PROJECT GUTENBERG"
    )
    assert body_of_book(text).strip() == "Book."


def test_a_sentence_that_begins_with_a_name_is_left_out():
    assert without_unknown_names(["Gordon went home.", "He saw the sea.", "The sea, he said."]) == [
        "He saw the sea.",
        "The sea, he said.",
    ]


def test_rare_words_are_counted_in_the_sentences_that_are_left():
    # "c" is rare; without its sentence "b" is rare as well.
    sentences = ["A a.", "A b.", "B c."]
    assert without_rare_words(sentences, 2) == ["A a."]
    assert without_rare_words(sentences, 2, known=["c"]) == sentences


def test_runs_are_all_stretches_of_that_length():
    assert runs(list("abcdef"), 5) == {tuple("abcde"), tuple("bcdef")}
    assert runs(list("ab"), 5) == set()


def test_every_word_comes_in_the_first_pass_and_the_order_follows_the_seed():
    sentences = [f"Common word{i % 7}." for i in range(70)]
    sentences = [s.replace(str(i), "abcdefg"[i]) for i in range(7) for s in sentences if s.endswith(f"{i}.")]
    first = by_coverage(sentences, 40, seed=1)
    assert {s.split()[1] for s in first[:7]} == {s.split()[1] for s in sentences}
    assert first == by_coverage(sentences, 40, seed=1)
    assert first != by_coverage(sentences, 40, seed=2)
