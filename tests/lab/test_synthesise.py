"""Synthetic speech: levels, ends and what a missing synthesiser says."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from revox.lab import LabError
from revox.lab.speakers import synthetic_speakers
from revox.lab.synthesise import level, synthesise, trim

RATE = 24000
installed = pytest.mark.skipif(
    not (shutil.which("espeak-ng") and shutil.which("flite")), reason="espeak-ng or flite is not installed"
)


def tone(seconds, hertz=200.0, size=0.3):
    return (size * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def test_silence_at_the_ends_is_cut_to_the_margin():
    quiet = np.zeros(RATE // 2, np.float32)
    trimmed = trim(np.concatenate([quiet, tone(1.0), quiet]), RATE, margin=0.05)
    assert len(trimmed) == pytest.approx(1.1 * RATE, abs=RATE // 100)


def test_level_sets_the_root_mean_square_of_the_active_part():
    half_silent = np.concatenate([tone(1.0), np.zeros(RATE, np.float32)])
    levelled = level(half_silent, RATE, -23.0)
    assert 10 * np.log10((levelled[:RATE].astype(float) ** 2).mean()) == pytest.approx(-23.0, abs=0.1)


def test_level_never_clips():
    click = tone(1.0, size=0.001)
    click[100] = 1.0
    assert np.abs(level(click, RATE)).max() <= 1.0


@installed
@pytest.mark.parametrize("engine", ["espeak-ng", "flite"])
def test_formants_move_up_with_the_factor_and_the_duration_stays(engine):
    speaker = next(s for s in synthetic_speakers() if s.engine == engine and s.sex == "M")
    plain = replace(speaker, formants=1.0, tilt=0.0, resonances=())
    low, high = (synthesise(replace(plain, formants=f), "see you on monday the third") for f in (0.9, 1.1))
    assert len(high) == pytest.approx(len(low), rel=0.12)

    def centroid(samples):
        power = np.abs(np.fft.rfft(samples)) ** 2
        return (power * np.fft.rfftfreq(len(samples), 1 / RATE)).sum() / power.sum()

    assert centroid(high) > 1.08 * centroid(low)


@installed
def test_the_same_speaker_and_text_give_the_same_samples():
    speaker = synthetic_speakers()[0]
    first, second = synthesise(speaker, "page nine of ten"), synthesise(speaker, "page nine of ten")
    assert first.dtype == np.float32
    assert np.array_equal(first, second)
    assert 0.5 * RATE < len(first) < 4 * RATE


def test_a_missing_synthesiser_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LabError, match="apt install espeak-ng flite"):
        synthesise(synthetic_speakers()[0], "hello")
