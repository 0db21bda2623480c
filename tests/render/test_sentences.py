from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from revox.render.captions import Cue, chapters_json, subtitles
from revox.render.sentences import sentence_times, sentences_of
from revox.speech.write import Chapter
from revox.synthesis.longform import SpeechSettings
from revox.synthesis.split import expected_seconds

RATE = 24000
TEXT = ["It is ten to five in the afternoon.", "No.", "The bus to the town is late, as it was before."]


def spoken(parts: list[tuple[float, float]], seed: int = 0) -> np.ndarray:
    """Noise and silence, in turn, of these seconds."""
    chance = np.random.default_rng(seed)
    pieces = []
    for sound, silence in parts:
        pieces += [0.1 * chance.standard_normal(int(sound * RATE)), np.zeros(int(silence * RATE))]
    return np.concatenate(pieces).astype(np.float32)


def test_sentences_end_where_the_pauses_are():
    # Read a third faster than usual, with a breath in the middle of the last sentence.
    first, second, third = (0.67 * expected_seconds(text) for text in TEXT)
    samples = np.concatenate(
        (np.zeros(RATE // 5), spoken([(first, 0.3), (second, 0.25), (0.5 * third, 0.15), (0.5 * third, 0.4)]))
    )
    times = sentence_times(TEXT, samples.astype(np.float32), RATE)
    starts = np.cumsum([0.2, first + 0.3, second + 0.25])
    assert [one.text for one in times] == TEXT
    assert [one.start for one in times] == pytest.approx(starts, abs=0.03)
    assert [one.end for one in times] == pytest.approx(
        [0.2 + first, starts[1] + second, starts[2] + third + 0.15], abs=0.03
    )


def test_without_pauses_the_time_is_shared_out_by_length():
    lengths = [expected_seconds(text) for text in TEXT]
    times = sentence_times(TEXT, spoken([(sum(lengths), 0)]), RATE)
    assert [one.end for one in times] == pytest.approx(np.cumsum(lengths), abs=0.05)
    assert all(one.end == other.start for one, other in pairwise(times))


@pytest.mark.parametrize(
    "samples", [np.zeros(0, np.float32), np.zeros(RATE, np.float32), np.ones(7, np.float32)]
)
def test_a_sound_of_nothing_still_gives_times_inside_it_and_in_order(samples):
    times = sentence_times(TEXT, samples, RATE)
    flat = [moment for one in times for moment in (one.start, one.end)]
    assert flat == sorted(flat)
    assert flat[0] >= 0
    assert flat[-1] <= len(samples) / RATE


def test_speech_of_signs_alone_has_no_sentence():
    assert sentence_times([], np.ones(100, np.float32), 24_000) == []


def test_captions_show_the_text_as_written_without_markup():
    settings = SpeechSettings(lexicon={"sql": "sequel"})
    found = sentences_of("**SQL** is old. Dr. Fox [pause:1s] left!\n\n- one\n- two", settings)
    assert found == ["SQL is old.", "Dr. Fox", "left!", "one.", "two."]


def test_subtitle_files_have_the_form_that_players_read():
    cues = [Cue(0.0, 1.5, "Ada & Bob", "1 < 2 --> yes"), Cue(3599.9996, 3661.25, "Eve", "Late.")]
    assert subtitles(cues, ".vtt", True) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\n<v Ada &amp; Bob>1 &lt; 2 --&gt; yes\n\n"
        "01:00:00.000 --> 01:01:01.250\n<v Eve>Late.\n"
    )
    assert subtitles(cues, ".srt", True) == (
        "1\n00:00:00,000 --> 00:00:01,500\nAda & Bob: 1 < 2 --> yes\n\n"
        "2\n01:00:00,000 --> 01:01:01,250\nEve: Late.\n"
    )
    assert "<v" not in subtitles(cues, ".vtt", False)
    assert '"startTime": 3.25' in chapters_json([Chapter(3.25, 9.0, "One")], None)
