"""Recordings from strangers: what comes in, what is refused, and that nothing of the inside is reached."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import inspect
import io
import json
import os
import resource
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
import wave
from datetime import datetime, timedelta, timezone
from pathlib import Path

import av
import httpx2
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from revox.serving.errors import ApiError, ServeError
from revox.serving.fetch import fetch, is_public
from revox.serving.references import Reference, References
from revox.serving.sandboxed_decode import sandboxed_decode
from revox.serving.settings import ServeSettings
from revox.speech import AudioError

RATE = 24_000
PUBLIC = "93.184.216.34"


def wav(seconds: float = 1.0, rate: int = 16_000, channels: int = 1) -> bytes:
    """A sine of 200 Hz."""
    out = io.BytesIO()
    at = np.arange(round(seconds * rate))
    samples = np.repeat(np.sin(2 * np.pi * 200 * at / rate)[:, None], channels, 1)
    with wave.open(out, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 12_000).astype("<i2").tobytes())
    return out.getvalue()


def silence(container: str, codec: str, seconds: float, rate: int) -> bytes:
    """Silence, which packs to next to nothing."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        options = {"compression_level": "0"}
        stream = file.add_stream(codec, rate=rate, layout="mono", options=options)
        frame = av.AudioFrame(format=stream.codec_context.format.name, layout="mono", samples=4096)
        frame.sample_rate = rate
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        for start in range(0, round(seconds * rate), 4096):
            frame.pts = start
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()


def data_url(data: bytes, kind: str = "audio/wav") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def references(**options) -> References:
    options = {"max_reference_seconds": 60.0, **options}
    return References(ServeSettings(checkpoint="x", **options), RATE)


def resolved(ref_audio: str, **options) -> Reference:
    return asyncio.run(references(**options).resolve(ref_audio))


def read(data: bytes, **options) -> Reference:
    return asyncio.run(references(**options).read(data))


@pytest.fixture
def undecoded(monkeypatch) -> None:
    """Recordings come out as their bytes: no process is started for each."""
    monkeypatch.setattr("revox.serving.references.sandboxed_decode", lambda data, rate, limit: data)


def refusal(work, status: int) -> str:
    """The sentence of a refusal with that status."""
    with pytest.raises(ApiError) as refused:
        work()
    assert refused.value.status == status, refused.value.message
    return refused.value.message


# ---- what comes in


@pytest.mark.parametrize(
    "write",
    [
        data_url,
        lambda data: data_url(data, "audio/x-anything"),
        lambda data: f"data:;base64,{base64.b64encode(data).decode()}",
        lambda data: base64.b64encode(data).decode(),
        lambda data: base64.b64encode(data).decode().rstrip("="),
        lambda data: base64.urlsafe_b64encode(data).decode(),
        lambda data: base64.encodebytes(data).decode(),
        lambda data: data_url(data).replace("+", "%2B").replace("/", "%2F").replace("audio%2F", "audio/"),
    ],
)
def test_every_way_of_writing_base64_gives_the_same_bytes(write, undecoded):
    data = wav()
    found = resolved(write(data))
    assert (found.data, found.audio, found.origin) == (data, data, "data")


def test_a_recording_comes_out_as_its_sound():
    found = resolved(data_url(wav()))
    assert found.audio.rate == RATE
    assert found.audio.samples.shape == (RATE,)
    spectrum = np.abs(np.fft.rfft(found.audio.samples))
    assert np.argmax(spectrum) == 200  # one second: a bin is a hertz
    assert found.audio.samples.std() == pytest.approx(12_000 / 32_768 / np.sqrt(2), rel=0.01)


def test_stereo_at_another_rate_comes_out_mono_at_the_rate_of_the_codec():
    found = read(wav(2.0, 44_100, 2))
    assert found.audio.samples.shape == (2 * RATE,)
    assert found.origin == "upload"


def test_requests_are_read_beside_each_other_and_too_many_are_sent_away(monkeypatch, undecoded):
    monkeypatch.setattr("revox.serving.references.MAX_WAITING", 3)

    async def fetch_later(*_: object, **__: object) -> None:
        await hold.wait()

    hold = asyncio.Event()
    monkeypatch.setattr("revox.serving.references.fetch", fetch_later)
    given = references(allow_urls=True)

    async def run() -> None:
        held = [asyncio.create_task(given.resolve("http://a.example/")) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as refused:
            await given.resolve(data_url(wav()))
        assert refused.value.status == 503
        assert refused.value.headers["Retry-After"]
        hold.set()
        await asyncio.gather(*held, return_exceptions=True)
        assert (await given.resolve(data_url(wav()))).data == wav()

    asyncio.run(run())


# ---- what is no recording


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("", "is not a data URL"),
        ("hello, world!", "is not a data URL"),
        ("../../etc/passwd", "is not a data URL"),
        ("ftp://a.example/x.wav", "is not a data URL"),
        ("javascript:alert(1)", "is not a data URL"),
        ("A" * 1000 + " " * 200_000 + "!", "is not a data URL"),
        ("data:audio/wav;base64", "no comma"),
        ("data:audio/wav,hello", "not in base64"),
        ("data:audio/wav;base64,@@@@", "damaged base64"),
        ("data:audio/wav;base64,A", "damaged base64"),
        ("data:audio/wav;base64,", "0 bytes"),
        ("data:audio/wav;base64,é", "damaged base64"),
        (data_url(b"these are words and no sound " * 40), "cannot be decoded|can be decoded"),
        (data_url(b"#EXTM3U\nfile:///etc/passwd\n"), "can be decoded"),
        (data_url(b"ffconcat version 1.0\nfile '/etc/passwd'\n"), "can be decoded"),
        (data_url(wav()[:44]), "no audio samples"),
        (data_url(b"RIFF" + b"\xff" * 300), "can be decoded"),
    ],
)
def test_what_is_no_recording_is_a_sentence(given, sentence):
    began = time.monotonic()
    message = refusal(lambda: resolved(given), 400)
    assert any(part in message for part in sentence.split("|")), message
    assert "\n" not in message
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("container", "codec", "rate", "hours"), [("flac", "flac", 8000, 0.4), ("ogg", "libopus", 8000, 0.1)]
)
def test_a_small_file_of_much_silence_is_refused_without_being_decoded_whole(container, codec, rate, hours):
    bomb = silence(container, codec, hours * 3600, rate)
    assert len(bomb) < 2 << 20
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    assert "longer than 60 s" in refusal(lambda: read(bomb), 400)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began < 10


def test_a_recording_of_just_the_length_allowed_is_whole():
    assert read(wav(2.0, RATE), max_reference_seconds=2.0).audio.samples.shape == (2 * RATE,)
    assert "longer than 2 s" in refusal(lambda: read(wav(2.01, RATE), max_reference_seconds=2.0), 400)


def test_a_decoding_that_takes_too_long_is_ended():
    began = time.monotonic()
    with pytest.raises(AudioError, match="takes longer than"):
        sandboxed_decode(wav(), RATE, 60.0, seconds=0.01)
    assert time.monotonic() - began < 10


def apart(code: str) -> subprocess.CompletedProcess[str]:
    """Python in a process with the limits of the one that decodes."""
    begin = "import sys\nfrom revox.serving.sandboxed_decode import _limit\nimport revox.speech\n_limit(1)\n"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    command = [sys.executable, "-c", begin + code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.skipif(sys.platform != "linux", reason="enforced on Linux")
def test_the_decoding_process_can_neither_fill_memory_nor_run_on_nor_open_files(tmp_path):
    assert "MemoryError" in apart("x = bytearray(2 << 30)").stderr
    assert apart("while True: pass").returncode in (-24, -9)  # SIGXCPU, SIGKILL
    assert "Too many open files" in apart(f"open({str(tmp_path / 'x')!r}, 'w')").stderr
    assert "Too many open files" in apart("import socket; socket.socket()").stderr
    assert apart("print('well')").stdout == "well\n"


def test_a_decoder_that_dies_is_a_sentence(monkeypatch):
    monkeypatch.setattr("revox.serving.sandboxed_decode.sys.executable", "/bin/false")
    with pytest.raises(AudioError, match="more memory or time"):
        sandboxed_decode(wav(), RATE, 60.0)


# ---- files


@pytest.fixture
def folder(tmp_path) -> Path:
    """An allowed folder with a clip in a folder of its own, and secrets outside."""
    inside = tmp_path / "allowed"
    (inside / "more").mkdir(parents=True)
    (inside / "clip.wav").write_bytes(wav())
    (inside / "more" / "ä clip.wav").write_bytes(wav(0.5))
    (tmp_path / "secret.wav").write_bytes(wav(3))
    (tmp_path / "allowed-not").mkdir()
    (tmp_path / "allowed-not" / "clip.wav").write_bytes(wav(3))
    (inside / "link.wav").symlink_to(tmp_path / "secret.wav")
    (inside / "up").symlink_to(tmp_path)
    (inside / "near.wav").symlink_to("clip.wav")
    os.mkfifo(inside / "pipe.wav")
    return inside


def test_files_below_the_allowed_folder_are_read(folder, undecoded):
    given = {"allowed_folder": folder}
    assert resolved(f"file://{folder}/clip.wav", **given).data == wav()
    assert resolved(f"FILE://localhost{folder}/clip.wav", **given).origin == "file clip.wav"
    assert resolved(f"file://{folder}/more/%C3%A4%20clip.wav", **given).data == wav(0.5)


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.wav",
        "/more/../../secret.wav",
        "/%2e%2e/secret.wav",
        "/more/%2e%2e/%2e%2e/secret.wav",
        "/link.wav",
        "/up/secret.wav",
        "/near.wav",
        "/pipe.wav",
        "/more",
        "/",
        "",
        "/absent.wav",
        "//clip.wav",
        "/./clip.wav",
        "-not/clip.wav",
        "/clip.wav%00.txt",
        "/clip.wav/x",
        "/clip.wav?x",
        "/clip.wav#x",
    ],
)
def test_nothing_else_is_read_and_the_answer_tells_nothing_of_what_is_there(folder, path):
    given = {"allowed_folder": folder}
    message = refusal(lambda: resolved(f"file://{folder}{path}", **given), 403)
    assert message == refusal(lambda: resolved("file:///etc/passwd", **given), 403)
    assert str(folder) not in message


def test_other_hosts_files_and_a_server_without_a_folder_are_refused(folder):
    given = {"allowed_folder": folder}
    refusal(lambda: resolved(f"file://host{folder}/clip.wav", **given), 403)
    refusal(lambda: resolved("file:clip.wav", **given), 403)
    assert "--allowed-folder" in refusal(lambda: resolved(f"file://{folder}/clip.wav"), 403)
    with pytest.raises(ServeError, match="not a folder"):
        references(allowed_folder=folder / "clip.wav")


def test_a_file_larger_than_allowed_is_not_read(folder):
    given = {"allowed_folder": folder, "max_body_bytes": 1024}
    refusal(lambda: resolved(f"file://{folder}/clip.wav", **given), 413)


def test_a_folder_named_through_a_link_is_the_folder(folder, tmp_path, undecoded):
    (tmp_path / "named").symlink_to(folder)
    given = {"allowed_folder": tmp_path / "named"}
    for base in (folder, tmp_path / "named"):
        assert resolved(f"file://{base}/clip.wav", **given).data == wav()


# ---- addresses


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255",
        "192.168.1.1", "169.254.169.254", "100.100.100.200", "100.64.0.1", "168.63.129.16", "192.0.0.192",
        "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.7", "224.0.0.1", "239.255.255.250", "240.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1",
        "fec0::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::1", "2001::1", "2001:db8::1",
        "not an address", "",
    ],
)  # fmt: skip
def test_no_address_of_an_inside_is_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", [PUBLIC, "8.8.8.8", "172.32.0.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_addresses_of_the_internet_are_public(address):
    assert is_public(address)


class Host:
    """A host of the outside: answers by path, and counts who came to which name and address."""

    def __init__(self) -> None:
        self.answers: dict[str, object] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.connected: list[tuple[str, int]] = []
        self.names: dict[str, object] = {"a.example": [PUBLIC], "b.example": ["8.8.8.8"]}
        host = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                first = self.rfile.readline().decode()
                if not first:
                    return
                headers = {}
                while line := self.rfile.readline().decode().strip():
                    key, _, value = line.partition(": ")
                    headers[key.lower()] = value
                path = first.split()[1]
                host.asked.append((path, headers))
                answer = host.answers[path]
                with contextlib.suppress(OSError):
                    if callable(answer):
                        answer(self.wfile)
                    else:
                        self.wfile.write(answer)

        socketserver.ThreadingTCPServer.allow_reuse_address = True
        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    async def lookup(self, name: str, port: int) -> list[str]:
        found = self.names.get(name)
        if found is None:
            raise socket.gaierror("unknown")
        found = found() if callable(found) else found
        return await found if inspect.isawaitable(found) else found  # type: ignore[return-value]

    async def fetching(self, url: str, max_bytes: int = 1 << 20, seconds: float = 5.0, tls=None):
        transport = Rerouted(self.server.server_address[1], self.connected, tls)
        return await fetch(url, max_bytes=max_bytes, seconds=seconds, lookup=self.lookup, transport=transport)

    def fetch(self, *arguments, **options):
        return asyncio.run(self.fetching(*arguments, **options))


class Rerouted(httpx2.AsyncHTTPTransport):
    """Connects to a port of this machine in place of any address, and notes which one was meant."""

    def __init__(
        self, port: int, connected: list[tuple[str, int]], tls: ssl.SSLContext | None = None
    ) -> None:
        super().__init__(verify=tls or ssl.create_default_context(), trust_env=False)
        self.port, self.connected = port, connected

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        standard = {"http": 80, "https": 443}[request.url.scheme]
        self.connected.append((request.url.host, request.url.port or standard))
        request.url = request.url.copy_with(host="127.0.0.1", port=self.port)
        return await super().handle_async_request(request)


@pytest.fixture
def host():
    host = Host()
    yield host
    host.server.shutdown()
    host.server.server_close()


def said(body: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    """An HTTP answer."""
    lines = {"Content_Type": "audio/wav", "Content_Length": str(len(body)), **headers}
    head = "".join(f"{key.replace('_', '-')}: {value}\r\n" for key, value in lines.items() if value)
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


def test_a_recording_is_fetched_from_the_checked_address_without_telling_who_asks(host):
    host.answers["/clip.wav?k=1"] = said(wav())
    data, origin = host.fetch("http://a.example/clip.wav?k=1#t=1")
    assert data == wav()
    assert origin == "http://a.example"  # the path may hold a secret
    assert host.connected == [(PUBLIC, 80)]
    [(_, headers)] = host.asked
    assert headers["host"] == "a.example"
    assert headers["accept-encoding"] == "identity"
    assert not {"cookie", "referer", "authorization"} & set(headers)


def test_urls_are_fetched_only_if_the_operator_says_so(host, undecoded, monkeypatch):
    host.answers["/clip.wav"] = said(wav())
    url = "http://a.example/clip.wav"
    assert "--allow-urls" in refusal(lambda: resolved(url), 403)
    monkeypatch.setattr("revox.serving.references.fetch", host.fetching)
    assert resolved(url, allow_urls=True).data == wav()


@pytest.mark.parametrize("inside", ["127.0.0.1", "169.254.169.254", "10.1.2.3", "::1", "::ffff:10.0.0.1"])
def test_a_name_that_leads_inside_is_not_even_connected_to(host, inside):
    host.names["evil.example"] = [inside]
    refusal(lambda: host.fetch("http://evil.example/"), 403)
    host.names["evil.example"] = [PUBLIC, inside]  # one of several is enough
    refusal(lambda: host.fetch("http://evil.example/"), 403)
    assert host.connected == []


def test_a_name_is_asked_once_so_that_a_second_answer_cannot_lead_inside(host):
    answers = iter([[PUBLIC], ["127.0.0.1"], ["127.0.0.1"]])
    host.names["rebind.example"] = lambda: next(answers)
    host.answers["/"] = said(wav())
    assert host.fetch("http://rebind.example/")[0] == wav()
    assert host.connected == [(PUBLIC, 80)]
    assert next(answers) == ["127.0.0.1"]  # the second answer was never asked for


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://[::1]/",
        "http://[::ffff:169.254.169.254]/latest/meta-data",
        "http://localhost/",
    ],
)
def test_an_address_of_the_inside_in_any_spelling_is_refused_by_the_systems_own_lookup(url):
    connected = []
    with pytest.raises(ApiError) as refused:
        asyncio.run(fetch(url, max_bytes=1000, seconds=5.0, transport=Rerouted(9, connected)))
    assert refused.value.status in (400, 403)  # a system may not know the odd spellings
    assert connected == []


def test_a_redirect_is_followed_and_checked_as_a_new_address(host):
    host.names["evil.example"] = ["192.168.0.1"]
    host.answers["/1"] = said(status="302 Found", Location="http://b.example/2")
    host.answers["/2"] = said(wav())
    assert host.fetch("http://a.example/1")[1] == "http://b.example"
    assert [address for address, _ in host.connected] == [PUBLIC, "8.8.8.8"]
    for status in ("301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"):
        host.answers["/1"] = said(status=status, Location="http://evil.example/2")
        refusal(lambda: host.fetch("http://a.example/1"), 403)
    for location in (
        "file:///etc/passwd",
        "ftp://b.example/2",
        "//user:pw@b.example/2",
        "http://b.example:0/",
    ):
        host.answers["/1"] = said(status="302 Found", Location=location)
        refusal(lambda: host.fetch("http://a.example/1"), 400)
    assert {address for address, _ in host.connected} == {PUBLIC, "8.8.8.8"}


def test_redirects_end(host):
    host.answers["/1"] = said(status="302 Found", Location="/1")
    assert "redirected" in refusal(lambda: host.fetch("http://a.example/1"), 400)
    assert len(host.asked) == 4
    host.answers["/1"] = said(status="302 Found")
    assert "nowhere" in refusal(lambda: host.fetch("http://a.example/1"), 400)


@pytest.mark.parametrize(
    ("answer", "status", "sentence"),
    [
        (said(b"<html>secret</html>", Content_Type="text/html"), 400, "does not declare it as audio"),
        (said(b"secret", Content_Type=""), 400, "does not declare it as audio"),
        (said(b"secret", Content_Type="audio/wav, text/html"), 400, "does not declare it as audio"),
        (said(b"secret", status="401 Unauthorized"), 400, "answered 401"),
        (said(b"\x1f\x8b", Content_Encoding="gzip"), 400, "compressed"),
        (said(b"", Content_Length="0"), 400, "is empty"),
        (said(b"abc", Content_Length="99"), 400, "ended early"),
        (said(b"abc", Content_Length="2000000"), 413, "larger than"),
        (said(b"a" * 1_100_000, Content_Length=""), 413, "larger than"),
        (b"\x00\x01secret\r\n\r\n", 400, "answer as expected"),
        (b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: 1\r\n" % i for i in range(500)), 400, "as expected"),
        (b"", 400, "answer as expected"),
    ],
)  # fmt: skip
def test_what_is_not_sound_is_not_used_and_never_repeated(host, answer, status, sentence):
    host.answers["/"] = answer
    message = refusal(lambda: host.fetch("http://a.example/"), status)
    assert sentence in message
    assert "secret" not in message


@pytest.mark.parametrize("where", ["head", "body"])
def test_a_host_that_trickles_is_cut_off_in_time(host, where):
    gone = threading.Event()

    def trickle(out) -> None:
        out.write(said(Content_Length="500000") if where == "body" else b"HTTP/1.1 200 OK\r\nX: ")
        try:
            for _ in range(600):
                out.write(b"a")
                out.flush()
                if gone.wait(0.05):
                    return
        except OSError:
            gone.set()

    host.answers["/"] = trickle
    began = time.monotonic()
    assert "longer than 0.5 s" in refusal(lambda: host.fetch("http://a.example/", seconds=0.5), 400)
    assert time.monotonic() - began < 5
    gone.set()


def certified(name: str, folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """What a host of that name shows, and what whoever believes it has."""
    key = ec.generate_private_key(ec.SECP256R1())
    called = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(timezone.utc)
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign",
         "encipher_only", "decipher_only"), False,
    )  # fmt: skip
    made = (
        x509.CertificateBuilder()
        .subject_name(called)
        .issuer_name(called)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=True, **usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    public = made.public_bytes(pem)
    plain = serialization.NoEncryption()
    (folder / "both.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain) + public
    )
    shows = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    shows.load_cert_chain(folder / "both.pem")
    return shows, ssl.create_default_context(cadata=public.decode())


def test_an_https_host_must_prove_its_name_to_an_authority_that_is_believed(host, tmp_path):
    shows, believes = certified("a.example", tmp_path)
    host.server.socket = shows.wrap_socket(host.server.socket, server_side=True)
    host.answers["/"] = said(wav())

    def get(url: str, tls: ssl.SSLContext | None) -> bytes:
        return host.fetch(url, seconds=10.0, tls=tls)[0]

    assert get("https://a.example/", believes) == wav()
    assert host.connected == [(PUBLIC, 443)]
    refusal(lambda: get("https://b.example/", believes), 400)  # the certificate of another name
    refusal(lambda: get("https://a.example/", None), 400)  # of an authority that nobody here knows
    assert len(host.asked) == 1
    host.answers["/"] = said(status="302 Found", Location="http://b.example/2")
    assert "from https to http" in refusal(lambda: get("https://a.example/", believes), 400)


def test_a_host_that_is_slow_to_prove_its_name_and_trickles_then_is_cut_off_in_time(host, tmp_path):
    shows, believes = certified("a.example", tmp_path)
    gone = threading.Event()
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            plain, _ = server.accept()
            gone.wait(0.4)
            with shows.wrap_socket(plain, server_side=True) as held:
                held.recv(4096)
                held.sendall(said(Content_Length="500000"))
                while not gone.wait(0.05):
                    held.sendall(b"a")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    over = threading.Timer(10.0, gone.set)
    over.start()
    try:
        with pytest.raises(ApiError, match=r"longer than 0\.6 s"):
            asyncio.run(
                fetch("https://a.example/", max_bytes=1 << 20, seconds=0.6, lookup=host.lookup,
                      transport=Rerouted(server.getsockname()[1], [], believes))
            )  # fmt: skip
        assert not gone.is_set()  # nobody else ended it
    finally:
        over.cancel()
        gone.set()
        server.close()
        thread.join(5)


def test_a_name_that_is_not_answered_for_is_given_up_in_time(host):
    host.names["slow.example"] = lambda: asyncio.Event().wait()
    began = time.monotonic()
    assert "longer than 0.3 s" in refusal(lambda: host.fetch("http://slow.example/", seconds=0.3), 400)
    assert time.monotonic() - began < 5
    assert "not known" in refusal(lambda: host.fetch("http://nowhere.example/"), 400)


@pytest.mark.parametrize(
    "url",
    ["http://", "http:///x", "http://a.example:99999/", "http://a.example:0/", "http://u:p@a.example/",
     "http://a.example/ x", "http://a.example/\r\nHost: b", "http://a.example\\@b.example/", "http://[::1/",
     "http://" + "a" * 3000, "http://\u2100.example/", "http://a..example/"],
)  # fmt: skip
def test_an_address_that_is_none_is_a_sentence_and_reaches_nobody(host, url):
    refusal(lambda: host.fetch(url), 400)
    assert host.asked == []


def test_an_address_of_this_machine_itself_is_not_fetched_from(host, monkeypatch):
    # As if the machine had the public address: connections to it start from it.
    monkeypatch.setattr("revox.serving.fetch._local_address", lambda address, port: address)
    refusal(lambda: host.fetch("http://a.example/"), 403)
    assert host.connected == []


def test_refusals_are_in_openais_shape():
    with pytest.raises(ApiError) as refused:
        resolved("http://a.example/x")
    body = json.loads(json.dumps(refused.value.body()))["error"]
    assert body["type"] == "permission_error"
    assert (body["param"], body["code"]) == ("ref_audio", "urls_not_allowed")
