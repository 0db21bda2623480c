from __future__ import annotations

import numpy as np
import pytest

from revox.render.music import MusicBed, duck_gain, mixed
from revox.render.script import Music
from revox.speech import Audio, loudness, true_peak, write_audio

RATE = 24000
SPANS = [(2 * RATE, 3 * RATE), (3 * RATE + 1200, 4 * RATE), (8 * RATE, 9 * RATE)]


def in_db(gain: np.ndarray) -> np.ndarray:
    return 20 * np.log10(gain)


def test_the_envelope_is_down_where_somebody_speaks_and_has_no_step():
    music = Music(file="x", duck=12, attack=0.5, release=1.5)
    gain = in_db(duck_gain(0, 10 * RATE, SPANS, RATE, music))
    for first, last in SPANS:
        np.testing.assert_allclose(gain[first:last], -12)
    assert gain[RATE] == 0
    assert gain[2 * RATE - RATE // 4] == pytest.approx(-6, abs=1e-3)  # half way down
    assert gain[4 * RATE + int(0.75 * RATE)] == pytest.approx(-6, abs=1e-3)  # half way up again
    assert gain[6 * RATE] == 0
    assert gain[3 * RATE + 600] < -11  # a short gap does not pump
    steepest = 12 / (0.5 * RATE)
    assert np.abs(np.diff(gain)).max() <= steepest * 1.001


def test_the_envelope_does_not_depend_on_the_blocks_it_is_asked_in():
    music = Music(file="x")
    whole = duck_gain(0, 10 * RATE, SPANS, RATE, music)
    parts = [duck_gain(start, 1000, SPANS, RATE, music) for start in range(0, 10 * RATE, 1000)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.fixture
def bed_file(tmp_path):
    wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE)
    write_audio(tmp_path / "bed.wav", Audio(wave.astype(np.float32), RATE))
    return str(tmp_path / "bed.wav")


def test_music_repeats_at_its_loudness_fades_at_both_ends_and_goes_down_under_speech(bed_file):
    music = Music(file=bed_file, loudness=-30, duck=20, fade=0.5)
    bed = MusicBed.of(music, RATE, -1.5)
    silence = [Audio(np.zeros(RATE, np.float32), RATE) for _ in range(10)]
    out = np.concatenate([part.samples for part in mixed(iter(silence), SPANS, 10 * RATE, bed)])
    assert len(out) == 10 * RATE
    assert loudness(out[5 * RATE + RATE // 2 : 7 * RATE], RATE) == pytest.approx(-30, abs=0.3)
    assert loudness(out[2 * RATE : 3 * RATE], RATE) == pytest.approx(-50, abs=0.3)
    assert np.abs(out[:24]).max() < 1e-3
    assert np.abs(out[-24:]).max() < 1e-3
    assert np.abs(np.diff(out)).max() < 0.01  # the seam of a repeat and the envelope make no click
    assert true_peak(out[2 * RATE : 3 * RATE], RATE) <= 20 * np.log10(bed.ducked_peak) + 0.1
