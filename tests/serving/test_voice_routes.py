"""Voices over HTTP: uploads with consent, jobs, deletion with its tombstone, and what survives a restart."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import threading
from datetime import datetime, timezone
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import revox
from revox.checkpoint import consent_log
from revox.checkpoint.voices import Voice, add_voice, load_voice
from revox.cli.voice_command import app as voice_app
from revox.cloning.consent import provenance, source_of
from revox.cloning.errors import CloneError
from revox.demo import checkpoint_folder
from revox.progress import Progress, ignore_progress
from revox.serving import voice_files
from revox.serving.app import create_app
from revox.serving.errors import ApiError, ServeError
from revox.serving.keys import add_key
from revox.serving.references import Reference
from revox.serving.voice_jobs import Job
from revox.serving.voices import Voices, given_consent
from revox.speech import Audio, encode_audio, read_audio

CONSENT = "Ada Example, who agreed by e-mail on 2026-11-20"
CLIP = sorted((checkpoint_folder().parent / "examples").glob("*.flac"))[0].read_bytes()
SECOND = encode_audio(Audio(read_audio(CLIP, max_seconds=1.0).samples, 16_000), "wav")[0]
SHA256 = hashlib.sha256(CLIP).hexdigest()


class FakeCloner:
    """Gives a voice of known codes, when it is let; fails when told; sees whether it should stop."""

    def __init__(self, tts, by: str = "inversion") -> None:
        self.tts, self.by = tts, by
        self.go = threading.Event()
        self.go.set()
        self.begun = threading.Event()
        self.stopped = threading.Event()
        self.error: BaseException | None = None
        self.asked: list[str] = []
        self.frames = 20

    def codes(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(7)
        sizes = torch.tensor(self.tts.model.config.codebook_rows)[:, None] - 2
        return (torch.rand(len(sizes), self.frames, generator=generator) * sizes).long()

    def install(self, voices: Voices) -> None:
        voices._clone, voices.method = self, self.by

    def __call__(self, speech, name, consent, ref_text, progress=ignore_progress, should_stop=None):
        self.asked.append(name)
        progress(Progress("descent", 5, 10, {"seconds_left": 12.5}))
        self.begun.set()
        for _ in range(5000):  # a test that fails does not hang
            if self.go.wait(0.01):
                break
            if should_stop is not None and should_stop():
                self.stopped.set()
                break
        if self.error is not None:
            raise self.error
        rows = self.tts.model.mm_audio_embeddings.voice_embedding(self.codes())
        record = provenance(consent, self.by, source=speech.source)
        return Voice(name, self.codes(), rows.to(torch.bfloat16), record)


@pytest.fixture(autouse=True)
def _decoded_here(monkeypatch):
    """The clip is decoded in this process; that strangers' are not is shown in test_references."""
    monkeypatch.setattr(
        "revox.serving.references.sandboxed_decode", lambda data, rate, limit: read_audio(data, rate=rate)
    )


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_after(change: int, monkeypatch):
    """The process dies right after so many changes to the disk."""
    changes = itertools.count(1)

    def watched(function):
        def call(*arguments, **named):
            result = function(*arguments, **named)
            if next(changes) == change:
                raise Killed
            return result

        return call

    with monkeypatch.context() as patch:
        patch.setattr(voice_files, "replace_file", watched(voice_files.replace_file))
        patch.setattr(consent_log, "append", watched(consent_log.append))
        patch.setattr(Path, "unlink", watched(Path.unlink))
        with pytest.raises(Killed):
            yield


def form(name: str = "ada", clip: bytes = CLIP, **fields):
    """The arguments of an upload."""
    data = {"name": name, "consent": CONSENT, **fields}
    files = {"audio_sample": ("clip.flac", io.BytesIO(clip), "audio/flac")}
    return {"data": {k: v for k, v in data.items() if v is not None}, "files": files}


def faked(app, by: str = "inversion") -> FakeCloner:
    state = app.state.revox
    cloner = FakeCloner(state.tts, by)
    cloner.install(state.voices)
    return cloner


async def ended(client, job: dict) -> dict:
    """The job when it has come to its end."""
    for _ in range(2000):
        job = (await client.get(f"/v1/audio/voice-jobs/{job['id']}")).json()
        if job["state"] not in ("queued", "running"):
            return job
        await asyncio.sleep(0.01)
    raise AssertionError(job)


async def uploaded(client, **fields) -> dict:
    """The listed voice, after its job is done."""
    answer = await client.post("/v1/audio/voices", **form(**fields))
    assert answer.status_code in (200, 202), answer.text
    if answer.status_code == 202:
        job = await ended(client, answer.json()["job"])
        assert job["state"] == "done", job
    listed = (await client.get("/v1/audio/voices")).json()
    [voice] = [v for v in listed["uploaded_voices"] if v["name"] == fields.get("name", "ada")]
    return voice


def refused(answer: httpx.Response, status: int) -> str:
    """The sentence of a refusal in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error["message"]


def log_of(path: Path) -> list[tuple[str, str | None]]:
    return [(line["event"], line.get("voice")) for line in consent_log.read(path / "consent.jsonl")]


# ---- uploads


def test_an_inverted_upload_is_a_202_with_a_job_and_then_a_voice_with_its_consent(talk, tmp_path):
    async def dialogue(client, app):
        cloner = faked(app)
        cloner.go.clear()
        answer = await client.post("/v1/audio/voices", **form(subject="Ada", speaker_description="warm"))
        assert answer.status_code == 202
        said = answer.json()
        assert said["success"] is True
        assert said["job"]["state"] in ("queued", "running")
        assert answer.headers["Location"] == f"/v1/audio/voice-jobs/{said['job']['id']}"
        await asyncio.to_thread(cloner.begun.wait, 20)
        job = (await client.get(answer.headers["Location"])).json()
        assert (job["state"], job["phase"], job["seconds_left"]) == ("running", "descent", 12.5)
        assert job["progress"] == 0.35  # half of the descent, which is 0.7 of the whole
        assert "still being made" in refused(await client.get("/v1/audio/voices/ada"), 404)
        assert [j["id"] for j in (await client.get("/v1/audio/voices")).json()["jobs"]] == [job["id"]]
        cloner.go.set()
        job = await ended(client, job)
        assert (job["state"], job["progress"]) == ("done", 1.0)
        listed = (await client.get("/v1/audio/voices")).json()
        assert "ada" in listed["voices"]
        assert len(listed["voices"]) == 21
        [voice] = listed["uploaded_voices"]
        assert voice["consent"] == CONSENT
        assert (voice["subject"], voice["given_by"], voice["sha256"]) == ("Ada", "anonymous", SHA256)
        assert (voice["method"], voice["file_size"], voice["mime_type"]) == (
            "inversion",
            len(CLIP),
            "audio/flac",
        )
        assert voice["speaker_description"] == "warm"
        assert abs(voice["created_at"] - datetime.now(timezone.utc).timestamp()) < 60
        shown = (await client.get("/v1/audio/voices/ada")).json()
        assert (shown["frames"], shown["kind"]) == (20, "uploaded")
        assert shown["provenance"]["consent"]["statement"] == CONSENT
        spoken = app.state.revox.voices.voice("ada")
        assert torch.equal(spoken.codes, cloner.codes())
        speech = {"input": "Hello.", "voice": "ada", "max_new_tokens": 2}
        assert (await client.post("/v1/audio/speech", json=speech)).status_code == 200

    talk(dialogue)
    assert log_of(tmp_path / "voices") == [("asked", "ada"), ("added", "ada")]


def test_an_upload_with_an_encoder_is_a_200_in_vllm_omnis_shape(talk):
    async def dialogue(client, app):
        faked(app, "encoder")
        answer = await client.post("/v1/audio/voices", **form(ref_text="What he said."))
        assert answer.status_code == 200
        voice = answer.json()["voice"]
        # vllm-omni's docs/serving/speech_api.md
        assert {"name", "consent", "created_at", "mime_type", "file_size", "ref_text"} <= set(voice)
        assert (voice["name"], voice["ref_text"], voice["method"]) == ("ada", "What he said.", "encoder")
        gone = await client.delete("/v1/audio/voices/ada")
        assert gone.json() == {"success": True, "message": "Voice 'ada' deleted successfully"}

    talk(dialogue)


def test_an_upload_with_the_checkpoints_own_encoder_speaks_at_once(
    tiny_checkpoint_with_encoder, settings, tmp_path
):
    tts = revox.load(tiny_checkpoint_with_encoder, device="cpu", dtype=torch.float32)
    app = create_app(settings(), tts)

    async def dialogue():
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client,
        ):
            answer = await client.post("/v1/audio/voices", **form())
            assert answer.status_code == 200, answer.text
            assert answer.json()["voice"]["method"] == "encoder"
            preview = await client.get("/v1/audio/voices/ada/preview")
            frames = (await client.get("/v1/audio/voices/ada")).json()["frames"]
            audio = read_audio(preview.content)
            assert audio.samples.shape[-1] == frames * 1920
            voice = app.state.revox.voices.voice("ada")
            expected = tts.model.audio_tokenizer.decode(voice.codes[None])[0].numpy()
            assert abs(audio.samples - expected.clip(-1, 1)).max() < 1e-3

    asyncio.run(dialogue())


@pytest.mark.slow
def test_a_real_inversion_makes_a_voice_in_the_time_it_is_given(talk):
    async def dialogue(client, app):
        voice = await uploaded(client)
        assert voice["method"] == "inversion"

    talk(dialogue, clone_seconds=2.0)


@pytest.mark.parametrize(
    ("fields", "status", "sentence"),
    [
        ({"consent": None}, 422, "consent"),
        ({"consent": ""}, 422, "consent"),
        ({"consent": "  "}, 400, "consent is required"),
        ({"consent": "12"}, 400, "consent is required"),
        ({"consent": "a" * 4001}, 400, "longer than 4000"),
        ({"name": ""}, 422, "name"),
        (
            {"name": "Ada"},
            400,
            "cannot name a voice: use 1 to 64 of the characters a-z, 0-9, _ and -, - not first, such as ada",
        ),
        ({"name": "小明"}, 400, "such as voice_5c0f660e"),
        ({"name": "../ada"}, 400, "cannot name a voice"),
        ({"name": "a/b"}, 400, "cannot name a voice"),
        ({"name": "a" * 65}, 400, "cannot name a voice"),
        ({"name": "ada\x00"}, 400, "cannot name a voice"),
        ({"name": "neutral_male"}, 409, "already"),
        ({"ref_text": "x" * 4001}, 400, "longer than 4000"),
        ({"keep_sample": "perhaps"}, 422, "keep_sample"),
        ({"speaker_embedding": "[1, 2]"}, 400, "speaker_embedding: unknown field"),
        ({"language": "en"}, 400, "language: unknown field"),
        ({"clip": b""}, 400, "0 bytes"),
        ({"clip": b"these are words " * 100}, 400, "can be decoded"),
        ({"clip": SECOND}, 400, "speech"),
    ],
)
def test_a_bad_upload_is_a_sentence_and_leaves_nothing(talk, tmp_path, fields, status, sentence):
    async def dialogue(client, app):
        cloner = faked(app)
        assert sentence in refused(await client.post("/v1/audio/voices", **form(**fields)), status)
        assert cloner.asked == []
        listed = (await client.get("/v1/audio/voices")).json()
        assert (listed["uploaded_voices"], listed["jobs"]) == ([], [])
        assert await uploaded(client)  # and the name is free

    talk(dialogue)
    assert log_of(tmp_path / "voices") == [("asked", "ada"), ("added", "ada")]


def test_bodies_that_are_no_form_are_refused(talk):
    async def dialogue(client, app):
        faked(app)
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        for body, headers in (
            (b"", {}),
            (b"{}", {"Content-Type": "application/json"}),
            (b"--x\r\n", kind),
            (b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\n\xff\xfe\r\n--x--\r\n', kind),
            (b"\x00" * 1000, kind),
        ):
            answer = await client.post("/v1/audio/voices", content=body, headers=headers)
            refused(answer, 422 if answer.status_code == 422 else 400)
        assert "larger than" in refused(
            await client.post("/v1/audio/voices", **form(clip=b"a" * 50_000)), 413
        )
        assert (await client.get("/health")).status_code == 200

    talk(dialogue, max_body_bytes=20_000)


def test_of_two_uploads_of_one_name_at_once_one_is_a_409(talk, tmp_path):
    async def dialogue(client, app):
        cloner = faked(app, "encoder")
        cloner.go.clear()
        first = asyncio.create_task(client.post("/v1/audio/voices", **form()))
        await asyncio.to_thread(cloner.begun.wait, 20)
        assert "already" in refused(await client.post("/v1/audio/voices", **form()), 409)
        cloner.go.set()
        assert (await first).status_code == 200
        many = await asyncio.gather(*(client.post("/v1/audio/voices", **form("bob")) for _ in range(6)))
        assert sorted(answer.status_code for answer in many) == [200] + [409] * 5
        assert cloner.asked == ["ada", "bob"]

    talk(dialogue)


def test_a_queue_takes_names_in_turn_and_holds_them(talk):
    async def dialogue(client, app):
        cloner = faked(app)
        cloner.go.clear()
        jobs = []
        for name in ("ada", "bob", "cyd"):
            jobs.append((await client.post("/v1/audio/voices", **form(name))).json()["job"])
            await asyncio.to_thread(cloner.begun.wait, 20)
        refused(await client.post("/v1/audio/voices", **form("bob")), 409)
        told = [(await client.get(f"/v1/audio/voice-jobs/{job['id']}")).json() for job in jobs]
        assert [job["state"] for job in told] == ["running", "queued", "queued"]
        assert [job.get("waiting") for job in told] == [None, 1, 2]
        cloner.go.set()
        assert [(await ended(client, job))["state"] for job in jobs] == ["done"] * 3
        assert cloner.asked == ["ada", "bob", "cyd"]

    talk(dialogue)


def test_more_voices_than_allowed_and_more_jobs_than_can_wait_are_refused(talk, monkeypatch):
    monkeypatch.setattr("revox.serving.voice_jobs.MAX_WAITING", 1)

    async def dialogue(client, app):
        cloner = faked(app)
        cloner.go.clear()
        await client.post("/v1/audio/voices", **form("a"))
        await asyncio.to_thread(cloner.begun.wait, 20)
        assert (await client.post("/v1/audio/voices", **form("b"))).status_code == 202
        assert "wait" in refused(await client.post("/v1/audio/voices", **form("c")), 503)
        cloner.go.set()
        for job in (await client.get("/v1/audio/voice-jobs")).json()["data"]:
            await ended(client, job)
        assert await uploaded(client, name="c")
        assert "at most 3 uploaded voices" in refused(await client.post("/v1/audio/voices", **form("d")), 409)

    talk(dialogue, max_voices=3)


# ---- jobs that do not end well


def test_a_failed_job_says_why_frees_its_name_and_is_logged(talk, tmp_path):
    async def dialogue(client, app):
        cloner = faked(app)
        cloner.error = CloneError("the recording holds too little")
        job = (await client.post("/v1/audio/voices", **form())).json()["job"]
        job = await ended(client, job)
        assert (job["state"], job["error"], job["can_retry"]) == (
            "failed",
            "the recording holds too little",
            False,
        )
        cloner.error = RuntimeError("secret: /home/x")
        job = await ended(client, (await client.post("/v1/audio/voices", **form())).json()["job"])
        assert job["state"] == "failed"
        assert "secret" not in job["error"]
        cloner.error = None
        assert await uploaded(client)

    talk(dialogue)
    events = [kind for kind, _ in log_of(tmp_path / "voices")]
    assert events == ["asked", "failed", "asked", "failed", "asked", "added"]


def test_an_upload_that_finds_the_disk_full_is_a_507(talk, monkeypatch):
    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    async def dialogue(client, app):
        with monkeypatch.context() as patch:
            patch.setattr("tempfile.SpooledTemporaryFile.write", write)
            return await client.post("/v1/audio/voices", **form())

    answer = talk(dialogue)
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full")


@pytest.mark.parametrize("full", ["voice", "log"])
def test_a_disk_that_is_full_leaves_neither_half_a_voice_nor_its_recording(talk, tmp_path, monkeypatch, full):
    real_file, real_line = voice_files.replace_file, consent_log.append
    no_space = OSError(errno.ENOSPC, "No space left on device")

    def replace_file(path, content):
        if full == "voice" and Path(path).suffix == ".safetensors":
            raise no_space
        real_file(path, content)

    def append(path, line, once=False):
        if full == "log" and line["event"] == "added":
            raise no_space
        real_line(path, line, once)

    async def dialogue(client, app):
        faked(app)
        with monkeypatch.context() as patch:
            patch.setattr(voice_files, "replace_file", replace_file)
            patch.setattr(consent_log, "append", append)
            answer = await client.post("/v1/audio/voices", **form(keep_sample="true"))
            job = await ended(client, answer.json()["job"])
        assert (job["state"], job["can_retry"]) == ("failed", True)
        assert "could not be saved (No space left" in job["error"]
        refused(await client.get("/v1/audio/voices/ada"), 404)
        assert not list((tmp_path / "voices").glob("*.safetensors"))
        assert not list((tmp_path / "voices" / "samples").iterdir())
        again = await client.post(f"/v1/audio/voice-jobs/{job['id']}/retry")
        assert (await ended(client, again.json()))["state"] == "done"
        assert (await client.get("/v1/audio/voices/ada/sample")).content == CLIP

    talk(dialogue)
    assert log_of(tmp_path / "voices") == [
        ("asked", "ada"), ("failed", "ada"), ("asked", "ada"), ("added", "ada")
    ]  # fmt: skip


def test_an_upload_that_finds_the_disk_full_is_a_507_and_nothing_is_asked_for(talk, tmp_path, monkeypatch):
    def append(path, line, once=False):
        raise OSError(errno.ENOSPC, "No space left on device")

    async def dialogue(client, app):
        faked(app)
        with monkeypatch.context() as patch:
            patch.setattr(consent_log, "append", append)
            answer = await client.post("/v1/audio/voices", **form())
        assert "disk is full: nothing was saved" in refused(answer, 507)
        assert answer.json()["error"]["code"] == "disk_full"
        assert await uploaded(client)

    talk(dialogue)
    assert log_of(tmp_path / "voices") == [("asked", "ada"), ("added", "ada")]


def test_a_recording_that_was_not_to_be_kept_is_not_given_out_though_one_lies_there(talk, tmp_path):
    async def dialogue(client, app):
        faked(app)
        assert not (await uploaded(client))["sample_kept"]
        assert not list((tmp_path / "voices" / "samples").iterdir())
        (tmp_path / "voices" / "samples" / "ada").write_bytes(SECOND)
        refused(await client.get("/v1/audio/voices/ada/sample"), 404)

    talk(dialogue)


def test_a_recording_of_a_job_that_a_kill_kept_from_beginning_is_gone_after_the_next_start(
    tts, tmp_path, monkeypatch
):
    files = voice_files.VoiceFiles(tmp_path / "v", tts.model)
    files.save_job({"id": "whole", "created_at": 1}, CLIP)
    with killed_after(1, monkeypatch):
        files.save_job({"id": "half", "created_at": 1}, CLIP)
    (tmp_path / "v" / "jobs" / ".half.json.1-2.tmp").write_bytes(b"{")
    files.release()
    assert files.has_job_sample("half")
    voice_files.VoiceFiles(tmp_path / "v", tts.model).release()
    assert sorted(path.name for path in (tmp_path / "v" / "jobs").iterdir()) == ["whole.json", "whole.sample"]


def test_files_of_ones_own_in_the_folder_of_voices_stay(tts, tmp_path):
    own = [tmp_path / "v" / name for name in ("samples/interview.wav", "samples/takes/a.wav", ".notes.tmp",
                                              "samples/interview", "jobs/a.sample")]  # fmt: skip
    for path in own:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    voice_files.VoiceFiles(tmp_path / "v", tts.model).release()
    assert all(path.read_bytes() == b"mine" for path in own)
    voice_files.VoiceFiles(tmp_path / "v", tts.model).release()  # from now on it is a folder of voices
    assert all(path.read_bytes() == b"mine" for path in own[:2])
    assert not own[3].exists()  # as a recording would be whose voice a kill kept from being saved


@pytest.mark.parametrize("how", ["job", "voice"])
def test_a_cancelled_job_stops_and_leaves_nothing(talk, tmp_path, how):
    async def dialogue(client, app):
        cloner = faked(app)
        cloner.go.clear()
        jobs = [
            (await client.post("/v1/audio/voices", **form(name))).json()["job"] for name in ("ada", "bob")
        ]
        await asyncio.to_thread(cloner.begun.wait, 20)
        for job in jobs:
            path = f"voice-jobs/{job['id']}" if how == "job" else f"voices/{job['name']}"
            assert (await client.delete(f"/v1/audio/{path}")).status_code == 200
        assert await asyncio.to_thread(cloner.stopped.wait, 20)
        if how == "job":
            told = [await ended(client, job) for job in jobs]
            assert {job["error"] for job in told} == {"it was cancelled"}
            refused(await client.delete(f"/v1/audio/voice-jobs/{jobs[0]['id']}"), 409)
        assert (await client.get("/v1/audio/voices")).json()["uploaded_voices"] == []
        cloner.go.set()
        assert await uploaded(client)

    talk(dialogue)
    assert cancelled(tmp_path) == {"ada", "bob"}
    assert not list((tmp_path / "voices" / "jobs").glob("*.sample"))


def cancelled(tmp_path) -> set[str | None]:
    return {name for kind, name in log_of(tmp_path / "voices") if kind == "cancelled"}


@pytest.mark.parametrize("keep", [True, False])
def test_a_job_interrupted_by_a_stop_is_told_as_failed_and_retried_if_the_sample_was_kept(
    talk, tmp_path, keep
):
    ids = {}

    async def first(client, app):
        cloner = faked(app)
        cloner.go.clear()
        for name in ("ada", "bob"):  # one runs, one waits
            answer = await client.post("/v1/audio/voices", **form(name, keep_sample=str(keep)))
            ids[name] = answer.json()["job"]["id"]
        await asyncio.to_thread(cloner.begun.wait, 20)

    async def second(client, app):
        faked(app)
        for name in ("ada", "bob"):
            job = (await client.get(f"/v1/audio/voice-jobs/{ids[name]}")).json()
            assert job["state"] == "failed"
            assert "stopped before" in job["error"]
            assert job["can_retry"] is keep
            answer = await client.post(f"/v1/audio/voice-jobs/{ids[name]}/retry")
            if not keep:
                assert "upload the recording" in refused(answer, 409)
                continue
            assert answer.status_code == 202
            done = await ended(client, answer.json())
            assert (done["state"], done["retry_of"]) == ("done", ids[name])
            sample = await client.get(f"/v1/audio/voices/{name}/sample")
            assert sample.content == CLIP
            refused(await client.post(f"/v1/audio/voice-jobs/{ids[name]}/retry"), 409)

    talk(first)
    talk(second)


def test_a_server_that_was_killed_tells_its_job_as_interrupted(tts, settings):
    voices = Voices(settings(), tts)
    cloner = FakeCloner(tts)
    cloner.install(voices)
    cloner.go.clear()

    async def begin():
        reference = Reference(CLIP, read_audio(CLIP, rate=24_000), "upload")
        consent = given_consent(CONSENT, None, "x").model_dump(mode="json", exclude_none=True)
        job = Job(
            name="ada", asked_by="x", consent=consent, sha256=SHA256, details={"created_at": 1},
            keep_sample=True,
        )  # fmt: skip
        await voices.upload(reference, job)
        return job

    job = asyncio.run(begin())
    assert cloner.begun.wait(20)
    voices.files.release()  # what a killed process leaves: its files, and no lock
    again = Voices(settings(), tts)
    told = again.jobs.get(job.id)
    assert (told["state"], told["can_retry"]) == ("failed", True)
    assert "stopped before" in told["error"]
    cloner.go.set()
    asyncio.run(again.close())


# ---- restarts, deletion


def test_a_voice_is_there_after_a_restart_and_gone_after_its_deletion_with_all_that_was_derived(
    talk, tmp_path
):
    folder = tmp_path / "voices"

    async def first(client, app):
        await uploaded(client, keep_sample="true", ref_text="What he said.")
        await uploaded(client, name="bob")

    async def second(client, app):
        cloner = FakeCloner(app.state.revox.tts)
        listed = (await client.get("/v1/audio/voices")).json()
        assert [v["name"] for v in listed["uploaded_voices"]] == ["ada", "bob"]
        assert listed["uploaded_voices"][0]["ref_text"] == "What he said."
        voice = app.state.revox.voices.voice("ada")
        assert torch.equal(voice.codes, cloner.codes())
        assert torch.equal(voice.embedding, app.state.revox.voices.voice("bob").embedding)
        assert (await client.get("/v1/audio/voices/ada/sample")).content == CLIP
        assert "not kept" in refused(await client.get("/v1/audio/voices/bob/sample"), 404)
        assert (await client.delete("/v1/audio/voices/ada")).status_code == 200
        refused(await client.get("/v1/audio/voices/ada"), 404)
        refused(await client.delete("/v1/audio/voices/ada"), 404)
        # The request that speaks with it holds it; nobody else gets it.
        assert torch.equal(voice.codes, cloner.codes())
        left = [p for p in folder.rglob("*") if p.is_file() and p.name not in ("consent.jsonl", "lock")]
        assert not [p for p in left if "ada" in p.name]
        assert not [p for p in left if CLIP in p.read_bytes()]
        assert "Example" in (folder / "consent.jsonl").read_text()  # whose it was stays on record
        assert not [
            j for j in (await client.get("/v1/audio/voice-jobs")).json()["data"] if j["name"] == "ada"
        ]

    async def third(client, app):
        assert [v["name"] for v in (await client.get("/v1/audio/voices")).json()["uploaded_voices"]] == [
            "bob"
        ]
        document = (await client.get("/v1/audio/voices/ada/consent")).json()
        [ada] = document["voices"]
        assert ada["status"] == "removed"
        assert [line["event"] for line in ada["log"]] == ["asked", "added", "removed"]
        assert ada["log"][-1]["sha256"] == SHA256
        assert ada["log"][-1]["consent"]["statement"] == CONSENT

    def with_fake(dialogue):
        async def run(client, app):
            faked(app)
            return await dialogue(client, app)

        return run

    talk(with_fake(first))
    talk(with_fake(second))
    talk(with_fake(third))


@pytest.mark.parametrize(("change", "step"), [(1, "sample"), (2, "voice"), (3, "logged")])
def test_a_kill_while_a_voice_is_saved_leaves_a_whole_voice_or_none(tts, tmp_path, monkeypatch, change, step):
    cloner = FakeCloner(tts)
    record = provenance(CONSENT, "inversion", source=CLIP)
    voice = Voice(
        "ada", cloner.codes(), tts.model.mm_audio_embeddings.voice_embedding(cloner.codes()), record
    )

    files = voice_files.VoiceFiles(tmp_path / "v", tts.model)
    with killed_after(change, monkeypatch):
        files.save("ada", voice, {"created_at": 1}, CLIP)
    files.release()
    again = voice_files.VoiceFiles(tmp_path / "v", tts.model)
    assert list(again.records) == ([] if step == "sample" else ["ada"])
    assert again.sample("ada") == (None if step == "sample" else CLIP)
    assert log_of(tmp_path / "v") == ([] if step == "sample" else [("added", "ada")])
    if step != "sample":
        assert torch.equal(again.load("ada").codes, cloner.codes())
    again.release()


@pytest.mark.parametrize("change", [1, 2, 3], ids=["tombstone", "sample deleted", "voice deleted"])
def test_a_kill_while_a_voice_is_removed_is_finished_at_the_next_start(tts, tmp_path, monkeypatch, change):
    cloner = FakeCloner(tts)
    record = provenance(CONSENT, "inversion", source=CLIP)
    voice = Voice(
        "ada", cloner.codes(), tts.model.mm_audio_embeddings.voice_embedding(cloner.codes()), record
    )
    files = voice_files.VoiceFiles(tmp_path / "v", tts.model)
    files.save("ada", voice, {"created_at": 1}, CLIP)

    with killed_after(change, monkeypatch):
        files.remove("ada", "ada")
    files.release()
    again = voice_files.VoiceFiles(tmp_path / "v", tts.model)
    assert again.records == {}
    assert [path.name for path in (tmp_path / "v").rglob("*ada*")] == []
    assert log_of(tmp_path / "v") == [("added", "ada"), ("removed", "ada")]
    again.save("ada", voice, {"created_at": 2}, None)  # the old tombstone does not take the new one
    again.release()
    assert list(voice_files.VoiceFiles(tmp_path / "v", tts.model).records) == ["ada"]


def test_damaged_foreign_and_vanished_voices_are_left_alone_and_not_offered(tts, settings, tmp_path, caplog):
    voices = Voices(settings(), tts)
    cloner = FakeCloner(tts)
    rows = tts.model.mm_audio_embeddings.voice_embedding(cloner.codes())
    for name in ("ada", "bob", "cyd", "dan", "eve"):
        voices.files.save(
            name,
            Voice(name, cloner.codes(), rows, provenance(CONSENT, "x", source=CLIP)),
            {"created_at": 1},
            None,
        )
    folder = settings().voices_path
    (folder / "ada.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    (folder / "bob.safetensors").write_bytes((folder / "bob.safetensors").read_bytes()[:300])
    (folder / "dan.safetensors").unlink()
    (folder / "zoe.safetensors").write_bytes((folder / "eve.safetensors").read_bytes())  # says that it is eve
    (folder / "Odd Name.safetensors").write_bytes(b"")
    (folder / ".x.safetensors.1-2.tmp").write_bytes(b"half")
    asyncio.run(voices.close())
    monkey = voice_files.fingerprint(tts.model)
    again = Voices(settings(), tts)
    assert [record["name"] for record in again.records()] == ["cyd", "eve"]
    assert ("missing", "dan") in log_of(folder)
    assert not (folder / ".x.safetensors.1-2.tmp").exists()
    asyncio.run(again.close())
    other = {record["name"]: record["checkpoint"] for record in again.records()}
    assert set(other.values()) == {monkey}


def test_voices_of_another_checkpoint_are_not_offered(tts, settings, monkeypatch):
    voices = Voices(settings(), tts)
    cloner = FakeCloner(tts)
    rows = tts.model.mm_audio_embeddings.voice_embedding(cloner.codes())
    record = provenance(CONSENT, "x", source=CLIP)
    voices.files.save("ada", Voice("ada", cloner.codes(), rows, record), {"created_at": 1}, None)
    asyncio.run(voices.close())
    monkeypatch.setattr(voice_files, "fingerprint", lambda model: "another")
    kept = (settings().voices_path / "ada.safetensors").read_bytes()
    again = Voices(settings(), tts)
    assert again.records() == []
    # An upload of that name would write over it.
    with pytest.raises(ApiError, match="not a voice of this checkpoint") as told:
        again.check_name("ada")
    assert told.value.status == 409
    asyncio.run(again.close())
    assert (settings().voices_path / "ada.safetensors").read_bytes() == kept


def test_a_voices_file_holds_rows_codes_and_record_for_other_programs(tts, tmp_path):
    cloner = FakeCloner(tts)
    rows = tts.model.mm_audio_embeddings.voice_embedding(cloner.codes())
    files = voice_files.VoiceFiles(tmp_path / "v", tts.model)
    files.save(
        "ada",
        Voice("ada", cloner.codes(), rows, provenance(CONSENT, "x", source=CLIP)),
        {"created_at": 1},
        None,
    )
    tensors = load_file(tmp_path / "v" / "ada.safetensors")
    assert tensors["rows"].dtype == torch.bfloat16
    assert torch.equal(tensors["codes"].long(), cloner.codes())
    files.release()


def test_an_uploaded_voice_is_taken_into_a_checkpoint_by_the_command_line(
    tts, tiny_checkpoint_copy, tmp_path
):
    cloner = FakeCloner(tts)
    rows = tts.model.mm_audio_embeddings.voice_embedding(cloner.codes())
    files = voice_files.VoiceFiles(tmp_path / "v", tts.model)
    record = provenance(CONSENT, "x", source=CLIP)
    files.save("ada", Voice("ada", cloner.codes(), rows, record), {"created_at": 1}, None)
    file, folder = str(tmp_path / "v" / "ada.safetensors"), str(tiny_checkpoint_copy)
    result = CliRunner().invoke(voice_app, ["add", "ada", file, "-c", folder, "--consent", CONSENT])
    assert result.exit_code == 0, result.output
    voice = load_voice(tiny_checkpoint_copy, "ada")
    assert torch.equal(voice.codes, cloner.codes())
    assert torch.equal(voice.embedding, files.load("ada").embedding)
    files.release()


def test_two_servers_do_not_write_to_one_folder(tts, settings):
    voices = Voices(settings(), tts)
    voices.files.own()
    with pytest.raises(ServeError, match="another server"):
        Voices(settings(), tts)
    asyncio.run(voices.close())
    asyncio.run(Voices(settings(), tts).close())


def test_nothing_is_made_on_disk_before_the_first_voice(tts, settings):
    asyncio.run(Voices(settings(), tts).close())
    assert not settings().voices_path.exists()


# ---- presets, names, previews


def test_presets_stay_and_unknown_names_are_told_the_nearest(talk):
    async def dialogue(client, app):
        assert "belongs to the checkpoint" in refused(
            await client.delete("/v1/audio/voices/neutral_male"), 403
        )
        assert "did you mean neutral_male" in refused(
            await client.delete("/v1/audio/voices/neutral_mal"), 404
        )
        assert "did you mean neutral_male" in refused(await client.get("/v1/audio/voices/neutral_mal"), 404)
        for path in ("%2e%2e%2fparams", "..", "a%00b", "%ff", "x" * 5000, "neutral_male.pt"):
            answer = await client.get(f"/v1/audio/voices/{path}")
            assert answer.status_code in (404, 405), path
        shown = (await client.get("/v1/audio/voices/neutral_male")).json()
        assert (shown["kind"], shown["provenance"]) == ("checkpoint", {})
        assert "without a record" in refused(await client.get("/v1/audio/voices/neutral_male/consent"), 404)
        assert "not kept" in refused(await client.get("/v1/audio/voices/neutral_male/sample"), 404)
        refused(await client.get("/v1/audio/voices/nobody/sample"), 404)
        refused(await client.get("/v1/audio/voices/nobody/consent"), 404)
        refused(await client.get("/v1/audio/voice-jobs/none"), 404)

    talk(dialogue)


def test_a_presets_preview_is_the_decoder_on_the_codes_it_was_made_of(talk, tts, tiny_preset_codes):
    async def dialogue(client, app):
        answer = await client.get("/v1/audio/voices/it_male/preview")
        assert answer.headers["content-type"] == "audio/wav"
        assert answer.headers["x-content-type-options"] == "nosniff"
        codec = tts.model.audio_tokenizer
        expected = codec.decode(tiny_preset_codes["it_male"][None])[0].float().numpy()
        assert abs(read_audio(answer.content).samples - expected.clip(-1, 1)).max() < 1e-3

    talk(dialogue)


def test_a_preview_is_marked_as_synthetic(talk):
    async def dialogue(client, app):
        from revox.marking import verify_bytes

        answer = await client.get("/v1/audio/voices/it_male/preview")
        assert [key for key in answer.headers if key.startswith("x-")]
        assert verify_bytes(answer.content).state == "marked"

    talk(dialogue, marking=True)


def test_a_voice_added_to_the_checkpoint_while_the_server_runs_is_heard(
    talk, tiny_checkpoint_copy, settings, tmp_path
):
    tts = revox.load(tiny_checkpoint_copy, device="cpu", dtype=torch.float32)
    voices = Voices(settings(), tts)
    cloner = FakeCloner(tts)
    for frames in (20, 12):
        cloner.frames = frames
        rows = tts.model.mm_audio_embeddings.voice_embedding(cloner.codes()).to(torch.bfloat16)
        add_voice(tiny_checkpoint_copy, "ada", rows, cloner.codes(), {"method": "x"}, overwrite=True)
        assert voices.voice("ada").frames == frames
        assert voices.voice("ada") is voices.voice("ada")  # read once
    with pytest.raises(ApiError) as refused:
        voices.voice("../checkpoint/voice_embedding/ada")
    assert refused.value.status == 404
    asyncio.run(voices.close())


def test_a_checkpoints_voice_may_have_a_name_that_no_upload_may_have(tts, settings, monkeypatch):
    voices, kept = Voices(settings(), tts), tts.voice("neutral_male")
    monkeypatch.setattr(tts, "voice", lambda name: kept if name == "Ada Example" else None)
    assert voices.voice("Ada Example") is kept
    asyncio.run(voices.close())


def test_a_kept_sample_is_never_served_as_a_page(talk):
    async def dialogue(client, app):
        faked(app)
        files = {"audio_sample": ("x.html", io.BytesIO(CLIP), "text/html")}
        answer = await client.post(
            "/v1/audio/voices", data={"name": "ada", "consent": CONSENT, "keep_sample": "true"}, files=files
        )
        await ended(client, answer.json()["job"])
        answer = await client.get("/v1/audio/voices/ada/sample")
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["content-disposition"].startswith("attachment")

    talk(dialogue)


# ---- inline references


def inline(voices: Voices, **given):
    reference = Reference(CLIP, read_audio(CLIP, rate=24_000), "https://host.example")
    return voices.inline(reference, **{"consent": CONSENT, "ref_text": None, "asked_by": "ada", **given})


def test_an_inline_reference_needs_a_way_to_clone_and_consent(tts, settings):
    voices = Voices(settings(), tts)
    with pytest.raises(ApiError) as refused:
        asyncio.run(inline(voices))
    assert refused.value.status == 400
    for way in ("no encoder", "POST /v1/audio/voices", "preset", "revox inject", "--method inversion"):
        assert way in refused.value.message
    with pytest.raises(ApiError) as refused:
        asyncio.run(inline(voices, consent=None))
    assert refused.value.code == "consent_required"
    with pytest.raises(ServeError, match="--method encoder needs"):
        Voices(settings(method="encoder"), tts)


def test_every_inline_reference_is_logged_and_one_recording_is_cloned_once(tts, settings):
    voices = Voices(settings(method="inversion", consent_statement="all callers agreed in writing"), tts)
    cloner = FakeCloner(tts)
    cloner.install(voices)

    async def ask():
        cloner.go.clear()
        asked = [asyncio.create_task(inline(voices)) for _ in range(4)]
        await asyncio.to_thread(cloner.begun.wait, 20)
        cloner.go.set()
        return [*await asyncio.gather(*asked), await inline(voices, consent=None, asked_by="bob")]

    made = asyncio.run(ask())
    assert cloner.asked == ["one-off"]
    assert all(torch.equal(voice.codes, cloner.codes()) for voice in made)
    assert made[0].provenance["consent"]["statement"] == CONSENT
    assert made[-1].provenance["consent"]["statement"] == "all callers agreed in writing"
    lines = consent_log.read(voices.files.log_path)
    assert [(line["event"], line["by"]) for line in lines] == [("one-off", "ada")] * 4 + [("one-off", "bob")]
    assert {line["sha256"] for line in lines} == {SHA256}
    assert {line["origin"] for line in lines} == {"https://host.example"}
    assert lines[-1]["consent"]["given_by"] == "the operator of the server"
    assert lines[0]["consent"]["given_by"] == "ada"
    assert voices.files.document()["inline_references"] == lines
    assert voices.records() == []
    asyncio.run(voices.close())


def test_an_inline_cloning_that_no_request_waits_for_stops(tts, settings):
    voices = Voices(settings(method="inversion"), tts)
    cloner = FakeCloner(tts)
    cloner.install(voices)
    cloner.go.clear()

    async def ask():
        asked = asyncio.create_task(inline(voices))
        await asyncio.to_thread(cloner.begun.wait, 20)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert await asyncio.to_thread(cloner.stopped.wait, 20)
        cloner.go.set()
        return await inline(voices)

    assert torch.equal(asyncio.run(ask()).codes, cloner.codes())
    assert cloner.asked == ["one-off"] * 2  # what was stopped is not kept
    asyncio.run(voices.close())


def test_deleting_a_voice_forgets_inline_voices_of_its_recording(tts, settings):
    voices = Voices(settings(method="inversion"), tts)
    FakeCloner(tts).install(voices)
    asyncio.run(inline(voices))
    record = provenance(CONSENT, "x", source=source_of(CLIP))
    cloner = FakeCloner(tts)
    rows = tts.model.mm_audio_embeddings.voice_embedding(cloner.codes())
    voices.files.save("ada", Voice("ada", cloner.codes(), rows, record), {"created_at": 1}, None)
    assert len(voices._inline) == 1
    voices.remove("ada", "x")
    assert len(voices._inline) == 0
    asyncio.run(voices.close())


# ---- who asks, and the record as one JSON


def test_only_keys_are_let_in_and_their_names_stand_in_the_record(talk, tmp_path):
    keys = tmp_path / "keys.json"
    secret = add_key(keys, "studio")
    limited = add_key(keys, "limited", rate_limit=1)

    async def dialogue(client, app):
        faked(app)
        for method, path in (
            ("GET", "voices"), ("POST", "voices"), ("DELETE", "voices/ada"), ("GET", "voices/ada/sample"),
            ("GET", "consent"), ("GET", "voice-jobs"), ("GET", "voices/neutral_male/preview"),
        ):  # fmt: skip
            extra = form() if method == "POST" else {}
            answer = await client.request(method, f"/v1/audio/{path}", **extra)
            refused(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"
        bearer = {"Authorization": f"Bearer {limited}"}
        assert (await client.get("/v1/audio/voices", headers=bearer)).status_code == 200
        answer = await client.get("/v1/audio/voices", headers=bearer)
        refused(answer, 429)
        assert 0 < int(answer.headers["retry-after"]) <= 60
        client.headers["Authorization"] = f"Bearer {secret}"
        voice = await uploaded(client)
        assert voice["given_by"] == "studio"
        await client.delete("/v1/audio/voices/ada")

    talk(dialogue, api_keys=keys)
    lines = consent_log.read(tmp_path / "voices" / "consent.jsonl")
    assert [(line["event"], line["by"]) for line in lines] == [
        ("asked", "studio"),
        ("added", "studio"),
        ("removed", "studio"),
    ]


def test_the_whole_record_is_one_json_with_who_when_hash_and_method(talk):
    async def dialogue(client, app):
        faked(app)
        await uploaded(client, subject="Ada")
        await uploaded(client, name="bob")
        await client.delete("/v1/audio/voices/bob")
        document = json.loads((await client.get("/v1/audio/consent")).content)
        assert document["format"] == "revox consent 1"
        ada, bob = document["voices"]
        assert (ada["voice"], ada["status"], ada["sha256"], ada["method"]) == (
            "ada",
            "present",
            SHA256,
            "inversion",
        )
        assert (ada["consent"]["statement"], ada["consent"]["subject"]) == (CONSENT, "Ada")
        when = datetime.fromisoformat(ada["consent"]["recorded_at"].replace("Z", "+00:00"))
        assert abs((datetime.now(timezone.utc) - when).total_seconds()) < 60
        assert (bob["voice"], bob["status"]) == ("bob", "removed")

    talk(dialogue)


def test_statements_with_line_breaks_and_markup_cannot_forge_the_log(talk, tmp_path):
    forged = 'ok\n{"event": "removed", "voice": "ada"}\u2028\u0085<script>'

    async def dialogue(client, app):
        faked(app)
        assert "<script>" in (await uploaded(client, consent=forged))["consent"]

    talk(dialogue)
    assert log_of(tmp_path / "voices") == [("asked", "ada"), ("added", "ada")]
    assert len((tmp_path / "voices" / "consent.jsonl").read_bytes().splitlines()) == 2


def test_a_log_that_was_torn_goes_on_in_a_line_of_its_own(tmp_path):
    path = tmp_path / "log.jsonl"
    consent_log.append(path, {"id": "1", "event": "added"})
    with open(path, "ab") as file:
        file.write(b'{"id": "2", "ev')
    consent_log.append(path, {"id": "3", "event": "removed"})
    assert [line["id"] for line in consent_log.read(path)] == ["1", "3"]
    consent_log.append(path, {"id": "3", "event": "removed"}, once=True)
    assert len(consent_log.read(path)) == 2
    os.symlink(path, tmp_path / "link.jsonl")
    with pytest.raises(OSError):
        consent_log.append(tmp_path / "link.jsonl", {"id": "4"})


def test_requests_that_make_the_folder_at_once_do_not_take_each_other_for_another_server(
    tts, tmp_path, monkeypatch
):
    files = voice_files.VoiceFiles(tmp_path / "v", tts.model)
    opened, both = os.open, threading.Barrier(2)

    def open_late(*arguments, **named):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)  # as far as two can come together, were nothing in between
        return opened(*arguments, **named)

    monkeypatch.setattr(voice_files.os, "open", open_late)
    failed = []

    def own():
        try:
            files.own()
        except ServeError as error:
            failed.append(error)

    threads = [threading.Thread(target=own) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    files.release()
