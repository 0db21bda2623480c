"""Fetch a recording from an address that a stranger chose, and never from a network of our own.

A name is resolved once, every address it stands for is checked, and the connection goes to the checked
address itself: a name that answers otherwise the second time (DNS rebinding) gains nothing. Each redirect is
a new address and is checked as one. Proxies of the environment are not used, no cookie, referrer or key is
sent, compressed answers are refused, and bytes and the time for everything together are bounded.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from revox.serving.errors import ApiError

Lookup = Callable[[str, int], list[str]]
Connect = Callable[[str, int, float], socket.socket]

MAX_REDIRECTS = 3
MAX_URL = 2048
BLOCK = 1 << 16

# Addresses that look public and are not meant for strangers: the Azure host's own service
# (learn.microsoft.com, "What is IP address 168.63.129.16?") and relays into IPv6. Link-local (169.254.169.254
# of most clouds), shared (100.100.100.200 of Alibaba) and private ones (fd00:ec2::254 of AWS) are not global
# to begin with.
_NEVER = tuple(
    map(
        ipaddress.ip_network,
        ("168.63.129.16/32", "100.64.0.0/10", "192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2002::/16"),
    )
)
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")  # all that is given out (IANA's IPv6 global unicast registry)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
_AUDIO = re.compile(r"(audio|video)/[\w.+-]+|application/(octet-stream|ogg)|binary/octet-stream")


@dataclass(frozen=True)
class Fetched:
    """What came, and from which host (fit for a log: no path, which can hold secrets)."""

    data: bytes
    origin: str


@dataclass(frozen=True)
class _Target:
    scheme: str
    host: str
    port: int
    path: str

    @property
    def origin(self) -> str:
        standard = {"http": 80, "https": 443}[self.scheme]
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}{'' if self.port == standard else f':{self.port}'}"


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet, and so does any IPv4 address wrapped inside it."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        wrapped = parsed.ipv4_mapped
        if parsed in _NAT64:
            wrapped = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if wrapped is not None:
            return is_public(str(wrapped))
        if parsed not in _GLOBAL_V6:
            return False
    if parsed.is_multicast or parsed.is_reserved or parsed.is_unspecified or not parsed.is_global:
        return False
    return not any(parsed.version == network.version and parsed in network for network in _NEVER)


def fetch(
    url: str,
    *,
    max_bytes: int,
    seconds: float,
    lookup: Lookup | None = None,
    connect: Connect | None = None,
    tls: ssl.SSLContext | None = None,
) -> Fetched:
    """The bytes of a recording at an http(s) address, in `seconds` altogether.

    `lookup` (host, port -> addresses) and `connect` (address, port, timeout -> socket) are the system's
    unless given. Raises ApiError: 400 for what cannot be fetched or is not declared as sound, 403 for an
    address that is not public, 413 for too much. What the other side answered is never repeated.
    """
    deadline = time.monotonic() + seconds
    target = _parse(url)
    for _ in range(MAX_REDIRECTS + 1):
        address = _checked_address(target, deadline, seconds, lookup or _system_lookup)
        with _connected(target, address, deadline, seconds, connect or _system_connect, tls) as connection:
            found = _ask(connection, target, deadline, seconds, max_bytes)
        if isinstance(found, bytes):
            return Fetched(found, target.origin)
        new = _parse(urljoin(f"{target.origin}{target.path}", found))
        if target.scheme == "https" and new.scheme == "http":
            raise _failed("it leads from https to http")
        target = new
    raise _failed(f"it is redirected more than {MAX_REDIRECTS} times")


def _failed(why: str) -> ApiError:
    return ApiError(
        400,
        f"ref_audio could not be fetched: {why}; send the recording itself as a data URL",
        param="ref_audio",
        code="fetch_failed",
    )


def _parse(url: str) -> _Target:
    if len(url) > MAX_URL or re.search(r"[\x00-\x20\x7f\\]", url):
        raise _failed(f"its address is longer than {MAX_URL} characters or holds spaces or backslashes")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        if ":" not in host:
            host = host.encode("idna").decode()
    except (ValueError, UnicodeError):
        raise _failed("its address cannot be read") from None
    if parts.scheme not in ("http", "https") or not host:
        raise _failed("its address is not a whole http or https address")
    if parts.username is not None or parts.password is not None:
        raise _failed("its address holds a user name or password, which is not sent anywhere")
    if port == 0:
        raise _failed("its address names port 0")
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    if parts.query:
        path += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    return _Target(parts.scheme, host, port or {"http": 80, "https": 443}[parts.scheme], path)


def _checked_address(target: _Target, deadline: float, seconds: float, lookup: Lookup) -> str:
    """The first address of the host, after all of them were found to be public."""
    found: list[list[str] | OSError | UnicodeError] = []

    def look() -> None:
        try:
            found.append(lookup(target.host, target.port))
        except (OSError, UnicodeError) as error:
            found.append(error)

    # The system's resolver cannot be told when to give up.
    thread = threading.Thread(target=look, daemon=True, name="resolve")
    thread.start()
    thread.join(max(0.0, deadline - time.monotonic()))
    if not found:
        raise _failed(f"it took longer than {seconds:g} s")
    addresses = found[0]
    if not isinstance(addresses, list) or not addresses:
        raise _failed("its host is not known")
    if not all(map(is_public, addresses)):
        raise _not_public()
    return addresses[0]


def _not_public() -> ApiError:
    return ApiError(
        403,
        "ref_audio's address is not on the public internet, and no other is fetched from; "
        "send the recording itself as a data URL",
        param="ref_audio",
        code="address_not_allowed",
    )


@contextlib.contextmanager
def _connected(
    target: _Target,
    address: str,
    deadline: float,
    seconds: float,
    connect: Connect,
    tls: ssl.SSLContext | None,
) -> Iterator[http.client.HTTPConnection]:
    """A connection to `address`, cut at the deadline however slowly the other side sends."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise _failed(f"it took longer than {seconds:g} s")
    connection = http.client.HTTPConnection(target.host, target.port)
    late = threading.Event()
    try:
        held = connect(address, target.port, left)
    except OSError:
        raise _failed("its host does not answer") from None

    def cut() -> None:
        late.set()
        with contextlib.suppress(OSError):
            held.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), cut)
    timer.daemon = True
    timer.start()
    try:
        # A connection to an address of this machine starts from that same address.
        if held.getsockname()[0] == address:
            raise _not_public()
        if target.scheme == "https":
            context = tls or ssl.create_default_context()
            held.settimeout(max(0.001, deadline - time.monotonic()))  # of the whole handshake, not a step
            held = context.wrap_socket(held, server_hostname=target.host)
            if late.is_set():  # what was cut is the socket that the handshake was begun on
                raise TimeoutError
        connection.sock = held
        yield connection
    except (ApiError, OSError, http.client.HTTPException, ValueError) as error:
        # A cut connection reads as its end, and what came by then as all there was.
        if late.is_set() or time.monotonic() >= deadline:
            raise _failed(f"it took longer than {seconds:g} s") from None
        if isinstance(error, ApiError):
            raise
        raise _failed("its host does not answer as expected") from None
    finally:
        timer.cancel()
        with contextlib.suppress(OSError):
            held.close()
        connection.close()


def _ask(
    connection: http.client.HTTPConnection, target: _Target, deadline: float, seconds: float, max_bytes: int
) -> bytes | str:
    """The body, or where it is to be looked for instead."""
    connection.putrequest("GET", target.path, skip_host=True, skip_accept_encoding=True)
    connection.putheader("Host", target.origin.partition("://")[2])
    connection.putheader("Accept", "audio/*, video/*, application/octet-stream;q=0.5")
    connection.putheader("Accept-Encoding", "identity")
    connection.putheader("User-Agent", "revox")
    connection.putheader("Connection", "close")
    connection.endheaders()
    response = connection.getresponse()
    if response.status in (301, 302, 303, 307, 308):
        location = response.getheader("Location")
        if not location:
            raise _failed("it is redirected to nowhere")
        return location
    if response.status != 200:
        raise _failed(f"its host answered {response.status}")
    kind = (response.getheader("Content-Type") or "").partition(";")[0].strip().lower()
    if not _AUDIO.fullmatch(kind):
        raise _failed("its host does not call it sound (Content-Type)")
    if (response.getheader("Content-Encoding") or "identity").strip().lower() != "identity":
        raise _failed("its host sends it compressed")
    too_much = ApiError(
        413, f"ref_audio is larger than {max_bytes:,} bytes; send a shorter recording", param="ref_audio"
    )
    declared = response.getheader("Content-Length")
    if declared and declared.isdigit() and int(declared) > max_bytes:
        raise too_much
    data = bytearray()
    while block := response.read1(BLOCK):
        data += block
        if len(data) > max_bytes:
            raise too_much
    if time.monotonic() >= deadline:
        raise _failed(f"it took longer than {seconds:g} s")
    if declared and declared.isdigit() and len(data) != int(declared):
        raise _failed("it ended early")
    if not data:
        raise _failed("it is empty")
    return bytes(data)


def _system_lookup(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _system_connect(address: str, port: int, timeout: float) -> socket.socket:
    return socket.create_connection((address, port), timeout=timeout)
