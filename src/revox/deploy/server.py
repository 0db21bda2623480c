"""Ask a running server what it is, which voices it has, and whether `ref_audio` works on it.

A request with `ref_audio` ends the engine of vllm-omni 0.18 to 0.28 when the checkpoint has no encoder (what
the release is), so it is sent only to a server that shows itself to be 0.30 or later; see `may_be_sent`.
Whatever answers may be slow, huge or hostile: every answer is bounded in bytes and in time, redirections are
not followed, and what is said is data, never trusted.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import socket
import threading
import wave
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from packaging.version import InvalidVersion, Version

from revox.deploy.errors import DeployError
from revox.deploy.rules import REFUSES_SINCE

MAX_BYTES = 8 << 20
ASK_SECONDS = 15.0
SPEAK_SECONDS = 120.0
MAX_VOICES = 10_000
MAX_NAME = 200

_REQUEST = "OpenAICreateSpeechRequest"
"""The name of the speech request in vllm-omni's own OpenAPI document, 0.18 to 0.30."""

WORKS, REFUSED, NOT_SENT, FAILED = "works", "refused", "not sent", "failed"


@dataclass(frozen=True)
class Answer:
    """A status and the body as bytes; `cut` if there was more than MAX_BYTES of it."""

    status: int
    body: bytes
    kind: str
    cut: bool = False

    def json(self) -> Any:
        """The body as JSON, or None if it is not (or is cut, or is nested beyond reason)."""
        try:
            return None if self.cut else json.loads(self.body)
        except (ValueError, RecursionError):
            return None


@dataclass
class ServerReport:
    """What a server said. kind: vllm-omni, vllm, revox or unknown. `ref_audio`: one of the four words above.

    version: what /version says (vllm's, for vllm-omni, whose minor is the same). voices: None if it lists
    none.
    """

    url: str
    kind: str = "unknown"
    version: str | None = None
    healthy: bool = False
    models: list[str] = field(default_factory=list)
    voices: list[str] | None = None
    ref_audio: str = NOT_SENT
    ref_audio_said: str = ""
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return dict(vars(self))


class Server:
    """A server's address, asked one thing at a time."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Raises DeployError if `url` is not http(s)://host[:port][/path] or the key cannot be a header."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise DeployError(f"{url!r} is not an address ({error}); give http://HOST:PORT.") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DeployError(f"{url!r} is not an address; give http://HOST:PORT.")
        if parts.username is not None or parts.password is not None:
            raise DeployError("an address with a password in it is not taken; put the key in a variable.")
        if any(ord(c) <= 32 or ord(c) > 126 for c in url):
            raise DeployError(f"{url!r} has characters that an address cannot have.")
        if key is not None and (not key.isascii() or not key.isprintable() or not key):
            raise DeployError("the key is empty or has characters that a header cannot have.")
        self._https = parts.scheme == "https"
        self._host, self._port = parts.hostname, port
        # The OpenAI client is given .../v1; the rest of the server is above it.
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self._path}"
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def ask(self, path: str, body: Mapping[str, Any] | None = None, seconds: float = ASK_SECONDS) -> Answer:
        """GET a path, or POST `body` as JSON to it.

        Raises:
            DeployError: there is no answer within `seconds`, all of it together, or what answers is not HTTP.
        """
        make = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        connection = make(self._host, self._port, timeout=min(seconds, ASK_SECONDS))
        late = threading.Event()
        held: list[socket.socket] = []

        def stop() -> None:
            late.set()
            for one in held:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

        # A socket's own timeout starts anew with every byte; this one is for the whole answer.
        clock = threading.Timer(seconds, stop)
        clock.daemon = True
        clock.start()
        try:
            connection.connect()
            connection.sock.settimeout(seconds)
            # Kept, since the connection lets go of it where the answer is the last one.
            held.append(connection.sock)
            # Where several addresses were tried the time may be over, and nothing was held to be shut.
            if late.is_set():
                raise TimeoutError
            sent = None if body is None else json.dumps(body).encode()
            headers = {**self._headers, **({"Content-Type": "application/json"} if sent is not None else {})}
            verb = "GET" if sent is None else "POST"
            connection.request(verb, self._path + path, sent, headers)
            response = connection.getresponse()
            read = response.read(MAX_BYTES + 1)
            if late.is_set():
                raise TimeoutError
            said = response.getheader("content-type") or ""
            return Answer(response.status, read[:MAX_BYTES], said[:MAX_NAME], len(read) > MAX_BYTES)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                raise DeployError(f"{self.url}{path} did not answer within {seconds:g} s.") from None
            raise DeployError(
                f"{self.url}{path} cannot be asked ({_plain(str(error) or type(error).__name__)}); is the "
                "server running there?"
            ) from None
        finally:
            clock.cancel()
            connection.close()


def examine_server(url: str, key: str | None = None, probe: bool = True) -> ServerReport:
    """Ask the server at `url`. `probe`: try `ref_audio` too, where that cannot harm it.

    Raises:
        DeployError: nothing answers there, or it wants a key.
    """
    server = Server(url, key)
    report = ServerReport(server.url)
    health = server.ask("/health")
    report.healthy = health.status == 200
    if not report.healthy:
        report.notes.append(f"/health answers {health.status}")
    models = server.ask("/v1/models")
    if models.status in (401, 403):
        raise DeployError(f"{server.url} wants a key; name the variable that holds it with --key-from.")
    document = _json(server, "/openapi.json", report)
    report.models = _names(models.json(), "data", "id")
    report.kind = _kind(document, models.json())
    if report.kind == "revox":
        report.version = _text(_inner(document, "info", "version"))
    else:
        report.version = _text(_json(server, "/version", report).get("version"))
    listed = _json(server, "/v1/audio/voices", report)
    if "voices" in listed:
        report.voices = _names(listed, "voices", "name")
    if report.kind == "vllm":
        report.notes.append("it has no speech endpoint: it was started without --omni")
    sendable, why = may_be_sent(report, document)
    if not sendable or not probe:
        report.ref_audio_said = why if not sendable else "not asked for"
    elif not report.healthy:
        report.ref_audio_said = "the server is not healthy"
    else:
        _try_ref_audio(server, report)
    return report


def may_be_sent(report: ServerReport, document: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether a request with `ref_audio` cannot end this server's engine, and if not why.

    Two signs are asked for, since a wrong guess ends somebody's server: /version is a release from 0.30 on
    (not a candidate, which may come before the fix of pull request 7012), and the speech request has the
    field `sample_rate`, which 0.30.0's has and 0.28.0's has not (both wheels' vllm_omni/entrypoints/openai/
    protocol/audio.py). revox's own server refuses what it cannot do.
    """
    if report.kind == "revox":
        return True, ""
    if report.kind != "vllm-omni":
        return False, "it is not known what the server would do with it"
    try:
        version = Version(report.version or "")
    except InvalidVersion:
        return False, "the server does not say its version; before 0.30 it could die of it"
    if version.release[:2] < REFUSES_SINCE or version.is_prerelease or version.epoch:
        return False, f"vllm {version}: before vllm-omni 0.30 a checkpoint without encoder dies of it"
    fields = _object(document, "components", "schemas", _REQUEST, "properties")
    if "sample_rate" not in fields:
        return False, "its speech request lacks a field of 0.30, so vllm-omni may be older than vllm"
    return True, ""


def _try_ref_audio(server: Server, report: ServerReport) -> None:
    """One short sentence in the voice of a synthetic clip; afterwards the server must still be there."""
    body = {
        "input": "One.",
        "ref_audio": "data:audio/wav;base64," + base64.b64encode(reference_clip()).decode(),
        "response_format": "wav",
        "max_new_tokens": 25,
    }
    if report.models:
        body["model"] = report.models[0]
    if report.kind == "revox":
        body["consent"] = "A synthetic test clip: nobody's voice."
    try:
        answer = server.ask("/v1/audio/speech", body, SPEAK_SECONDS)
    except DeployError as error:
        report.ref_audio, report.ref_audio_said = FAILED, str(error)
    else:
        said = _plain(answer.body[:2000].decode(errors="replace"))
        refusal = answer.json()
        told = _inner(refusal, "error", "message") or _inner(refusal, "message")
        message = _plain(told) if isinstance(told, str) else said
        if answer.status == 200 and len(answer.body) > 44 and answer.body[:4] == b"RIFF":
            report.ref_audio = WORKS
        elif answer.status == 200:
            report.ref_audio, report.ref_audio_said = FAILED, "the answer is not the sound that was asked for"
        elif 400 <= answer.status < 500:
            report.ref_audio, report.ref_audio_said = REFUSED, f"{answer.status}: {message[:500]}"
        else:
            report.ref_audio, report.ref_audio_said = FAILED, f"{answer.status}: {message[:500]}"
    try:
        if server.ask("/health").status != 200:
            report.healthy = False
    except DeployError:
        report.healthy = False
    if not report.healthy:
        report.ref_audio = FAILED
        report.notes.append("the server was healthy before the request with ref_audio and is not since")


def reference_clip(seconds: float = 3.0, rate: int = 24000) -> bytes:
    """A WAV (16 bit, mono) of a buzzing tone that rises and falls: what an encoder can take, of nobody."""
    import numpy as np

    t = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.7 * t)) / rate
    buzz = sum(np.sin(k * phase) / k for k in range(1, 9))
    samples = (6000 * (0.5 + 0.5 * np.sin(2 * np.pi * 3 * t)) * buzz).astype("<i2")
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return out.getvalue()


def _json(server: Server, path: str, report: ServerReport) -> dict[str, Any]:
    """A path's JSON object; {} and a note if there is none."""
    try:
        answer = server.ask(path)
    except DeployError as error:
        report.notes.append(str(error))
        return {}
    if answer.status == 404:
        return {}
    found = answer.json()
    if answer.status == 200 and isinstance(found, dict):
        return found
    many = f" of more than {MAX_BYTES >> 20} MiB" if answer.cut else ""
    report.notes.append(f"{path} answers {answer.status}{many}, not with a JSON object")
    return {}


def _kind(document: Mapping[str, Any], models: Any) -> str:
    if _inner(document, "info", "title") == "revox":
        return "revox"
    paths = _object(document, "paths")
    if "/v1/omni/sleep" in paths or _object(document, "components", "schemas", _REQUEST):
        return "vllm-omni"
    if any(one.get("owned_by") == "vllm" for one in _listed(models, "data")):
        # vllm's own models list; with the speech endpoint it is vllm-omni's.
        return "vllm-omni" if "/v1/audio/speech" in paths else "vllm"
    return "unknown"


def _inner(data: Any, *keys: str) -> Any:
    """What is at `keys`, where every step is an object; else {}."""
    for key in keys:
        data = data.get(key, {}) if isinstance(data, dict) else {}
    return data if data is not None else {}


def _object(data: Any, *keys: str) -> dict[str, Any]:
    """The object at `keys`, or {}."""
    found = _inner(data, *keys)
    return found if isinstance(found, dict) else {}


def _listed(data: Any, key: str) -> list[dict[str, Any]]:
    found = _inner(data, key)
    return [one for one in found[:MAX_VOICES] if isinstance(one, dict)] if isinstance(found, list) else []


def _names(data: Any, key: str, name: str) -> list[str]:
    """Names in a list of strings or of objects with one; odd entries are left out."""
    found = _inner(data, key)
    entries = found[:MAX_VOICES] if isinstance(found, list) else []
    names = [_text(one.get(name) if isinstance(one, dict) else one) for one in entries]
    return [one for one in names if one]


def _text(value: Any) -> str | None:
    return _plain(value)[:MAX_NAME] if isinstance(value, str) and value else None


def _plain(text: str) -> str:
    """On one line, without characters that a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text).strip()
