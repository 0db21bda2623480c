"""The voices that were uploaded to a server, on disk: one file each, so that a voice is complete or absent.

    NAME.safetensors    embedding (named "rows") bf16 `[N, dim]`, codes int16 `[n_codebooks, N - 1]`, and the
                        record as metadata
    samples/NAME        the recording as it came, only if requested
    jobs/ID.json        a cloning job that waits, runs or has ended; jobs/ID.sample its recording, while kept
    consent.jsonl       the log (`revox.checkpoint.consent_log`)
    lock                held by the server that may write here

If the server is killed between two files, the next start completes the change from the log.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic_core import from_json
from safetensors import SafetensorError
from safetensors.torch import load, save

from revox.checkpoint import consent_log
from revox.checkpoint.errors import CheckpointError, VoiceError
from revox.checkpoint.tensors import read_metadata
from revox.checkpoint.voices import Voice, check_voice_name, codes_fit
from revox.serving.errors import ServeError
from revox.speech.files import replace_file, sync_folder

if TYPE_CHECKING:
    from revox.model.voxtral import Voxtral

FORMAT = "revox uploaded voice 1"

log = logging.getLogger("revox.serving")


def fingerprint(model: Voxtral) -> str:
    """Identifies the checkpoint of a voice: a hash of the table that voice embeddings are sums of."""
    table = model.mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight
    some = table.detach()[:: max(1, len(table) // 64)].to("cpu", torch.bfloat16).contiguous()
    digest = hashlib.sha256(str(list(table.shape)).encode())
    digest.update(some.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


class VoiceFiles:
    """The folder of a server's uploaded voices, created for the first one.

    model: the checkpoint of the voices; other checkpoints' voices in the folder are ignored. Raises
    ServeError if the folder cannot be used or another server writes to it.
    """

    def __init__(self, folder: Path, model: Voxtral) -> None:
        self.folder = folder
        self.records: dict[str, dict[str, Any]] = {}
        self._config = model.config
        self._of = fingerprint(model)
        self._lock: int | None = None
        self._owning = threading.Lock()  # for threads of this process; the file lock is per descriptor
        if folder.exists():
            ours = (folder / "lock").exists()
            self.own()
            self._restore(ours)

    # --------------------------------------------------------------------------------------------- the folder

    def own(self) -> None:
        """Create the folder and lock it for this server. Raises ServeError."""
        with self._owning:
            if self._lock is not None:
                return
            try:
                for folder in (self.folder, self.folder / "samples", self.folder / "jobs"):
                    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            except OSError as error:
                raise ServeError(
                    f"{self.folder} cannot be written ({error.strerror}); name a folder of your own with "
                    "--voices-folder"
                ) from None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(descriptor)
                raise ServeError(
                    f"another server uses {self.folder}; stop it, or name another --voices-folder"
                ) from None
            self._lock = descriptor

    def release(self) -> None:
        """Let another server write here."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _restore(self, ours: bool) -> None:
        """Read the voices. What a killed server left is deleted only in a folder that was `ours` before, and
        nothing there that it could not have written."""
        removed = set()
        last: dict[str, dict[str, Any]] = {}
        for line in consent_log.read(self.log_path):
            if line.get("event") == "removed":
                removed.add(line.get("removes"))
            if isinstance(line.get("voice"), str) and line.get("event") in ("added", "removed", "missing"):
                last[line["voice"]] = line
        for path in sorted(self.folder.glob("*.safetensors")):
            record = self._read_record(path)
            if record is None:
                continue
            name = path.stem
            if record["id"] in removed:  # killed after the tombstone: finish the removal
                self._unlink(name)
                continue
            self.records[name] = record
            if (last.get(name) or {}).get("id") != record["id"]:  # killed before the log
                consent_log.append(self.log_path, self._added(record), once=True)
        for name, line in last.items():
            if line["event"] == "added" and not self._path(name).exists():
                log.warning("the voice %r is not in %s any more", name, self.folder)
                self.note("missing", name, {}, removes=line.get("id"))
        if ours:
            self._delete_leftovers()

    def _delete_leftovers(self) -> None:
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        for sample in (self.folder / "samples").iterdir():
            with contextlib.suppress(VoiceError):  # a name that no voice has is no sample of ours
                check_voice_name(sample.name)
                if sample.is_file() and not self._path(sample.name).exists():
                    sample.unlink(missing_ok=True)
        jobs = self.folder / "jobs"
        for path in (*jobs.glob(".*.tmp"), *jobs.glob("*.sample")):  # killed while a job was saved
            if path.suffix == ".tmp" or not path.with_suffix(".json").exists():
                path.unlink(missing_ok=True)

    def _read_record(self, path: Path) -> dict[str, Any] | None:
        try:
            check_voice_name(path.stem)
            record = from_json(read_metadata(path).get("revox", ""))
            if record["format"] != FORMAT or record["name"] != path.stem or not isinstance(record["id"], str):
                raise ValueError
            consent, created = record["provenance"]["consent"], record["created_at"]
            if not isinstance(consent["statement"], str) or not isinstance(created, int):
                raise ValueError
        except (CheckpointError, OSError, ValueError, KeyError, TypeError, AttributeError):
            log.warning("%s is damaged or not a voice; it is ignored", path)
            return None
        if record.get("checkpoint") != self._of:
            log.warning("%s was made for another checkpoint; it is ignored", path)
            return None
        return record

    # ------------------------------------------------------------------------------------------------- voices

    def save(
        self, name: str, voice: Voice, details: Mapping[str, Any], sample: bytes | None
    ) -> dict[str, Any]:
        """Save a voice with its record, and its recording if given. Returns the record.

        Raises OSError if the disk is full; then nothing of the voice is left.
        """
        self.own()
        record = {
            "format": FORMAT,
            "id": os.urandom(16).hex(),
            "name": name,
            "checkpoint": self._of,
            "provenance": voice.provenance,
            "sample_kept": sample is not None,
            **details,
        }
        tensors = {"rows": voice.embedding.detach().to("cpu", torch.bfloat16).contiguous()}
        if voice.codes is not None:
            tensors["codes"] = voice.codes.cpu().to(torch.int16).contiguous()
        try:
            if sample is not None:
                replace_file(self._sample(name), sample)
            replace_file(self._path(name), save(tensors, {"revox": json.dumps(record)}))
            consent_log.append(self.log_path, self._added(record), once=True)
        except Exception:
            # On a full disk, no recording stays without its voice and no voice without its line in the log.
            with contextlib.suppress(OSError):
                self._unlink(name)
            raise
        self.records[name] = record
        return record

    def in_the_way(self, name: str) -> bool:
        """Whether an ignored file (damaged, or of another checkpoint) has the name."""
        return name not in self.records and self._path(name).exists()

    def load(self, name: str) -> Voice:
        """A saved voice. Raises VoiceError if its file is gone or damaged."""
        record = self.records[name]
        try:
            tensors = load(self._path(name).read_bytes())
            embedding, codes = tensors["rows"], tensors.get("codes")
        except (OSError, SafetensorError, KeyError):
            raise VoiceError(
                f"the file of voice {name!r} is gone or damaged; delete it and upload it again"
            ) from None
        codes = None if codes is None else codes.long()
        fits = codes is None or (codes.shape[1] == len(embedding) - 1 and codes_fit(codes, self._config))
        if embedding.ndim != 2 or embedding.shape[1] != self._config.backbone.dim or not fits:
            raise VoiceError(f"the file of voice {name!r} is damaged; delete it and upload it again")
        return Voice(name, codes, embedding, record["provenance"])

    def remove(self, name: str, by: str) -> None:
        """Log the tombstone, then delete the voice and its recording."""
        self.own()
        record = self.records[name]
        self.note("removed", name, record["provenance"], removes=record["id"], by=by)
        del self.records[name]
        self._unlink(name)

    def sample(self, name: str) -> bytes | None:
        """The recording as it was uploaded, if it was kept."""
        if not self.records.get(name, {}).get("sample_kept"):
            return None
        try:
            return self._sample(name).read_bytes()
        except OSError:
            return None

    def _unlink(self, name: str) -> None:
        self._sample(name).unlink(missing_ok=True)
        self._path(name).unlink(missing_ok=True)
        sync_folder(self.folder)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _sample(self, name: str) -> Path:
        return self.folder / "samples" / name

    # ---------------------------------------------------------------------------------------------------- log

    @property
    def log_path(self) -> Path:
        """The log of consent and removals."""
        return self.folder / "consent.jsonl"

    def note(self, kind: str, voice: str | None, record: Mapping[str, Any], **more: Any) -> None:
        """Add a line to the log, synced to disk."""
        self.own()
        consent_log.append(self.log_path, consent_log.event(kind, voice, record, **more))

    def document(self, name: str | None = None) -> dict[str, Any]:
        """The record of consent, of one voice (also a removed one) or of all."""
        voices = [(each, record["provenance"]) for each, record in sorted(self.records.items())]
        found = consent_log.document(voices, consent_log.read(self.log_path), "uploaded voices")
        if name is not None:
            found["voices"] = [voice for voice in found["voices"] if voice["voice"] == name]
            found["one_off"] = []
        return found

    def _added(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return consent_log.event("added", record["name"], record["provenance"], by=record.get("asked_by")) | {
            "id": record["id"]
        }

    # --------------------------------------------------------------------------------------------------- jobs

    def save_job(self, job: Mapping[str, Any], sample: bytes | None = None) -> None:
        """Save a job, and its recording if given."""
        self.own()
        if sample is not None:
            replace_file(self.folder / "jobs" / f"{job['id']}.sample", sample)
        replace_file(self.folder / "jobs" / f"{job['id']}.json", json.dumps(dict(job), indent=1))

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs on disk, oldest first."""
        found = []
        for path in (self.folder / "jobs").glob("*.json") if (self.folder / "jobs").is_dir() else ():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                job = from_json(path.read_bytes())
                if job["id"] == path.stem and isinstance(job["created_at"], int | float):
                    found.append(job)
        return sorted(found, key=lambda job: job["created_at"])

    def has_job_sample(self, job: str) -> bool:
        """Whether a job's recording was kept."""
        return (self.folder / "jobs" / f"{job}.sample").is_file()

    def job_sample(self, job: str) -> bytes | None:
        """A job's recording, if it was kept."""
        try:
            return (self.folder / "jobs" / f"{job}.sample").read_bytes()
        except OSError:
            return None

    def drop_job(self, job: str, only_sample: bool = False) -> None:
        """Delete a job's recording, and the job itself."""
        (self.folder / "jobs" / f"{job}.sample").unlink(missing_ok=True)
        if not only_sample:
            (self.folder / "jobs" / f"{job}.json").unlink(missing_ok=True)
