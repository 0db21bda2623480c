"""The semantic codes: Whisper's states of utterances that share windows, the network, and its codebook."""

import shutil
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lab import semantic as module
from lab.data import LabUtterance, SpeechSet, write_set
from lab.frames import PATCH_BANDS, FrameSet
from lab.semantic import (
    GAP_FRAMES,
    SILENT,
    SPACE,
    SemanticData,
    SemanticTraining,
    WhisperStates,
    semantic_codes,
    train_semantic,
    whisper_states,
    windows,
)
from revox.speech.files import save_stamped, stamp_of
from revox.training.distill import WhisperTeacher
from training.test_distill import save_whisper

FRAME, RATE = 1920, 24000
SECONDS = (2.2, 0.5, 1.0, 0.35, 3.5, 4.2, 3.9)  # windows of 4 s hold 0 and 1; 2 and 3; and one each
SETTINGS = SemanticTraining(epochs=30, batch=64, width=32, rounds=30, dropout=0.0, learning_rate=3e-3)


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    rng = np.random.default_rng(0)
    parts = []
    for seconds in SECONDS:
        time = np.arange(round(seconds * RATE)) / RATE
        wave = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 400) * time) * (1 + np.sin(9 * time))
        wave = wave + 0.01 * rng.standard_normal(len(wave))
        entry = {"speaker": "a", "sex": "F", "preset": None, "text": None, "samples": len(wave)}
        parts.append(((wave * 16000).astype(np.int16), [entry]))
    write_set(folder, "human-train", iter(parts))
    return SpeechSet(folder, "train", "human")


@pytest.fixture(scope="module")
def frames(speech):
    count = sum(-(-u.samples // FRAME) for u in speech.utterances)
    return FrameSet(speech, np.zeros((count, 1), np.float16), FRAME)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return save_whisper(tmp_path_factory.mktemp("whisper"), positions=1500)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 4.0)


def test_windows_hold_every_utterance_once_in_order_and_apart(speech):
    groups = windows(speech, FRAME)
    assert [[i for i, *_ in group] for group in groups] == [[0, 1], [2, 3], [4], [5], [6]]
    for group in groups:
        assert group[0][1] == 0
        for (_, at, frames), (_, after, _) in pairwise(group):
            assert after == at + frames + GAP_FRAMES
        for i, _, frames in group:
            assert frames == -(-round(SECONDS[i] * RATE) // FRAME)


def test_states_are_whispers_in_each_half_of_a_frame(speech, frames, whisper, tmp_path):
    states = whisper_states(whisper, speech, frames, tmp_path / "w.npy")
    teacher = WhisperTeacher.load(str(whisper))
    for i in (2, 4):  # the first in their windows
        wave = speech.waveform(i)
        if i == 2:  # utterance 3 is in the same window
            start = (-(-len(wave) // FRAME) + GAP_FRAMES) * FRAME
            wave = np.concatenate((wave, np.zeros(start - len(wave), np.float32), speech.waveform(3)))
        samples = -(-len(wave) // FRAME) * FRAME
        wave = np.pad(wave, (0, samples - len(wave)))
        found = teacher.encode(torch.from_numpy(wave)[None], RATE, torch.tensor([samples]))[0]
        expected = found.reshape(750, 2, teacher.width).mean(1)  # 25 halves of a frame a second
        mine = states.states[states.starts[i] : states.ends[i]].reshape(-1, teacher.width)
        np.testing.assert_allclose(mine, expected[: len(mine)], atol=5e-3)
    before, now, after = (states.around(np.arange(len(states))).numpy().reshape(len(states), 3, -1)[:, k]
                          for k in (1, 0, 2))  # fmt: skip
    for a, b in zip(states.starts, states.ends, strict=True):
        np.testing.assert_array_equal(before[a], now[a])
        np.testing.assert_array_equal(before[a + 1 : b], now[a : b - 1])
        np.testing.assert_array_equal(after[a : b - 1], now[a + 1 : b])
        np.testing.assert_array_equal(after[b - 1], now[b - 1])


def test_what_exceeds_a_window_has_the_last_state_that_was_heard(speech, frames, whisper, tmp_path):
    states = whisper_states(whisper, speech, frames, tmp_path / "w.npy")
    rows = states.states[states.starts[5] : states.ends[5]].reshape(-1, states.states.shape[1] // 2)
    assert np.isfinite(rows.astype(np.float32)).all()
    assert len(rows) == 2 * -(-round(4.2 * RATE) // FRAME)


def test_states_are_computed_once(speech, frames, whisper, tmp_path, monkeypatch):
    first = whisper_states(whisper, speech, frames, tmp_path / "w.npy")
    monkeypatch.setattr(WhisperTeacher, "load", lambda folder: pytest.fail("they are cached"))
    second = whisper_states(whisper, speech, frames, tmp_path / "w.npy")
    np.testing.assert_array_equal(first.states, second.states)
    with pytest.raises(pytest.fail.Exception):
        whisper_states(whisper.parent, speech, frames, tmp_path / "w.npy")  # another's


def test_states_are_of_the_weights_and_not_of_the_folders_name(
    speech, frames, whisper, tmp_path, monkeypatch
):
    path, other = tmp_path / "w.npy", tmp_path / whisper.name
    first = whisper_states(whisper, speech, frames, path)
    monkeypatch.setattr(WhisperTeacher, "load", lambda folder: pytest.fail("they are cached"))
    shutil.copytree(whisper, other)
    np.testing.assert_array_equal(whisper_states(other, speech, frames, path).states, first.states)
    weights = next(other.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    with pytest.raises(pytest.fail.Exception):
        whisper_states(other, speech, frames, path)
    by_name = stamp_of(speech.identity, len(first.states), whisper.name, module.HALVES)
    save_stamped(path.with_suffix(".done"), by_name, b"done")  # as they were stamped before
    assert len(whisper_states(whisper, speech, frames, path).states) == len(first.states)


def phones(seed: int, lengths=(40, 60, 50), shift=0.0) -> SemanticData:
    """Utterances of 12 phonemes, of which states hold a noisy picture and spectra another, with a constant of
    the utterance's own."""
    pictures = np.random.default_rng(7).standard_normal((12, 10))
    looks = np.random.default_rng(8).standard_normal((12, 8 * PATCH_BANDS)) * 0.3
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    symbols = rng.integers(0, 12, (total, 2))
    states = np.concatenate([pictures[symbols[:, k]] for k in (0, 1)], axis=1)
    states = states + 0.2 * rng.standard_normal(states.shape) + shift
    features = looks[symbols[:, 0]]
    speech = SimpleNamespace(utterances=[LabUtterance("s", "F", None, "x", 0, n * FRAME) for n in lengths])
    frames = FrameSet(speech, np.zeros((total, 1)), FRAME)
    for a, b in zip(frames.starts, frames.ends, strict=True):
        features[a:b] += rng.standard_normal()
    frames.features = features.astype(np.float16)
    found = {
        i: (symbols[a:b] + 50).ravel().astype(np.int16)
        for i, (a, b) in enumerate(zip(frames.starts, frames.ends, strict=True))
    }
    return SemanticData(WhisperStates(states.astype(np.float16), frames), frames, found)


def test_goals_are_phonemes_with_one_silence_and_spectra_without_the_utterances_mean():
    data = phones(0)
    data.symbols[1][:4] = (SILENT[0], SILENT[1], SPACE, 60)
    del data.symbols[2]
    symbols, spectra = data.goals(8 * PATCH_BANDS)
    assert symbols[40:42].tolist() == [[SPACE, SPACE], [SPACE, 60]]
    assert symbols[0].tolist() == data.symbols[0][:2].tolist()
    assert not symbols[100:].any()
    bands = spectra.float().reshape(-1, 8, PATCH_BANDS)
    for a, b in ((0, 40), (40, 100), (100, 150)):
        torch.testing.assert_close(bands[a:b].mean((0, 1)), torch.zeros(PATCH_BANDS), atol=2e-3, rtol=0)


def test_codes_tell_the_phonemes_of_speech_that_the_network_has_not_heard():
    data = [phones(0, (300, 400)), phones(1, (200,))]
    network = train_semantic(data, [[one.states for one in data]], (8 * PATCH_BANDS, 12, 200), SETTINGS)
    unheard = phones(2)
    codes = semantic_codes(network, unheard.states)
    assert codes.dtype == np.int16
    assert len(set(codes.tolist())) > 60
    logits = network.phonemes(network.rows[torch.from_numpy(codes.astype(np.int64))])
    told = logits.unflatten(-1, (2, -1)).argmax(-1)
    symbols, _ = unheard.goals(8 * PATCH_BANDS)
    assert float((told == symbols).float().mean()) > 0.8  # 0.08 by chance
    same = train_semantic(data, [[one.states for one in data]], (8 * PATCH_BANDS, 12, 200), SETTINGS)
    assert np.array_equal(semantic_codes(same, unheard.states), codes)


def test_the_codebook_is_where_k_means_comes_to_rest():
    data = [phones(0, (300, 400))]
    network = train_semantic(
        data, [[data[0].states]], (8 * PATCH_BANDS, 6, 20), replace(SETTINGS, epochs=1, rounds=200)
    )
    latents = torch.cat([network(part) for part in data[0].states.parts()])
    codes = torch.from_numpy(semantic_codes(network, data[0].states).astype(np.int64))
    distances = torch.stack([(latents - row).square().sum(-1) for row in network.rows], dim=-1)
    torch.testing.assert_close(distances.gather(1, codes[:, None])[:, 0], distances.min(-1).values)
    torch.testing.assert_close(network.distance, distances.min(-1).values.mean(), rtol=1e-3, atol=0)
    for code, row in enumerate(network.rows):
        torch.testing.assert_close(row, latents[codes == code].mean(0), atol=1e-3, rtol=0)
