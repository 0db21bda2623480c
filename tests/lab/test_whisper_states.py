"""Whisper's states of the lab's utterances, which share windows, against the windows' own targets."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from lab import whisper_states as module
from lab.data import SpeechSet, write_set
from lab.whisper_states import GAP_FRAMES, whisper_states, windows
from revox.training.distill import WhisperTeacher
from training.test_distill import save_whisper

FRAME, RATE = 1920, 24000
# Seconds and texts: windows of 4 s hold 0, 1 and 3; then 4; then 6.
SPEECH = [
    (2.2, "ABC DE"),
    (0.5, "fg"),
    (1.0, None),
    (0.35, "h"),
    (3.5, " ij kl "),
    (4.2, "long"),
    (3.9, "NO"),
]
TOKENS = {0: 7, 1: 3, 3: 2, 4: 6, 6: 3}  # a letter is one, as is a space, and so is the first word's


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    rng = np.random.default_rng(0)
    parts = []
    for seconds, text in SPEECH:
        time = np.arange(round(seconds * RATE)) / RATE
        wave = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 400) * time) * (1 + np.sin(9 * time))
        wave = wave + 0.01 * rng.standard_normal(len(wave))
        entry = {"speaker": "a", "sex": "F", "preset": None, "text": text, "samples": len(wave)}
        parts.append(((wave * 16000).astype(np.int16), [entry]))
    write_set(folder, "human-train", iter(parts))
    return SpeechSet(folder, "train", "human")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return save_whisper(tmp_path_factory.mktemp("whisper"), positions=64)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 4.0)
    monkeypatch.setattr(module, "WINDOWS_A_PART", 1)


def frames_of(i):
    return -(-round(SPEECH[i][0] * RATE) // FRAME)


def test_windows_hold_every_utterance_with_text_once_in_order_and_apart(speech):
    groups = list(windows(speech, FRAME))
    assert [[i for i, _ in group] for group in groups] == [[0, 1, 3], [4], [6]]
    for group in groups:
        assert group[0][1] == 0
        for (i, at), (_, after) in pairwise(group):
            assert after == at + frames_of(i) + GAP_FRAMES
        last, at = group[-1]
        assert (at + frames_of(last)) * FRAME <= 4.0 * RATE


def test_the_targets_of_a_window_are_cut_into_those_of_its_utterances(speech, whisper, tmp_path):
    states = whisper_states(whisper, speech, FRAME, tmp_path, 9)
    assert set(states.hidden) == set(states.alignment) == set(states.encoded) == {0, 1, 3, 4, 6}
    teacher, kept = WhisperTeacher.load(str(whisper)), 0
    for group in windows(speech, FRAME):
        wave = np.zeros(round(4.0 * RATE), np.float32)
        for i, at in group:
            wave[at * FRAME :][: len(speech.waveform(i))] = speech.waveform(i)
        length = group[-1][1] * FRAME + len(speech.waveform(group[-1][0]))
        text = " ".join(SPEECH[i][1].strip().lower() for i, _ in group)
        found = teacher.targets(torch.from_numpy(wave[None, :length]), RATE, torch.tensor([length]), [text])
        first = 0
        for i, at in group:
            own = slice(first, first + TOKENS[i])
            first = own.stop
            alignment = found.alignment[0][own, at : at + frames_of(i)]
            share = alignment.sum(1)
            timed = share > 0.5
            kept += int(timed.sum())
            np.testing.assert_allclose(states.hidden[i], found.hidden[0][own][timed], atol=5e-3)
            expected = (alignment / share[:, None])[timed]
            np.testing.assert_allclose(states.alignment[i], expected, atol=2e-3)
            np.testing.assert_allclose(states.alignment[i].sum(1, dtype=np.float32), 1, atol=5e-3)
            assert states.alignment[i].shape == (len(states.hidden[i]), frames_of(i))
            assert states.encoded[i].shape == (frames_of(i), teacher.width)
        assert first == len(found.hidden[0])
    assert kept >= TOKENS[4] + TOKENS[6]  # those that are alone in their window


def test_the_encoders_states_are_the_mean_of_four_positions_a_frame(speech, whisper, tmp_path):
    states = whisper_states(whisper, speech, FRAME, tmp_path, 9)
    teacher = WhisperTeacher.load(str(whisper))
    wave = torch.from_numpy(speech.waveform(4))[None]
    features = teacher._mels(wave, RATE, [wave.shape[1]])
    with torch.no_grad():
        encoded = teacher.encoder(features).last_hidden_state[0]
    expected = encoded.reshape(-1, 4, teacher.width).mean(1)[: frames_of(4)]
    np.testing.assert_allclose(states.encoded[4], expected, atol=5e-3)


def test_a_resumed_run_computes_only_the_parts_that_are_missing(speech, whisper, tmp_path, monkeypatch):
    first = whisper_states(whisper, speech, FRAME, tmp_path, 2)
    assert set(first.hidden) == {0, 1, 3, 4}
    computed = []
    of_window = module._of_window

    def noted(teacher, speech, group, per_frame):
        computed.append([i for i, _ in group])
        return of_window(teacher, speech, group, per_frame)

    monkeypatch.setattr(module, "_of_window", noted)
    second = whisper_states(whisper, speech, FRAME, tmp_path, 9)
    assert computed == [[6]]
    for i in first.hidden:
        np.testing.assert_array_equal(first.hidden[i], second.hidden[i])
        np.testing.assert_array_equal(first.encoded[i], second.encoded[i])
    (path,) = tmp_path.glob("00001*")
    path.write_bytes(path.read_bytes()[:-9])  # damaged
    whisper_states(whisper, speech, FRAME, tmp_path, 9)
    assert computed == [[6], [4]]
    monkeypatch.setattr(WhisperTeacher, "load", lambda folder: pytest.fail("all of it is kept"))
    whisper_states(whisper, speech, FRAME, tmp_path, 9)


def test_another_whisper_computes_its_own(speech, whisper, tmp_path):
    whisper_states(whisper, speech, FRAME, tmp_path / "states", 1)
    (tmp_path / "other").mkdir()
    other = save_whisper(tmp_path / "other", positions=64, seed=1)
    found, fresh = (whisper_states(other, speech, FRAME, tmp_path / n, 1) for n in ("states", "fresh"))
    np.testing.assert_array_equal(found.encoded[0], fresh.encoded[0])


def test_a_batch_is_the_targets_of_its_utterances(speech, whisper, tmp_path):
    states = whisper_states(whisper, speech, FRAME, tmp_path, 9)
    batch = states.batch([4, 6])
    for i, hidden, alignment in zip((4, 6), batch.hidden, batch.alignment, strict=True):
        assert hidden.dtype == alignment.dtype == torch.float32
        np.testing.assert_array_equal(hidden, states.hidden[i])
        np.testing.assert_array_equal(alignment, states.alignment[i])
