from __future__ import annotations

import json
import socket

import httpx
import numpy as np
import pytest
from websockets.sync.client import connect

SAID = {"input": "Hello.", "voice": "neutral_male", "seed": 3, "max_new_tokens": 3, "response_format": "pcm"}

BODIES = [
    b"", b"{", b"null", b"[]", b"3", b'"x"', b"\xff\xfe\x00", b'{"input": NaN}', b"[" * 100_000,
    b'{"input": "a", "voice": "neutral_male", "input": ["b"]}',
    json.dumps({"input": "\ud800", "voice": "neutral_male"}).encode(),
    json.dumps({"input": "a", "voice": "\ud800"}).encode(),
]  # fmt: skip
FIELDS = [
    {"input": None}, {"input": 3}, {"input": ["a"]}, {"input": {"text": "a"}}, {"input": True},
    {"voice": 3}, {"voice": ["a"]}, {"voice": {}}, {"voice": {"id": 3}}, {"voice": {"id": "x", "more": 1}},
    {"voice": "../../etc/passwd"}, {"voice": "x" * 10_000}, {"voice": "\x00"}, {"voice": "{0}%s"},
    {"response_format": "exe"}, {"response_format": 3}, {"response_format": None}, {"response_format": "WAV"},
    {"speed": 0}, {"speed": 0.24}, {"speed": 4.1}, {"speed": -1}, {"speed": "fast"}, {"speed": 1e400},
    {"speed": True}, {"seed": 2**63}, {"seed": -(2**63) - 1}, {"seed": 1.5},
    {"seed": "1x"}, {"seed": "9" * 5000}, {"speed": "nan"}, {"speed": "1e99"}, {"speed": "0x1"},
    {"speed": "-inf"}, {"seed": "1_0"}, {"extra_params": {"cfg_alpha": "nan"}}, {"seed": 10**400},
    {"max_new_tokens": 0}, {"max_new_tokens": -1}, {"max_new_tokens": 2**62}, {"max_new_tokens": 1.5},
    {"max_new_tokens": False}, {"sample_rate": 0}, {"sample_rate": -8000}, {"sample_rate": 2**40},
    {"sample_rate": 22051}, {"stream": "yes"}, {"stream_format": "wav"}, {"initial_codec_chunk_frames": 0},
    {"initial_codec_chunk_frames": 10**9, "stream": True}, {"model": 3}, {"model": "x" * 100_000},
    {"ref_audio": 3}, {"ref_audio": ["a", "b"]}, {"ref_audio": ""}, {"ref_audio": "a"},
    {"voice": None, "ref_audio": "data:audio/wav;base64,AAAA"},
    {"voice": None, "ref_audio": "file:///etc/passwd"},
    {"voice": None, "ref_audio": "http://127.0.0.1:1/"}, {"voice": None, "ref_audio": "data:,"},
    {"voice": None, "ref_audio": "base64" * 1000}, {"consent": 3}, {"consent": "x" * 5000},
    {"instructions": "{evil}"}, {"language": 3}, {"task_type": ["Base"]}, {"task_type": "VoiceDesign"},
    {"extra_params": {"__class__": 1}}, {"__proto__": {}}, {"": 1}, {"x" * 1000: 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def spoken(tts):
    samples = tts.speak("Hello.", "neutral_male", seed=3, takes=1, max_seconds=0.24).samples
    return np.clip(np.rint(samples * 32768), -32768, 32767).astype("<i2").tobytes()


def _is_openai_error(answer):
    error = answer.json()["error"]
    return set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)


def test_no_request_ends_the_engine_or_tells_of_the_inside(serve, spoken, caplog):
    with serve(max_body_bytes=1 << 20) as (url, _app), httpx.Client(base_url=url, timeout=30) as client:
        headers = {"content-type": "application/json"}
        for path in ("/v1/audio/speech", "/v1/audio/speech/stream", "/v1/audio/speech/batch"):
            for body in BODIES:
                answer = client.post(path, content=body, headers=headers)
                assert answer.status_code in (400, 404, 422), (path, body[:80], answer.text[:300])
                assert _is_openai_error(answer)
        for change in FIELDS:
            # Python writes an infinity as JSON that is none.
            answer = client.post("/v1/audio/speech", content=json.dumps({**SAID, **change}), headers=headers)
            assert answer.status_code in (400, 403, 404, 422), (str(change)[:80], answer.text[:300])
            assert _is_openai_error(answer)
            assert "Traceback" not in answer.text
        # In a batch null is "as for all".
        items = [{**SAID, **change} for change in FIELDS[:32] if change != {"response_format": None}]
        batch = client.post(
            "/v1/audio/speech/batch", content=json.dumps({"items": [*items, SAID]}), headers=headers
        )
        assert batch.json()["succeeded"] == 1
        for method, path in (
            ("PUT", "/v1/audio/speech"), ("DELETE", "/v1/models"), ("GET", "/v1/audio/speech"),
            ("GET", "/../../etc/passwd"), ("GET", "/v1/%00"), ("POST", "/v1/nothing"),
            ("GET", "/v1/models/%2e%2e"),
        ):  # fmt: skip
            answer = client.request(method, path)
            assert answer.status_code in (404, 405)
            assert _is_openai_error(answer)
        big = client.post("/v1/audio/speech", content=b"x" * (1 << 20) + b"x", headers=headers)
        assert (big.status_code, big.json()["error"]["code"]) == (413, "body_too_large")

        def unannounced():
            for _ in range(20):
                yield b" " * (1 << 17)

        answer = client.post("/v1/audio/speech", content=unannounced(), headers=headers)
        assert answer.status_code == 413
        _garbage(url)
        assert client.post("/v1/audio/speech", json=SAID).content == spoken
        assert "Traceback" not in caplog.text


def _garbage(url):
    host, port = url.removeprefix("http://").split(":")
    for sent in (b"\x16\x03\x01\x00", b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/audio/speech HTTP/1.1\r\n" * 3):
        with socket.create_connection((host, int(port)), timeout=10) as line:
            line.sendall(sent)


MESSAGES = [
    "", "{", "3", "null", "[]", b"\x00\x01", "[" * 100_000, '{"type": 3}', '{"type": "audio.start"}',
    '{"type": "input.text"}', '{"type": "input.text", "text": 3}',
    '{"type": "input.text", "text": "\\ud800"}',
    '{"type": "session.config", "voice": "nobody"}', '{"type": "session.config", "speed": 9}',
    '{"type": "session.config", "voice": "neutral_male", "stream_audio": true}',
    '{"type": "session.config", "voice": "neutral_male", "split_granularity": "word"}',
    '{"type": "session.config", "voice": "neutral_male", "instructions": "x"}',
]  # fmt: skip


def test_no_message_ends_a_session_that_was_begun_well(serve, spoken):
    with serve() as (url, _app):
        address = url.replace("http", "ws") + "/v1/audio/speech/stream"
        for message in MESSAGES:  # as the first one: an error, and the end
            with connect(address) as session:
                session.send(message)
                assert json.loads(session.recv(timeout=20))["type"] == "error"
        config = {k: v for k, v in SAID.items() if k != "input"}
        with connect(address) as session:
            session.send(json.dumps({"type": "session.config", **config}))
            for message in MESSAGES:
                session.send(message)
                assert json.loads(session.recv(timeout=20))["type"] == "error", message
            session.send('{"type": "input.text", "text": "Hello."}')
            session.send('{"type": "input.done"}')
            assert json.loads(session.recv(timeout=20))["type"] == "audio.start"
            assert session.recv(timeout=20) == spoken
