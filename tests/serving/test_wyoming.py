"""Wyoming, by the protocol's own client."""

from __future__ import annotations

import asyncio
import json
import socket

import numpy as np
import pytest
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncTcpClient
from wyoming.error import Error
from wyoming.event import Event
from wyoming.info import Describe, Info
from wyoming.ping import Ping, Pong
from wyoming.tts import (
    Synthesize,
    SynthesizeChunk,
    SynthesizeStart,
    SynthesizeStop,
    SynthesizeStopped,
    SynthesizeVoice,
)

from revox.cli.serve_command import _listen_wyoming
from revox.serving.app import create_app
from revox.serving.errors import ServeError

MALE = SynthesizeVoice(name="pt_male")


@pytest.fixture
def talk(tts, settings):
    """`talk(dialogue, **settings)`: run `async def dialogue(connect)` against a server."""

    def run(dialogue, **changes):
        async def everything():
            listener = _listen_wyoming("tcp://127.0.0.1:0")
            app = create_app(settings(**changes), tts, listener)
            port = listener.getsockname()[1]
            async with app.router.lifespan_context(app):
                app.port = port
                return await asyncio.wait_for(dialogue(lambda: AsyncTcpClient("127.0.0.1", port), app), 60)

        return asyncio.run(everything())

    return run


async def heard_until(client, kind):
    """Events up to one of a kind, or to the end of the connection."""
    events = []
    while (event := await asyncio.wait_for(client.read_event(), 30)) is not None:
        events.append(event)
        if kind.is_type(event.type):
            break
    return events


def samples(events):
    chunks = [AudioChunk.from_event(event) for event in events if AudioChunk.is_type(event.type)]
    assert {(chunk.rate, chunk.width, chunk.channels) for chunk in chunks} == {(24000, 2, 1)}
    return np.frombuffer(b"".join(chunk.audio for chunk in chunks), "<i2") / 32768


def alone(tts, text, voice="pt_male"):
    parts = list(tts.stream(text, voice, takes=1, report=lambda warning: None))
    return np.clip(np.concatenate([part.samples for part in parts]), -1, 1)


def test_it_describes_its_voices_with_their_languages(talk, tts):
    async def dialogue(connect, app):
        async with connect() as client:
            await client.write_event(Describe().event())
            [told] = await heard_until(client, Info)
            await client.write_event(Ping(text="x").event())
            [answer] = await heard_until(client, Pong)
            return Info.from_event(told), Pong.from_event(answer).text

    info, pong = talk(dialogue)
    assert pong == "x"
    [program] = info.tts
    assert program.installed
    assert program.supports_synthesize_streaming
    voices = {voice.name: voice.languages for voice in program.voices}
    assert sorted(voices) == sorted(tts.voices())
    assert voices["de_male"] == ["de"]
    assert voices["casual_male"] == ["en"]


def test_a_text_is_what_the_library_speaks_and_is_marked(talk, tts):
    async def dialogue(connect, app):
        async with connect() as client:
            await client.write_event(Synthesize(text="ten to five", voice=MALE).event())
            first = await heard_until(client, AudioStop)
            await client.write_event(Synthesize(text="six", voice=MALE).event())
            return first, await heard_until(client, AudioStop)

    first, second = talk(dialogue, marking=True)
    for events, text in ((first, "ten to five"), (second, "six")):
        assert AudioStart.is_type(events[0].type)
        assert events[0].data["mark"]["voice"] == "pt_male"
        assert AudioStop.is_type(events[-1].type)
        np.testing.assert_allclose(samples(events), alone(tts, text), atol=1 / 32768)


def test_text_in_parts_is_spoken_sentence_by_sentence_before_it_ends(talk, tts):
    async def dialogue(connect, app):
        async with connect() as client:
            await client.write_event(SynthesizeStart(voice=MALE).event())
            for part in ("Ten to", " five. Sev", "en, eight! And"):
                await client.write_event(SynthesizeChunk(text=part).event())
            expected = len(alone(tts, "Ten to five.")) + len(alone(tts, "Seven, eight!"))
            early = []
            while not early or len(samples(early)) < expected:
                event = await asyncio.wait_for(client.read_event(), 30)
                early += [event] if AudioChunk.is_type(event.type) else []
            # As Home Assistant does: the whole text again, for servers that do not know streams.
            await client.write_event(SynthesizeChunk(text=" then?").event())
            await client.write_event(Synthesize(text="Ten to five. ...", voice=MALE).event())
            await client.write_event(SynthesizeStop().event())
            return early, await heard_until(client, SynthesizeStopped)

    early, late = talk(dialogue)
    expected = np.concatenate([alone(tts, text) for text in ("Ten to five.", "Seven, eight!", "And then?")])
    np.testing.assert_allclose(samples([*early, *late]), expected, atol=1 / 32768)
    assert [event.type for event in late if not AudioChunk.is_type(event.type)] == [
        "audio-stop", "synthesize-stopped",
    ]  # fmt: skip


def test_text_without_an_end_is_spoken_after_a_while(talk, tts, monkeypatch):
    monkeypatch.setattr("revox.serving.pending_text.OVERDUE_SECONDS", 0.1)

    async def dialogue(connect, app):
        async with connect() as client:
            await client.write_event(SynthesizeStart(voice=MALE).event())
            await client.write_event(SynthesizeChunk(text="ten to five").event())
            return await heard_until(client, AudioChunk)

    assert AudioChunk.is_type(talk(dialogue)[-1].type)


def test_without_a_voice_the_first_speaks_or_the_first_of_a_language(talk, tts):
    async def dialogue(connect, app):
        found = []
        for voice in (None, SynthesizeVoice(language="de-DE")):
            async with connect() as client:
                await client.write_event(Synthesize(text="ten", voice=voice).event())
                found.append(await heard_until(client, AudioStop))
        return found

    first, german = talk(dialogue)
    names = tts.voices()
    np.testing.assert_allclose(samples(first), alone(tts, "ten", names[0]), atol=1 / 32768)
    name = next(name for name in names if name.startswith("de_"))
    np.testing.assert_allclose(samples(german), alone(tts, "ten", name), atol=1 / 32768)


@pytest.mark.parametrize(
    ("events", "sentence"),
    [
        ([Synthesize(text="ten", voice=SynthesizeVoice(name="pt_mail")).event()], "did you mean pt_male"),
        ([Synthesize(text=" ", voice=MALE).event()], "the input is empty"),
        ([Synthesize(text="ten " * 2000, voice=MALE).event()], "at most 4,096 are allowed"),
        ([Synthesize(text="ten", voice=SynthesizeVoice(language="xx")).event()], "no voice of the language"),
        ([Event("synthesize", {"text": 5})], "not of the protocol's form"),
        ([Event("synthesize", {})], "not of the protocol's form"),
        (
            [SynthesizeStart().event(), SynthesizeChunk(text="x" * 5000).event()],
            "send shorter sentences",
        ),
    ],
)
def test_what_cannot_be_spoken_is_an_error_and_ends_the_connection(talk, events, sentence):
    async def dialogue(connect, app):
        async with connect() as client:
            for event in events:
                await client.write_event(event)
            told = await heard_until(client, AudioStop)
        async with connect() as client:
            await client.write_event(Synthesize(text="ten", voice=MALE).event())
            after = await heard_until(client, AudioStop)
        return told, after

    told, after = talk(dialogue)
    assert [event.type for event in told] == ["error"]
    assert sentence in Error.from_event(told[0]).text
    assert AudioStop.is_type(after[-1].type)


@pytest.mark.parametrize(
    "data",
    [
        b"not json\n",
        b"[]\n",
        b"{}\n",
        json.dumps({"type": "synthesize", "data_length": 1 << 40}).encode() + b"\n",
        json.dumps({"type": "synthesize", "data_length": -1}).encode() + b"\n",
        json.dumps({"type": "ping", "payload_length": 60_000}).encode() + b"\n" + bytes(60_000),
        json.dumps({"type": "synthesize", "data_length": 5}).encode() + b"\n[1,2]",
        json.dumps({"type": "synthesize", "payload_length": "9"}).encode() + b"\n",
        b"x" * (1 << 17),
    ],
)
def test_bytes_that_are_not_the_protocol_end_their_connection_only(talk, data, caplog):
    async def dialogue(connect, app):
        reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
        writer.write(data)
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()
        async with connect() as client:
            await client.write_event(Ping(text="x").event())
            return await heard_until(client, Pong)

    assert Pong.is_type(talk(dialogue, max_body_bytes=1 << 16)[-1].type)
    assert "Traceback" not in caplog.text


def test_whoever_hangs_up_frees_the_place(talk, held):
    async def dialogue(connect, app):
        engine = app.state.revox.engine
        with held(engine, 3) as go:
            async with connect() as client:
                await client.write_event(Synthesize(text="Good evening, doctor.", voice=MALE).event())
                while engine.active == 0:
                    await asyncio.sleep(0.01)
                (stream,) = engine._active
            for _ in range(500):
                if stream.cancelled:
                    break
                await asyncio.sleep(0.01)
            go.set()
        return stream.cancelled

    assert talk(dialogue)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:10200", "udp://127.0.0.1:1", "tcp://127.0.0.1", "tcp://:5", "tcp://a:b"]
)
def test_an_address_of_another_form_is_a_sentence(address):
    with pytest.raises(ServeError, match=r"expected an address such as tcp://127\.0\.0\.1:10200"):
        _listen_wyoming(address)


def test_an_address_in_use_is_a_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServeError, match="choose another --wyoming"):
            _listen_wyoming(f"tcp://127.0.0.1:{taken.getsockname()[1]}")
