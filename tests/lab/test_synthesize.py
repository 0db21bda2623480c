"""Synthetic speech: levels, ends and what a missing synthesizer says."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from lab import LabError
from lab.speakers import synthetic_speakers
from lab.synthesize import level, synthesize, trim

RATE = 24000
installed = pytest.mark.skipif(not shutil.which("flite"), reason="flite is not installed")


def tone(seconds, hertz=200.0, size=0.3):
    return (size * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def test_silence_at_the_ends_is_cut_to_the_margin():
    quiet = np.zeros(RATE // 2, np.float32)
    trimmed = trim(np.concatenate([quiet, tone(1.0), quiet]), RATE, margin=0.05)
    assert len(trimmed) == pytest.approx(1.1 * RATE, abs=RATE // 100)


def test_level_sets_the_root_mean_square_of_the_active_part():
    half_silent = np.concatenate([tone(1.0), np.zeros(RATE, np.float32)])
    leveled = level(half_silent, RATE, -23.0)
    assert 10 * np.log10((leveled[:RATE].astype(float) ** 2).mean()) == pytest.approx(-23.0, abs=0.1)


def test_level_never_clips():
    click = tone(1.0, size=0.001)
    click[100] = 1.0
    assert np.abs(level(click, RATE)).max() <= 1.0


@installed
def test_formants_move_up_with_the_factor_and_the_duration_stays():
    speaker = next(s for s in synthetic_speakers() if s.sex == "M")
    plain = replace(speaker, formants=1.0, tilt=0.0, resonances=())
    low, high = (
        synthesize(replace(plain, formants=f), "see you on monday the third").samples for f in (0.9, 1.1)
    )
    assert len(high) == pytest.approx(len(low), rel=0.12)

    def centroid(samples):
        power = np.abs(np.fft.rfft(samples)) ** 2
        return (power * np.fft.rfftfreq(len(samples), 1 / RATE)).sum() / power.sum()

    assert centroid(high) > 1.08 * centroid(low)


@installed
def test_the_same_speaker_and_text_give_the_same_samples():
    speaker = synthetic_speakers()[0]
    first, second = synthesize(speaker, "page nine of ten"), synthesize(speaker, "page nine of ten")
    assert first.samples.dtype == np.float32
    assert np.array_equal(first.samples, second.samples)
    assert 0.5 * RATE < len(first.samples) < 4 * RATE


@installed
def test_phones_are_told_in_order_and_end_with_the_speech():
    said = synthesize(synthetic_speakers()[0], "see you")
    names = [name for name, _ in said.phones]
    assert [n for n in names if n != "pau"][:2] == ["s", "iy"]
    ends = [end for _, end in said.phones]
    assert ends == sorted(ends)
    assert ends[-1] == pytest.approx(len(said.samples) / RATE, abs=0.25)
    # The hiss of "s" lies where its phone does.
    start = ends[names.index("s") - 1] if names.index("s") else 0.0
    hiss = said.samples[round(start * RATE) : round(ends[names.index("s")] * RATE)]
    vowel = said.samples[round(ends[names.index("s")] * RATE) : round(ends[names.index("iy")] * RATE)]
    assert np.mean(np.diff(np.sign(hiss)) != 0) > 2 * np.mean(np.diff(np.sign(vowel)) != 0)


def test_a_missing_synthesiser_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LabError, match="apt install flite"):
        synthesize(synthetic_speakers()[0], "hello")
