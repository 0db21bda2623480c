import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from revox.metrics.errors import MetricError
from revox.metrics.speaker import SpeakerVerifier
from revox.speech import Audio, read_audio

CLIPS = sorted((Path(__file__).parents[1] / "speech" / "clips").glob("*.flac"))


def halves(audio):
    middle = len(audio.samples) // 2
    return Audio(audio.samples[:middle], audio.rate), Audio(audio.samples[middle:], audio.rate)


@pytest.fixture(scope="module")
def judge():
    return SpeakerVerifier()


def test_the_embedding_is_resemblyzers_own(judge):
    from resemblyzer import VoiceEncoder, preprocess_wav

    audio = read_audio(CLIPS[1])
    quiet = audio.samples * np.float32(
        10 ** (-40 / 20) / np.sqrt(np.mean(audio.samples**2))
    )  # it raises to -30
    oracle = VoiceEncoder("cpu", verbose=False).embed_utterance(preprocess_wav(quiet))
    ours = judge.embed(audio)
    assert ours.shape == (256,)
    assert np.linalg.norm(ours) == pytest.approx(1.0, abs=1e-5)
    assert float(ours @ oracle) == pytest.approx(1.0, abs=1e-3)


def test_halves_of_a_clip_are_nearer_than_other_speakers(judge):
    pairs = [[judge.embed(half) for half in halves(read_audio(clip))] for clip in CLIPS]
    same = [judge.similarity(a, b) for a, b in pairs]
    different = [judge.similarity(a[0], b[1]) for a, b in itertools.permutations(pairs, 2)]
    assert min(same) > 0.75  # halves of 3 s
    assert max(different) < 0.75


def test_level_rate_and_channels_do_not_move_the_judgement(judge):
    audio = read_audio(CLIPS[1])
    own = judge.embed(audio)
    for other in (
        Audio(audio.samples * 0.05, audio.rate),
        Audio(audio.samples / np.abs(audio.samples).max(), audio.rate),
        audio.at(24000),
        Audio(np.stack([audio.samples, audio.samples]), audio.rate),
    ):
        assert judge.similarity(own, other) > 0.995


def test_silence_resembles_nobody_and_noise_is_judged_without_failing(judge):
    voice = judge.embed(read_audio(CLIPS[1]))
    assert judge.similarity(Audio(np.zeros(16000), 16000), voice) == 0.0
    noise = Audio(np.random.default_rng(0).normal(scale=0.1, size=32000), 16000)
    assert 0.0 < judge.similarity(noise, voice) < 0.7
    assert np.isfinite(judge.embed(Audio(np.ones(10), 24000))).all()


def test_a_missing_resemblyzer_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "resemblyzer.audio", None)
    monkeypatch.setitem(sys.modules, "resemblyzer", None)
    with pytest.raises(MetricError, match=r"revox\[eval\]"):
        SpeakerVerifier()


@pytest.mark.slow
def test_the_calibration_in_the_documentation_holds_on_librispeech(judge):
    """Set REVOX_LIBRISPEECH to a folder of clips, one a speaker (../shared/speech/librispeech)."""
    folder = Path(os.environ.get("REVOX_LIBRISPEECH", "../shared/speech/librispeech"))
    if not folder.is_dir():
        pytest.skip("no LibriSpeech folder")
    clips = [
        audio for path in sorted(folder.glob("*.flac"))[:100] if (audio := read_audio(path)).seconds >= 8
    ]
    first, second = (
        np.array(half) for half in zip(*[[judge.embed(h) for h in halves(a)] for a in clips], strict=True)
    )
    cosine = first @ second.T
    same, different = np.diag(cosine), cosine[~np.eye(len(cosine), dtype=bool)]
    assert len(clips) == 83
    assert same.mean() == pytest.approx(0.926, abs=0.01)
    assert same.min() == pytest.approx(0.85, abs=0.02)
    assert different.mean() == pytest.approx(0.577, abs=0.01)
    assert np.percentile(different, 95) == pytest.approx(0.717, abs=0.01)
    assert (cosine.argmax(1) == np.arange(len(cosine))).all()
