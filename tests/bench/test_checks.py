"""Each fault of a file is found, and sound speech has none."""

from __future__ import annotations

import io
import wave

import numpy as np
import pytest
from made_endpoint import speech

from revox.bench.checks import check_answer, check_speech
from revox.endpoints import SpeechAnswer
from revox.speech import Audio, encode_audio

TEXT = "Please close the window; the rain is coming in."  # about 3.1 s
SECONDS = 3.0


def changed(change):
    audio = speech(SECONDS)
    return Audio(change(audio.samples.copy()), audio.rate)


def paused(samples):
    samples[24_000:62_400] = 0
    return samples


def test_sound_speech_has_no_fault():
    assert check_speech(speech(SECONDS), TEXT) == []
    assert check_speech(speech(SECONDS, rate=44_100), TEXT) == []


@pytest.mark.parametrize(
    ("audio", "fault"),
    [
        (changed(lambda x: 0.001 * x), "silent"),
        (changed(lambda x: x[:0]), "silent"),
        (changed(lambda x: np.clip(8 * x, -1, 1)), "clipped"),
        (speech(1.0), "too short"),
        (speech(12.0), "too long"),
        (changed(paused), "silence inside"),
        (changed(lambda x: x[:-1600]), "middle of a sound"),
    ],
)
def test_a_fault_is_named(audio, fault):
    assert any(fault in found for found in check_speech(audio, TEXT))


def answer(content, response_format="wav"):
    return SpeechAnswer(200, response_format, 24_000, content)


def test_rate_and_channels_are_those_promised():
    audio = speech(SECONDS)
    assert check_answer(answer(encode_audio(audio)[0]), TEXT, 24_000)[1] == []
    other = encode_audio(audio.at(44_100))[0]
    assert check_answer(answer(other), TEXT, 24_000)[1] == ["44100 Hz, promised 24000"]
    assert check_answer(answer(other), TEXT, None)[1] == []
    opus = encode_audio(audio, "opus")[0]
    assert check_answer(answer(opus, "opus"), TEXT, 24_000)[1] == []  # opus is 48 kHz whatever it holds
    stereo = io.BytesIO()
    with wave.open(stereo, "wb") as file:
        file.setparams((2, 2, 24_000, 0, "NONE", ""))
        file.writeframes(np.repeat((32767 * audio.samples).astype("<i2"), 2).tobytes())
    assert check_answer(answer(stereo.getvalue()), TEXT, 24_000)[1] == ["2 channels, expected 1"]


@pytest.mark.parametrize("content", [b"not audio", b"RIFF", b"<html></html>" * 100])
def test_what_does_not_decode_is_a_fault(content):
    audio, problems = check_answer(answer(content), TEXT, 24_000)
    assert audio is None
    assert "does not decode" in problems[0]


def test_a_refusal_is_a_fault():
    refused = SpeechAnswer(429, message="too many requests")
    assert check_answer(refused, TEXT, 24_000) == (None, ["status 429: too many requests"])
    lost = SpeechAnswer(None, message="refused")
    assert check_answer(lost, TEXT, 24_000) == (None, ["refused"])
