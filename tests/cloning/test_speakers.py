from pathlib import Path

import numpy as np
import pytest

from revox.cloning.clone import select_speech
from revox.cloning.speakers import several_speakers
from revox.metrics.speaker import SpeakerVerifier
from revox.speech import Audio, loudness, normalize_loudness, read_audio

EXAMPLES = Path(__file__).parents[2] / "src" / "revox" / "demo" / "examples"
MAN, WOMAN, OTHER_WOMAN = "2159-179154-0000.flac", "4680-16026-0000.flac", "5867-48852-0000.flac"
RATE = 16000


def clip(name, seconds=None):
    samples = read_audio(EXAMPLES / name, RATE).samples
    return samples if seconds is None else samples[: round(seconds * RATE)]


@pytest.mark.parametrize("other", [MAN, OTHER_WOMAN])
def test_of_two_people_the_one_who_speaks_most_is_taken_and_a_warning_says_so(other):
    small, large = clip(other, 6), clip(WOMAN)
    selection = select_speech(Audio(np.concatenate([small, large]), RATE), 24000).selection
    assert selection.start > len(small) / RATE - 0.2
    assert selection.seconds > 8
    assert any("2 people seem to speak" in warning for warning in selection.warnings)


def test_one_who_is_interrupted_is_taken_from_one_side_of_the_interruption():
    before, other, after = clip(WOMAN, 9), clip(MAN, 5), clip(WOMAN)[9 * RATE :]
    selection = select_speech(Audio(np.concatenate([before, other, after]), RATE), 24000).selection
    assert selection.end < 9.2
    assert SpeakerVerifier().similarity(selection.audio, Audio(before, RATE)) > 0.9


def test_with_a_transcript_all_is_used_and_the_second_speaker_told():
    both = np.concatenate([clip(MAN, 6), clip(WOMAN, 8)])
    selection = select_speech(Audio(both, RATE), 24000, transcript="what they say").selection
    assert selection.seconds > 12
    assert any("all of them are used" in warning for warning in selection.warnings)


@pytest.mark.parametrize("name", [path.name for path in sorted(EXAMPLES.glob("*.flac"))])
def test_one_person_is_one_person(name):
    assert several_speakers(Audio(clip(name), RATE)) is None


def test_without_the_model_nobody_is_told_apart(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "resemblyzer", None)
    both = np.concatenate([clip(MAN, 6), clip(WOMAN, 8)])
    assert several_speakers(Audio(both, RATE)) is None


@pytest.mark.parametrize("factor", [-1.0, -0.85])
def test_of_inverted_stereo_one_channel_is_cloned_and_a_warning_says_so(factor):
    x = clip(WOMAN)
    selection = select_speech(Audio(np.stack([x, factor * x]), RATE), RATE).selection
    alone = select_speech(Audio(x, RATE), RATE).selection
    np.testing.assert_array_equal(selection.samples, alone.samples)
    assert any("cancel each other" in warning for warning in selection.warnings)
    assert not any("cancel each other" in warning for warning in alone.warnings)


def test_a_clip_at_minus_60_db_is_raised_and_gives_the_same_stretch():
    x = clip(WOMAN) / np.abs(clip(WOMAN)).max()
    quiet = np.round(x * 1e-3 * 32768) / 32768  # as 16 bits hold it
    selection = select_speech(Audio(quiet, RATE), 24000).selection
    usual = select_speech(Audio(x, RATE), 24000).selection
    assert selection.start == pytest.approx(usual.start, abs=0.2)
    assert selection.end == pytest.approx(usual.end, abs=0.2)
    assert selection.gain_db == pytest.approx(54, abs=0.5)
    assert loudness(normalize_loudness(selection.samples, 24000), 24000) == pytest.approx(-23, abs=0.1)
    assert any("very quiet (-8" in warning for warning in selection.warnings)
