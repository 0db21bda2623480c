"""Fetch a recording from an address that a client chose, and never from a private network.

A name is resolved once, every address it resolves to is checked, and the connection goes to the checked
address itself, so a name that resolves differently the second time (DNS rebinding) gains nothing. Every
redirect is checked as a new address. Proxies of the environment are ignored; no cookies, referrer or keys are
sent; compressed answers are refused; the bytes and the total time are limited.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx2

from revox.serving.errors import ApiError

Lookup = Callable[[str, int], Awaitable[list[str]]]

MAX_REDIRECTS = 3
MAX_URL = 2048

# Addresses that look public and are not: the Azure host's own service (learn.microsoft.com, "What is IP
# address 168.63.129.16?") and relays into IPv6. Link-local (169.254.169.254 of most clouds), shared
# (100.100.100.200 of Alibaba) and private ones (fd00:ec2::254 of AWS) are not global to begin with.
_NEVER = [
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32", "100.64.0.0/10", "192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2002::/16",
    )
]  # fmt: skip
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")  # IANA's IPv6 global unicast registry
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
_AUDIO = re.compile(r"(audio|video)/[\w.+-]+|application/(octet-stream|ogg)|binary/octet-stream")
_HEADERS = {
    "accept": "audio/*, video/*, application/octet-stream;q=0.5",
    "accept-encoding": "identity",
    "connection": "close",
    "user-agent": "revox",
}


def is_public(address: str) -> bool:
    """Whether an address is on the public internet, and so is any IPv4 address embedded in it."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        embedded = parsed.ipv4_mapped
        if parsed in _NAT64:
            embedded = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if embedded is not None:
            return is_public(str(embedded))
        if parsed not in _GLOBAL_V6:
            return False
    if parsed.is_multicast or parsed.is_reserved or parsed.is_unspecified or not parsed.is_global:
        return False
    return not any(parsed.version == network.version and parsed in network for network in _NEVER)


async def fetch(
    url: str,
    *,
    max_bytes: int,
    seconds: float,
    lookup: Lookup | None = None,
    transport: httpx2.AsyncBaseTransport | None = None,
) -> tuple[bytes, str]:
    """The bytes of a recording at an http(s) address, and its host for logs (the path can hold secrets).

    seconds: altogether. `lookup` (host, port -> addresses) and `transport` default to the system's. Raises
    ApiError: 400 for what cannot be fetched or is not declared as audio, 403 for an address that is not
    public, 413 for too many bytes. The other server's answer is never quoted.
    """
    if transport is None:
        transport = httpx2.AsyncHTTPTransport(verify=ssl.create_default_context(), trust_env=False)
    try:
        async with httpx2.AsyncClient(transport=transport, timeout=seconds, trust_env=False) as client:
            return await asyncio.wait_for(_follow(client, url, max_bytes, lookup or _system_lookup), seconds)
    except (asyncio.TimeoutError, httpx2.TimeoutException):
        raise _failed(f"it took longer than {seconds:g} s") from None
    except httpx2.ConnectError:
        raise _failed("its host does not answer") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError):
        raise _failed("its host does not answer as expected") from None


async def _follow(client: httpx2.AsyncClient, url: str, max_bytes: int, lookup: Lookup) -> tuple[bytes, str]:
    target = _parse(url)
    for _ in range(MAX_REDIRECTS + 1):
        host = target.raw_host.decode("ascii").strip("[]")
        address = await _checked_address(
            host, target.port or {"http": 80, "https": 443}[target.scheme], lookup
        )
        netloc = target.netloc.decode("ascii")
        request = client.build_request(
            "GET",
            target.copy_with(host=address),
            headers={**_HEADERS, "host": netloc},
            extensions={"sni_hostname": host},  # the certificate must be the name's, not the address's
        )
        response = await client.send(request, stream=True)
        try:
            if not response.is_redirect:
                return await _body(response, max_bytes), f"{target.scheme}://{netloc}"
            location = response.headers.get("location")
        finally:
            await response.aclose()
        if not location:
            raise _failed("it is redirected to nowhere")
        new = _parse(location, base=target)
        if (target.scheme, new.scheme) == ("https", "http"):
            raise _failed("it redirects from https to http")
        target = new
    raise _failed(f"it is redirected more than {MAX_REDIRECTS} times")


def _failed(why: str) -> ApiError:
    return ApiError(
        400,
        f"ref_audio could not be fetched: {why}; send the recording itself as a data URL",
        param="ref_audio",
        code="fetch_failed",
    )


def _parse(text: str, base: httpx2.URL | None = None) -> httpx2.URL:
    if len(text) > MAX_URL or re.search(r"[\x00-\x20\x7f\\]", text):
        raise _failed(f"its address is longer than {MAX_URL} characters or holds spaces or backslashes")
    try:
        url = base.join(text) if base is not None else httpx2.URL(text)
    except (httpx2.InvalidURL, ValueError):
        raise _failed("its address cannot be read") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise _failed("its address is not a complete http or https address")
    if url.userinfo:
        raise _failed("its address holds a user name or password, which is not sent anywhere")
    if url.port is not None and not 0 < url.port < 65536:
        raise _failed(f"its address has the port {url.port}")
    return url


async def _checked_address(host: str, port: int, lookup: Lookup) -> str:
    """The first address of the host, after all of them were found to be public."""
    try:
        addresses = await lookup(host, port)
    except (OSError, UnicodeError):
        addresses = []
    if not addresses:
        raise _failed("its host is not known")
    if not all(map(is_public, addresses)) or _local_address(addresses[0], port) == addresses[0]:
        raise ApiError(
            403,
            "ref_audio's address is not on the public internet, and this server fetches from no other; send "
            "the recording itself as a data URL",
            param="ref_audio",
            code="address_not_allowed",
        )
    return addresses[0]


async def _system_lookup(host: str, port: int) -> list[str]:
    # In a thread of its own: the system's resolver has no timeout, and must not occupy the server's threads.
    pool = ThreadPoolExecutor(1, thread_name_prefix="resolve")
    try:
        find = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        found = await asyncio.get_running_loop().run_in_executor(pool, find)
    finally:
        pool.shutdown(wait=False)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _local_address(address: str, port: int) -> str | None:
    """The address that connections to `address` start from: the same one, if it is this machine's own."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connecting it sends nothing
            probe.connect((address, port))
            return str(probe.getsockname()[0])
    except OSError:
        return None


async def _body(response: httpx2.Response, max_bytes: int) -> bytes:
    if response.status_code != 200:
        raise _failed(f"its host answered {response.status_code}")
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not _AUDIO.fullmatch(kind):
        raise _failed("its host does not declare it as audio (Content-Type)")
    if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise _failed("its host sends it compressed")
    too_large = ApiError(
        413, f"ref_audio is larger than {max_bytes:,} bytes; send a shorter recording", param="ref_audio"
    )
    length = response.headers.get("content-length", "")
    if length.isdigit() and int(length) > max_bytes:
        raise too_large
    data = bytearray()
    try:
        async for block in response.aiter_raw():
            data += block
            if len(data) > max_bytes:
                raise too_large
    except httpx2.RemoteProtocolError:
        raise _failed("it ended early") from None
    if not data:
        raise _failed("it is empty")
    return bytes(data)
