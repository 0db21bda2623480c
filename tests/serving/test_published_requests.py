"""Requests that other software publishes or sends, as it sends them: what is spoken, refused, ignored."""

from __future__ import annotations

import json

import httpx
import pytest

from revox.cli.serve_command import aliases_from
from revox.serving.app import create_app
from revox.serving.errors import ServeError
from revox.speech import read_audio

TEXT = "ten"
SHORT = {"max_new_tokens": 4}
ALIASES = {"tts-1": "tiny", "gpt-4o-mini-tts": "tiny", "alloy": "neutral_female", "coral": "neutral_male"}
INSTRUCTIONS = "Speak in a cheerful and positive tone."

# name -> (where it is from, body, headers beside JSON's, fields that --compatible ignores)
CLIENTS = {
    "vllm-omni's recipe": (
        "vllm-omni 0.30.0, docs/serving/speech_api.md, Quick Start",
        {"input": TEXT, "voice": "neutral_male", "language": "English"},
        {},
        "",
    ),
    "OpenAI's sample": (
        "openai 3.54.0 for Python, resources/audio/speech.py; platform.openai.com/docs/guides/text-to-speech",
        {"model": "gpt-4o-mini-tts", "voice": "coral", "input": TEXT, "instructions": INSTRUCTIONS},
        {"accept": "application/octet-stream", "authorization": "Bearer any"},
        "instructions",
    ),
    "OpenAI's sample for Node": (
        "openai 6.49.0 for Node, resources/audio/speech.js",
        {"input": TEXT, "model": "tts-1", "voice": "alloy"},
        {"accept": "application/octet-stream", "authorization": "Bearer any"},
        "",
    ),
    "Open WebUI": (
        "open-webui 0.6.43, open_webui/routers/audio.py, speech",
        {"input": TEXT, "voice": "alloy", "model": "tts-1"},
        {"authorization": "Bearer any"},
        "",
    ),
    "Open WebUI with parameters": (
        "the same, TTS_OPENAI_PARAMS: whatever the operator writes",
        {"input": TEXT, "voice": "alloy", "model": "tts-1", "speed": "1.0", "lang_code": "a"},
        {"authorization": "Bearer any"},
        "lang_code",
    ),
    "LiteLLM's health check": (
        "litellm 1.110.2, litellm_core_utils/health_check_helpers.py, mode audio_speech",
        {"model": "tts-1", "voice": "alloy", "input": TEXT},
        {"accept": "application/octet-stream", "authorization": "Bearer any"},
        "",
    ),
    "LiteLLM": (
        "litellm 1.110.2, llms/openai/openai.py, audio_speech, with all of its optional parameters",
        {
            "model": "tts-1", "voice": "alloy", "input": TEXT, "response_format": "mp3", "speed": 1.25,
            "instructions": INSTRUCTIONS,
        },
        {"accept": "application/octet-stream", "authorization": "Bearer any"},
        "instructions",
    ),
    "Home Assistant's OpenAI integration": (
        "home-assistant/core, components/openai_conversation/tts.py: no prompt is the text None",
        {
            "model": "gpt-4o-mini-tts", "voice": "coral", "input": TEXT, "instructions": "None", "speed": 1.0,
            "response_format": "mp3",
        },
        {"accept": "application/octet-stream", "authorization": "Bearer any"},
        "instructions",
    ),
    "Home Assistant's openai_tts": (
        "sfortis/openai_tts, custom_components/openai_tts/openaitts_engine.py, async_get_tts_stream",
        {"model": "tts-1", "input": TEXT, "voice": "alloy", "response_format": "opus", "speed": 1.0},
        {"user-agent": "HomeAssistant-OpenAI-TTS"},
        "",
    ),
    "Home Assistant's openai_tts, its probe of a key": (
        "sfortis/openai_tts, custom_components/openai_tts/api_validation.py",
        {"model": "tts-1", "input": ".", "voice": "alloy", "response_format": "mp3"},
        {"authorization": "Bearer any"},
        "",
    ),
}  # fmt: skip


def _ask(talk, *bodies, path="/v1/audio/speech", **settings):
    async def dialogue(client, app):
        return [await client.post(path, **body) for body in bodies]

    return talk(dialogue, **settings)


@pytest.mark.parametrize("name", CLIENTS)
def test_published_requests_are_spoken_where_the_operator_says_compatible(talk, name):
    _source, body, headers, ignored = CLIENTS[name]
    [answer] = _ask(talk, {"json": {**body, **SHORT}, "headers": headers}, compatible=True, aliases=ALIASES)
    assert answer.status_code == 200, answer.text
    assert answer.headers.get("x-revox-ignored", "") == ignored
    expected = {"opus": "audio/ogg"}.get(body.get("response_format", ""), "audio/mpeg")
    assert answer.headers["content-type"] == expected
    assert read_audio(answer.content).seconds > 0.2


def test_without_compatible_the_same_requests_are_refused_for_what_would_have_no_effect(talk):
    requests = [{"json": {**body, **SHORT}} for _source, body, _headers, _ignored in CLIENTS.values()]
    answers = _ask(talk, *requests, aliases=ALIASES)
    for (_, body, _, ignored), answer in zip(CLIENTS.values(), answers, strict=True):
        assert "x-revox-ignored" not in answer.headers
        assert answer.status_code == (400 if ignored else 200), answer.text
        if ignored:
            assert answer.json()["error"]["param"] == ignored
        elif "response_format" not in body:
            assert answer.headers["content-type"] == "audio/wav"


def test_an_alias_speaks_as_what_it_stands_for(talk):
    said = {"input": TEXT, "response_format": "pcm", "seed": 3, **SHORT}
    alias, loud, real, other = _ask(
        talk,
        {"json": {**said, "voice": "alloy", "model": "tts-1"}},
        {"json": {**said, "voice": {"id": "Alloy"}}},
        {"json": {**said, "voice": "neutral_female"}},
        {"json": {**said, "voice": "neutral_male"}},
        aliases=ALIASES,
    )
    assert alias.content == loud.content == real.content != other.content

    async def models(client, app):
        return [(await client.get(path)).json() for path in ("/v1/models", "/v1/models/tts-1")]

    listed, one = talk(models, aliases=ALIASES)
    assert [model["id"] for model in listed["data"]] == ["tiny", "tts-1", "gpt-4o-mini-tts"]
    assert one["id"] == "tts-1"
    [unknown] = _ask(talk, {"json": {**said, "voice": "neutral_male", "model": "tts-1"}})
    assert "--alias tts-1=tiny" in unknown.json()["error"]["message"]


@pytest.mark.parametrize(
    ("aliases", "sentence"),
    [
        (["alloy=nobody"], "--alias alloy=nobody: nobody is neither the served model"),
        (["pt_male=neutral_male"], "pt_male is a voice already"),
        (["alloy"], "--alias is 'alloy', expected NAME=TARGET"),
        (["=neutral_male"], "expected NAME=TARGET"),
        (["a=pt_male", "a=de_male"], "--alias a is given twice"),
    ],
)
def test_an_alias_that_cannot_be_is_said_at_the_start(tts, settings, aliases, sentence):
    with pytest.raises(ServeError) as refusal:
        create_app(settings(aliases=aliases_from(aliases)), tts)
    assert sentence in str(refusal.value)


LANGUAGES = [
    # voice, text, language, whether it is taken
    ("neutral_male", TEXT, "English", True),
    ("neutral_male", TEXT, "en-US", True),
    ("de_male", "Guten Morgen.", "German", True),
    ("de_male", "zehn", "de", True),
    ("neutral_male", "Guten Morgen, ich bin nicht hier.", "German", True),
    ("neutral_male", "\u0935\u0939 \u092f\u0939\u093e\u0901", "Hindi", True),
    ("neutral_male", TEXT, "German", False),
    ("de_male", "Guten Morgen, ich bin nicht hier.", "Hindi", False),
    ("neutral_male", TEXT, "Chinese", False),
    ("neutral_male", TEXT, "Klingon", False),
    ("neutral_male", TEXT, "", True),
    ("neutral_male", TEXT, "Auto", True),
]


def test_a_language_is_taken_where_the_voice_or_the_text_is_in_it(talk):
    bodies = [
        {"json": {"input": text, "voice": voice, "language": language, **SHORT}}
        for voice, text, language, _ in LANGUAGES
    ]
    strict, lenient = (_ask(talk, *bodies, compatible=compatible) for compatible in (False, True))
    for (voice, _text, language, taken), answer, other in zip(LANGUAGES, strict, lenient, strict=True):
        assert answer.status_code == (200 if taken else 400), (voice, language, answer.text)
        assert other.status_code == 200
        assert other.headers.get("x-revox-ignored") == (None if taken else "language")
        if not taken:
            assert answer.json()["error"]["param"] == "language"
            assert "leave language out" in answer.json()["error"]["message"]


def test_a_language_is_in_which_numbers_are_spelled(talk):
    said = {"input": "10", "text_normalization": "full", "seed": 3, "response_format": "pcm", **SHORT}
    plain, german, spelled = _ask(
        talk,
        {"json": {**said, "voice": "neutral_male"}},
        {"json": {**said, "voice": "neutral_male", "input": "10 und nicht", "language": "German"}},
        {"json": {**said, "voice": "neutral_male", "input": "zehn und nicht", "text_normalization": "none"}},
    )
    assert german.content == spelled.content != plain.content


def test_numbers_may_be_strings_and_nothing_else_may(talk):
    said = {"input": TEXT, "voice": "neutral_male", "response_format": "pcm"}
    number, string, words, whole = _ask(
        talk,
        {"json": {**said, "speed": 1.5, "seed": 3, "max_new_tokens": 4, "sample_rate": 16000}},
        {"json": {**said, "speed": " 1.5", "seed": "3", "max_new_tokens": "4", "sample_rate": "16000"}},
        {"json": {**said, "speed": "fast"}},
        {"json": {**said, "seed": "3.5"}},
    )
    assert number.status_code == 200
    assert number.content == string.content
    assert (words.status_code, whole.status_code) == (422, 422)
    assert words.json()["error"]["param"] == "speed"


@pytest.mark.parametrize(
    "path", ["/v1/audio/speech", "/v1/audio/speech/stream", "/v1/open-webui/audio/speech"]
)
@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_is_not_said_to_be_json_is_told_what_to_send(talk, path, kind):
    body = json.dumps({"input": TEXT, "voice": "neutral_male"}).encode()
    headers = {} if kind is None else {"content-type": kind}
    [answer] = _ask(talk, {"content": body, "headers": headers}, path=path)
    assert answer.status_code == 415
    message = answer.json()["error"]["message"]
    assert "send JSON with the header Content-Type: application/json" in message
    assert (kind or "missing") in message


def test_what_is_ignored_is_named_in_streams_batches_and_sessions_too(talk, serve):
    said = {"input": TEXT, "voice": "neutral_male", "instructions": "softly", **SHORT}
    stream, events = _ask(
        talk,
        {"json": {**said, "stream_format": "audio"}},
        {"json": {**said, "stream_format": "sse", "temperature": 0.5, "extra_params": {"a": 1}}},
        compatible=True,
    )
    assert stream.headers["x-revox-ignored"] == "instructions"
    assert set(events.headers["x-revox-ignored"].split(", ")) == {
        "instructions", "temperature", "extra_params.a",
    }  # fmt: skip
    items = {"items": [{"input": TEXT, "temperature": 1}, {"input": TEXT}], "voice": "neutral_male", **SHORT}
    [batch] = _ask(talk, {"json": {**items, "user": "me"}}, path="/v1/audio/speech/batch", compatible=True)
    assert batch.headers["x-revox-ignored"] == "user"
    assert [result.get("ignored") for result in batch.json()["results"]] == [["temperature"], None]

    from websockets.sync.client import connect

    with (
        serve(compatible=True) as (url, _app),
        connect(f"{url.replace('http', 'ws')}/v1/audio/speech/stream") as socket,
    ):
        config = {"voice": "neutral_male", "instructions": "softly", **SHORT}
        socket.send(json.dumps({"type": "session.config", **config}))
        socket.send(json.dumps({"type": "input.text", "text": TEXT}))
        socket.send(json.dumps({"type": "input.done"}))
        assert json.loads(socket.recv(timeout=30))["ignored"] == ["instructions"]


def test_names_of_ignored_fields_cannot_break_the_header(talk):
    odd = {
        "a\r\nx-evil: 1": 1,
        "小明": 2,
        "b,c": 3,
        "x" * 300: 4,
        **{f"f{number}": 1 for number in range(99)},
    }
    [answer] = _ask(talk, {"json": {"input": TEXT, "voice": "pt_male", **SHORT, **odd}}, compatible=True)
    assert answer.status_code == 200
    names = answer.headers["x-revox-ignored"].split(", ")
    assert names[:4] == ["a??x-evil:?1", "??", "b?c", "x" * 100]
    assert len(names) == 50
    assert "x-evil" not in answer.headers


def test_the_openai_package_speaks_its_own_sample(serve):
    import openai

    with (
        serve(compatible=True, aliases=ALIASES) as (url, _app),
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
    ):
        answer = client.audio.speech.create(
            model="gpt-4o-mini-tts", voice="coral", input=TEXT, instructions=INSTRUCTIONS, extra_body=SHORT
        )
        assert answer.response.headers["x-revox-ignored"] == "instructions"
        assert httpx.get(f"{url}/v1/models/gpt-4o-mini-tts").status_code == 200
