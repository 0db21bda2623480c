"""A running server is asked what it is; `ref_audio` goes only to one that shows it will not die of it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from revox.deploy.errors import DeployError
from revox.deploy.server import (
    ASK_SECONDS,
    FAILED,
    MAX_BYTES,
    NOT_SENT,
    REFUSED,
    SPEAK_SECONDS,
    WORKS,
    ServerClient,
    examine_server,
    reference_clip,
)

WAV = reference_clip(0.1)
REFUSAL = {
    "error": {"message": "Voice cloning with 'ref_audio' requires the full Voxtral checkpoint" + 300 * "!"}
}
MODELS = {"object": "list", "data": [{"id": "voxtral", "owned_by": "vllm"}]}
VOICES = {"voices": ["ada", "neutral_male"], "uploaded_voices": []}


def document(of_030: bool = True, title: str = "FastAPI") -> dict[str, Any]:
    """What of vllm-omni's OpenAPI document is looked at, as 0.30.0's and 0.28.0's are."""
    fields = {"input": {}, "ref_audio": {}, **({"sample_rate": {}} if of_030 else {})}
    return {
        "info": {"title": title, "version": "0.1.0"},
        "paths": {"/v1/omni/sleep": {}, "/v1/audio/speech": {}},
        "components": {"schemas": {"OpenAICreateSpeechRequest": {"properties": fields}}},
    }


class Fake:
    """A server with canned answers that keeps what it was asked."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.spoken: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.done = threading.Event()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked.append(handler.path)
        self.keys.append(handler.headers.get("authorization"))
        length = int(handler.headers.get("content-length") or 0)
        if length:
            self.spoken.append(json.loads(handler.rfile.read(length)))
        found = self.answers.get(handler.path, (404, {"detail": "Not Found"}))
        if callable(found):
            found = found(handler, self)
            if found is None:
                return
        status, body = found if isinstance(found, tuple) else (200, found)
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(raw)))
        handler.end_headers()
        handler.wfile.write(raw)


@contextmanager
def serving(answers: dict[str, Any]) -> Iterator[tuple[str, Fake]]:
    fake = Fake(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fake.answer(self)

        def do_POST(self) -> None:
            fake.answer(self)

        def log_message(self, *args: object) -> None: ...

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: object) -> None: ...

    server = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fake
    finally:
        fake.done.set()
        server.shutdown()
        server.server_close()


def omni(
    version: str = "0.30.0", of_030: bool = True, speech: Any = (400, REFUSAL), **others: Any
) -> dict[str, Any]:
    return {
        "/health": (200, b""),
        "/version": {"version": version},
        "/v1/models": MODELS,
        "/openapi.json": document(of_030),
        "/v1/audio/voices": VOICES,
        "/v1/audio/speech": speech,
        **others,
    }


def test_a_server_of_030_is_told_by_what_it_says_and_asked_whether_ref_audio_works():
    with serving(omni()) as (url, fake):
        report = examine_server(url)
    assert (report.kind, report.version, report.healthy) == ("vllm-omni", "0.30.0", True)
    assert (report.models, report.voices) == (["voxtral"], ["ada", "neutral_male"])
    assert report.ref_audio == REFUSED
    assert report.ref_audio_message == f"400: {REFUSAL['error']['message']}"
    assert len(fake.spoken) == 1


def test_a_server_with_an_encoder_works():
    with serving(omni(speech=(200, WAV))) as (url, fake):
        assert examine_server(url).ref_audio == WORKS
    sent = fake.spoken[0]
    header, _, data = sent["ref_audio"].partition(",")
    assert header == "data:audio/wav;base64"
    with wave.open(io.BytesIO(base64.b64decode(data))) as clip:
        # vllm-omni takes 1 to 30 s (serving_speech.py, _REF_AUDIO_MIN_DURATION and _MAX_DURATION).
        assert 1 <= clip.getnframes() / clip.getframerate() <= 30
    assert sent["model"] == "voxtral"
    assert "voice" not in sent
    assert 1 <= sent["max_new_tokens"] <= 4096


CRASHING = [
    *((version, False) for version in ("0.18.0", "0.20.0", "0.22.1", "0.24.0", "0.26.0", "0.28.0")),
    ("0.29.0", True),
    ("0.30.0rc1", True),
    ("0.30.0.dev3+g1234", True),
    ("0.30.0", False),
    ("1!0.30.0", True),
    ("dev", True),
    ("", True),
    (None, True),
    (30, True),
]


@pytest.mark.parametrize(("version", "of_030"), CRASHING)
def test_ref_audio_is_never_sent_where_it_could_crash_the_server(version, of_030):
    def crash(handler: BaseHTTPRequestHandler, fake: Fake) -> None:
        raise AssertionError("the engine is dead")

    answers = omni(of_030=of_030, speech=crash) | {"/version": {"version": version}}
    with serving(answers) as (url, fake):
        report = examine_server(url)
    assert fake.spoken == []
    assert "/v1/audio/speech" not in fake.asked
    assert report.ref_audio == NOT_SENT
    assert report.ref_audio_message
    assert report.healthy


@pytest.mark.parametrize("missing", ["/version", "/openapi.json"])
def test_a_server_that_hides_what_it_is_is_not_sent_ref_audio(missing):
    with serving(omni(**{missing: (404, {})})) as (url, fake):
        assert examine_server(url).ref_audio == NOT_SENT
    assert fake.spoken == []


def test_a_sick_server_and_one_that_shall_not_be_probed_are_not_sent_ref_audio():
    with serving(omni(**{"/health": (503, b"")})) as (url, fake):
        report = examine_server(url)
        assert (report.healthy, report.ref_audio, fake.spoken) == (False, NOT_SENT, [])
    with serving(omni()) as (url, fake):
        assert examine_server(url, probe=False).ref_audio == NOT_SENT
        assert fake.spoken == []


@pytest.mark.parametrize("after", [503, None], ids=["sick", "gone"])
def test_a_server_that_dies_of_it_all_the_same_is_said_to_have_died(after):
    dead = threading.Event()

    def speech(handler: BaseHTTPRequestHandler, fake: Fake) -> tuple[int, Any]:
        dead.set()
        return 500, {"error": {"message": "EngineDeadError"}}

    def health(handler: BaseHTTPRequestHandler, fake: Fake) -> tuple[int, Any] | None:
        if not dead.is_set():
            return 200, b""
        return None if after is None else (after, b"")

    with serving(omni(speech=speech, **{"/health": health})) as (url, _):
        report = examine_server(url)
    assert (report.ref_audio, report.healthy) == (FAILED, False)
    assert "EngineDeadError" in report.ref_audio_message
    assert any("is not since" in note for note in report.notes)


@pytest.mark.parametrize("status", [400, 500])
@pytest.mark.parametrize("body", [b"\x1b[2Jno\n" + b"x" * 5000, {"message": "\x1b[2Jno\n" + "x" * 5000}])
def test_what_a_server_says_of_ref_audio_is_one_short_line_that_no_terminal_obeys(status, body):
    with serving(omni(speech=(status, body))) as (url, _):
        report = examine_server(url)
    assert report.ref_audio == (REFUSED if status == 400 else FAILED)
    assert report.ref_audio_message.startswith(f"{status}: [2Jno x")
    assert report.ref_audio_message.isprintable()
    assert len(report.ref_audio_message) < 520


@pytest.mark.parametrize("answer", [(200, b""), (200, {"ok": True}), (200, b"RIFF"), (502, b"bad gateway")])
def test_an_answer_that_is_no_sound_is_no_success(answer):
    with serving(omni(speech=answer)) as (url, _):
        assert examine_server(url).ref_audio == FAILED


def test_revoxs_own_server_is_known_and_given_a_consent():
    answers = omni(speech=(200, WAV)) | {"/openapi.json": document(title="revox")}
    del answers["/version"]
    with serving(answers) as (url, fake):
        report = examine_server(url)
    assert (report.kind, report.version, report.ref_audio) == ("revox", "0.1.0", WORKS)
    assert fake.spoken[0]["consent"]


def test_plain_vllm_is_told_from_vllm_omni():
    plain = {"info": {"title": "FastAPI"}, "paths": {"/v1/chat/completions": {}}}
    with serving(omni(**{"/openapi.json": plain, "/v1/audio/voices": (404, {})})) as (url, fake):
        report = examine_server(url)
    assert (report.kind, report.voices, fake.spoken) == ("vllm", None, [])
    assert any("--omni" in note for note in report.notes)


def test_a_web_server_that_is_none_of_them_is_unknown():
    with serving({}) as (url, fake):
        report = examine_server(url)
    assert (report.kind, report.healthy, report.ref_audio) == ("unknown", False, NOT_SENT)
    assert report.ref_audio_message == "it is not known what the server would do with it"
    assert fake.spoken == []


def test_the_key_goes_with_every_request_and_its_lack_is_a_sentence():
    with serving(omni()) as (url, fake):
        examine_server(url + "/v1/", "secret")
    assert set(fake.keys) == {"Bearer secret"}
    with (
        serving(omni(**{"/v1/models": (401, {})})) as (url, _),
        pytest.raises(DeployError, match="--key-from"),
    ):
        examine_server(url)


def test_a_redirection_is_not_followed():
    with serving(omni()) as (elsewhere, other):

        def redirect(handler: BaseHTTPRequestHandler, fake: Fake) -> None:
            handler.send_response(307)
            handler.send_header("location", elsewhere + handler.path)
            handler.send_header("content-length", "0")
            handler.end_headers()

        with serving(dict.fromkeys(omni(), redirect)) as (url, _):
            report = examine_server(url, "secret")
    assert other.asked == []
    assert report.kind == "unknown"


HOSTILE = {
    "a list": [1, 2],
    "null": None,
    "a number": 3,
    "text": "hello",
    "nested": b"[" * 200_000,
    "not UTF-8": b"\xff\xfe{",
    "NaN": b"NaN",
    "empty": b"",
    "wrong insides": {
        "info": 3, "paths": 4, "components": [], "data": {"a": 1}, "voices": "abc", "version": {"x": []},
    },
    "odd entries": {
        "data": [None, 3, {"id": 4}, {"id": "\x1b[2Jevil\n" + "x" * 1000}],
        "voices": [None, 1, {"name": ["a"]}, "a\x07"],
        "paths": ["/v1/omni/sleep"], "components": {"schemas": 7}, "version": "\x1b[31m0.30.0",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_odd_answers_everywhere_neither_break_it_nor_get_ref_audio_sent(kind):
    with serving(dict.fromkeys(omni(), HOSTILE[kind])) as (url, fake):
        report = examine_server(url)
    assert fake.spoken == []
    assert report.ref_audio == NOT_SENT
    said = [
        *report.models,
        *(report.voices or []),
        *report.notes,
        report.version or "",
        report.ref_audio_message,
    ]
    assert all(text.isprintable() for text in said)
    assert all(len(name) <= 200 for name in report.models)


def drip(first: bytes, piece: bytes) -> Callable[[BaseHTTPRequestHandler, Fake], None]:
    """Sends `first`, then `piece` again and again with pauses, for 5 s or until the test is over."""

    def send(handler: BaseHTTPRequestHandler, fake: Fake) -> None:
        handler.wfile.write(first)
        for _ in range(250):
            if fake.done.wait(0.02):
                break
            handler.wfile.write(piece)
            handler.wfile.flush()

    return send


@pytest.mark.parametrize(
    ("first", "piece"),
    [
        (b"", b""),
        (b"HTTP/1.1 200 OK\r\nx: ", b"x"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n{", b" "),
        (b"HTTP/1.0 200 OK\r\n\r\n{", b" "),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    ],
)
def test_a_server_that_drips_is_given_up_when_the_time_is_over(first, piece):
    with (
        serving({"/health": drip(first, piece)}) as (url, _),
        pytest.raises(DeployError, match="did not answer"),
    ):
        ServerClient(url).ask("/health", seconds=0.3)


def test_time_that_is_over_before_the_connection_stands_is_over():
    with serving(omni()) as (url, fake), pytest.raises(DeployError, match="did not answer"):
        ServerClient(url).ask("/health", seconds=0)
    assert fake.asked == []


def test_speaking_is_given_minutes_and_a_question_seconds(monkeypatch):
    given: dict[str, set[float]] = {}
    ask = ServerClient.ask

    def asked(self: ServerClient, path: str, body: Any = None, seconds: float = ASK_SECONDS) -> Any:
        given.setdefault(path, set()).add(seconds)
        return ask(self, path, body, seconds)

    monkeypatch.setattr(ServerClient, "ask", asked)
    with serving(omni()) as (url, _):
        examine_server(url)
    assert given.pop("/v1/audio/speech") == {SPEAK_SECONDS}
    assert set.union(*given.values()) == {ASK_SECONDS}
    assert ASK_SECONDS <= 30 < SPEAK_SECONDS <= 300


def test_connecting_is_given_up_sooner_than_speaking(monkeypatch):
    async def connect(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("anyio.connect_tcp", connect)
    monkeypatch.setattr("revox.deploy.server.ASK_SECONDS", 0.05)
    begun = time.monotonic()
    with pytest.raises(DeployError, match="did not answer within 100 s"):
        ServerClient("http://a").ask("/health", seconds=100)
    assert time.monotonic() - begun < 15


def test_a_huge_answer_is_read_to_its_bound_and_not_believed():
    sent = [0]

    def huge(handler: BaseHTTPRequestHandler, fake: Fake) -> None:
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n{")
        while not fake.done.is_set():
            handler.wfile.write(b" " * 65536)
            sent[0] += 65536

    with serving({"/health": huge}) as (url, _):
        answer = ServerClient(url).ask("/health")
    assert (len(answer.body), answer.cut, answer.json()) == (MAX_BYTES, True, None)
    # What was read, and what the system holds on the way.
    assert sent[0] < 3 * MAX_BYTES


@pytest.mark.parametrize(
    "said", [b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 OK\r\n\r\n", b"\x00" * 100 + b"\r\n\r\n"]
)
def test_what_does_not_speak_http_is_a_sentence(said):
    answers = {"/health": lambda handler, fake: handler.wfile.write(said) and None}
    with serving(answers) as (url, _), pytest.raises(DeployError, match="cannot be asked"):
        ServerClient(url).ask("/health", seconds=5)


def test_nobody_there_is_a_sentence():
    with serving({}) as (url, _):
        pass
    with pytest.raises(DeployError, match="is the server running there"):
        examine_server(url)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a", "http://", "http://a:port", "http://a:99999", "http://user:word@a", "http://a/\r\nx: y",
        "http://a b", "http://[::1", "file:///etc/passwd",
    ],
)  # fmt: skip
def test_addresses_that_cannot_be_are_sentences(url):
    with pytest.raises(DeployError):
        ServerClient(url)


@pytest.mark.parametrize("key", ["", "a\r\nx: y", "schlüssel"])
def test_keys_that_cannot_be_a_header_are_sentences(key):
    with pytest.raises(DeployError, match="key"):
        ServerClient("http://a", key)
