from __future__ import annotations

import base64
import io

import httpx
import numpy as np
import openai
import pytest

from revox.serving.keys import add_key
from revox.speech import read_audio

SAID = {"model": "tiny", "voice": "neutral_male", "input": "Hello."}
EXTRA = {"seed": 3, "max_new_tokens": 6}


@pytest.fixture
def client(serve):
    with serve() as (url, _app), openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def spoken(tts):
    samples = tts.speak("Hello.", "neutral_male", seed=3, takes=1, max_seconds=0.48).samples
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


def test_open_webui_finds_its_lists_and_speaks(serve, spoken):
    # The requests of open_webui/routers/audio, 0.12.4; its own base address is what differs.
    with serve() as (url, _app), httpx.Client(base_url=f"{url}/v1/open-webui") as client:
        models = client.get("/audio/models").raise_for_status().json().get("models", [])
        assert [(model["id"], model["name"]) for model in models] == [("tiny", "tiny")]
        voices = client.get("/audio/voices").raise_for_status().json().get("voices", [])
        named = {voice["id"]: voice["name"] for voice in voices}
        assert named["neutral_male"] == "neutral_male"
        assert sorted(named) == httpx.get(f"{url}/v1/audio/voices").json()["voices"]
        payload = {"input": "Hello.", "voice": "neutral_male", "model": "tiny", **EXTRA}
        answer = client.post("/audio/speech", json=payload, headers={"Authorization": "Bearer any"})
        assert answer.headers["content-type"].startswith("audio/")
        assert read_audio(io.BytesIO(answer.content)).seconds == pytest.approx(len(spoken) / 24000)


def test_open_webuis_paths_ask_for_keys_too(serve, tmp_path):
    add_key(tmp_path / "keys.json", "somebody")
    with (
        serve(api_keys=tmp_path / "keys.json") as (url, _app),
        httpx.Client(base_url=f"{url}/v1/open-webui/audio") as client,
    ):
        assert client.get("/voices").status_code == 401
        assert client.post("/speech", json={"input": "Hello.", "voice": "neutral_male"}).status_code == 401
