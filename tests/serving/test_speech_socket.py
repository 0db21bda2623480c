from __future__ import annotations

import json
import socket
from urllib.parse import urlsplit

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from revox.marking import verify_bytes
from revox.serving.keys import add_key
from revox.serving.speech_socket import OVERHEAD, Session

CONFIG = {
    "type": "session.config", "voice": "neutral_male", "seed": 3, "max_new_tokens": 6,
    "response_format": "pcm",
}  # fmt: skip


@pytest.fixture
def session(serve):
    with serve() as (url, app), connect(url.replace("http", "ws") + "/v1/audio/speech/stream") as session:
        yield Talker(session, app)


class Talker:
    def __init__(self, session, app):
        self.session, self.app = session, app

    def say(self, **message):
        self.session.send(json.dumps(message))

    def hear(self):
        message = self.session.recv(timeout=30)
        return message if isinstance(message, bytes) else json.loads(message)

    def until_done(self):
        heard = [self.hear()]
        while isinstance(heard[-1], bytes) or heard[-1]["type"] != "session.done":
            heard.append(self.hear())
        return heard


def _samples(tts, text, seconds=0.48):
    samples = tts.speak(text, "neutral_male", seed=3, takes=1, max_seconds=seconds).samples
    return np.clip(np.rint(samples * 32768), -32768, 32767)


def test_sentences_are_spoken_as_they_end_and_the_rest_when_the_utterance_is_done(session, tts):
    session.say(**CONFIG)
    session.say(type="input.text", text="Good ")
    session.say(type="input.text", text="morning. How are")
    start, sound, done = session.hear(), session.hear(), session.hear()
    assert start == {
        "type": "audio.start", "utterance_index": 0, "sentence_index": 0, "sentence_text": "Good morning.",
        "format": "pcm", "sample_rate": 24000,
    }  # fmt: skip
    np.testing.assert_allclose(np.frombuffer(sound, "<i2"), _samples(tts, "Good morning."), atol=1)
    assert done["total_bytes"] == len(sound)
    assert done["error"] is False
    assert done["usage"]["output_tokens"] == 6
    session.say(type="input.text", text=" you")
    session.say(type="input.done")
    start, sound, done, end = session.until_done()
    assert (start["sentence_text"], start["sentence_index"]) == ("How are you", 1)
    assert end == {"type": "session.done", "utterance_index": 0, "total_sentences": 2}
    session.say(type="input.text", text="ten")
    session.say(type="input.done")
    assert session.until_done()[-1] == {"type": "session.done", "utterance_index": 1, "total_sentences": 1}


def test_streamed_audio_comes_in_pieces_that_are_the_whole(session, tts):
    session.say(**CONFIG, stream_audio=True, split_granularity="none")
    session.say(type="input.text", text="Good morning. How are you?")
    session.say(type="input.done")
    _, *sounds, _, end = session.until_done()
    assert [len(sound) for sound in sounds] == [5 * 3840, 3840]
    expected = _samples(tts, "Good morning. How are you?")
    np.testing.assert_allclose(np.frombuffer(b"".join(sounds), "<i2"), expected, atol=1)
    assert end["total_sentences"] == 1


def _spoken(messages):
    return [
        one["sentence_text"] for one in messages if isinstance(one, dict) and one["type"] == "audio.start"
    ]


def test_list_items_and_headings_are_spoken_at_their_line_ends_before_the_utterance_is_done(session):
    session.say(**{**CONFIG, "max_new_tokens": 1})
    session.say(type="input.text", text="---\n## To buy\n")
    lines = [f"- item {number}\n" for number in range(12)]
    heard = []
    for line in lines:  # each is sent when the one before it was spoken
        while not heard or isinstance(heard[-1], bytes) or heard[-1]["type"] != "audio.done":
            heard.append(session.hear())
        session.say(type="input.text", text=line)
        heard.append(session.hear())
    session.say(type="input.done")
    assert _spoken(heard + session.until_done()) == ["## To buy", *(line.strip() for line in lines)]


def test_a_sentence_that_may_go_on_is_spoken_after_a_moment_of_quiet(session):
    session.say(**{**CONFIG, "max_new_tokens": 1})
    session.say(type="input.text", text="Good morning.")
    assert session.hear()["sentence_text"] == "Good morning."


def test_text_without_an_end_is_spoken_when_nothing_more_comes_for_a_while(session, monkeypatch):
    monkeypatch.setattr("revox.serving.pending_text.OVERDUE_SECONDS", 0.05)
    session.say(**{**CONFIG, "max_new_tokens": 1})
    session.say(type="input.text", text="Let me check")
    assert session.hear()["sentence_text"] == "Let me check"


def test_without_splitting_nothing_is_spoken_before_the_utterance_is_done(session, monkeypatch):
    monkeypatch.setattr("revox.serving.pending_text.OVERDUE_SECONDS", 0.0)
    monkeypatch.setattr("revox.serving.pending_text.QUIET_SECONDS", 0.0)
    session.say(**{**CONFIG, "max_new_tokens": 1, "split_granularity": "none"})
    session.say(type="input.text", text="One. Two.\n")
    session.say(type="input.text", text="Three.")
    session.say(type="input.done")
    assert _spoken(session.until_done()) == ["One. Two.\nThree."]


def test_a_config_within_an_utterance_is_refused_and_nothing_is_lost(session):
    session.say(**CONFIG)
    session.say(type="input.text", text="ten")
    session.say(**{**CONFIG, "voice": "pt_male"})
    assert session.hear()["error"]["type"] == "conflict_error"
    session.say(type="input.done")
    assert session.until_done()[0]["sentence_text"] == "ten"


def test_close_ends_the_connection(session):
    session.say(**CONFIG)
    session.say(type="session.close")
    with pytest.raises(ConnectionClosed):
        session.hear()


def test_whoever_hangs_up_while_being_spoken_to_frees_the_place(session, held, until):
    engine = session.app.state.revox.engine
    with held(engine, 20) as go:
        session.say(**{**CONFIG, "voice": "hi_female", "seed": 0, "max_new_tokens": 2000})
        session.say(type="input.text", text="Good evening, doctor.")
        session.say(type="input.done")
        until(lambda: engine.active == 1, "it is being spoken")
        (stream,) = engine._active
        session.session.close_socket()
        until(lambda: stream.cancelled, "the server has noticed", seconds=10)
        go.set()
        until(lambda: engine.active == 0, "its place is free", seconds=10)
    assert stream.frames < 2000


def test_tokens_sent_far_faster_than_they_are_spoken_keep_nobody_from_noticing_who_hangs_up(
    session, held, until
):
    engine = session.app.state.revox.engine
    with held(engine, 20) as go:
        session.say(**{**CONFIG, "voice": "hi_female", "seed": 0, "max_new_tokens": 2000})
        session.say(type="input.text", text="Good evening, doctor. ")
        for _ in range(400):
            session.say(type="input.text", text="ten ")
        until(lambda: engine.active == 1, "it is being spoken")
        (stream,) = engine._active
        assert session.session.ping().wait(10)
        session.session.close_socket()
        until(lambda: stream.cancelled, "the server has noticed", seconds=10)
        go.set()
        until(lambda: engine.active == 0, "its place is free", seconds=10)


def test_what_is_too_far_ahead_waits_in_the_network_and_is_spoken_all_the_same(
    serve, held, until, monkeypatch
):
    monkeypatch.setattr("revox.serving.speech_socket.AHEAD", 4 * (OVERHEAD + 40))
    begun, begin = [], Session.__init__
    monkeypatch.setattr(Session, "__init__", lambda self, *given: begun.append(self) or begin(self, *given))
    with serve() as (url, app), connect(url.replace("http", "ws") + "/v1/audio/speech/stream") as socket_:
        talker = Talker(socket_, app)
        with held(app.state.revox.engine, 20) as go:
            talker.say(**CONFIG)
            talker.say(type="input.text", text="ten. ")
            until(lambda: app.state.revox.engine.active == 1, "it is being spoken")
            for _ in range(30):
                talker.say(type="input.text", text="ten ")
            talker.say(type="input.text", text="x" * 500)
            talker.say(type="input.done")
            (one,) = begun
            until(lambda: one._ahead > 4 * (OVERHEAD + 40), "so much is read")
            talker.session.ping().wait(0.5)  # time in which all of it could be
            assert one._inbox.qsize() <= 5
            go.set()
        heard = talker.until_done()
    said = [one["sentence_text"] for one in heard if isinstance(one, dict) and one["type"] == "audio.start"]
    assert said == ["ten.", "ten " * 30 + "x" * 500]


def test_a_session_without_its_first_message_ends(serve, monkeypatch):
    monkeypatch.setattr("revox.serving.speech_socket.CONFIG_SECONDS", 0.05)
    with serve() as (url, _app), connect(url.replace("http", "ws") + "/v1/audio/speech/stream") as session:
        assert "session.config" in json.loads(session.recv(timeout=10))["message"]
        with pytest.raises(ConnectionClosed):
            session.recv(timeout=10)


def test_a_page_of_another_origin_may_not_connect(serve):
    with serve() as (url, _app):
        address = url.replace("http", "ws") + "/v1/audio/speech/stream"
        with pytest.raises(InvalidStatus) as told, connect(address, origin="https://example.org"):
            pass
        assert told.value.response.status_code == 403
        with connect(address, origin=url) as session:
            session.send("{")
            assert json.loads(session.recv(timeout=20))["type"] == "error"


def test_a_name_that_was_led_to_this_machine_may_not_connect(serve):
    with serve() as (url, _app):
        there = socket.create_connection((urlsplit(url).hostname, urlsplit(url).port))
        address = "ws://evil.example/v1/audio/speech/stream"
        with pytest.raises(InvalidStatus) as told, connect(address, sock=there, origin="http://evil.example"):
            pass
        assert told.value.response.status_code == 403
        assert b"--allow-host" in told.value.response.body


def test_without_a_key_the_connection_is_refused_with_a_401(serve, tmp_path):
    keys = tmp_path / "keys.json"
    key = add_key(keys, "ada")
    with serve(api_keys=keys) as (url, _app):
        address = url.replace("http", "ws") + "/v1/audio/speech/stream"
        with pytest.raises(InvalidStatus) as told, connect(address):
            pass
        with connect(address, additional_headers={"Authorization": f"Bearer {key}"}) as session:
            session.send("{")
            assert json.loads(session.recv(timeout=20))["type"] == "error"
    assert told.value.response.status_code == 401
    assert told.value.response.headers["www-authenticate"] == "Bearer"
    assert json.loads(told.value.response.body)["error"]["code"] == "invalid_api_key"


def test_the_rate_counts_utterances(serve, tmp_path):
    keys = tmp_path / "keys.json"
    headers = {"Authorization": f"Bearer {add_key(keys, 'ada')}"}
    with serve(api_keys=keys, rate_limit=2) as (url, app):
        address = url.replace("http", "ws") + "/v1/audio/speech/stream"
        with connect(address, additional_headers=headers) as session:
            talker = Talker(session, app)
            talker.say(**{**CONFIG, "max_new_tokens": 1})
            for _ in range(3):
                talker.say(type="input.text", text="ten")
                talker.say(type="input.done")
            kinds = [one for _ in range(3) for one in talker.until_done() if isinstance(one, dict)]
    refused = [one["error"]["code"] for one in kinds if one["type"] == "error"]
    assert refused == ["rate_limit_exceeded"]
    assert sum(one["type"] == "audio.done" for one in kinds) == 2


def test_what_is_sent_in_pieces_is_marked_too(serve):
    with (
        serve(marking=True) as (url, app),
        connect(url.replace("http", "ws") + "/v1/audio/speech/stream") as session,
    ):
        talker = Talker(session, app)
        for format in ("pcm", "flac"):
            talker.say(**{**CONFIG, "response_format": format, "max_new_tokens": 1})
            talker.say(type="input.text", text="ten")
            talker.say(type="input.done")
            start, sound, *_ = talker.until_done()
            assert start["mark"]["voice"] == "neutral_male"
            assert start["mark"]["model"] == "tiny"
            if format != "pcm":
                assert verify_bytes(sound).state == "marked"
