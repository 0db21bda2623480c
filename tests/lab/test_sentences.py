"""The lab's text domain."""

import itertools

import pytest

from lab import sentences


def first(split, seed, count):
    return list(itertools.islice(sentences.sentences(split, seed), count))


def test_the_domain_has_at_least_a_hundred_thousand_sentences():
    assert sentences.possible_sentences() >= 100_000


def test_counting_agrees_with_listing(monkeypatch):
    monkeypatch.setattr(sentences, "_RULES", {"sentence": "a (b | c [d]) | <x> e", "x": "f | g | h"})
    sentences._rule.cache_clear()
    sentences._count.cache_clear()
    try:
        assert sentences.possible_sentences() == len(["a b", "a c", "a c d", "f e", "g e", "h e"])
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


def test_the_written_form_belongs_to_the_same_split_and_reads_well():
    for sentence in first("heldout", 1, 50):
        assert sentences.split_of(sentences.written(sentence)) == "heldout"
    assert (
        sentences.written("can we meet on monday at half past two")
        == "Can we meet on Monday at half past two?"
    )


def test_a_recognizer_accepts_the_grammar_and_knows_every_word():
    pocketsphinx = pytest.importorskip("pocketsphinx")
    config = pocketsphinx.Config(lm=None)
    decoder = pocketsphinx.Decoder(config)
    unknown = [word for word in sentences.words() if decoder.lookup_word(word) is None]
    assert unknown == []
    decoder.add_jsgf_string("domain", sentences.jsgf())


def test_the_grammar_that_ships_is_the_labs():
    from revox.demo import grammar_file

    assert grammar_file().read_text(encoding="utf-8") == sentences.jsgf()
