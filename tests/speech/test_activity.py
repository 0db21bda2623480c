from pathlib import Path

import numpy as np
import pytest
import webrtcvad

from revox.speech import read_audio, speech_activity
from revox.speech.activity import frame_levels

CLIPS = sorted((Path(__file__).parent / "clips").glob("*.flac"))
RNG = np.random.default_rng(0)


def clip(index=0):
    return read_audio(CLIPS[index])


@pytest.mark.parametrize("index", range(len(CLIPS)))
def test_activity_agrees_with_webrtcs_detector_on_human_speech(index):
    audio = clip(index)
    detector = webrtcvad.Vad(3)
    pcm = (audio.samples * 32767).astype(np.int16)
    theirs = np.array(
        [detector.is_speech(pcm[i : i + 160].tobytes(), 16000) for i in range(0, len(pcm) - 159, 160)]
    )
    ours = speech_activity(audio.samples, audio.rate).active[: len(theirs)]
    assert (ours == theirs).mean() > 0.85
    assert (theirs & ~ours).mean() < 0.02


@pytest.mark.parametrize("rate", [8000, 24000, 48000])
def test_the_rate_does_not_change_what_is_speech(rate):
    audio = clip(1)
    a, b = (speech_activity(x.samples, x.rate) for x in (audio, audio.at(rate)))
    n = min(len(a.active), len(b.active))
    assert (a.active[:n] == b.active[:n]).mean() > 0.97


@pytest.mark.parametrize(
    "samples",
    [
        RNG.normal(scale=0.1, size=120000),
        RNG.normal(scale=0.1, size=120000) * (np.arange(120000) // 12000 % 2),
        0.3 * np.sin(np.arange(120000) * 0.1),
        np.zeros(120000),
        np.zeros(3),
        np.zeros(0),
    ],
    ids=["noise", "bursts of noise", "tone", "silence", "three samples", "nothing"],
)
def test_what_is_not_speech_is_not_active(samples):
    assert speech_activity(samples, 24000).seconds == 0


def test_the_level_of_a_full_scale_sine_is_minus_3_db():
    x = np.sin(2 * np.pi * 1000 * np.arange(24000) / 24000)
    assert np.median(frame_levels(x, 24000)) == pytest.approx(-3.01, abs=0.1)
