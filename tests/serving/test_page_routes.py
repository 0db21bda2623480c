"""The page's files as they are sent, and the endpoint that says how alike two recordings sound."""

from __future__ import annotations

import re
import sys
from importlib.resources import files

import pytest

from revox.demo import checkpoint_folder
from revox.metrics.errors import MetricError
from revox.serving.keys import add_key
from revox.serving.page_routes import COMPARED_SECONDS, FILES, other_server, policy
from revox.speech import Audio, encode_audio, read_audio

CLIPS = sorted((checkpoint_folder().parent / "examples").glob("*.flac"))
PAGE = files("revox.serving").joinpath("page")


def recording(path, seconds=6.0) -> bytes:
    return encode_audio(Audio(read_audio(path, max_seconds=seconds).samples, 16_000), "wav")[0]


def both(reference: bytes, result: bytes, **more):
    parts = {"reference": ("a.wav", reference, "audio/wav"), "result": ("b.wav", result, "audio/wav")}
    return {"files": parts, "data": more}


@pytest.fixture(autouse=True)
def _decoded_here(monkeypatch):
    """Recordings are decoded in this process; that strangers' are not is shown in test_references."""
    monkeypatch.setattr(
        "revox.serving.references.sandboxed_decode", lambda data, rate, limit: read_audio(data, rate=rate)
    )


def test_every_file_of_the_page_is_sent_and_no_other(talk):
    async def dialogue(client, app):
        assert sorted(one.name for one in PAGE.iterdir()) == sorted(FILES)
        for name, kind in FILES.items():
            answer = await client.get(f"/page/{name}")
            assert (answer.status_code, answer.headers["content-type"]) == (200, kind), name
            assert answer.content == PAGE.joinpath(name).read_bytes()
        for name in ("../page_routes.py", "..%2fpage_routes.py", "main", ".", "main.js%00", "style.css/"):
            assert (await client.get(f"/page/{name}", follow_redirects=False)).status_code in (307, 404), name
        home = await client.get("/")
        assert home.content == PAGE.joinpath("index.html").read_bytes()
        assert (await client.head("/")).status_code == 200

    talk(dialogue)


def test_what_the_page_names_is_part_of_it_and_nothing_comes_from_another_host():
    for name in FILES:
        text = PAGE.joinpath(name).read_text()
        loaded = re.findall(r'(?:src|href)="([^"#]*)"', text) + re.findall(r"url\(([^)]*)\)", text)
        for target in loaded:
            assert target == "/docs" or target.removeprefix("/page/") in FILES, (name, target)
        for target in re.findall(r'from "([^"]*)"', text):
            assert target.removeprefix("./") in FILES, (name, target)
        if name.endswith(".js"):
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), (
                name
            )


def test_the_page_may_load_from_here_only_and_takes_no_html(talk):
    async def dialogue(client, app):
        for path in ("/", "/page/main.js"):
            headers = (await client.get(path)).headers
            rules = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
            assert rules["default-src"] == "'none'"
            assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
            assert rules["frame-ancestors"] == rules["form-action"] == rules["base-uri"] == "'none'"
            assert rules["require-trusted-types-for"] == "'script'"
            assert headers["x-content-type-options"] == "nosniff"

    talk(dialogue)


def test_a_second_server_is_asked_only_when_its_address_names_it(talk):
    assert "connect-src 'self' http://10.0.0.7:8001;" in policy(other_server("http://10.0.0.7:8001"))
    assert other_server("http://tts_b:8001") == "http://tts_b:8001"
    assert other_server("https://[::1]:8001") is None  # no policy can name it
    for hostile in (
        "http://a; script-src *", "http://a http://b", "http://*", "*", "https:", "http://a/path", "data:x",
        "http://a,b", "http://a:99999999", "javascript:alert(1)", "http://a\nx: y", "http://a\n", "",
        "'unsafe-eval'",
    ):  # fmt: skip
        assert other_server(hostile) is None, hostile

    async def dialogue(client, app):
        for given, named in (("http://b:8001", True), ("http://b:8001; script-src *", False)):
            rules = (await client.get("/", params={"with": given})).headers["content-security-policy"]
            assert rules == policy("http://b:8001" if named else None)

    talk(dialogue)


def test_the_page_is_open_and_similarity_is_not_without_a_key(talk, tmp_path):
    keys = tmp_path / "keys.json"
    add_key(keys, "ada")

    async def dialogue(client, app):
        assert (await client.get("/")).status_code == 200
        assert (await client.get("/page/main.js")).status_code == 200
        answer = await client.post("/v1/audio/similarity", **both(b"x", b"y"))
        assert answer.status_code == 401

    talk(dialogue, api_keys=keys)


def test_similarity_is_what_the_judge_says_of_the_first_half_minute(talk):
    judge = pytest.importorskip("revox.metrics.speaker").SpeakerVerifier
    try:
        judge = judge()
    except MetricError as error:
        pytest.skip(str(error))
    first, second = (recording(path) for path in CLIPS[:2])
    long = read_audio(first).samples
    tail = read_audio(second).samples
    rate = 16_000
    repeated = [long] * (1 + int(COMPARED_SECONDS * rate) // len(long))
    filled = encode_audio(Audio(_joined([*repeated])[: int(COMPARED_SECONDS * rate)], rate), "wav")[0]
    longer = encode_audio(Audio(_joined([read_audio(filled).samples, tail]), rate), "wav")[0]

    async def dialogue(client, app):
        async def asked(a, b):
            answer = await client.post("/v1/audio/similarity", **both(a, b))
            assert answer.status_code == 200, answer.text
            assert answer.json()["judge"] == "Resemblyzer"
            return answer.json()["similarity"]

        at = app.state.revox.tts.sampling_rate
        expected = judge.similarity(read_audio(first, rate=at), read_audio(second, rate=at))
        assert await asked(first, second) == pytest.approx(expected, abs=1e-3)
        assert await asked(first, first) == pytest.approx(1.0, abs=1e-3)
        assert await asked(longer, filled) == pytest.approx(1.0, abs=1e-3)

    talk(dialogue)


def _joined(parts):
    import numpy as np

    return np.concatenate(parts)


def test_similarity_without_resemblyzer_or_with_bad_recordings_is_a_sentence(talk, monkeypatch):
    clip = recording(CLIPS[0], 3.0)
    monkeypatch.setitem(sys.modules, "resemblyzer", None)
    monkeypatch.setitem(sys.modules, "resemblyzer.audio", None)

    async def dialogue(client, app):
        answer = await client.post("/v1/audio/similarity", **both(clip, clip))
        assert answer.status_code == 501
        assert "Resemblyzer" in answer.json()["error"]["message"]
        assert "install" in answer.json()["error"]["message"]
        # The rest of the server works without it.
        assert (await client.get("/")).status_code == 200
        for parts, param in ((both(b"noise", clip), "reference"), (both(clip, b""), "result")):
            answer = await client.post("/v1/audio/similarity", **parts)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        answer = await client.post("/v1/audio/similarity", **both(clip, clip, loud="yes"))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "loud")
        answer = await client.post("/v1/audio/similarity", files={"result": ("b.wav", clip, "audio/wav")})
        assert answer.status_code == 422

    talk(dialogue)


def test_no_more_recordings_wait_for_the_judge_than_may(talk, monkeypatch):
    import asyncio
    import threading

    from revox.serving import page_routes

    go, begun = threading.Event(), threading.Event()

    def slow(self, reference, result):
        begun.set()
        go.wait(30)
        return 0.5

    monkeypatch.setattr(page_routes, "MAX_COMPARISONS", 2)
    monkeypatch.setattr(page_routes.Comparisons, "compare", slow)
    clip = recording(CLIPS[0], 3.0)

    async def dialogue(client, app):
        asked = [
            asyncio.ensure_future(client.post("/v1/audio/similarity", **both(clip, clip))) for _ in range(2)
        ]
        await asyncio.to_thread(begun.wait, 30)
        while app.state.comparisons.places.taken < 2:
            await asyncio.sleep(0.01)
        refused = await client.post("/v1/audio/similarity", **both(clip, clip))
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        go.set()
        assert [(await one).json()["similarity"] for one in asked] == [0.5, 0.5]
        assert (await client.post("/v1/audio/similarity", **both(clip, clip))).status_code == 200

    talk(dialogue)


def test_the_documentation_lists_every_address_and_loads_nothing_from_elsewhere(talk):
    async def dialogue(client, app):
        style = await client.get("/page/style.css")
        assert style.status_code == 200
        return await client.get("/docs"), (await client.get("/openapi.json")).json()

    answer, described = talk(dialogue)
    assert 'href="/page/style.css"' in answer.text
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    listed = re.findall(r"<dt><code>([A-Z]+) ([^<]+)</code>", answer.text)
    assert sorted(listed) == sorted((m.upper(), path) for path, ms in described["paths"].items() for m in ms)
    assert ("POST", "/v1/audio/speech") in listed
    assert not re.search(r"(src|href)=.?(https?:)?//", answer.text)
