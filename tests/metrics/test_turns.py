from pathlib import Path

import numpy as np
import pytest

from revox.metrics.speaker import SpeakerVerifier
from revox.metrics.turns import _quietest, find_turns, voice_changes
from revox.speech import read_audio
from revox.speech.activity import speech_activity

EXAMPLES = Path(__file__).parents[2] / "src" / "revox" / "demo" / "examples"
A, B = "2159-179154-0000.flac", "4680-16026-0000.flac"


@pytest.fixture(scope="module")
def verifier():
    return SpeakerVerifier()


def clip(name, start=0.0, end=None):
    audio = read_audio(EXAMPLES / name, 16000)
    return audio.samples[round(start * 16000) : None if end is None else round(end * 16000)]


def turns_of(verifier, *sounds):
    sources = []
    for samples in sounds:
        frames = verifier.frames(samples)
        sources.append((frames, speech_activity(samples, 16000).active[: len(frames.power)]))
    return find_turns(verifier, sources)


def test_two_people_are_two_speakers_and_each_second_is_its_owners(verifier):
    first, second = clip(A), clip(B)
    turns, voices = turns_of(verifier, np.concatenate([first, second]))
    change = len(first) / 160
    assert len(voices) == 2
    assert {turn.speaker for turn in turns if turn.last <= change} == {turns[0].speaker}
    assert {turn.speaker for turn in turns if turn.first >= change} == {1 - turns[0].speaker}
    assert all(turn.last <= change + 5 or turn.first >= change - 5 for turn in turns)


def test_one_person_in_two_recordings_at_two_levels_is_one_speaker(verifier):
    turns, voices = turns_of(verifier, clip(A), 0.01 * clip(A, 1.0))
    assert len(voices) == 1
    assert {turn.source for turn in turns} == {0, 1}


def test_a_change_of_voice_without_a_pause_ends_a_turn(verifier):
    def loud(name):  # the longest stretch without a pause
        samples = clip(name)
        frames = verifier.frames(samples)
        turns, _ = find_turns(
            verifier, [(frames, speech_activity(samples, 16000).active[: len(frames.power)])]
        )
        longest = max(turns, key=lambda turn: turn.seconds)
        return samples[longest.first * 160 : longest.last * 160]

    first, second = loud(A), loud(B)
    joined = np.concatenate([first, second])
    frames = verifier.frames(joined)
    turns, _ = find_turns(verifier, [(frames, np.ones(len(frames.power), dtype=bool))])
    assert min(abs(turn.last - len(first) / 160) for turn in turns[:-1]) <= 50


def test_the_voice_changes_most_at_the_pause_between_two_people(verifier):
    first = clip(A)
    turns, _ = turns_of(verifier, np.concatenate([first, clip(B)]))
    changes = voice_changes(turns)
    assert len(changes) == len(turns) - 1
    at = int(changes.argmin())
    assert turns[at].last <= len(first) / 160 + 5
    assert turns[at + 1].first >= len(first) / 160 - 5
    assert changes[at] < 0.8


def test_silence_has_no_turns(verifier):
    frames = verifier.frames(np.zeros(32000, np.float32))
    turns, voices = find_turns(verifier, [(frames, np.zeros(200, dtype=bool))])
    assert turns == []
    assert voices.shape == (0, 256)


def test_a_cut_is_at_the_quietest_place_and_not_at_an_edge_of_the_window():
    power = np.ones(30)
    power[12:17] = 0.8
    assert _quietest(power) == 14
    assert [_quietest(np.ones(n)) for n in (1, 4)] == [0, 2]
