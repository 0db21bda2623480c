"""Where in the text the lab's speech is, and sequences made of two utterances."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lab.language_data import (
    MOST_FRAMES,
    LanguageData,
    PromptTokens,
    TokenizedText,
    TokenizedUtterance,
    part_of_speech,
    spoken_times,
)
from lab.language_training import LanguageTraining
from lab.speech.durations import Durations

TOKENS = PromptTokens(bos=1, audio=24, begin_audio=25, next_audio_text=36, repeat_audio_text=35)
TEXT_START = 2 + 5 + 1  # of a prompt with a reference of 4 frames
SPACE = ord(" ")


def in_bytes(text: str) -> TokenizedText:
    return TokenizedText.of(text, tuple(text.encode()))


def utterance(text: str, times: list[list[float]] | None, frames: int, code: int = 0) -> TokenizedUtterance:
    """One whose codes number its frames from `code` on, and whose symbols do so from 1 + `code` on."""
    codes = np.tile(np.arange(code, code + frames, dtype=np.int16), (37, 1))
    known = None if times is None else np.array(times)
    return TokenizedUtterance(codes, (in_bytes(text),), "a", "p", False, known, codes[0] + 1)


def data(*utterances: TokenizedUtterance, spliced: float = 0.0) -> LanguageData:
    settings = LanguageTraining(reference_frames=(4, 4), preset_share=1.0, spliced=spliced)
    return LanguageData(list(utterances), {"p": np.zeros((37, 4), np.int16)}, TOKENS, settings, SPACE)


def test_words_are_found_in_the_bytes_of_a_text():
    text = in_bytes("“Don't” go, 7 é.")
    spelled = bytes(text.tokens)
    assert [spelled[a:b].decode() for a, b in text.words] == ["Don't", "go"]


def test_each_frame_has_its_place_in_the_text_and_the_end_of_its_word():
    # "ab" is frames 1 to 3, the pause 3 to 4, "cdef" 4 to 8; the sound ends at 9.
    one = utterance("ab cdef.", [[1, 3], [4, 8]], 9)
    item = data(one).item(0, np.random.default_rng(0))
    assert bytes(item.prompt[TEXT_START:-2]) == b"ab cdef."
    at, end = item.places - TEXT_START
    assert at.tolist() == [0, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7, 8]
    assert end.tolist() == [2, 2, 2, 2, 7, 7, 7, 7, 7, 8]


@pytest.mark.parametrize("times", [None, [[0, 1]]])
def test_places_are_unknown_where_times_do_not_fit_the_words(times):
    item = data(utterance("ab cd", times, 5)).item(0, np.random.default_rng(0))
    assert item.places is None


def test_a_spliced_sequence_says_the_beginning_of_one_and_the_end_of_another():
    first = utterance("ab cd.", [[0, 2], [3, 5]], 6)
    second = utterance("ef gh", [[1, 3], [3, 6]], 7, code=100)
    sequences, rng = data(first, second, spliced=1.0), np.random.default_rng(0)
    # What is said of each text, by the codes of the frames.
    said = {
        (b"ab ", b"ef gh"): [0, 1, 2, *range(100, 107)],
        (b"ab ", b"gh"): [0, 1, 2, *range(103, 107)],
        (b"ab cd. ", b"ef gh"): [*range(6), *range(100, 107)],
        (b"ab cd. ", b"gh"): [*range(6), *range(103, 107)],
    }
    expected = {begins + ends: codes for (begins, ends), codes in said.items()}
    found = {}
    for _ in range(3000):
        item = sequences.item(0, rng)
        found[bytes(item.prompt[TEXT_START:-2])] = item
    assert {text: found[text].codes[0].tolist() for text in expected} == expected
    # Words of another may come between.
    assert found[b"ab cd. ef gh"].codes[0].tolist() == [*range(6), *range(100, 107)]
    assert found[b"ab ef cd."].codes[0].tolist() == [0, 1, 2, *range(100, 103), *range(3, 6)]
    for item in found.values():
        assert item.symbols.tolist() == (item.codes[0] + 1).tolist()
    at = found[b"ab gh"].places[0] - TEXT_START
    assert at[:3] == pytest.approx([0.5, 1.5, 2.25], abs=0.3)
    assert at[3:] == pytest.approx([3 + (0.5 + n) * 2 / 3 for n in range(3)] + [5, 5], abs=0.01)


def test_a_spliced_sequence_is_of_bounded_length():
    long = utterance("ab cd", [[0, 60], [60, 80]], 80)
    sequences, rng = data(long, long, spliced=1.0), np.random.default_rng(0)
    lengths = [sequences.item(0, rng).codes.shape[1] for _ in range(40)]
    assert max(lengths) <= MOST_FRAMES
    assert len(set(lengths)) > 1


def test_the_synthesizers_times_are_those_of_trimmed_speech_at_its_speed():
    # 0.3 s of silence, then symbols of 0.2 s; "ˈ" (156) before 50, "ː" (158) after 51.
    tokens = np.array([0, 156, 50, 51, 158, 16, 52, 0])
    one = Durations(tokens, np.array([12, 8, 8, 8, 8, 8, 8, 4]), np.array([[1, 5], [6, 7]]))
    times, symbols = spoken_times(one, 16)
    # Trimmed speech begins 0.1 s before the first symbol does: 1.25 frames.
    assert times == pytest.approx(np.array([[1.25, 11.25], [13.75, 16]]))
    assert symbols.tolist() == [0, 50, 50, 50, 50, 50, 51, 51, 51, 51, 51, 16, 16, 16, 52, 52]
    faster, _ = spoken_times(one, 8, speed=2.0)
    assert faster == pytest.approx(times / 2)


def test_a_part_of_the_speech_has_all_presets_and_whole_speakers_with_their_other_speeds():
    def said(speaker: str, preset: str | None = None, human: bool = False) -> TokenizedUtterance:
        return replace(utterance("a", None, 2), speaker=speaker, preset=preset, human=human)

    every = [said("p", "ada") for _ in range(4)]
    every += [said(f"t{n}{speed}") for n in range(8) for speed in ("", "-0.9") for _ in range(3)]
    every += [said(f"h{n}{speed}", human=True) for n in range(4) for speed in ("", "-1.1") for _ in range(2)]
    mixed = [every[i] for i in np.random.default_rng(0).permutation(len(every))]
    assert [id(one) for one in part_of_speech(mixed, 1.0, 1.0)] == [id(one) for one in mixed]
    half = part_of_speech(every, 0.5, 1.0)
    assert {one.speaker for one in half if one.human} == {"h0", "h0-1.1", "h2", "h2-1.1"}
    assert len({one.speaker for one in half if not one.human}) == 1 + 4 * 2
    fewer = part_of_speech(every, 1.0, 0.5)
    assert sum(one.preset is not None for one in fewer) == 2
    assert sum(one.speaker.startswith("t3") for one in fewer) == 3
    assert {one.speaker[:2] for one in fewer} == {one.speaker[:2] for one in every}
