"""Files that commit 73e8a5f wrote to users' disks are still read: see 73e8a5f/make.py."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file

import revox
from revox.checkpoint.encoder_file import find_encoder, read_record
from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.inject import eject
from revox.checkpoint.inspect import inspect
from revox.checkpoint.share import export_encoder
from revox.checkpoint.voices import consent_document, read_embedding
from revox.marking import load_signer, verify_file
from revox.serving.app import create_app
from revox.serving.keys import read_keys
from revox.serving.settings import ServeSettings

FILES = Path(__file__).parent / "73e8a5f"
CONSENT = "Ada Example, who agreed by e-mail on 2026-11-20"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the files, which a test may change."""
    return Path(shutil.copytree(FILES, tmp_path / "old"))


def test_a_voice_of_a_folder_is_read_with_its_codes_and_provenance(old: Path) -> None:
    tts = revox.load(old / "checkpoint", device="cpu", dtype=torch.float32)
    assert set(tts.voices()) == {"casual_female", "neutral_male", "ada"}
    ada = tts.voice("ada")
    stored = load_file(FILES / "checkpoint/voice_embedding/ada.codes.safetensors")["codes"]
    assert torch.equal(ada.codes, stored.long())
    assert torch.equal(ada.embedding, torch.load(FILES / "checkpoint/voice_embedding/ada.pt"))
    summed = tts.model.mm_audio_embeddings.voice_embedding(ada.codes).to(torch.bfloat16)
    assert torch.equal(ada.embedding, summed)
    assert ada.provenance["consent"]["statement"] == CONSENT
    assert ada.provenance["source"]["sha256"] == hashlib.sha256((FILES / "ada.opus").read_bytes()).hexdigest()
    assert ada.provenance["transcript"] == "One, two, three."


@pytest.mark.parametrize("ending", [".pt", ".safetensors", ".bin"])
def test_an_exported_voice_is_the_one_of_the_folder(ending: str) -> None:
    original = read_embedding(FILES / "checkpoint/voice_embedding/ada.pt", 64)
    assert torch.equal(read_embedding(FILES / f"ada{ending}", 64), original)


def test_the_consent_log_of_a_folder_holds_additions_and_removals() -> None:
    [bob] = consent_document(FILES / "checkpoint", "bob")["voices"]
    assert (bob["status"], [line["event"] for line in bob["log"]]) == ("removed", ["added", "removed"])
    [ada] = consent_document(FILES / "checkpoint", "ada")["voices"]
    assert (ada["status"], ada["consent"]["statement"]) == ("present", CONSENT)


def test_an_encoder_file_is_read_and_an_injected_folder_gives_its_encoder(old: Path) -> None:
    assert read_record(find_encoder(old / "encoder.safetensors"))["steps"] == 1234
    assert inspect(old / "checkpoint").encoder == "complete"
    with pytest.raises(CheckpointError, match="restore your backup"):
        eject(old / "checkpoint")
    export_encoder(old / "checkpoint", old / "exported.safetensors")
    exported = load_file(old / "exported.safetensors")
    original = load_file(old / "encoder.safetensors")
    assert len(exported) == len(original) == 114
    assert all(torch.equal(exported[f"audio_tokenizer.{name}"], t.bfloat16()) for name, t in original.items())


def test_a_marked_file_and_its_signing_pair_are_recognized(old: Path) -> None:
    signer = load_signer(folder=old / "state")
    assert signer is not None
    assert signer.certificates in (FILES / "state/signing.pem").read_text()
    assert "ada" in str(verify_file(FILES / "marked.flac"))


def test_a_server_goes_on_with_keys_voices_samples_jobs_and_log(old: Path) -> None:
    [team] = read_keys(old / "keys.json").keys
    assert (team.name, team.rate_limit) == ("team", 600)
    settings = ServeSettings(
        checkpoint=str(old / "checkpoint"), voices_folder=old / "voices", model_name="tiny",
        api_keys=old / "keys.json", marking=False,
    )  # fmt: skip
    app = create_app(settings, revox.load(old / "checkpoint", device="cpu", dtype=torch.float32))
    secret = (FILES / "key.txt").read_text().strip()

    async def dialogue() -> None:
        transport = httpx.ASGITransport(app)
        headers = {"authorization": f"Bearer {secret}"}
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client,
        ):

            async def get(path: str) -> dict:
                answer = await client.get(f"/v1/audio/{path}")
                assert answer.status_code == 200, answer.text
                return answer.json()

            listed = await get("voices")
            assert listed["voices"] == ["ada", "carol", "casual_female", "dan", "neutral_male"]
            uploaded = {voice["name"]: voice for voice in listed["uploaded_voices"]}
            assert uploaded["carol"]["method"] == "encoder"
            assert uploaded["carol"]["speaker_description"] == "hums"
            assert uploaded["dan"]["method"] == "inversion"
            assert (uploaded["dan"]["given_by"], uploaded["dan"]["subject"]) == ("team", "Ada")

            carol = await get("voices/carol")
            stored = load_file(FILES / "voices/carol.safetensors")
            assert carol["frames"] == stored["codes"].shape[1] == len(stored["rows"]) - 1
            assert carol["provenance"]["consent"]["statement"] == CONSENT
            sample = await client.get("/v1/audio/voices/carol/sample")
            assert hashlib.sha256(sample.content).hexdigest() == uploaded["carol"]["sha256"]

            jobs = {job["name"]: job for job in (await get("voice-jobs"))["data"]}
            assert (jobs["dan"]["state"], jobs["dan"]["can_retry"]) == ("done", False)
            assert (jobs["frank"]["state"], jobs["frank"]["can_retry"]) == ("failed", True)

            document = await get("consent")
            events = {voice["voice"]: [e["event"] for e in voice["log"]] for voice in document["voices"]}
            assert events["eve"] == ["asked", "added", "removed"]
            assert events["frank"] == ["asked", "failed"]
            assert [line["by"] for line in document["inline_references"]] == ["team"]

            preview = await client.get("/v1/audio/voices/carol/preview")
            assert preview.status_code == 200, preview.text
            assert len(preview.content) == 44 + 2 * 1920 * carol["frames"]

    asyncio.run(dialogue())
    before = [json.loads(line) for line in (FILES / "voices/consent.jsonl").read_text().splitlines()]
    after = [json.loads(line) for line in (old / "voices/consent.jsonl").read_text().splitlines()]
    assert after == before  # nothing was missing and nothing had to be repaired
