"""Requests and answers of every adapter, as the servers' own schemas and code publish them (exchanges/)."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path

import httpx2
import numpy as np
import pytest

from revox.endpoints.adapters import ADAPTERS, event_audio
from revox.endpoints.endpoint import ReferenceClip, SpeechQuery
from revox.endpoints.http import HttpEndpoint
from revox.speech import Audio, encode_audio

EXCHANGES = {
    path.stem: json.loads(path.read_text()) for path in Path(__file__).parent.glob("exchanges/*.json")
}
SECONDS = 0.5


def sound(rate):
    t = np.arange(round(SECONDS * rate)) / rate
    return Audio((0.3 * np.sin(2 * np.pi * 200 * t)).astype(np.float32), rate)


def filled(value, rate):
    """The recorded value with the made sound in the places of its marks."""
    audio = sound(rate)
    wav, pcm = encode_audio(audio, "wav")[0], encode_audio(audio, "pcm")[0]
    if isinstance(value, dict):
        return {key: filled(one, rate) for key, one in value.items()}
    if isinstance(value, list):
        return [filled(one, rate) for one in value]
    if not isinstance(value, str):
        return value
    value = value.replace("@wav64", base64.b64encode(wav).decode())
    for kind, samples in (("pcm64", pcm), ("float64", audio.samples.tobytes())):
        while (at := value.find(f"@{kind}:")) >= 0:
            mark = value[at:].split('"')[0]
            first, last = (round(float(x) * len(audio.samples)) for x in mark.split(":")[1:])
            size = len(samples) // len(audio.samples)
            value = value.replace(mark, base64.b64encode(samples[first * size : last * size]).decode())
    if value.startswith("@pcm:"):
        first, last = (2 * round(float(x) * len(audio.samples)) for x in value.split(":")[1:])
        return pcm[first:last]
    return {"@wav": wav, "@wavhead": wav[:44], "@wavbody": wav[44:]}.get(value, value)


class Parts(httpx2.SyncByteStream):
    def __init__(self, parts):
        self.parts = parts

    def __iter__(self):
        yield from (part.encode() if isinstance(part, str) else part for part in self.parts)


def endpoint(kind, answer, asked, model=None):
    recorded = EXCHANGES[kind]

    def respond(request):
        asked.append(request)
        headers = {"content-type": answer["content_type"]}
        return httpx2.Response(answer["status"], headers=headers, stream=Parts(answer["parts"]))

    return HttpEndpoint(
        ADAPTERS[kind],
        "http://test",
        kind,
        recorded.get("key"),
        model,
        transport=httpx2.MockTransport(respond),
    )


def cases():
    return [(kind, i) for kind, one in EXCHANGES.items() for i in range(len(one["exchanges"]))]


@pytest.mark.parametrize(("kind", "number"), cases())
def test_a_request_is_as_published_and_its_answer_is_read(kind, number):
    recorded, asked = EXCHANGES[kind], []
    rate = recorded.get("rate", 24_000)
    exchange = filled(recorded["exchanges"][number], rate)
    query = exchange["query"]
    if "reference" in query:
        query["reference"] = ReferenceClip(**query["reference"])
    one = endpoint(kind, exchange["answer"], asked, exchange.get("model"))
    answer = one.speak(SpeechQuery(**query))
    assert (asked[0].method, asked[0].url.path) == ("POST", exchange["request"]["path"])
    assert json.loads(asked[0].content) == exchange["request"]["json"]
    assert asked[0].headers.get("authorization") == (
        f"Bearer {recorded['key']}" if "key" in recorded else None
    )
    assert answer.status == exchange["answer"]["status"]
    if answer.status != 200:
        assert exchange["message"] in answer.message
        assert not answer.ok
        return
    assert answer.ok, answer.message
    audio = answer.audio()
    assert audio.rate == rate
    np.testing.assert_allclose(audio.samples, sound(rate).samples, atol=1e-4)
    if query.get("stream") and one.streams:
        assert 0 < answer.first_audio <= answer.seconds
        if one.rate:
            assert answer.arrivals[-1][1] == pytest.approx(SECONDS, abs=1e-3)
    else:
        assert answer.first_audio is None


@pytest.mark.parametrize("kind", [kind for kind, one in EXCHANGES.items() if "voices" in one])
def test_voices_are_listed(kind):
    listed, asked = EXCHANGES[kind]["voices"], []
    answer = {"status": 200, "content_type": "application/json", "parts": [json.dumps(listed["json"])]}
    assert endpoint(kind, answer, asked).voices() == listed["names"]
    assert asked[0].url.raw_path.decode() == listed["path"]


def test_every_adapter_but_our_own_has_exchanges():
    assert set(EXCHANGES) == set(ADAPTERS) - {"revox"}  # which tests/bench asks a running server


@pytest.mark.parametrize("kind", ["vllm-omni", "fish-s2-pro", "voxcpm2", "qwen3-tts"])
def test_vllm_omni_knows_every_field(kind):
    # Of the installed package only this file, which imports pydantic alone, is run.
    package = Path(importlib.util.find_spec("vllm_omni").origin).parent
    path = package / "entrypoints" / "openai" / "protocol" / "audio.py"
    spec = importlib.util.spec_from_file_location("vllm_omni_audio_protocol", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for exchange in EXCHANGES[kind]["exchanges"]:
        body = exchange["request"]["json"]
        parsed = module.OpenAICreateSpeechRequest.model_validate(body)
        assert {name: getattr(parsed, name) for name in body} == body


def test_a_stream_that_reports_an_error_is_not_a_success():
    events = [
        'data: {"type": "speech.audio.delta", "audio": "@pcm64:0:0.4"}\n\n',
        'data: {"type": "speech.audio.error", "error": {"message": "out of memory"}}\n\n',
    ]
    answer = {"status": 200, "content_type": "text/event-stream", "parts": filled(events, 24_000)}
    answer = endpoint("sglang-omni", answer, []).speak(SpeechQuery("Hello.", stream=True))
    assert not answer.ok
    assert answer.message == "out of memory"
    assert answer.content  # what came before is there


@pytest.mark.parametrize("end", ["\n\n", "\n", ""])
@pytest.mark.parametrize("last", [b"\r", b"\n", b"}"])
def test_events_are_apart_wherever_the_blocks_of_a_stream_end(last, end):
    events = [f'data: {{"type": "speech.audio.delta", "audio": "@pcm64:{x}"}}' for x in ("0:0.4", "0.4:1")]
    text = ("\n\n".join(filled(events, 24_000)) + end).replace("\n", "\r\n").encode()
    parts = [part + last for part in text.split(last)[:-1]] + [text.split(last)[-1]]
    answer = {"status": 200, "content_type": "text/event-stream", "parts": parts}
    answer = endpoint("sglang-omni", answer, []).speak(SpeechQuery("Hello.", stream=True))
    assert answer.ok, answer.message
    assert answer.audio().seconds == pytest.approx(SECONDS)


def test_an_event_that_was_cut_off_is_not_a_success():
    events = ['data: {"type": "speech.audio.delta", "audio": "@pcm64:0:0.4"}\n\n', 'data: {"type": "spee']
    answer = {"status": 200, "content_type": "text/event-stream", "parts": filled(events, 24_000)}
    assert not endpoint("sglang-omni", answer, []).speak(SpeechQuery("Hello.", stream=True)).ok


@pytest.mark.parametrize("body", ["{}", "[]", "not JSON", '{"audio_data": "*"}', '{"audio_data": 5}'])
def test_json_without_audio_is_a_message(body):
    answer = {"status": 200, "content_type": "application/json", "parts": [body]}
    answer = endpoint("mistral", answer, []).speak(SpeechQuery("Hello.", "jane"))
    assert not answer.ok
    assert answer.message


def test_a_lost_connection_is_a_message():
    def lost(request):
        raise httpx2.ConnectError("refused")

    one = HttpEndpoint(ADAPTERS["openai"], "http://test", "test", transport=httpx2.MockTransport(lost))
    answer = one.speak(SpeechQuery("Hello.", "alloy"))
    assert (answer.status, answer.message) == (None, "refused")


def test_events_without_audio_are_passed_over():
    assert event_audio({"type": "speech.audio.done", "usage": {}}) is None
    assert event_audio(["speech.audio.delta"]) is None
