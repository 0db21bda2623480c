"""How the files beside this were made: by the code of commit 73e8a5f, once.

    git worktree add OLD 73e8a5f && cd OLD
    PYTHONPATH=src:tests python .../make.py OUT

The checkpoint has random weights at the smallest sizes that every layer takes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import conftest

OUT = Path(sys.argv[1])
shutil.rmtree(OUT, ignore_errors=True)
OUT.mkdir(parents=True)
os.environ["REVOX_STATE"] = str(OUT / "state")
torch.set_num_threads(1)

tiny = conftest.TINY
conftest.TINY = replace(
    tiny,
    backbone=replace(tiny.backbone, dim=64, n_layers=1, head_dim=16, hidden_dim=64),
    acoustic=replace(tiny.acoustic, input_dim=64, dim=64, n_layers=1, head_dim=16, hidden_dim=64),
)
conftest.PRESETS = ("casual_female", "neutral_male")

import httpx  # noqa: E402

import revox  # noqa: E402
from revox.checkpoint.encoder_file import decoder_sha256  # noqa: E402
from revox.checkpoint.inject import inject  # noqa: E402
from revox.checkpoint.voices import add_voice, export_voice, remove_voice  # noqa: E402
from revox.marking import load_signer, log_mark, mark_bytes, new_record  # noqa: E402
from revox.serving.app import create_app  # noqa: E402
from revox.serving.keys import add_key, remove_key  # noqa: E402
from revox.serving.settings import ServeSettings  # noqa: E402
from revox.speech import Audio, encode_audio  # noqa: E402

CONSENT = "Ada Example, who agreed by e-mail on 2026-11-20"


def clip(pitch: float) -> bytes:
    t = np.arange(4 * 16_000) / 16_000
    hum = sum(np.sin(2 * np.pi * k * pitch * t) / k for k in range(1, 6))
    return encode_audio(Audio((0.1 * hum * (1 + np.sin(6 * np.pi * t))).astype(np.float32), 16_000), "opus")[
        0
    ]


def checkpoint() -> Path:
    plain = conftest.write_checkpoint(OUT / "plain", conftest.tiny_model())
    parts = ("input_proj.", "encoder_blocks.")
    state = conftest.tiny_model(with_encoder=True, seed=7).audio_tokenizer.state_dict()
    encoder = {name: tensor.clone() for name, tensor in state.items() if name.startswith(parts)}
    record = {"revox_run": "first", "steps": 1234, "decoder_sha256": decoder_sha256(plain)}
    save_file(encoder, OUT / "encoder.safetensors", metadata={"revox": json.dumps(record)})
    (OUT / "plain.sha256").write_text(
        hashlib.sha256((plain / "consolidated.safetensors").read_bytes()).hexdigest() + "\n"
    )
    inject(plain, OUT / "encoder.safetensors", out=OUT / "checkpoint")
    shutil.rmtree(plain)
    return OUT / "checkpoint"


def voices(folder: Path) -> None:
    tts = revox.load(folder, device="cpu", dtype=torch.float32)
    (OUT / "ada.opus").write_bytes(clip(110.0))
    ada = tts.clone(OUT / "ada.opus", consent=CONSENT, name="ada", transcript="One, two, three.")
    add_voice(folder, "ada", ada.rows, ada.codes, ada.provenance)
    add_voice(folder, "bob", ada.rows, ada.codes, ada.provenance)
    remove_voice(folder, "bob")
    for ending in (".pt", ".safetensors", ".bin"):
        export_voice(folder, "ada", OUT / f"ada{ending}")


async def server(folder: Path) -> None:
    tts = revox.load(folder, device="cpu", dtype=torch.float32)
    secret = add_key(OUT / "keys.json", "team", rate_limit=600)
    add_key(OUT / "keys.json", "gone")
    remove_key(OUT / "keys.json", "gone")
    (OUT / "key.txt").write_text(secret + "\n")

    def settings(by: str) -> ServeSettings:
        return ServeSettings(
            checkpoint=str(folder),
            voices_folder=OUT / "voices",
            model_name="tiny",
            api_keys=OUT / "keys.json",
            clone_by=by,
            clone_seconds=3.0,
            drain_seconds=0.1,
            marking=False,
        )

    def upload(name: str, pitch: float, **more):
        data = {"name": name, "consent": CONSENT, "subject": "Ada", "ref_text": "One, two, three.", **more}
        return {"data": data, "files": {"audio_sample": ("clip.ogg", clip(pitch), "audio/ogg")}}

    async def talk(by: str, dialogue):
        app = create_app(settings(by), tts)
        transport = httpx.ASGITransport(app)
        headers = {"authorization": f"Bearer {secret}"}
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(
                transport=transport, base_url="http://test", headers=headers, timeout=60
            ) as client,
        ):
            await dialogue(client)

    async def at_once(client):
        for name, pitch, more in (("carol", 120.0, {"keep_sample": "true"}), ("eve", 140.0, {})):
            answer = await client.post(
                "/v1/audio/voices", **upload(name, pitch, speaker_description="hums", **more)
            )
            assert answer.status_code == 200, answer.text
        assert (await client.delete("/v1/audio/voices/eve")).status_code == 200
        import base64

        body = {
            "input": "One.",
            "ref_audio": base64.b64encode(clip(150.0)).decode(),
            "consent": CONSENT,
            "max_new_tokens": 3,
        }
        answer = await client.post("/v1/audio/speech", json=body)
        assert answer.status_code == 200, answer.text

    async def jobs(client):
        job = (await client.post("/v1/audio/voices", **upload("dan", 130.0))).json()["job"]
        while (found := (await client.get(f"/v1/audio/voice-jobs/{job['id']}")).json())["state"] in (
            "queued",
            "running",
        ):
            await asyncio.sleep(0.1)
        assert found["state"] == "done", found
        answer = await client.post("/v1/audio/voices", **upload("frank", 160.0, keep_sample="true"))
        assert answer.status_code == 202, answer.text  # and the server stops before it is made

    await talk("encoder", at_once)
    await talk("inversion", jobs)


def marks() -> None:
    signer = load_signer()
    record = new_record("tiny", "ada")
    data = encode_audio(Audio(np.linspace(-0.1, 0.1, 8000, dtype=np.float32), 16_000), "flac")[0]
    marked = mark_bytes(data, "flac", record=record, signer=signer)
    (OUT / "marked.flac").write_bytes(marked)
    log_mark(record, format="flac", sha256=hashlib.sha256(marked).hexdigest(), how="manifest")


made = checkpoint()
voices(made)
asyncio.run(server(made))
marks()
