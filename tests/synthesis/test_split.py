from __future__ import annotations

import pytest

from revox.synthesis.errors import SpeakError
from revox.synthesis.split import MAX_SECONDS, PAUSES, Splitter, expected_seconds, split_text

# Texts whose sentences are separated by " | ".
SENTENCES = [
    "Dr. Smith paid 3.50 euros at 9 p.m. today. | Yes!",
    'He came at 9 p.m. | The door was open. | "Really?!" she said... | Yes!',
    "The U.S. Army came. | See Fig. 3, p. 12 and No. 5. | No. | Inc. is short, etc. | So do I. | He too.",
    "J. S. Bach and E. A. Poe met at example.org, 12:30. | Wait... what? | (Really.) | He said “Go.” | Gone.",
    "approx. five of them, e.g. this one. | ten to nine. | half past ten.",
    "Das kostet z. B. 3,50 Euro bzw. mehr. | Dr. Müller wohnt in Nr. 5.",
    "Wir gehen am 3. Oktober los. | Im 19. Jahrhundert. | Es kostet 3 Mio. Euro. | Er wurde 5. | Ja.",
    "M. Dupont est là. | « Bonjour ! » dit-il. | Où ?",
    "¿Qué hora es? | ¡Son las 3.30! | El Sr. García llega.",
    "今日は。|「元気？」|と言った。|他……走了。|はい",
    "नमस्ते। | आप कैसे हैं? | ठीक।",
    "كيف حالك؟ | أنا بخير. | شكرا",
    "A heading |\n\nFirst line |\n- one |\n- two |\n1. three |\n2) four",
]


def _sentences(marked):
    text = marked.replace(" | ", " ").replace(" |\n", "\n").replace("|", "")
    return text, [one.strip() for one in marked.split("|")]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("marked", SENTENCES)
def test_sentences_come_out_whatever_parts_the_text_comes_in(marked, size):
    text, expected = _sentences(marked)
    splitter = Splitter("sentence")
    given = [
        sentence for i in range(0, len(text), size) for sentence in splitter.feed(text[i : i + size])
    ] + splitter.flush()
    assert given == expected


def test_clauses_end_at_commas_but_not_within_numbers():
    splitter = Splitter("clause")
    assert splitter.feed("First, 1,000 of them; then: nothing ") == ["First,", "1,000 of them;", "then:"]
    assert splitter.pending > 0
    assert splitter.flush() == ["nothing"]


def test_nothing_is_given_before_the_end_when_nothing_is_split():
    splitter = Splitter("none")
    assert splitter.feed("One. Two. ") == []
    assert splitter.flush() == ["One. Two."]
    assert splitter.flush() == []


def test_a_stop_at_the_end_counts_once_it_is_known_that_nothing_follows():
    splitter = Splitter()
    assert splitter.feed("It is 3.") == []
    assert splitter.feed("14. ") == []
    assert splitter.settle() == ["It is 3.14."]
    assert splitter.settle() == []


def test_overdue_text_is_given_up_to_its_last_clause_or_else_its_last_word():
    splitter = Splitter()
    assert splitter.feed("well, I thought, perhaps not") == []
    assert splitter.overdue() == ["well, I thought,"]
    assert splitter.overdue() == ["perhaps"]
    assert splitter.flush() == ["not"]


def test_a_text_that_fits_is_one_piece_exactly_as_it_is():
    text = "One. Two,  three!\n- four"
    assert [(piece.text, piece.pause) for piece in split_text(f" {text}\n")] == [(text, 0.0)]
    assert split_text(" \n") == []


def test_pieces_are_parts_of_the_text_in_order_within_the_bounds_and_none_is_a_short_rest():
    text = "\n\n".join(
        "The hall was dark, and nobody spoke. He waited for a while; then he left by the other door. Rain."
        for _ in range(9)
    )
    pieces = split_text(text, 250)
    at = 0
    for piece in pieces:
        at = text.index(piece.text, at) + len(piece.text)
        assert len(piece.text) <= 250
        assert piece.text.endswith(".")
    assert text.replace("\n\n", " ") == " ".join(piece.text.replace("\n\n", " ") for piece in pieces)
    assert min(len(piece.text) for piece in pieces) > 90


def test_a_sentence_that_does_not_fit_is_cut_at_clauses_a_clause_at_spaces_and_a_word_anywhere():
    def cut(text):
        return [piece.text for piece in split_text(text, 20)]

    assert cut("He came, he saw, and then he left.") == ["He came, he saw,", "and then he left."]
    assert cut("one two three four five six") == ["one two three", "four five six"]
    assert cut("x" * 50) == ["x" * 20, "x" * 20, "x" * 10]
    assert cut("ten " + "長" * 30)[0] == "ten"


def test_chinese_is_bounded_by_its_expected_seconds():
    pieces = split_text("今天天气很好，我们去公园吧。" * 40, 1000)
    assert len(pieces) > 2
    assert all(expected_seconds(piece.text) <= MAX_SECONDS for piece in pieces)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        # Read aloud by people: a LibriSpeech utterance, Chinese and Korean at five to six syllables a second.
        ("concord returned to its place amidst the tents", 3.0),
        ("今天天气很好我们去公园吧", 2.6),
        ("오늘은 날씨가 아주 좋습니다", 2.2),
        ("1984", 1.3),
    ],
)
def test_expected_seconds_are_near_what_reading_takes(text, seconds):
    assert expected_seconds(text) == pytest.approx(seconds, rel=0.35)


def test_the_silence_after_a_piece_depends_on_what_ends_it():
    text = f"{'a' * 18}. {'b' * 17}, {'c' * 20} {'d' * 19}.\n{'e' * 19}.\n\n{'f' * 19}."
    pauses = [piece.pause for piece in split_text(text, 20)]
    assert pauses == [PAUSES[end] for end in ("sentence", "clause", "word", "line", "paragraph")] + [0.0]


def test_a_wrapped_paragraph_is_not_cut_at_its_lines_and_a_list_is():
    wrapped = "He waited in the hall for a while, until the rain\nhad stopped and the street was dry. " * 3
    assert all("\n" in piece.text for piece in split_text(wrapped, 110))
    listed = "Bring\n" + "\n".join(f"- the {word} one" for word in ("first", "second", "third"))
    assert [piece.text for piece in split_text(listed, 20)] == [
        "Bring",
        "- the first one",
        "- the second one",
        "- the third one",
    ]


@pytest.mark.parametrize("max_chars", [0, 19, 2001])
def test_bounds_out_of_range_are_refused(max_chars):
    with pytest.raises(SpeakError, match="20 to 2000"):
        split_text("ten", max_chars)


def test_a_megabyte_is_split_in_seconds():
    assert len(split_text("Hello there my friend, how are you. " * 30_000)) == 3750
