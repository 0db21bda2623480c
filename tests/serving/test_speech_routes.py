from __future__ import annotations

import asyncio
import base64
import io
import json
import wave

import numpy as np
import pytest

from revox.marking import verify_bytes
from revox.serving.errors import ApiError
from revox.serving.keys import add_key
from revox.serving.references import Reference
from revox.speech import Audio, read_audio

SAID = {"input": "Hello.", "voice": "neutral_male", "seed": 3, "max_new_tokens": 7}
SAMPLES = 7 * 1920
FORMATS = ("wav", "pcm", "flac", "mp3", "aac", "opus")


@pytest.fixture(scope="module")
def alone(tts):
    return tts.speak("Hello.", "neutral_male", seed=3, takes=1, max_seconds=7 * 0.08).samples


def _ask(talk, *bodies, path="/v1/audio/speech", **settings):
    async def dialogue(client, app):
        return [await client.post(path, json=body) for body in bodies]

    answers = talk(dialogue, **settings)
    return answers[0] if len(bodies) == 1 else answers


def _sound(data):
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 24000)
        return np.frombuffer(file.readframes(1 << 30), "<i2") / 32768


def _events(answer):
    blocks = [block.split("\n", 1) for block in answer.text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name for name, _ in blocks] == [f"event: {event['type']}" for event in events]
    return events


def test_the_answer_is_what_the_library_speaks_with_the_same_seed(talk, alone):
    answer = _ask(talk, SAID)
    assert answer.headers["content-type"] == "audio/wav"
    np.testing.assert_allclose(_sound(answer.content), alone, atol=1 / 32768)


def test_two_at_once_are_each_what_they_are_alone(talk, tts, alone):
    other = {**SAID, "input": "Good evening, doctor.", "voice": "hi_female", "seed": 0}

    async def dialogue(client, app):
        return await asyncio.gather(*(client.post("/v1/audio/speech", json=body) for body in (SAID, other)))

    first, second = talk(dialogue)
    np.testing.assert_allclose(_sound(first.content), alone, atol=1 / 32768)
    expected = tts.speak(other["input"], other["voice"], seed=0, takes=1, max_seconds=7 * 0.08).samples
    np.testing.assert_allclose(_sound(second.content), expected, atol=1 / 32768)


def test_every_format_whole_and_streamed_decodes_to_the_same_sound(talk, tmp_path, alone):
    bodies = [
        {**SAID, "response_format": name, **({"stream_format": "audio"} if streamed else {})}
        for name in FORMATS
        for streamed in (False, True)
    ]
    for body, answer in zip(bodies, _ask(talk, *bodies), strict=True):
        name = body["response_format"]
        assert answer.status_code == 200, answer.text
        if name == "pcm":
            samples = np.frombuffer(answer.content, "<i2") / 32768
        else:
            path = tmp_path / f"speech.{name}"
            path.write_bytes(answer.content)
            samples = read_audio(path).at(24000).samples
        if name in ("wav", "pcm", "flac"):
            np.testing.assert_allclose(samples, alone, atol=1 / 32768)
        else:
            # Lossy, and with a delay of its own: the energy is there, and the length, but for a few packets.
            assert abs(len(samples) - SAMPLES) < 3000, body
            loud = np.sqrt(np.mean(samples**2)) / np.sqrt(np.mean(alone**2))
            assert 0.5 < loud < 1.5, body


@pytest.mark.parametrize("stream", [{"stream_format": "audio"}, {"stream_format": "sse"}])
@pytest.mark.parametrize("name", ["wav", "flac", "mp3", "opus"])
def test_libsndfile_reads_what_is_streamed(talk, name, stream, alone):
    soundfile = pytest.importorskip("soundfile")
    answer = _ask(talk, {**SAID, "response_format": name, **stream})
    data = answer.content
    if "sse" in stream.values():
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
        data = b"".join(base64.b64decode(event["audio"]) for event in events if "audio" in event)
    samples, rate = soundfile.read(io.BytesIO(data))
    assert abs(len(samples) * 24000 / rate - len(alone)) < 3000


def test_usage_is_counted_as_vllm_omni_counts_it(talk, tts):
    answer = _ask(talk, SAID)
    text = len(tts.prompter.text_tokens("Hello."))
    expected = {"input": text, "output": 7, "total": text + 7, "input-text": text, "input-audio": 0}
    assert {name: int(answer.headers[f"x-vllm-omni-{name}-tokens"]) for name in expected} == expected
    assert answer.headers["x-revox-truncated"] == "true"


@pytest.mark.parametrize("asked", [{"stream": True}, {"stream_format": "sse"}])
def test_events_carry_the_audio_in_pieces_and_the_usage_at_the_end(talk, alone, asked):
    answer = _ask(talk, {**SAID, "response_format": "pcm", **asked})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *deltas, done = _events(answer)
    assert [(d["type"], d["response_format"]) for d in deltas] == [("speech.audio.delta", "pcm")] * 2
    pieces = [np.frombuffer(base64.b64decode(delta["audio"]), "<i2") / 32768 for delta in deltas]
    assert [len(piece) for piece in pieces] == [5 * 1920, 2 * 1920]
    np.testing.assert_allclose(np.concatenate(pieces), alone, atol=1 / 32768)
    assert done["type"] == "speech.audio.done"
    assert done["usage"]["output_tokens"] == 7
    assert done["usage"]["total_tokens"] == done["usage"]["input_tokens"] + 7


def test_the_chunked_endpoint_streams_without_being_asked_to(talk, alone):
    answer = _ask(talk, {**SAID, "response_format": "pcm"}, path="/v1/audio/speech/stream")
    assert "content-length" not in answer.headers
    np.testing.assert_allclose(np.frombuffer(answer.content, "<i2") / 32768, alone, atol=1 / 32768)


def test_speed_changes_the_length_whole_and_streamed_and_a_sample_rate_is_followed(talk):
    pcm = {**SAID, "response_format": "pcm"}
    bodies = [
        {**pcm, "speed": 2.0},
        {**pcm, "speed": 2.0, "stream_format": "audio"},
        {**pcm, "speed": 0.5},
        {**pcm, "sample_rate": 8000},
        {**pcm, "sample_rate": 8000, "stream_format": "audio"},
    ]
    lengths = [len(answer.content) // 2 for answer in _ask(talk, *bodies)]
    assert lengths[0] == lengths[1] == pytest.approx(SAMPLES / 2, rel=0.15)
    assert lengths[2] == pytest.approx(SAMPLES * 2, rel=0.15)
    assert lengths[3] == lengths[4] == pytest.approx(SAMPLES / 3, abs=2)


def test_the_engine_is_told_at_what_speed_its_frames_are_heard(talk, monkeypatch):
    async def dialogue(client, app):
        engine, told = app.state.revox.engine, []
        submit = engine.submit

        def noted(*args, **named):
            told.append(named["speed"])
            return submit(*args, **named)

        monkeypatch.setattr(engine, "submit", noted)
        for body in ({**SAID, "speed": 1.5, "stream_format": "audio"}, {**SAID, "speed": 0.5}, SAID):
            assert (await client.post("/v1/audio/speech", json=body)).status_code == 200
        return told

    assert talk(dialogue) == [1.5, 0.5, 1.0]


@pytest.mark.parametrize("path", ["/v1/audio/speech", "/v1/audio/speech/stream"])
def test_one_request_takes_one_place_and_tokenizes_its_text_once(talk, tts, monkeypatch, path):
    async def dialogue(client, app):
        engine, calls = app.state.revox.engine, []
        for owner, name in ((tts.prompter, "text_tokens"), (engine, "place"), (engine, "submit")):
            real = getattr(owner, name)
            monkeypatch.setattr(
                owner, name, lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k)
            )
        assert (await client.post(path, json=SAID)).status_code == 200
        return calls

    assert talk(dialogue) == ["place", "text_tokens", "submit"]


def test_a_stream_that_fails_says_so_in_its_last_event_and_before_the_first_sound_by_its_status(
    talk, monkeypatch
):
    async def dialogue(client, app):
        frames = app.state.revox.engine._engine
        real, calls = frames.decode, []

        def decoded(several):
            calls.extend(several)
            if len(calls) > 1:
                raise RuntimeError("secret")
            return real(several)

        monkeypatch.setattr(frames, "decode", decoded)
        body = {**SAID, "stream": True, "response_format": "pcm"}
        return [await client.post("/v1/audio/speech", json=body) for _ in range(2)]

    later, at_once = talk(dialogue)
    delta, error = _events(later)
    assert delta["type"] == "speech.audio.delta"
    assert error["type"] == "speech.audio.error"
    assert error["error"]["type"] == "server_error"
    assert "secret" not in later.text + at_once.text
    assert at_once.status_code == 500
    assert at_once.json()["error"]["type"] == "server_error"


def test_a_batch_speaks_what_it_can_and_tells_of_each_item_that_it_cannot(talk, alone):
    items = [
        {"input": "Hello."},
        {"input": " "},
        {"input": "Hello.", "voice": "nobody"},
        {"input": "Hello.", "instructions": "whisper"},
        "Hello.",
        {"input": "Hello.", "stream": True},
        {"input": "Hello.", "response_format": "pcm", "voice": "casual_male", "max_new_tokens": 2},
    ]
    batch = {**{k: v for k, v in SAID.items() if k != "input"}, "items": items}
    answer = _ask(talk, batch, path="/v1/audio/speech/batch", max_streams=2, max_queue=0)
    found = answer.json()
    assert (found["total"], found["succeeded"], found["failed"]) == (7, 2, 5)
    assert found["id"].startswith("speech-batch-")
    results = found["results"]
    assert [result["index"] for result in results] == list(range(7))
    assert [result["status"] for result in results] == ["success", *["error"] * 5, "success"]
    np.testing.assert_allclose(_sound(base64.b64decode(results[0]["audio_data"])), alone, atol=1 / 32768)
    assert results[0]["usage"]["output_tokens"] == 7
    assert results[6]["media_type"] == "audio/pcm"
    assert len(base64.b64decode(results[6]["audio_data"])) == 2 * 2 * 1920
    for result, word in zip(
        results[1:6], ("empty", "nobody", "instructions", "object", "complete response"), strict=True
    ):
        assert word in result["error"]
        assert "audio_data" not in result


def test_a_batch_has_1_to_32_items(talk):
    none, many = _ask(talk, {"items": []}, {"items": [{}] * 33}, path="/v1/audio/speech/batch")
    assert (none.status_code, many.status_code) == (422, 422)


NO_EFFECT = [
    ("instructions", "Speak softly."),
    ("task_type", "VoiceDesign"),
    ("task_type", "Base"),
    ("language", "Chinese"),
    ("x_vector_only_mode", True),
    ("speaker_embedding", [0.5]),
    ("non_streaming_mode", False),
    ("word_timestamps", True),
    ("ref_audio_2", "x"),
    ("ambient_sound", "rain"),
    ("duration_seconds", 3.0),
    ("extra_params", {"a": 1}),
    ("ref_text", "Hello."),
    ("consent", "my own voice"),
    ("initial_codec_chunk_frames", 3),
    ("temperature", 0.7),
    ("user", "me"),
]


def test_a_field_that_would_have_no_effect_is_refused_with_its_name_and_why(talk):
    answers = _ask(talk, *({**SAID, name: value} for name, value in NO_EFFECT))
    for (name, _), answer in zip(NO_EFFECT, answers, strict=True):
        error = answer.json()["error"]
        assert answer.status_code == 400, name
        assert (error["param"], error["code"], error["type"]) == (
            name, "unsupported_parameter", "invalid_request_error",
        )  # fmt: skip
        assert name in error["message"]
        assert len(error["message"]) > len(name) + 30, "it says why"


def test_the_scale_of_guidance_is_taken_as_vllm_omnis_demo_sends_it(talk, tts):
    said = {**SAID, "response_format": "pcm", "max_new_tokens": 4}
    usual, more, too_much, none = _ask(
        talk,
        said,
        {**said, "extra_params": {"cfg_alpha": 3.0}},
        {**said, "extra_params": {"cfg_alpha": 11}},
        {**said, "extra_params": {}},
    )
    expected = tts.speak(SAID["input"], SAID["voice"], seed=3, takes=1, cfg=3.0, max_seconds=0.32).samples
    found = np.frombuffer(more.content, "<i2")
    np.testing.assert_allclose(found, np.clip(np.rint(expected * 32768), -32768, 32767), atol=1)
    assert more.content != usual.content
    assert none.content == usual.content
    assert too_much.status_code == 422


def test_flow_steps_are_those_asked_for_and_at_most_16(talk, tts):
    said = {**SAID, "response_format": "pcm", "max_new_tokens": 4}
    usual, three, most, none, too_many = _ask(
        talk, said, *({**said, "flow_steps": steps} for steps in (3, 16, 0, 17))
    )
    expected = tts.speak(
        SAID["input"], SAID["voice"], seed=3, takes=1, flow_steps=3, max_seconds=0.32
    ).samples
    found = np.frombuffer(three.content, "<i2")
    np.testing.assert_allclose(found, np.clip(np.rint(expected * 32768), -32768, 32767), atol=1)
    assert len({usual.content, three.content, most.content}) == 3
    assert (none.status_code, too_many.status_code) == (422, 422)


def test_values_that_ask_for_nothing_are_taken(talk):
    nothing = {
        "instructions": "", "task_type": "CustomVoice", "language": "Auto", "x_vector_only_mode": False,
        "speaker_embedding": None, "word_timestamps": False, "stream": False, "speed": None, "seed": None,
        "model": "tiny", "ref_audio": None, "sample_rate": None,
    }  # fmt: skip
    assert _ask(talk, {**nothing, "input": "ten", "voice": "pt_male", "max_new_tokens": 1}).status_code == 200


def test_voices_are_found_in_any_case_and_by_openais_id_and_unknown_ones_are_a_404_with_the_nearest(talk):
    loud, by_id, speaker, unknown, missing = _ask(
        talk,
        {**SAID, "voice": "Neutral_MALE", "max_new_tokens": 1},
        {**SAID, "voice": {"id": "neutral_male"}, "max_new_tokens": 1},
        {"input": "Hello.", "speaker": "neutral_male", "max_new_tokens": 1},
        {**SAID, "voice": "neutral_mail"},
        {"input": "Hello."},
    )
    assert (loud.status_code, by_id.status_code, speaker.status_code) == (200, 200, 200)
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "voice_not_found"
    assert "neutral_male" in unknown.json()["error"]["message"]
    assert "/" not in unknown.json()["error"]["message"].replace("/v1/audio/voices", ""), "no folder is named"
    assert missing.status_code == 400
    assert missing.json()["error"]["param"] == "voice"


def test_texts_that_cannot_be_spoken_are_a_400(talk):
    empty, blank, long, endless = _ask(
        talk,
        {**SAID, "input": ""},
        {**SAID, "input": " \n"},
        {**SAID, "input": "a" * 101},
        {**SAID, "input": "\x00 \ud83d".encode("utf-16", "surrogatepass").decode("utf-16", "replace")},
        max_text_characters=100,
    )
    for answer, code in ((empty, "empty_input"), (blank, "empty_input"), (long, "input_too_long")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
        assert answer.json()["error"]["param"] == "input"
    assert endless.status_code in (200, 400)


def test_another_model_is_a_404(talk):
    answer = _ask(talk, {**SAID, "model": "tts-1"})
    assert answer.status_code == 404
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == ("model", "model_not_found")


class _Recordings:
    """In place of references and voices: knows one recording, and remembers what it was asked."""

    def __init__(self, tts):
        self.tts, self.asked = tts, []

    async def resolve(self, ref_audio):
        if ref_audio != "good":
            raise ApiError(400, "no recording", param="ref_audio")
        return Reference(b"", Audio(np.zeros(10), 24000), "data")

    async def inline(self, reference, *, consent, ref_text, asked_by):
        self.asked.append((consent, ref_text, asked_by))
        return self.tts.voice("neutral_male")


def test_ref_audio_speaks_like_the_recording_and_hands_on_consent_and_transcript(
    talk, tts, alone, monkeypatch
):
    said = {name: value for name, value in SAID.items() if name != "voice"}

    async def dialogue(client, app):
        state, parts = app.state.revox, _Recordings(tts)
        monkeypatch.setattr(state.references, "resolve", parts.resolve)
        monkeypatch.setattr(state.voices, "inline", parts.inline)
        bodies = [
            {**said, "ref_audio": "good", "consent": "mine", "ref_text": "ten", "task_type": "Base"},
            {**said, "ref_audio": "good", "voice": ""},
            {**said, "ref_audio": "bad"},
            {**said, "ref_audio": "good", "voice": "neutral_male"},
            {**said, "ref_audio": "good", "task_type": "CustomVoice"},
        ]
        return parts.asked, [await client.post("/v1/audio/speech", json=body) for body in bodies]

    asked, (good, unnamed, bad, both, custom) = talk(dialogue)
    np.testing.assert_allclose(_sound(good.content), alone, atol=1 / 32768)
    assert int(good.headers["x-vllm-omni-input-audio-tokens"]) == len(tts.voice("neutral_male").embedding)
    assert asked == [("mine", "ten", "anonymous"), (None, None, "anonymous")]
    assert [a.status_code for a in (unnamed, bad, both, custom)] == [200, 400, 400, 400]
    assert [a.json()["error"]["param"] for a in (bad, both, custom)] == ["ref_audio", "voice", "task_type"]


def test_what_is_spoken_is_marked_in_the_file_and_in_the_headers_unless_that_is_off(talk):
    from revox.marking.tags import read_tags

    bodies = [{**SAID, "max_new_tokens": 1}, {**SAID, "max_new_tokens": 1, "stream_format": "audio"}]
    marked, streamed = _ask(talk, *bodies, marking=True)
    for answer in (marked, streamed):
        assert answer.headers["x-revox-synthetic"] == "?1"
        assert json.loads(answer.headers["x-revox-mark"])["voice"] == "neutral_male"
    assert read_tags(marked.content)["model"] == "tiny"
    plain = _ask(talk, bodies[0], marking=False)
    assert "x-revox-synthetic" not in plain.headers
    assert read_tags(plain.content) is None


def test_every_format_carries_its_mark_whole_and_in_a_batch_and_every_stream_in_its_headers(talk):
    bodies = [{**SAID, "max_new_tokens": 1, "response_format": name} for name in FORMATS]
    streams = [{**body, "stream_format": kind} for body in bodies for kind in ("audio", "sse")]

    async def dialogue(client, app):
        batch = await client.post("/v1/audio/speech/batch", json={"items": bodies})
        path = "/v1/audio/speech"
        return batch, [await client.post(path, json=body) for body in (*bodies, *streams)]

    batch, answers = talk(dialogue, marking=True)
    files = [base64.b64decode(result["audio_data"]) for result in batch.json()["results"]]
    for name, whole, item in zip(FORMATS, answers, files, strict=False):
        if name != "pcm":  # raw samples have no place for it
            assert verify_bytes(whole.content).state == "marked", name
            assert verify_bytes(item).state == "marked", name
    for answer in answers:
        assert answer.headers["x-revox-synthetic"] == "?1"
        assert json.loads(answer.headers["x-revox-mark"])["voice"] == "neutral_male"


def test_whoever_may_not_ask_sends_nothing(talk, tmp_path):
    keys = tmp_path / "keys.json"
    key = add_key(keys, "ada", rate_limit=1)
    sent = []

    async def endless():
        while True:
            sent.append(1)
            yield b"x" * (1 << 16)

    async def dialogue(client, app):
        answers = []
        for path in ("/v1/audio/voices", "/v1/audio/speech", "/v1/audio/similarity", "/v1/nothing"):
            kind = {"content-type": "multipart/form-data; boundary=x"}
            answers.append(await client.post(path, content=endless(), headers=kind))
        known = {"authorization": f"Bearer {key}"}
        good = await client.get("/v1/models", headers=known)
        often = await client.post("/v1/audio/voices", content=endless(), headers=known)
        return answers, good, often, await client.get("/metrics")

    answers, good, often, metrics = talk(dialogue, api_keys=keys)
    assert sent == []
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert good.status_code == 200
    assert (often.status_code, often.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(often.headers["retry-after"]) >= 1
    assert 'revox_requests_total{path="other",status="401"} 4.0' in metrics.text, "refusals are counted"


def test_models_health_readiness_and_metrics(talk):
    async def dialogue(client, app):
        await client.post("/v1/audio/speech", json={**SAID, "max_new_tokens": 2})
        paths = ("/v1/models", "/v1/models/tiny", "/v1/models/other", "/health", "/ready", "/metrics")
        answers = [await client.get(path) for path in paths]
        app.state.revox.draining = True
        return [*answers, await client.get("/ready")]

    models, one, other, health, ready, metrics, draining = talk(dialogue)
    assert models.json() == {"object": "list", "data": [one.json()]}
    assert {"id": "tiny", "object": "model"}.items() <= one.json().items()
    assert (other.status_code, health.status_code, ready.status_code) == (404, 200, 200)
    assert draining.status_code == 503
    for line in (
        'revox_requests_total{path="/v1/audio/speech",status="200"} 1.0',
        'revox_utterances_total{outcome="cut"} 1.0',
        "revox_first_audio_seconds_count 1.0",
        "revox_real_time_factor_count 1.0",
        "revox_active_streams 0.0",
        "revox_queue_length 0.0",
    ):
        assert line in metrics.text.splitlines()


def test_pages_of_other_origins_may_call_only_if_the_operator_says_so(talk):
    async def dialogue(client, app):
        return await client.get("/v1/models", headers={"Origin": "https://example.org"})

    assert "access-control-allow-origin" not in talk(dialogue).headers
    allowed = talk(dialogue, cors_origins=("https://example.org",))
    assert allowed.headers["access-control-allow-origin"] == "https://example.org"


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://example.org", 403), ("null", 403), ("http://test.example.org", 403), ("http://[", 403),
        ("http://test", 200), ("https://TEST", 200), ("https://friend.example", 200), (None, 200),
    ],
)  # fmt: skip
def test_what_a_page_of_another_origin_sends_is_refused(talk, origin, status):
    async def dialogue(client, app):
        headers = {"Origin": origin} if origin else {}
        return await client.post("/v1/audio/speech", json={**SAID, "max_new_tokens": 1}, headers=headers)

    assert talk(dialogue, cors_origins=("https://friend.example",)).status_code == status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403), ("evil.example:8000", 403), ("127.0.0.1.evil.example", 403), ("[", 403),
        ("evil.localhost.example.", 403), ("evil.milan", 403), ("test", 200), ("localhost:8000", 200),
        ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("revox.default.svc.cluster.local", 200),
        ("host.docker.internal", 200), ("TTS.example.org.", 200), ("", 200),
    ],
)  # fmt: skip
def test_a_name_that_was_led_to_this_machine_reaches_nothing(talk, host, status):
    async def dialogue(client, app):
        paths = ("/health", "/metrics", "/v1/models", "/")
        return [await client.get(path, headers={"Host": host}) for path in paths]

    *watched, models, page = talk(dialogue, allowed_hosts=("tts.example.org",))
    assert [answer.status_code for answer in watched] == [200, 200]
    for answer in (models, page):
        assert answer.status_code == status
        assert status == 200 or "--allow-host" in answer.json()["error"]["message"]


def test_names_are_not_asked_for_where_keys_are_or_where_every_page_may_call(talk, tmp_path):
    async def dialogue(client, app):
        return await client.get("/v1/models", headers={"Host": "tts.example.org"})

    keys = tmp_path / "keys.json"
    add_key(keys, "ada")
    assert talk(dialogue, api_keys=keys).status_code == 401
    assert talk(dialogue, cors_origins=("*",)).status_code == 200


LONG = {
    **SAID,
    "input": "He waited in the hall until the rain had stopped, and then he left by the other door. " * 6,
    "max_new_tokens": 400,
}


def test_a_long_text_is_spoken_in_pieces_as_the_library_speaks_it_whole_and_streamed(talk, tts):
    told = []
    options = {"seed": 3, "takes": 1, "max_seconds": 32.0}
    expected = tts.speak(LONG["input"], LONG["voice"], report=told.append, **options)
    answer = _ask(talk, LONG)
    np.testing.assert_allclose(_sound(answer.content), np.clip(expected.samples, -1, 1), atol=1 / 32768)
    assert answer.headers["x-revox-truncated"] == str(expected.truncated).lower()
    # Random weights end when they like, long before a text of this length.
    assert told
    warnings = ", ".join(f"{warning.piece}:{warning.fault.value}" for warning in told)
    assert answer.headers["x-revox-warnings"] == warnings
    streamed = _ask(talk, {**LONG, "stream_format": "audio", "response_format": "pcm"})
    samples = np.frombuffer(streamed.content, "<i2") / 32768
    np.testing.assert_allclose(samples, np.clip(expected.samples, -1, 1), atol=1 / 32768)
    *_, warning, done = _events(_ask(talk, {**LONG, "stream": True}))
    assert (warning["type"], warning["fault"]) == ("speech.audio.warning", told[-1].fault.value)
    assert warning["text"] in LONG["input"]
    assert done["truncated"] == expected.truncated
    assert done["usage"]["input_tokens"] == int(answer.headers["x-vllm-omni-input-tokens"])


def test_bad_takes_are_spoken_again_as_often_as_the_request_or_the_server_says(talk):
    body = {**LONG, "input": LONG["input"][:258]}

    async def dialogue(client, app):
        engine, asked = app.state.revox.engine, []
        submit = engine.submit
        engine.submit = lambda request, **options: asked.append(request) or submit(request, **options)
        counts = []
        for takes in ({}, {"takes": 1}):
            before = len(asked)
            assert (await client.post("/v1/audio/speech", json={**body, **takes})).status_code == 200
            counts.append(len(asked) - before)
        return counts, asked

    counts, asked = talk(dialogue, takes=2)
    assert counts == [2, 1]
    assert asked[0].min_frames > 0
    assert asked[0].seed != asked[1].seed
    assert (asked[2].min_frames, asked[2].seed) == (0, 3)


def test_markup_is_not_spoken_unless_the_text_is_to_stay_as_it_is(talk, alone, tmp_path):
    (tmp_path / "words.txt").write_text("Hi = Hello\n")
    body = {**SAID, "input": "# **Hi**."}
    answers = _ask(talk, body, {**body, "text_normalization": "none"}, lexicon=tmp_path / "words.txt")
    np.testing.assert_allclose(_sound(answers[0].content), alone, atol=1 / 32768)
    assert not np.array_equal(_sound(answers[1].content), _sound(answers[0].content))


def test_an_item_of_a_batch_says_what_went_wrong_in_it(talk):
    answer = _ask(talk, {"items": [LONG], "voice": "neutral_male"}, path="/v1/audio/speech/batch").json()
    [result] = answer["results"]
    assert {warning["piece"] for warning in result["warnings"]} <= {1, 2}
    assert result["truncated"] in (True, False)


@pytest.mark.parametrize("speed", [1.0, 1.6])
def test_events_say_when_each_sentence_is_heard(talk, tts, speed):
    text = "Ten to five. Seven, eight! And then?"
    said = {"input": text, "voice": "pt_male", "seed": 3, "response_format": "pcm", "timestamps": "sentence"}
    answer = _ask(talk, {**said, "stream_format": "sse", "speed": speed})
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    heard = [event for event in events if event["type"] == "speech.audio.sentence"]
    assert [event["text"] for event in heard] == ["Ten to five.", "Seven, eight!", "And then?"]
    assert [event["index"] for event in heard] == [0, 1, 2]
    at = 0.0
    for event in heard:
        alone = tts.speak(event["text"], "pt_male", seed=3, takes=1, report=lambda warning: None)
        assert event["start"] == pytest.approx(at / speed)
        assert event["end"] == pytest.approx((at + alone.seconds) / speed)
        at += alone.seconds + 0.25
    # A sentence is told once its sound is out, and not at the end only.
    kinds = [event["type"].removeprefix("speech.audio.") for event in events]
    assert "delta" in kinds[kinds.index("sentence") :]


def test_a_sentence_that_ends_with_its_last_chunk_is_told_too(talk, tts):
    frames = round(
        tts.speak("Ten to five.", "pt_male", seed=3, takes=1, report=lambda _: None).seconds * 12.5
    )
    said = {"input": "Ten to five.", "voice": "pt_male", "seed": 3, "response_format": "pcm"}
    said |= {"timestamps": "sentence", "stream_format": "sse", "initial_codec_chunk_frames": min(frames, 100)}
    assert "speech.audio.sentence" in _ask(talk, said).text


def test_pauses_are_bounded_together_and_a_text_that_fails_leaves_nobody_speaking(talk, monkeypatch):
    from revox.serving import speaking

    make_prompt, prompts = speaking.make_prompt, []

    def failing(*given):
        prompts.append(given)
        if len(prompts) == 2:
            raise ApiError(400, "it cannot be")
        return make_prompt(*given)

    async def dialogue(client, app):
        body = {"voice": "neutral_male", "max_new_tokens": 400}
        long = await client.post("/v1/audio/speech", json={**body, "input": "[pause:1s]" * 70 + "Hello."})
        some = {**body, "input": "[pause:2s] [pause:2s] Hello.", "max_new_tokens": 60}
        some = await client.post("/v1/audio/speech", json=some)
        monkeypatch.setattr(speaking, "make_prompt", failing)
        text = "Good morning to everybody. [pause:2s] See you tomorrow at the station."
        failed = await client.post("/v1/audio/speech", json={**body, "input": text})
        await asyncio.sleep(0.3)
        return long, some, failed, app.state.revox.engine.active

    long, some, failed, active = talk(dialogue)
    assert (long.status_code, "70 s of pauses" in long.text) == (400, True)
    assert some.status_code == 200
    assert (failed.status_code, active) == (400, 0)


def test_timestamps_without_events_and_of_another_kind_are_refused(talk):
    whole, streamed, words = _ask(
        talk,
        {**SAID, "timestamps": "sentence"},
        {**SAID, "timestamps": "sentence", "stream_format": "audio"},
        {**SAID, "timestamps": "word", "stream_format": "sse"},
    )
    assert (whole.status_code, streamed.status_code, words.status_code) == (400, 400, 422)
    assert whole.json()["error"]["param"] == "timestamps"
