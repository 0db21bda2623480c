from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lab.errors import LabError
from lab.speech.durations import FILE, Durations, read_durations, word_symbols, write_durations
from lab.speech.plan import read_plan

LAB = FILE.parent.parent


def test_words_that_are_read_as_one_are_told_apart():
    read = "ðə lˈɛɾɚz ɑːɹ ɔnðə tˈeɪbəl. "
    spans = word_symbols(read, ["ðə ", "lˈɛɾɚz ", "ˈɑːɹ ", "ˈɔn ", "ðə ", "tˈeɪbəl "])
    assert [read[start:end] for start, end in spans] == ["ðə", "lˈɛɾɚz", "ɑːɹ", "ɔn", "ðə", "tˈeɪbəl"]


def test_a_word_that_is_said_otherwise_in_a_sentence_is_found_all_the_same():
    read = "ɐ tə, æɾ ˈeɪt"
    spans = word_symbols(read, ["ˈeɪ ", "tuː ", "æt ", "ˈeɪt "])
    assert [read[start:end] for start, end in spans] == ["ɐ", "tə", "æɾ", "ˈeɪt"]


def test_what_is_written_is_read_again(tmp_path: Path):
    path = tmp_path / "durations.npz"
    assert read_durations(path) == {}
    made = {
        7: Durations(np.array([0, 50, 51, 0]), np.array([13, 2, 3, 1]), np.array([[1, 2], [2, 3]])),
        3: Durations(np.array([0, 60, 0]), np.array([12, 9, 2]), np.array([[1, 2]])),
    }
    write_durations(path, made)
    found = read_durations(path)
    assert sorted(found) == [3, 7]
    for number, one in made.items():
        for name in ("tokens", "counts", "words"):
            assert np.array_equal(getattr(found[number], name), getattr(one, name))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(LabError, match="does not hold durations"):
        read_durations(path)


def test_the_committed_durations_have_the_words_of_their_sentences():
    found = read_durations()
    plan = {item.number: item for item in read_plan(LAB / "speech" / "plan.tsv")}
    assert len(found) > 3000
    for number, one in found.items():
        assert len(one.words) == len(plan[number].text.split())
        assert one.words[-1][1] < len(one.tokens) == len(one.counts)
        assert (one.words[:, 0] < one.words[:, 1]).all()
        assert (one.words[1:, 0] >= one.words[:-1, 1]).all()
