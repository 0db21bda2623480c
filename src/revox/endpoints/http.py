"""A speech server over HTTP: one request, timed, whatever its shape."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx2

from revox.endpoints.adapters import EndpointAdapter, event_audio
from revox.endpoints.endpoint import PCM_BYTES, SpeechAnswer, SpeechQuery
from revox.endpoints.errors import EndpointError

MAX_BYTES = 256 << 20
"""Of one answer: an hour of speech in float32 is more than any server gives at a time."""
CONNECT_SECONDS = 15.0
SPEAK_SECONDS = 600.0
WAV_HEADER = 44
_MAX_MESSAGE = 500


class HttpEndpoint:
    """A server at an address, asked by its adapter. Its answers are bounded in bytes and time."""

    max_streams: int | None = None

    def __init__(
        self,
        adapter: EndpointAdapter,
        url: str,
        name: str,
        key: str | None = None,
        model: str | None = None,
        known: dict[str, str] | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        """`url`: http(s)://HOST[:PORT][/PATH], without /v1. known: further facts. transport: for tests."""
        self.adapter, self.url, self.name, self.kind = adapter, url, name, adapter.kind
        self.model = model or adapter.model
        self.rate, self.formats = adapter.rate, adapter.formats
        self.streams, self.clones = adapter.stream is not None, bool(adapter.reference)
        self._known = known or {}
        self._client = httpx2.Client(
            headers={"accept-encoding": "identity"} | ({"authorization": f"Bearer {key}"} if key else {}),
            timeout=httpx2.Timeout(SPEAK_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=adapter.url is not None,  # a proxy between here and a hosted API; none to own servers
            transport=transport,
        )

    def facts(self) -> dict[str, str]:
        """Its address, kind and model, and what it told when it was opened."""
        return {"address": self.url, "kind": self.kind, "model": self.model or "its own", **self._known}

    def voices(self) -> list[str]:
        """The names of its voices; empty if it lists none. Raises EndpointError when it does not answer."""
        if self.adapter.voices_path is None:
            return []
        try:
            answer = self._client.get(self.url + self.adapter.voices_path, timeout=CONNECT_SECONDS)
            found = answer.json() if answer.status_code == 200 else None
        except (httpx2.HTTPError, ValueError) as error:
            raise EndpointError(f"{self.name} does not list its voices ({_why(error)}).") from None
        if answer.status_code in (401, 403):
            raise EndpointError(f"{self.name} requires another key; --key-from names the variable with it.")
        return _names(found)

    def speak(self, query: SpeechQuery) -> SpeechAnswer:
        """One request. A refusal, a lost connection and a time limit are in the answer."""
        body = self.adapter.fields(query, self.model)
        streaming = query.stream and self.adapter.stream is not None
        if streaming:
            body |= dict(self.adapter.stream or {})
        answer = SpeechAnswer(
            None, self.adapter.stream_format if streaming else query.response_format, self.rate
        )
        started = time.perf_counter()
        try:
            with self._client.stream("POST", self.url + self.adapter.path, json=body) as response:
                answer.status = response.status_code
                if response.status_code != 200:
                    answer.message = _refusal(response, started)
                elif streaming:
                    self._read_stream(response, answer, started)
                else:
                    content = b"".join(_bounded(response.iter_bytes(), started))
                    answer.content = self.adapter.unwrap(content)
        except (httpx2.HTTPError, httpx2.StreamError, OSError, ValueError, RuntimeError) as error:
            # RuntimeError: the client was closed meanwhile.
            answer.message = _why(error)
        answer.seconds = time.perf_counter() - started
        if answer.status == 200 and not answer.content and not answer.message:
            answer.message = "the answer is empty"
        return answer

    def _read_stream(self, response: httpx2.Response, answer: SpeechAnswer, started: float) -> None:
        """Fill `answer` as the audio comes, so that what came before a failure is there."""
        if self.adapter.events:
            parts: Iterator[bytes] = _event_parts(response, started)
        else:
            parts = _bounded(response.iter_raw(), started)
        size, header = PCM_BYTES.get(answer.response_format, 2), 0
        if answer.response_format == "wav":
            header = WAV_HEADER
        content = bytearray()
        try:
            for part in parts:
                content += part
                if len(content) <= header:
                    continue
                now = time.perf_counter() - started
                answer.first_audio = now if answer.first_audio is None else answer.first_audio
                if answer.rate:
                    answer.arrivals.append((now, (len(content) - header) / size / answer.rate))
        finally:
            answer.content = bytes(content)

    def close(self) -> None:
        """Close all connections; requests under way fail."""
        self._client.close()


def _bounded(parts: Iterator[bytes], started: float) -> Iterator[bytes]:
    """The parts of an answer. Raises ValueError when they are too many or come too late."""
    read = 0
    for part in parts:
        read += len(part)
        if read > MAX_BYTES:
            raise ValueError(f"the answer is larger than {MAX_BYTES >> 20} MiB")
        if time.perf_counter() - started > SPEAK_SECONDS:
            raise ValueError(f"the answer was not complete after {SPEAK_SECONDS:g} s")
        yield part


def _event_parts(response: httpx2.Response, started: float) -> Iterator[bytes]:
    """The audio in server-sent events (html.spec.whatwg.org, server-sent events), event by event."""
    for event in _events(_bounded(response.iter_raw(), started)):
        lines = (line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
        data = b"\n".join(lines)
        if not data or data == b"[DONE]":
            continue
        audio = event_audio(json.loads(data))
        if audio:
            yield audio


def _events(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The events; also the last if no empty line ends it, so that half an event is an error, not dropped."""
    waiting = b""
    for block in blocks:
        waiting = (waiting + block).replace(b"\r\n", b"\n")  # a block may end between the two
        *events, waiting = waiting.split(b"\n\n")
        yield from events
    yield waiting


def _refusal(response: httpx2.Response, started: float) -> str:
    """The message of a refusal: OpenAI's `error.message`, `detail`, `message`, or the text itself."""
    content = b""
    for part in _bounded(response.iter_bytes(), started):
        content += part
        if len(content) > 1 << 16:
            break
    text = content.decode(errors="replace")
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if isinstance(found, dict):
        error = found.get("error")
        inner = error.get("message") if isinstance(error, dict) else error
        text = str(inner or found.get("message") or found.get("detail") or text)
    return _printable(text)[:_MAX_MESSAGE] or f"status {response.status_code}"


def _why(error: Exception) -> str:
    return _printable(str(error) or type(error).__name__)[:_MAX_MESSAGE]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text).strip()


def _names(found: Any) -> list[str]:
    """Voices' names in a list of strings or objects, under the keys that servers use."""
    if isinstance(found, dict):
        found = next((found[key] for key in ("voices", "items", "reference_ids") if key in found), None)
    names: list[str] = []
    for one in found if isinstance(found, list) else []:
        name = one.get("id") or one.get("name") if isinstance(one, dict) else one
        if isinstance(name, str) and name:
            names.append(_printable(name)[:200])
    return list(dict.fromkeys(names))
