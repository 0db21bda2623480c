from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest

from revox.metrics import perceptual
from revox.metrics.errors import MetricError
from revox.speech import Audio, read_audio

CLIP = Path(__file__).parents[1] / "speech" / "clips" / "103-1240-0000.flac"


@pytest.fixture(scope="module")
def speech():
    audio = read_audio(CLIP, rate=24000)
    return Audio(audio.samples[: 3 * 24000], 24000)


def test_estoi_falls_with_noise_and_knows_the_original(speech):
    pytest.importorskip("pystoi")
    level = np.sqrt(np.mean(speech.samples**2))
    noise = np.random.default_rng(0).standard_normal(len(speech.samples)).astype(np.float32) * level
    scores = [perceptual.estoi(speech, Audio(speech.samples + k * noise, 24000)) for k in (0, 0.3, 1, 100)]
    assert scores[0] == pytest.approx(1.0, abs=1e-6)
    assert scores == sorted(scores, reverse=True)
    assert abs(scores[3]) < 0.1


def test_estoi_of_too_little_speech_is_none(speech):
    pytest.importorskip("pystoi")
    short = Audio(speech.samples[:2400], 24000)
    assert perceptual.estoi(short, short) is None


def test_pesq_knows_the_original(speech):
    pytest.importorskip("pesq")
    assert perceptual.pesq(speech, speech) == pytest.approx(4.64, abs=0.01)
    assert perceptual.pesq(speech, Audio(np.zeros_like(speech.samples), 24000)) is None


def test_pesq_is_asked_for_wide_band_at_16_khz_with_the_reference_first(speech, monkeypatch):
    """The library needs a compiler: here stands one that notes how it was called."""
    calls = []

    class NoUtterancesError(Exception):
        pass

    def library(rate, reference, degraded, mode):
        calls.append((rate, len(reference), len(degraded), mode, float(np.abs(degraded).max())))
        if len(calls) > 1:
            raise NoUtterancesError
        return 3.5

    fake = types.SimpleNamespace(pesq=library, PesqError=NoUtterancesError)
    monkeypatch.setitem(sys.modules, "pesq", fake)
    monkeypatch.setattr(perceptual, "installed", lambda name: "0.0.4")
    quiet = Audio(speech.samples[:48000] * np.float32(0.1), 24000)
    assert perceptual.pesq(speech, quiet) == 3.5
    rate, reference, degraded, mode, peak = calls[0]
    assert (rate, mode) == (16000, "wb")
    assert reference == degraded == 32000
    assert peak < 0.2  # the second is the degraded one
    assert perceptual.pesq(speech, quiet) is None  # no utterance found


@pytest.mark.parametrize(("name", "extra"), [("pesq", "pesq"), ("estoi", "eval")])
def test_a_missing_library_is_a_sentence_with_the_mend(speech, monkeypatch, name, extra):
    monkeypatch.setattr(perceptual, "installed", lambda name: None)
    with pytest.raises(MetricError, match=rf"not installed; install it with .*revox\[{extra}\]"):
        getattr(perceptual, name)(speech, speech)


def test_installed_says_the_version_or_none():
    assert perceptual.installed("numpy") == np.__version__
    assert perceptual.installed("no_such_library_at_all") is None
