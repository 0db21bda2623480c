"""Long texts, by takes that are made up: random codes, a hum for samples, faults where a test wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from revox.model.config import CodecConfig
from revox.synthesis.errors import SpeakError
from revox.synthesis.longform import LongSpeech, SpeechSettings, Take, pieces_of
from revox.synthesis.split import TextPiece, expected_seconds
from revox.synthesis.takes import TakeFault

CODEC = CodecConfig()
FRAME = CODEC.samples_per_frame
SENTENCE = "The rain had stopped, and the street was dry again. "


@dataclass
class Made:
    """What a take says: semantic codes, samples, and whether it ends by itself."""

    codes: np.ndarray
    samples: np.ndarray
    ends: bool = True


def good(take: Take, seconds: float | None = None) -> Made:
    chance = np.random.default_rng(abs(hash((take.text, take.seed))))
    frames = round((seconds or expected_seconds(take.text)) * CODEC.frame_rate)
    hum = 0.2 * np.sin(np.arange(frames * FRAME) / 30).astype(np.float32)
    return Made(chance.integers(0, 8192, frames), hum)


def too_short(take: Take) -> Made:
    return good(take, max(0.1, 0.3 * expected_seconds(take.text)))


def endless(take: Take) -> Made:
    made = good(take, 200)
    made.ends = False
    return made


def with_silence(take: Take) -> Made:
    made = good(take, expected_seconds(take.text) + 1.8)
    middle = len(made.codes) // 2
    made.samples[middle * FRAME : (middle + 22) * FRAME] *= 1e-3
    return made


def looping(take: Take, period: int = 9) -> Made:
    made = good(take, expected_seconds(take.text) + 2.5)
    chance = np.random.default_rng(5)
    for i in range(period + 3, min(period + 40, len(made.codes))):  # with one code in ten that differs
        if chance.random() > 0.1:
            made.codes[i] = made.codes[i - period]
    return made


FAULTS: list[tuple[Callable[[Take], Made], TakeFault]] = [
    (too_short, TakeFault.ENDED_EARLY),
    (endless, TakeFault.NEVER_ENDED),
    (with_silence, TakeFault.SILENCE),
    (looping, TakeFault.LOOP),
]


def run(
    speech: LongSpeech, says: Callable[[Take], Made] = good, chunk: int = 25, started: list | None = None
) -> Iterator[np.ndarray]:
    """Run a speech's takes in turn, `chunk` frames at a time, as an engine does."""
    running: dict[Take, tuple[Made, int]] = {}
    while True:
        samples = speech.samples()
        if len(samples):
            yield samples
        if speech.done:
            return
        for take in speech.next_takes():
            running[take] = (says(take), 0)
            if started is not None:
                started.append(take)
        for take, (made, at) in list(running.items()):
            limit = take.max_frames or 2048
            stop = min(at + chunk, len(made.codes), limit)
            ended, truncated = made.ends and stop == len(made.codes), stop == limit
            samples = made.samples[at * FRAME : stop * FRAME]
            speech.push(take, made.codes[at:stop], samples, ended=ended, truncated=truncated and not ended)
            running[take] = (made, stop)
            if take.stopped or ended or truncated:
                del running[take]


def spoken(text, says=good, streaming=False, max_frames=None, started=None, **options):
    settings = SpeechSettings(**options)
    speech = LongSpeech(
        pieces_of(text, settings), settings, CODEC, max_frames=max_frames, streaming=streaming, together=2
    )
    return speech, list(run(speech, says, started=started))


def test_a_short_text_is_one_take_whose_samples_are_given_as_they_are():
    started: list[Take] = []
    speech, parts = spoken("Good morning.", started=started)
    [take] = started
    assert (take.text, take.seed, take.cfg) == ("Good morning.", 0, 1.2)
    np.testing.assert_array_equal(np.concatenate(parts), good(take).samples)
    assert speech.frames * FRAME == sum(map(len, parts))
    assert not speech.truncated
    assert speech.warnings == []


def test_pieces_are_joined_in_order_with_silence_and_without_steps_between_samples():
    started: list[Take] = []
    speech, parts = spoken(SENTENCE * 20, max_chars=120, started=started)
    samples = np.concatenate(parts)
    assert len(started) == len({id(take) for take in started}) > 5
    assert "".join(take.text + " " for take in started) == SENTENCE * 20
    pauses = (len(started) - 1) * round(0.25 * CODEC.sampling_rate)
    assert len(samples) == speech.frames * FRAME + pauses
    inner = samples[100:-100]  # the hum itself takes steps of 0.007
    assert np.abs(np.diff(inner)).max() < 0.01


@pytest.mark.parametrize("chunk", [3, 50, 1000])
def test_a_stream_laid_end_to_end_is_the_whole_and_starts_with_the_first_piece(chunk):
    text = SENTENCE * 12
    _, whole = spoken(text)
    settings = SpeechSettings()
    speech = LongSpeech(pieces_of(text, settings), settings, CODEC, streaming=True, together=2)
    parts = list(run(speech, chunk=chunk))
    assert len(parts[0]) <= min(chunk, 400) * FRAME
    np.testing.assert_allclose(np.concatenate(parts), np.concatenate(whole), atol=1e-6)


def test_pauses_in_a_row_are_silence_and_no_takes():
    started: list[Take] = []
    text = "[pause:1s] [pause:1s] Good morning. [pause:1s] [pause:2s] See you. [pause:1s]"
    for streaming in (False, True):
        speech, parts = spoken(text, streaming=streaming, started=started)
        assert sum(map(len, parts)) == speech.frames * FRAME + 6 * CODEC.sampling_rate
    assert [take.text for take in started] == 2 * ["Good morning.", "See you."]


def test_pieces_of_another_level_are_brought_to_the_first_ones():
    def uneven(take):
        made = good(take)
        made.samples *= {0: 1.0, 1: 0.5, 2: 1.2}[len(take.text) % 3]
        return made

    for streaming in (False, True):
        speech, parts = spoken(
            "a" * 99 + ". " + "b" * 100 + ". " + "c" * 101 + ".", uneven, streaming, max_chars=102
        )
        samples = np.concatenate(parts)
        blocks = samples[: len(samples) // 4800 * 4800].reshape(-1, 4800)
        levels = 20 * np.log10(np.sqrt((blocks**2).mean(1)) + 1e-9)
        loud = levels[levels > -30]
        assert loud.max() - loud.min() < 4  # 10 dB before, and blocks at ends hold some silence
        assert speech.warnings == []


@pytest.mark.parametrize(("says", "fault"), FAULTS)
def test_a_bad_take_is_spoken_again_with_other_noise_and_the_good_one_is_heard(says, fault):
    started: list[Take] = []
    speech, parts = spoken(
        SENTENCE, lambda take: says(take) if take.seed == 7 else good(take), started=started, seed=7
    )
    assert [take.seed == 7 for take in started] == [True, False]
    np.testing.assert_array_equal(np.concatenate(parts), good(started[1]).samples)
    assert speech.warnings == []
    assert not speech.truncated


@pytest.mark.parametrize(("says", "fault"), FAULTS)
def test_what_no_take_says_well_is_reported_with_its_fault(says, fault):
    started: list[Take] = []
    speech, parts = spoken(SENTENCE, says, started=started)
    warning = speech.warnings[0]
    assert warning.fault == fault
    assert warning.piece == 1
    assert "its text takes about" in str(warning)
    assert speech.truncated == (fault == TakeFault.NEVER_ENDED)
    assert sum(map(len, parts)) > 0


def test_the_third_take_is_of_the_two_halves_of_a_piece():
    started: list[Take] = []
    speech, _ = spoken(
        SENTENCE, lambda take: (too_short if take.text == SENTENCE.strip() else good)(take), started=started
    )
    assert [take.text for take in started[2:]] == ["The rain had stopped,", "and the street was dry again."]
    assert speech.warnings == []


def test_with_one_take_nothing_is_asked_of_the_model_and_faults_are_reported_all_the_same():
    started: list[Take] = []
    speech, parts = spoken(SENTENCE, too_short, started=started, takes=1)
    [take] = started
    assert (take.min_frames, take.max_frames) == (0, None)
    assert [warning.fault for warning in speech.warnings] == [TakeFault.ENDED_EARLY]
    np.testing.assert_array_equal(np.concatenate(parts), too_short(take).samples)


def test_with_more_takes_the_end_is_not_allowed_before_its_text_can_be_over():
    started: list[Take] = []
    spoken(SENTENCE, started=started)
    expected = expected_seconds(SENTENCE) * CODEC.frame_rate
    assert 0.1 * expected < started[0].min_frames < 0.5 * expected
    assert 2 * expected < started[0].max_frames < 6 * expected


def test_in_a_stream_a_fault_after_the_first_chunk_is_reported_and_not_spoken_again():
    started: list[Take] = []
    speech, _ = spoken(SENTENCE, with_silence, streaming=True, started=started)
    assert len(started) == 1
    assert [warning.fault for warning in speech.warnings] == [TakeFault.SILENCE]


def test_in_a_stream_a_later_piece_is_spoken_again_before_it_is_its_turn():
    bad = []

    def says(take):
        if len(bad) < 1 and take.text.startswith("b"):
            bad.append(take)
            return too_short(take)
        return good(take)

    started: list[Take] = []
    speech, _ = spoken("a" * 99 + ". " + "b" * 100 + ".", says, True, started=started, max_chars=102)
    assert [take.text[0] for take in started] == ["a", "b", "b"]
    assert speech.warnings == []


def test_a_limit_cuts_the_whole_with_a_fade_and_says_so():
    for streaming in (False, True):
        speech, parts = spoken(SENTENCE * 12, streaming=streaming, max_frames=150)
        samples = np.concatenate(parts)
        assert len(samples) == 150 * FRAME
        assert speech.truncated
        assert speech.warnings == []
        assert np.abs(samples[-24:]).max() < 0.01
        assert np.abs(samples[-2400:-480]).max() > 0.1


def test_a_repeated_word_is_not_a_loop():
    speech, _ = spoken("ten, ten, ten, ten, ten and ten again", looping)
    assert speech.warnings == []


def test_only_as_many_pieces_as_are_spoken_together_are_in_memory():
    settings = SpeechSettings(max_chars=60)
    speech = LongSpeech(pieces_of(SENTENCE * 200, settings), settings, CODEC, together=2)
    alive = []
    for _ in run(speech):
        alive.append(sum(slot.take is not None for slot in speech._slots))
    assert max(alive) <= 2


def test_pieces_of_silence_only_are_spoken_as_silence():
    pieces = [TextPiece("", 0.5), TextPiece("ten", 0.25), TextPiece("", 1.0)]
    speech = LongSpeech(pieces, SpeechSettings(), CODEC)
    samples = np.concatenate(list(run(speech)))
    seconds = (len(samples) - speech.frames * FRAME) / CODEC.sampling_rate
    assert seconds == pytest.approx(1.75)


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_text_is_refused(text):
    with pytest.raises(SpeakError, match="at least one word"):
        pieces_of(text, SpeechSettings())


def test_settings_out_of_range_are_refused():
    with pytest.raises(SpeakError, match="1 to 10"):
        SpeechSettings(takes=0)
