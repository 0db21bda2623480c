"""The lab's text domain."""

import itertools
import re

import pytest

from lab import sentences


def first(split, seed, count):
    return list(itertools.islice(sentences.sentences(split, seed), count))


def possible():
    return sentences._count(("rule", "sentence"))


def test_the_domain_has_at_least_a_hundred_thousand_sentences():
    assert possible() >= 100_000


def test_counting_agrees_with_listing(monkeypatch):
    monkeypatch.setattr(sentences, "_RULES", {"sentence": "a (b | c [d]) | <x> e", "x": "f | g | h"})
    sentences._rule.cache_clear()
    sentences._count.cache_clear()
    try:
        assert possible() == len(["a b", "a c", "a c d", "f e", "g e", "h e"])
    finally:
        monkeypatch.undo()
        sentences._rule.cache_clear()
        sentences._count.cache_clear()


def test_splits_never_share_a_sentence_and_are_the_same_for_the_same_seed():
    train, validation, heldout = (set(first(split, 7, 400)) for split in sentences.SPLITS)
    assert len(train) == len(validation) == len(heldout) == 400
    assert not train & validation
    assert not train & heldout
    assert not validation & heldout
    assert first("train", 7, 20) == first("train", 7, 20) != first("train", 8, 20)


def test_case_and_punctuation_do_not_move_a_sentence_to_another_split():
    for sentence in first("heldout", 1, 50):
        assert sentences.split_of(f"{sentence.capitalize()}.") == "heldout"


def test_a_recognizer_accepts_the_grammar_and_knows_every_word():
    pocketsphinx = pytest.importorskip("pocketsphinx")
    config = pocketsphinx.Config(lm=None)
    decoder = pocketsphinx.Decoder(config)
    words = {w for body in sentences._RULES.values() for w in re.findall(r"<\w+>|([a-z']+)", body) if w}
    unknown = [word for word in sorted(words) if decoder.lookup_word(word) is None]
    assert unknown == []
    decoder.add_jsgf_string("domain", sentences.jsgf())


def test_the_grammar_that_ships_is_the_labs():
    from revox.demo import grammar_file

    assert grammar_file().read_text(encoding="utf-8") == sentences.jsgf()
