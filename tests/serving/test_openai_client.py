from __future__ import annotations

import base64

import numpy as np
import openai
import pytest

SAID = {"model": "tiny", "voice": "neutral_male", "input": "Hello."}
EXTRA = {"seed": 3, "max_new_tokens": 6}


@pytest.fixture
def client(serve):
    with serve() as (url, _app), openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def spoken(tts):
    samples = tts.speak("Hello.", "neutral_male", seed=3, max_seconds=0.48).samples
    return np.clip(np.rint(samples * 32768), -32768, 32767)


def test_the_openai_package_speaks_unchanged(client, spoken, tmp_path):
    answer = client.audio.speech.create(**SAID, response_format="pcm", extra_body=EXTRA)
    np.testing.assert_allclose(np.frombuffer(answer.content, "<i2"), spoken, atol=1)
    mp3 = client.audio.speech.create(
        **{**SAID, "voice": {"id": "neutral_male"}}, response_format="mp3", speed=1.5
    )
    mp3.write_to_file(tmp_path / "speech.mp3")
    assert (tmp_path / "speech.mp3").stat().st_size > 1000


def test_the_openai_package_streams_bytes_and_events(client, spoken):
    asked = {**SAID, "response_format": "pcm", "extra_body": EXTRA}
    with client.audio.speech.with_streaming_response.create(**asked, stream_format="audio") as answer:
        data = b"".join(answer.iter_bytes())
    np.testing.assert_allclose(np.frombuffer(data, "<i2"), spoken, atol=1)
    with client.audio.speech.with_streaming_response.create(**asked, stream_format="sse") as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    import json

    *deltas, done = [json.loads(line.removeprefix("data: ")) for line in lines]
    data = b"".join(base64.b64decode(delta["audio"]) for delta in deltas)
    np.testing.assert_allclose(np.frombuffer(data, "<i2"), spoken, atol=1)
    assert done["usage"]["output_tokens"] == 6


def test_the_openai_package_lists_models_and_raises_its_own_errors(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError) as unknown:
        client.audio.speech.create(**{**SAID, "voice": "alloy"})
    assert unknown.value.code == "voice_not_found"
    assert unknown.value.param == "voice"
    with pytest.raises(openai.BadRequestError, match="instructions"):
        client.audio.speech.create(**SAID, instructions="Speak like a pirate.")
    with pytest.raises(openai.UnprocessableEntityError):
        client.audio.speech.create(**SAID, speed=9.0)
    with pytest.raises(openai.NotFoundError):
        client.audio.speech.create(**{**SAID, "model": "tts-1"})
