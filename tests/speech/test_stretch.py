from __future__ import annotations

import numpy as np
import pytest

from revox.speech.stretch import TimeStretch

RATE = 24_000


def _sine(seconds, hertz=220.0):
    return np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE).astype(np.float32)


def _stretched(samples, speed, piece):
    filter_ = TimeStretch(RATE, speed)
    pieces = [filter_.push(samples[i : i + piece]) for i in range(0, len(samples), piece)]
    return np.concatenate([*pieces, filter_.finish()])


def _peak(samples):
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return np.argmax(spectrum) * RATE / len(samples)


@pytest.mark.parametrize("speed", [0.25, 0.4, 0.5, 0.8, 1.3, 2.0, 2.5, 4.0])
def test_the_length_changes_by_the_speed_and_the_pitch_does_not(speed):
    out = _stretched(_sine(4), speed, 9600)
    assert len(out) / RATE == pytest.approx(4 / speed, rel=0.02, abs=0.05)
    assert _peak(out) == pytest.approx(220, rel=0.02)
    assert np.sqrt(np.mean(out**2)) == pytest.approx(np.sqrt(0.5), rel=0.1)


def test_pieces_of_any_size_give_the_same_as_the_whole():
    samples = np.random.default_rng(0).normal(0, 0.1, 3 * RATE).astype(np.float32)
    whole = _stretched(samples, 1.5, len(samples))
    for piece in (9600, 1234):
        assert np.array_equal(_stretched(samples, 1.5, piece), whole)


def test_speed_one_is_the_identity_at_once():
    samples = _sine(0.1)
    filter_ = TimeStretch(RATE, 1.0)
    assert filter_.push(samples) is samples
    assert filter_.finish().size == 0


def test_nothing_in_is_nothing_out():
    filter_ = TimeStretch(RATE, 2.0)
    assert filter_.push(np.zeros(0, np.float32)).size == 0
    assert filter_.finish().size == 0


@pytest.mark.parametrize("speed", [0.25, 2.0, 4.0])
def test_a_single_frame_of_speech_comes_through(speed):
    out = _stretched(_sine(0.08), speed, 1920)
    assert out.size > 0
