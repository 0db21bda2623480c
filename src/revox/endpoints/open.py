"""`[KIND=]ADDRESS[#MODEL]` -> an endpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from revox.endpoints.errors import EndpointError

if TYPE_CHECKING:
    from revox.endpoints.endpoint import Endpoint

# What the title of an OpenAPI document, or a model's id under vllm-omni, tells of a server.
_TITLES = (
    ("sglang", "sglang-omni"),
    ("kokoro", "kokoro"),
    ("chatterbox", "chatterbox"),
    ("fish", "fish-speech"),
)
_MODELS = (("qwen3-tts", "qwen3-tts"), ("s2-pro", "fish-s2-pro"), ("voxcpm2", "voxcpm2"))


@dataclass(frozen=True)
class EndpointAddress:
    """kind: None until it is found out, "checkpoint" for a folder or hub id. url: None for a checkpoint."""

    kind: str | None
    url: str | None
    checkpoint: str | None = None
    model: str | None = None

    @property
    def short(self) -> str:
        """A name for tables: the host and port, or the folder's name."""
        if self.url is None:
            return (self.checkpoint or "").rstrip("/").rsplit("/", 1)[-1]
        return self.kind if self.kind and _hosted(self.kind) == self.url else urlsplit(self.url).netloc


def _hosted(kind: str) -> str | None:
    from revox.endpoints.adapters import ADAPTERS

    return ADAPTERS[kind].url if kind in ADAPTERS else None


def parse_address(text: str) -> EndpointAddress:
    """Read `[KIND=]ADDRESS[#MODEL]`: an http(s) address, a hosted API by its kind, a folder or a hub id.

    Raises EndpointError on anything else.
    """
    from revox.endpoints.adapters import ADAPTERS

    kind, equals, rest = text.partition("=")
    if not equals or "/" in kind or "#" in kind:
        kind, rest = "", text
    if kind and kind not in (*ADAPTERS, "checkpoint"):
        raise EndpointError(f"{kind!r} is not a kind of endpoint; take {', '.join(ADAPTERS)} or checkpoint.")
    address, _, model = rest.partition("#")
    if not kind and _hosted(address):
        kind, address = address, _hosted(address) or ""
    if re.match(r"https?://", address, re.IGNORECASE):
        if kind == "checkpoint":
            raise EndpointError(f"{address} is an address, not a checkpoint; give a folder or a hub id.")
        return EndpointAddress(kind or None, address, model=model or None)
    if kind not in ("", "checkpoint"):
        raise EndpointError(f"{address!r} is not an address; write {kind}=http://HOST:PORT.")
    if re.fullmatch(r"[\w.-]+:\d+(/\S*)?", address):
        raise EndpointError(f"{address} lacks a scheme; write http://{address}.")
    if not address:
        raise EndpointError(f"{text!r} names no endpoint; give an address, a folder or a hub id.")
    return EndpointAddress("checkpoint", None, address)


def open_endpoints(texts: Sequence[str], keys: Sequence[str] = ()) -> list[Endpoint]:
    """Open endpoints, see `open_endpoint`; equal names get a number.

    keys: see `key_variables`. A key is sent to no other endpoint. Raises EndpointError.
    """
    variables = key_variables(texts, keys)
    opened: list[Endpoint] = []
    for text in texts:
        try:
            one = open_endpoint(text, variables.get(text))
        except BaseException:
            for endpoint in opened:
                endpoint.close()
            raise
        same = sum(re.fullmatch(re.escape(one.name) + r"( \(\d+\))?", e.name) is not None for e in opened)
        one.name += f" ({same + 1})" if same else ""
        opened.append(one)
    return opened


def key_variables(texts: Sequence[str], keys: Sequence[str]) -> dict[str, str]:
    """The environment variable that holds the key of each endpoint, by what is written in `texts`.

    keys: `[ENDPOINT=]VARIABLE`; without an endpoint the variable is that of the only one. Raises
    EndpointError.
    """
    variables: dict[str, str] = {}
    for key in keys:
        text, equals, variable = key.rpartition("=")
        if not equals and len(texts) > 1:
            raise EndpointError(
                f"say whose key {key} holds: --key-from ENDPOINT={key}, as the endpoint is given."
            )
        if text not in texts if equals else not texts:
            raise EndpointError(f"--key-from names {text or key!r}, which is not one of the endpoints.")
        variables[text if equals else texts[0]] = variable
    return variables


def open_endpoint(text: str, key_from: str | None = None) -> Endpoint:
    """Open `[KIND=]ADDRESS[#MODEL]`; a server is asked what it is where its kind is not given.

    key_from: the environment variable with its key; a hosted API's own, for its own address
    only, is known. Raises EndpointError when it
    does not answer or its key is missing, CheckpointError when it is a folder that cannot be loaded.
    """
    address = parse_address(text)
    if address.url is None:
        import revox
        from revox.endpoints.local import CheckpointEndpoint

        return CheckpointEndpoint(revox.load(address.checkpoint or "", weights="auto"), address.short)
    return _open_server(address, key_from)


def _open_server(address: EndpointAddress, key_from: str | None) -> Endpoint:
    from revox.deploy.errors import DeployError
    from revox.deploy.server import ServerClient, examine_server
    from revox.endpoints.adapters import ADAPTERS
    from revox.endpoints.http import HttpEndpoint

    known: dict[str, str] = {}
    adapter = ADAPTERS.get(address.kind or "")
    own = adapter is not None and adapter.url is not None and _same_place(adapter.url, address.url or "")
    variable = key_from or (adapter.key_variable if adapter and own else None)
    key = os.environ.get(variable, "") if variable else None
    if variable and not key:
        raise EndpointError(f"the variable {variable} is not set; export the key of {address.url} in it.")
    model = address.model
    try:
        url = ServerClient(address.url or "", key).url
        if adapter is None or adapter.url is None:
            report = examine_server(url, key, probe=False)
            known = {"server": " ".join(filter(None, (report.kind, report.version)))}
            model = model or next(iter(report.models), None)
            adapter = adapter or ADAPTERS[_kind(report.kind, report.title or "", report.models)]
    except DeployError as error:
        raise EndpointError(str(error)) from None
    return HttpEndpoint(adapter, url, address.short, key, model, known)


def _same_place(one: str, other: str) -> bool:
    """Whether two addresses are one scheme and host: a key that is for one may go to the other."""
    return urlsplit(one)[:2] == urlsplit(other.lower())[:2]


def _kind(kind: str, title: str, models: Sequence[str]) -> str:
    """The adapter for what a server told; `openai`, the common shape, when it told nothing."""
    if kind == "vllm-omni":
        named = " ".join(models).lower()
        return next((found for word, found in _MODELS if word in named), kind)
    if kind == "revox":
        return kind
    return next((found for word, found in _TITLES if word in title.lower()), "openai")
