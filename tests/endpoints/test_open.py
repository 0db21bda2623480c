"""How an endpoint is named, and what is found out about it."""

from __future__ import annotations

import pytest

from revox.deploy.server import ServerReport
from revox.endpoints import EndpointError, open_endpoints
from revox.endpoints.open import EndpointAddress, parse_address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://a:1", EndpointAddress(None, "http://a:1")),
        ("vllm-omni=http://a:1/v1", EndpointAddress("vllm-omni", "http://a:1/v1")),
        ("kokoro=https://a#tts", EndpointAddress("kokoro", "https://a", model="tts")),
        ("mistral", EndpointAddress("mistral", "https://api.mistral.ai")),
        ("mistral#x", EndpointAddress("mistral", "https://api.mistral.ai", model="x")),
        ("mistral=http://proxy", EndpointAddress("mistral", "http://proxy")),
        ("owner/name", EndpointAddress("checkpoint", None, "owner/name")),
        ("./a=b/c", EndpointAddress("checkpoint", None, "./a=b/c")),
        ("checkpoint=a=b", EndpointAddress("checkpoint", None, "a=b")),
    ],
)  # fmt: skip
def test_an_endpoint_is_named_by_kind_address_and_model(text, expected):
    assert parse_address(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kokorro=http://a", "not a kind"),
        ("kokoro=a", "not an address"),
        ("kokoro", None),
        ("localhost:8000/v1", "lacks a scheme"),
        ("checkpoint=http://a", "not a checkpoint"),
        ("", "names no endpoint"),
    ],
)
def test_other_names_are_a_sentence(text, message):
    if message is None:  # a folder may be called like a kind
        assert parse_address(text).checkpoint == text
        return
    with pytest.raises(EndpointError, match=message):
        parse_address(text)


@pytest.fixture
def servers(monkeypatch):
    """Reports of servers by address, in the place of asking them; and the keys that they were asked with."""
    reports, asked = {}, {}

    def examine(url, key=None, probe=True):
        assert not probe
        asked[url] = key
        return reports[url]

    monkeypatch.setattr("revox.deploy.server.examine_server", examine)
    return reports, asked


@pytest.mark.parametrize(
    ("report", "kind"),
    [
        (dict(kind="revox", title="revox", models=["lab"]), "revox"),
        (dict(kind="vllm-omni", models=["mistralai/Voxtral-4B-TTS-2603"]), "vllm-omni"),
        (dict(kind="vllm-omni", models=["Qwen/Qwen3-TTS-12Hz-1.7B-Base"]), "qwen3-tts"),
        (dict(kind="vllm-omni", models=["fishaudio/s2-pro"]), "fish-s2-pro"),
        (dict(kind="vllm-omni", models=["openbmb/VoxCPM2"]), "voxcpm2"),
        (dict(title="sglang-omni"), "sglang-omni"),
        (dict(title="Kokoro TTS API"), "kokoro"),
        (dict(title="Chatterbox TTS Server"), "chatterbox"),
        (dict(), "openai"),
    ],
)
def test_a_server_is_asked_what_it_is(servers, report, kind):
    servers[0]["http://a:1"] = ServerReport("http://a:1", **report)
    (one,) = open_endpoints(["http://a:1"])
    assert (one.kind, one.name) == (kind, "a:1")
    assert one.facts()["model"] == next(iter(report.get("models", [])), one.adapter.model or "its own")
    one.close()


def test_a_key_goes_to_its_own_endpoint_only(servers, monkeypatch):
    reports, asked = servers
    reports["http://a:1"] = ServerReport("http://a:1", kind="revox")
    reports["http://b:1"] = ServerReport("http://b:1", kind="revox")
    monkeypatch.setenv("KEY", "one")
    monkeypatch.setenv("MISTRAL_API_KEY", "two")
    for one in open_endpoints(["http://a:1", "http://b:1", "mistral"], ["http://a:1=KEY"]):
        one.close()
    assert asked == {"http://a:1": "one", "http://b:1": None}
    with pytest.raises(EndpointError, match="whose key"):
        open_endpoints(["http://a:1", "http://b:1"], ["KEY"])
    with pytest.raises(EndpointError, match="not one of the endpoints"):
        open_endpoints(["http://a:1"], ["http://b:1=KEY"])
    monkeypatch.delenv("MISTRAL_API_KEY")
    with pytest.raises(EndpointError, match="MISTRAL_API_KEY is not set"):
        open_endpoints(["mistral"])


@pytest.mark.parametrize(
    ("address", "sent"),
    [
        ("mistral=http://proxy:9000", None),
        ("mistral=http://api.mistral.ai", None),
        ("mistral=https://api.mistral.ai.example", None),
        ("mistral=https://api.mistral.ai/v1", "Bearer two"),
    ],
)
def test_the_key_of_a_hosted_api_goes_to_its_own_address_only(monkeypatch, address, sent):
    monkeypatch.setenv("MISTRAL_API_KEY", "two")
    monkeypatch.setenv("PROXY_KEY", "three")
    for keys, expected in (((), sent), (("PROXY_KEY",), "Bearer three")):
        (one,) = open_endpoints([address], keys)
        assert one._client.headers.get("authorization") == expected
        one.close()


def test_equal_names_are_numbered(servers):
    servers[0]["http://a:1"] = ServerReport("http://a:1", kind="revox")
    opened = open_endpoints(["http://a:1#x", "http://a:1#y", "http://a:1#z"])
    assert [one.name for one in opened] == ["a:1", "a:1 (2)", "a:1 (3)"]
    for one in opened:
        one.close()


def test_a_server_that_does_not_answer_is_a_sentence():
    with pytest.raises(EndpointError, match="is the server running"):
        open_endpoints(["http://127.0.0.1:9"])


def test_a_checkpoint_speaks_without_a_server(tiny_checkpoint):
    from revox.endpoints import SpeechQuery

    (one,) = open_endpoints([str(tiny_checkpoint)])
    assert one.max_streams == 1
    voice = one.voices()[0]
    whole = one.speak(SpeechQuery("Hello.", voice, seed=1))
    stream = one.speak(SpeechQuery("Hello.", voice, seed=1, stream=True))
    assert whole.ok and stream.ok  # noqa: PT018
    assert whole.audio().rate == stream.audio().rate == one.rate
    assert stream.first_audio <= stream.seconds
    refused = one.speak(SpeechQuery("Hello.", "nobody"))
    assert refused.status == 400
    assert "nobody" in refused.message
