from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from revox.serving.settings import ServeSettings, settings_from

LONG = {"input": "Good evening, doctor.", "voice": "hi_female", "seed": 0, "response_format": "pcm"}


@pytest.mark.parametrize("asked", [{"stream_format": "audio"}, {"stream": True}, {}])
def test_whoever_hangs_up_frees_the_place(serve, held, until, asked):
    body = {**LONG, "max_new_tokens": 2000, **asked}

    def tasks():
        return re.findall(r"^revox_tasks (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)

    with serve(max_streams=1) as (url, app):
        engine, before = app.state.revox.engine, tasks()
        address = ("127.0.0.1", httpx.URL(url).port)
        with held(engine, 20) as go, socket.create_connection(address, timeout=30) as client:
            data = json.dumps(body).encode()
            head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
            client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
            until(lambda: engine.active == 1, "it is being spoken")
            (stream,) = engine._active
            if asked:
                assert client.recv(64).startswith(b"HTTP/1.1 200")
            client.close()
            until(lambda: stream.cancelled, "the server has noticed", seconds=10)
            go.set()
            until(lambda: engine.active == 0 and engine.waiting == 0, "its place is free", seconds=10)
        assert stream.frames < 2000
        until(lambda: tasks() == before, "no task is left of it", seconds=10)
        again = httpx.post(f"{url}/v1/audio/speech", json={**LONG, "max_new_tokens": 2}, timeout=30)
        assert len(again.content) == 2 * 3840


def test_a_reader_who_does_not_read_holds_up_nobody(serve, until):
    with serve(lead_frames=8) as (url, app):
        engine = app.state.revox.engine
        body = {**LONG, "max_new_tokens": 40, "stream_format": "audio"}
        with (
            httpx.Client(timeout=30) as slow,
            slow.stream("POST", f"{url}/v1/audio/speech", json=body) as answer,
        ):
            for _ in range(2):
                other = httpx.post(f"{url}/v1/audio/speech", json={**LONG, "max_new_tokens": 3}, timeout=30)
                assert len(other.content) == 3 * 3840
            assert len(answer.read()) == 40 * 3840
        until(lambda: engine.active == 0, "nobody speaks")


def test_a_raw_stream_that_fails_half_way_is_no_complete_answer(serve, monkeypatch):
    with serve() as (url, app):
        engine = app.state.revox.engine
        real = engine._decode

        def decoded(due):
            if any(stream.decoded for stream in due):
                raise RuntimeError("a broken codec")
            return real(due)

        monkeypatch.setattr(engine, "_decode", decoded)
        body = {**LONG, "max_new_tokens": 12, "stream_format": "audio"}
        with (
            httpx.Client(timeout=30) as client,
            client.stream("POST", f"{url}/v1/audio/speech", json=body) as answer,
        ):
            assert answer.status_code == 200
            with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
                answer.read()


def test_a_full_queue_is_a_429_with_retry_after(serve, held):
    with serve(max_streams=1, max_queue=0) as (url, app), held(app.state.revox.engine, 20):
        body = {**LONG, "max_new_tokens": 2000, "stream_format": "audio"}
        with httpx.Client(timeout=30) as client, client.stream("POST", f"{url}/v1/audio/speech", json=body):
            refused = httpx.post(f"{url}/v1/audio/speech", json=LONG, timeout=30)
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) >= 1


def test_revox_serve_speaks_and_on_sigterm_finishes_what_it_has_begun(tiny_checkpoint, tmp_path, until):
    command = [
        sys.executable, "-m", "revox", "serve", str(tiny_checkpoint), "--port", "0", "--device", "cpu",
        "--voices-folder", str(tmp_path / "voices"), "--no-marking",
        "--allow-host", "tts.example.org", "--allow-host", "speech.example.org",
    ]  # fmt: skip
    log = tmp_path / "log"
    with log.open("wb") as file:
        server = subprocess.Popen(command, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        until(lambda: "API" in log.read_text() or server.poll() is not None, "it greets", 120)
        found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        assert found, log.read_text()
        url = found[0]
        body = {**LONG, "max_new_tokens": 12, "stream_format": "audio"}
        with httpx.Client(timeout=60) as client:
            client.get(f"{url}/ready").raise_for_status()
            named = {
                host: client.get(f"{url}/v1/models", headers={"Host": f"{host}.example.org"}).status_code
                for host in ("tts", "speech", "evil")
            }
            assert named == {"tts": 200, "speech": 200, "evil": 403}
            with client.stream("POST", f"{url}/v1/audio/speech", json=body) as answer:
                pieces = answer.iter_raw()
                data = next(pieces)
                server.send_signal(signal.SIGTERM)
                data += b"".join(pieces)
        assert len(data) == 12 * 3840
        assert server.wait(60) == 0
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health")
        assert "Traceback" not in log.read_text()
    finally:
        server.kill()


def test_the_defaults_are_the_safe_choices():
    settings = ServeSettings(checkpoint="x")
    assert settings.host == "127.0.0.1"
    assert not settings.allow_urls
    assert settings.allowed_folder is None
    assert settings.cors_origins == ()
    assert not settings.keep_samples
    assert settings.marking


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("port", 70000),
        ("method", "magic"),
        ("max_streams", 0),
        ("consent_statement", "..."),
        ("model_name", "../../etc"),
        ("model_name", "/etc"),
        ("nothing", 1),
    ],
)
def test_an_option_that_cannot_be_is_a_sentence_that_names_it(option, value):
    from revox.serving.errors import ServeError

    with pytest.raises(ServeError, match=f"--{option.replace('_', '-')} "):
        settings_from(checkpoint="x", **{option: value})


@pytest.mark.parametrize("host", ["https://a.example", "a.example:8000", "a b", ""])
def test_a_name_with_anything_beside_it_is_refused(host):
    from revox.serving.errors import ServeError

    with pytest.raises(ServeError, match=r"--allow-host .* expected a host name"):
        settings_from(checkpoint="x", allowed_hosts=("tts.example.org", host))


@pytest.mark.parametrize("origin", ["https://a.example/", "a.example", "https://a b", ""])
def test_an_origin_that_no_browser_sends_is_refused(origin):
    from revox.serving.errors import ServeError

    with pytest.raises(ServeError, match=r"--cors-origin .* expected an origin"):
        settings_from(checkpoint="x", cors_origins=("https://good.example", origin))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "a" * 70], "cannot listen on"),
        (["--port", "0", "--api-keys", "nowhere.json"], "nowhere.json cannot be read"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence_before_the_checkpoint_is_read(
    options, said, capsys, monkeypatch
):
    from revox.cli.main import main

    monkeypatch.setattr(sys, "argv", ["revox", "serve", "no/such/checkpoint", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert said in told
    assert "checkpoint" not in told


def test_a_certificate_that_cannot_sign_ends_the_start_with_a_sentence(tts, settings, tmp_path):
    from revox.marking.errors import MarkError
    from revox.serving.app import create_app

    chosen = settings(marking=True, sign_certificate=tmp_path / "none.pem", sign_key=tmp_path / "none.key")
    with pytest.raises(MarkError, match=r"none\.pem"):
        create_app(chosen, tts)


def test_a_thread_that_is_not_there_is_told_by_health(talk):
    async def dialogue(client, app):
        await asyncio.to_thread(app.state.revox.engine.close)
        answers = [await client.get(path) for path in ("/health", "/ready")]
        return [*answers, await client.post("/v1/audio/speech", json=LONG)]

    assert [answer.status_code for answer in talk(dialogue)] == [503, 503, 503]
