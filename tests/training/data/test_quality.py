"""The report says how much there is and where its spectrum ends."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from speech_files import clip, source

from revox.speech import Audio, resample, write_audio
from revox.training.data import DataError, SpeechSource, report


def noise(path: Path, rate: int, up_to: int, seconds: float = 1.0) -> Path:
    """White noise up to `up_to` Hz, in a file of `rate` Hz."""
    n = round(seconds * rate)
    spectrum = np.fft.rfft(np.random.default_rng(0).normal(size=n))
    spectrum[round(up_to * seconds) :] = 0
    samples = np.fft.irfft(spectrum, n)
    write_audio(path, Audio((samples / np.abs(samples).max() * 0.5).astype(np.float32), rate))
    return path


@pytest.fixture
def sources(tmp_path) -> list[SpeechSource]:
    """Ten clips, an hour each by their headers: 4 at 16 kHz, 6 at 24 kHz (1 ends at 8 kHz, 2 at 10)."""
    kinds = [(16000, 8000)] * 4 + [(24000, 8000)] + [(24000, 9900)] * 2 + [(24000, 12000)] * 3
    clips = []
    for i, (rate, up_to) in enumerate(kinds):
        path = noise(tmp_path / f"{i}.wav", rate, up_to)
        clips.append(clip(path, f"s{i % 5}", "de" if i < 4 else "fr", None, 3600.0, rate))
    return [source("low", clips[:4]), source("high", clips[4:], (("x.wav", "is empty"),))]


def test_what_there_is_is_counted_and_the_band_measured(sources):
    said = report(sources, workers=0)
    assert (said.clips, said.hours, said.speakers) == (10, 10.0, 5)
    assert said.languages == {"fr": 6.0, "de": 4.0}
    assert said.below_full_rate == 0.4
    assert said.measured == 10
    assert said.ends_below == {8000: 0.5, 10000: 0.7, 11000: 0.7}
    text = str(said)
    assert "1 files cannot be used." in text
    assert "10.0 hours of speech: 10 clips of 5 speakers (fr 6.0 h, de 4.0 h)." in text
    assert "40 % of the clips were sampled below 24 kHz, and the spectrum of 50 % of 10 measured" in text
    assert "learns to leave it empty" in text


def test_low_rates_are_refused_and_what_that_costs_is_said(sources):
    said = report(sources, refuse_below=24000, workers=0)
    assert said.clips == 6
    assert [source.name for source in said.sources] == ["high"]
    assert said.below_full_rate == 0
    assert "4 clips (4.0 hours) below 24000 Hz were left out." in str(said)
    mixed = source("mixed", [cut.to_dict() for one in sources for cut in one.cuts])
    [kept] = report([mixed], refuse_below=24000, workers=0, sample=1).sources
    assert list(kept.cuts) == list(sources[1].cuts)
    with pytest.raises(DataError, match="no clip is left: all 4 are below 24000 Hz"):
        report(sources[:1], refuse_below=24000, workers=0)


def test_full_band_speech_gets_no_warning(sources):
    said = report([SpeechSource("best", sources[1].cuts.take(np.arange(3, 6)))], workers=0)
    assert said.ends_below == {8000: 0.0, 10000: 0.0, 11000: 0.0}
    assert "leave it empty" not in str(said)


def test_speech_that_was_resampled_up_is_found_out(tmp_path):
    low = np.random.default_rng(1).normal(size=16000).astype(np.float32) * 0.1
    write_audio(tmp_path / "up.wav", Audio(resample(low, 16000, 24000), 24000))
    said = report([source("up", [clip(tmp_path / "up.wav", "s", None, None, 1.0, 24000)])], workers=0)
    assert said.below_full_rate == 0
    assert said.ends_below[8000] == 1.0


def test_clips_that_cannot_be_decoded_are_not_measured(tmp_path):
    clips = [clip(noise(tmp_path / "a.wav", 24000, 12000), "s", None, None, 1.0, 24000)]
    clips.append(clip(tmp_path / "gone.wav", "s", None, None, 1.0, 24000))
    assert report([source("a", clips)], workers=0).measured == 1
