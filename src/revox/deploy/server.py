"""Ask a running server what it is, which voices it has, and whether `ref_audio` works on it.

A request with `ref_audio` stops the engine of a vllm-omni before 0.30 if the checkpoint has no encoder (as
released), so it is sent only to a server that proves to be 0.30 or later; see `ref_audio_is_safe`. Answers
may be slow, huge or hostile: each is limited in bytes and time, redirects are not followed, and the content
is treated as data.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2
from packaging.version import InvalidVersion, Version

from revox.deploy.errors import DeployError
from revox.deploy.facts import OLDEST

MAX_BYTES = 8 << 20
ASK_SECONDS = 15.0
SPEAK_SECONDS = 120.0
MAX_VOICES = 10_000
MAX_NAME = 200

_REQUEST = "OpenAICreateSpeechRequest"
"""The name of the speech request in vllm-omni's own OpenAPI document."""

WORKS, REFUSED, NOT_SENT, FAILED = "works", "refused", "not sent", "failed"


@dataclass(frozen=True)
class Answer:
    """A status and the body; `cut` if the body was longer than MAX_BYTES."""

    status: int
    body: bytes
    cut: bool = False

    def json(self) -> Any:
        """The body as JSON; None if it is not JSON (or is cut, or nested too deeply)."""
        try:
            return None if self.cut else json.loads(self.body)
        except (ValueError, RecursionError):
            return None


@dataclass
class ServerReport:
    """What a server answered. kind: vllm-omni, vllm, revox or unknown. ref_audio: works, refused, not sent or
    failed; ref_audio_message says more.

    version: from /version (vllm's, for vllm-omni, whose minor is the same). voices: None if it lists none.
    title: of its OpenAPI document.
    """

    url: str
    kind: str = "unknown"
    title: str | None = None
    version: str | None = None
    healthy: bool = False
    models: list[str] = field(default_factory=list)
    voices: list[str] | None = None
    ref_audio: str = NOT_SENT
    ref_audio_message: str = ""
    notes: list[str] = field(default_factory=list)


class ServerClient:
    """A server's address, asked one question at a time."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Raises DeployError if `url` is not http(s)://host[:port][/path] or the key cannot be a header."""
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise DeployError(f"{url!r} is not an address ({error}); give http://HOST:PORT.") from None
        valid = parsed.scheme in ("http", "https") and parsed.host and " " not in url
        if not valid or not 0 < (parsed.port or 80) < 65536:
            raise DeployError(f"{url!r} is not an address; give http://HOST:PORT.")
        if parsed.userinfo:
            raise DeployError("an address must not hold a password; put the key in a variable.")
        if key is not None and (not key.isascii() or not key.isprintable() or not key):
            raise DeployError("the key is empty or has characters that a header cannot have.")
        # OpenAI clients are given .../v1; the other paths of the server are above it.
        self.url = str(parsed.copy_with(path=parsed.path, query=None, fragment=None))
        self.url = self.url.rstrip("/").removesuffix("/v1")
        self._headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {key}"} if key else {})

    def ask(self, path: str, body: Mapping[str, Any] | None = None, seconds: float = ASK_SECONDS) -> Answer:
        """GET a path, or POST `body` to it as JSON.

        Raises DeployError if the whole answer does not arrive within `seconds`, or is not HTTP.
        """
        try:
            return asyncio.run(asyncio.wait_for(self._ask(path, body, seconds), seconds))
        except (asyncio.TimeoutError, httpx2.TimeoutException):
            raise DeployError(f"{self.url}{path} did not answer within {seconds:g} s.") from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            why = _printable(str(error) or type(error).__name__)
            hint = "is the server running there?"
            raise DeployError(f"{self.url}{path} cannot be asked ({why}); {hint}") from None

    async def _ask(self, path: str, body: Mapping[str, Any] | None, seconds: float) -> Answer:
        limits = httpx2.Timeout(seconds, connect=min(seconds, ASK_SECONDS))
        client = httpx2.AsyncClient(headers=self._headers, timeout=limits, trust_env=False)
        method = "GET" if body is None else "POST"
        async with client, client.stream(method, self.url + path, json=body) as response:
            content = bytearray()
            async for block in response.aiter_raw():
                content += block
                if len(content) > MAX_BYTES:
                    break
            return Answer(response.status_code, bytes(content[:MAX_BYTES]), len(content) > MAX_BYTES)


def examine_server(url: str, key: str | None = None, probe: bool = True) -> ServerReport:
    """Ask the server at `url`. `probe`: try `ref_audio` too, where it cannot stop the server.

    Raises DeployError if nothing answers there, or if the server requires a key.
    """
    server = ServerClient(url, key)
    report = ServerReport(server.url)
    health = server.ask("/health")
    report.healthy = health.status == 200
    if not report.healthy:
        report.notes.append(f"/health answers {health.status}")
    models = server.ask("/v1/models")
    if models.status in (401, 403):
        raise DeployError(f"{server.url} requires a key; name the variable that holds it with --key-from.")
    document = _json(server, "/openapi.json", report)
    report.models = _names(models.json(), "data", "id")
    report.kind, report.title = _kind(document, models.json()), _text(_object(document, "info").get("title"))
    if report.kind == "revox":
        report.version = _text(_object(document, "info").get("version"))
    else:
        report.version = _text(_json(server, "/version", report).get("version"))
    listed = _json(server, "/v1/audio/voices", report)
    if "voices" in listed:
        report.voices = _names(listed, "voices", "name")
    if report.kind == "vllm":
        report.notes.append("it has no speech endpoint: it was started without --omni")
    safe, why = ref_audio_is_safe(report, document)
    if not safe or not probe:
        report.ref_audio_message = why if not safe else "not asked for"
    elif not report.healthy:
        report.ref_audio_message = "the server is not healthy"
    else:
        _try_ref_audio(server, report)
    return report


def ref_audio_is_safe(report: ServerReport, document: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether a request with `ref_audio` cannot stop this server's engine, and if it could, why.

    Two signs are required, since a wrong guess can stop a server in use: /version is a release from 0.30 on
    (not a candidate, which may be older than the fix, pull request 7012), and the speech request has the
    field `sample_rate`, which 0.30.0 has and 0.28.0 does not (both wheels' vllm_omni/entrypoints/openai/
    protocol/audio.py). revox's own server refuses what it cannot do.
    """
    if report.kind == "revox":
        return True, ""
    if report.kind != "vllm-omni":
        return False, "it is not known what the server would do with it"
    try:
        version = Version(report.version or "")
    except InvalidVersion:
        return False, "the server does not tell its version; before 0.30 the request could stop it"
    if version.release[:2] < OLDEST or version.is_prerelease or version.epoch:
        return False, f"found vllm {version}, at least 0.30 is needed: an older server can die of it; upgrade"
    if "sample_rate" not in _object(document, "components", "schemas", _REQUEST, "properties"):
        return False, "its speech request lacks a field of 0.30, so vllm-omni may be older than vllm"
    return True, ""


def _try_ref_audio(server: ServerClient, report: ServerReport) -> None:
    """One short word in the voice of a synthetic clip; afterwards the server must still be healthy."""
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
        report.ref_audio, report.ref_audio_message = FAILED, str(error)
    else:
        report.ref_audio, report.ref_audio_message = _ref_audio_result(answer)
    try:
        report.healthy = server.ask("/health").status == 200
    except DeployError:
        report.healthy = False
    if not report.healthy:
        report.ref_audio = FAILED
        report.notes.append("the server was healthy before the request with ref_audio and is not since")


def _ref_audio_result(answer: Answer) -> tuple[str, str]:
    if answer.status == 200:
        is_wav = len(answer.body) > 44 and answer.body[:4] == b"RIFF"
        return (WORKS, "") if is_wav else (FAILED, "the answer is not the audio that was asked for")
    refusal = answer.json()
    message = _object(refusal, "error").get("message") or _object(refusal).get("message")
    text = message if isinstance(message, str) else answer.body[:2000].decode(errors="replace")
    kind = REFUSED if 400 <= answer.status < 500 else FAILED
    return kind, f"{answer.status}: {_printable(text)[:500]}"


def reference_clip(seconds: float = 3.0, rate: int = 24000) -> bytes:
    """A WAV (16 bit, mono) of a buzzing tone that rises and falls: nobody's voice, and fit for an encoder."""
    import numpy as np

    from revox.speech import Audio, encode_audio

    t = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.7 * t)) / rate
    buzz = sum(np.sin(k * phase) / k for k in range(1, 9))
    samples = 0.18 * (0.5 + 0.5 * np.sin(2 * np.pi * 3 * t)) * buzz
    return encode_audio(Audio(samples.astype(np.float32), rate), "wav")[0]


def _json(server: ServerClient, path: str, report: ServerReport) -> dict[str, Any]:
    """A path's JSON object; {} and a note if it has none."""
    try:
        answer = server.ask(path)
    except DeployError as error:
        report.notes.append(str(error))
        return {}
    found = answer.json()
    if answer.status == 200 and isinstance(found, dict):
        return found
    if answer.status != 404:
        size = f" and more than {MAX_BYTES >> 20} MiB" if answer.cut else ""
        report.notes.append(f"{path} answers {answer.status}{size}, expected a JSON object")
    return {}


def _kind(document: Mapping[str, Any], models: Any) -> str:
    if _object(document, "info").get("title") == "revox":
        return "revox"
    paths = _object(document, "paths")
    if "/v1/omni/sleep" in paths or _object(document, "components", "schemas", _REQUEST):
        return "vllm-omni"
    if any(isinstance(one, dict) and one.get("owned_by") == "vllm" for one in _list(models, "data")):
        # vllm's own list of models; with the speech endpoint it is vllm-omni's.
        return "vllm-omni" if "/v1/audio/speech" in paths else "vllm"
    return "unknown"


def _object(data: Any, *keys: str) -> dict[str, Any]:
    """The object at `keys` of nested objects; {} where there is none."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else {}


def _list(data: Any, key: str) -> list[Any]:
    found = _object(data).get(key)
    return found[:MAX_VOICES] if isinstance(found, list) else []


def _names(data: Any, key: str, name: str) -> list[str]:
    """Names in a list of strings or of objects with one; other entries are left out."""
    names = [_text(one.get(name) if isinstance(one, dict) else one) for one in _list(data, key)]
    return [one for one in names if one]


def _text(value: Any) -> str | None:
    return _printable(value)[:MAX_NAME] if isinstance(value, str) and value else None


def _printable(text: str) -> str:
    """On one line, without the control characters that a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text).strip()
