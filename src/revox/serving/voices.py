"""The voices of a server: the checkpoint's, uploaded ones, and those of inline references.

Uploads become voices in jobs (`revox.serving.voice_jobs`): with an encoder the request waits for its job, by
inversion that takes a minute and is polled. Every cloning is logged before it begins, and its log ends with
added, failed or cancelled.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from revox.checkpoint.errors import CheckpointError, VoiceError
from revox.checkpoint.voices import Voice, check_voice_name, list_voices, voice_file
from revox.cloning.consent import Consent, provenance, record_consent, source_of
from revox.cloning.errors import CloneError
from revox.coding.errors import CodingError
from revox.progress import ProgressCallback, ignore_progress
from revox.serving.errors import ApiError, ServeError
from revox.serving.limits import Places
from revox.serving.voice_files import VoiceFiles
from revox.serving.voice_jobs import Job, VoiceJobs
from revox.speech import AudioError
from revox.speech.files import file_stamp

if TYPE_CHECKING:
    from collections.abc import Callable

    from revox.api import Revox
    from revox.cloning.clone import SelectedSpeech
    from revox.serving.references import Reference, References
    from revox.serving.settings import ServeSettings

MAX_INLINE = 16
CACHED_VOICES = 32
CACHED_INLINE = 16

log = logging.getLogger("revox.serving")


@dataclass
class _Inline:
    """The voice of an inline reference, being made or cached; cloning stops when no request waits for it."""

    future: Future[Voice]
    stop: threading.Event
    waiting: int = 0


class Voices:
    """Finds, makes and removes voices.

    Raises ServeError if the folder of voices cannot be used, or if the checkpoint cannot clone as asked.
    """

    def __init__(self, settings: ServeSettings, tts: Revox, references: References | None = None) -> None:
        has_encoder = tts.encoder == "complete"
        if settings.method == "encoder" and not has_encoder:
            raise ServeError(
                "--method encoder needs a checkpoint with an encoder, and this one has none: inject one with "
                "`revox inject`, or use --method inversion"
            )
        has_student = not has_encoder and tts.coder.student is not None
        if settings.method == "student" and tts.coder.student is None:
            raise ServeError(
                "--method student needs a trained student, and this checkpoint has none: train it with "
                "`revox train student`, or use --method inversion"
            )
        # Uploads are jobs and may take time; inline references make a request wait, and are inverted only if
        # the operator says so.
        self.method: str = settings.method
        if settings.method == "auto":
            self.method = "encoder" if has_encoder else "student" if has_student else "inversion"
        self._inline_allowed = self.method != "inversion" or has_encoder or settings.method == "inversion"
        self._settings, self._tts, self._references = settings, tts, references
        self._lock = threading.RLock()
        self.files = VoiceFiles(settings.voices_path, tts.model)
        self.jobs = VoiceJobs(self.files, self._lock, self._clone_job, self.method)
        self._load = lru_cache(CACHED_VOICES)(self._read)
        self._inline: dict[tuple[str, str | None], _Inline] = {}
        self._inline_places = Places(MAX_INLINE, "recordings are being cloned", retry_after=10)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cloning")
        self._closing = threading.Event()

    # ------------------------------------------------------------------------------------------------ by name

    def names(self) -> list[str]:
        """Every voice that can be spoken with, the checkpoint's first."""
        own = self._tts.voices()
        with self._lock:
            return own + sorted(name for name in self.files.records if name not in own)

    def voice(self, name: str) -> Voice:
        """A voice by name. Raises ApiError 404 with the nearest names. May read a file: call in a thread."""
        with self._lock:
            record = self.files.records.get(name)
        try:
            stamp = record["id"] if record else self._stamp(name)
            return self._read(name, None) if stamp is None else self._load(name, stamp)
        except (VoiceError, KeyError) as error:
            raise self.not_found(name, error) from None

    def _read(self, name: str, stamp: object) -> Voice:
        """A voice; `stamp` changes with its file, so that a cached voice is never outdated."""
        return self.files.load(name) if name in self.files.records else self._tts.voice(name)

    def _stamp(self, name: str) -> object:
        try:
            check_voice_name(name)  # before a client's string becomes a path
        except VoiceError:
            return None
        return file_stamp(voice_file(self._tts.folder, name))

    def records(self) -> list[dict[str, Any]]:
        """The records of all uploaded voices, by name."""
        with self._lock:
            return [record for _, record in sorted(self.files.records.items())]

    def not_found(self, name: str, error: BaseException | None = None) -> ApiError:
        """The error for an unknown name, with the nearest ones, or for a voice that cannot be read."""
        names = self.names()
        known = name in names or any(entry.name == name for entry in list_voices(self._tts.folder))
        if known and isinstance(error, CheckpointError):
            log.error("voice %r cannot be used: %s", name, error)
            message = f"voice {name!r} cannot be read on the server; the server's log says why"
            return ApiError(500, message, param="voice")
        near = difflib.get_close_matches(name[:200], names, n=3, cutoff=0.5)
        if name in self.jobs.active_names:
            hint = "it is still being made"
        elif near:
            hint = f"did you mean {' or '.join(near)}?"
        else:
            hint = f"known voices: {', '.join(names[:8]) or 'none'}{' ...' if len(names) > 8 else ''}"
        message = f"there is no voice {name[:200]!r}: {hint}"
        return ApiError(404, message, param="voice", code="voice_not_found")

    def remove(self, name: str, by: str) -> None:
        """Delete an uploaded voice and everything derived from it; the log keeps a tombstone.

        A job that would make it is cancelled. Requests that speak with it now are not interrupted. Raises
        ApiError: 403 for a voice of the checkpoint, 404 for an unknown one.
        """
        with self._lock:
            record = self.files.records.get(name)
            was_active = self.jobs.forget(name, by)
            if record is not None:
                self._load.cache_clear()
                sha256 = record["provenance"].get("source", {}).get("sha256")
                for key in [key for key in list(self._inline) if key[0] == sha256]:
                    self._inline.pop(key, None)
                self.files.remove(name, by)
            elif not was_active and name in self._tts.voices():
                raise ApiError(
                    403,
                    f"voice {name!r} belongs to the checkpoint and cannot be deleted here; `revox voice "
                    "remove` deletes voices of the folder (presets with --force)",
                    param="name",
                    code="voice_of_the_checkpoint",
                )
            elif not was_active:
                raise self.not_found(name)

    # ------------------------------------------------------------------------------------------------ uploads

    async def upload(self, reference: Reference, job: Job) -> dict[str, Any] | None:
        """The record of a new voice; None if `job` makes it in the background, by inversion.

        Raises ApiError: 400 for an invalid name or recording, 409 for a name that is taken or too many
        voices, 503 if too many wait.
        """
        try:
            # What would fail after a minute of search is reported at once.
            speech = await asyncio.to_thread(self._select, reference, job.ref_text)
            cloning = await asyncio.to_thread(self._submit, job, speech, reference.data)
            if self.method == "inversion":
                return None
            # If the client disconnects, the job goes on.
            return await asyncio.shield(asyncio.wrap_future(cloning))
        except (AudioError, CodingError) as error:
            raise ApiError(400, str(error), param="audio_sample", code="bad_audio") from None

    def check_name(self, name: str) -> None:
        """Check a new voice's name before any work.

        Raises ApiError: 400 for an invalid name, 409 for one that is taken or for too many voices.
        """
        try:
            check_voice_name(name)
        except VoiceError as error:
            raise ApiError(400, str(error)[:400], param="name", code="bad_name") from None
        own = self._tts.voices()
        with self._lock:
            making = self.jobs.active_names
            if name in making or name in self.files.records or name in own:
                message = f"there is already a voice {name!r}; choose another name, or delete it first"
                raise ApiError(409, message, param="name", code="voice_exists")
            if self.files.in_the_way(name):
                message = f"a file named {name!r} is not a voice of this checkpoint; choose another name"
                raise ApiError(409, message, param="name", code="voice_exists")
            if len(self.files.records) + len(making) >= self._settings.max_voices:
                message = f"this server keeps at most {self._settings.max_voices} uploaded voices; delete one"
                raise ApiError(409, message, code="too_many_voices")

    def _submit(self, job: Job, speech: SelectedSpeech, data: bytes) -> Future[dict[str, Any] | None]:
        with self._lock:  # an active job holds its name
            self.check_name(job.name)
            return self.jobs.submit(job, speech, data)

    def _clone_job(
        self, job: Job, speech: SelectedSpeech, progress: ProgressCallback, should_stop: Callable[[], bool]
    ) -> Voice:
        consent = Consent.model_validate(job.consent)
        return self._clone(speech, job.name, consent, job.ref_text, progress, should_stop)

    def _clone(
        self,
        speech: SelectedSpeech,
        name: str,
        consent: Consent,
        ref_text: str | None,
        progress: ProgressCallback = ignore_progress,
        should_stop: Callable[[], bool] | None = None,
    ) -> Voice:
        """The voice of a recording. Raises AudioError or CodingError if the recording is unusable."""
        cloned = self._tts.clone(
            speech, consent=consent, name=name, transcript=ref_text, method=self.method, progress=progress,
            budget=self._settings.clone_seconds if self.method == "inversion" else None,
            should_stop=should_stop,
        )  # fmt: skip
        return Voice(name, cloned.codes, cloned.embedding, cloned.provenance)

    def _select(self, reference: Reference, ref_text: str | None) -> SelectedSpeech:
        return self._tts.select(reference.audio, transcript=ref_text, source=reference.data)

    async def retry(self, id: str, asked_by: str) -> dict[str, Any]:
        """Retry a failed job, if its recording was kept. Raises ApiError 404, 409, 503."""
        assert self._references is not None
        job, data = await asyncio.to_thread(self.jobs.retry, id, asked_by)
        await asyncio.to_thread(self.check_name, job.name)
        await self.upload(await self._references.read(data), job)
        with self._lock:
            self.files.drop_job(id, only_sample=True)
        return self.jobs.show(job)

    # ------------------------------------------------------------------------------------- inline references

    async def inline(
        self, reference: Reference, *, consent: str | None, ref_text: str | None, asked_by: str
    ) -> Voice:
        """The voice of a recording that came with a request; a cached recording is not cloned again.

        Raises ApiError 400 without consent, without a way to clone, or for an unusable recording; 503 if too
        many are being cloned.
        """
        statement, given_by = (consent or "").strip() or None, asked_by
        if statement is None:
            statement, given_by = self._settings.consent_statement, "the operator of the server"
        if statement is None:
            raise ApiError(
                400,
                "ref_audio requires consent: state in the field consent whose voice it is and that they "
                "agreed (or start the server with --consent-statement)",
                param="consent",
                code="consent_required",
            )
        agreed = given_consent(statement, None, given_by)
        if not self._inline_allowed:
            raise ApiError(
                400,
                "ref_audio cannot be used: this checkpoint has no encoder and no trained student. Upload "
                "the recording to POST /v1/audio/voices, which finds its codes by inversion; use a "
                "preset; inject an encoder with `revox inject`; train a student with `revox train student`; "
                "or start the server with --method inversion",
                param="ref_audio",
                code="no_encoder",
            )
        record = provenance(agreed, self.method, source=source_of(reference.data))
        event = {"by": asked_by, "origin": reference.origin}
        await asyncio.to_thread(self.files.note, "one-off", None, record, **event)
        voice = await self._inline_voice(reference, agreed, ref_text)
        named = voice.provenance | {"consent": agreed.model_dump(mode="json", exclude_none=True)}
        return Voice(voice.name, voice.codes, voice.embedding, named)

    async def _inline_voice(self, reference: Reference, consent: Consent, ref_text: str | None) -> Voice:
        key = (hashlib.sha256(reference.data).hexdigest(), ref_text)
        entry = self._inline.get(key)
        if entry is None:
            self._inline_places.check(sum(not one.future.done() for one in self._inline.values()))
            stop = threading.Event()

            def should_stop() -> bool:
                return stop.is_set() or self._closing.is_set()

            def make() -> Voice:
                if should_stop():
                    raise CloneError("no request waits for this voice any more")
                speech = self._select(reference, ref_text)
                return self._clone(speech, "one-off", consent, ref_text, should_stop=should_stop)

            entry = self._inline[key] = _Inline(self._pool.submit(make), stop)
        entry.waiting += 1
        try:
            return await asyncio.shield(asyncio.wrap_future(entry.future))
        except (AudioError, CodingError) as error:
            raise ApiError(400, str(error), param="ref_audio", code="bad_audio") from None
        finally:
            entry.waiting -= 1
            if not entry.waiting:
                self._tidy_inline(key, entry)

    def _tidy_inline(self, key: tuple[str, str | None], entry: _Inline) -> None:
        """Stop a cloning that no request waits for; cache the latest voices only."""
        done = entry.future.done()
        if not done:
            entry.stop.set()
        if (not done or entry.future.exception() is not None) and self._inline.get(key) is entry:
            del self._inline[key]
        cached = [one for one, other in self._inline.items() if other.future.done() and not other.waiting]
        for old in cached[: max(0, len(cached) - CACHED_INLINE)]:
            del self._inline[old]

    async def close(self) -> None:
        """Stop everything and let another server use the folder."""
        self._closing.set()
        await asyncio.to_thread(self.jobs.close)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.files.release()


def given_consent(statement: str, subject: str | None, given_by: str) -> Consent:
    """The consent that came with a request. Raises ApiError 400 if it says nothing."""
    try:
        return record_consent(statement, subject, given_by=given_by)
    except CodingError as error:
        message = str(error).replace(', e.g. --consent "my own voice, recorded by me"', "")
        raise ApiError(400, message, param="consent", code="consent_required") from None
