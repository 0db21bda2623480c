"""Voices of a server: the checkpoint's, the uploaded ones, one-off ones; and the jobs that make them.

With an encoder a voice is made while its request waits. By inversion it takes a minute, so it is a job: one
thread takes them in turn, at a lower priority than speech. Every cloning is logged before it begins, and ends
in the log as added, failed or cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import difflib
import hashlib
import logging
import os
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from revox.checkpoint.errors import CheckpointError, VoiceError
from revox.checkpoint.voice_journal import VOICE_FOLDER
from revox.checkpoint.voices import Voice, check_voice_name
from revox.cloning.consent import Consent, provenance, record_consent, source_of
from revox.cloning.errors import CloneError
from revox.coding.errors import CodingError
from revox.serving.cloner import CloneByModel
from revox.serving.errors import ApiError, ServeError, as_api_error
from revox.serving.voice_files import VoiceFiles
from revox.speech import AudioError, select_reference

if TYPE_CHECKING:
    from revox.api import Revox
    from revox.coding.invert import InversionProgress
    from revox.serving.settings import ServeSettings
    from revox.serving.state import Reference, ServerState

MAX_WAITING = 16
KEPT_JOBS = 100
KEPT_VOICES = 32
KEPT_ONE_OFF = 16
DESCENT = 0.7  # of an inversion's time; the rest is polish

ACTIVE = ("queued", "running")
INTERRUPTED = "the server was stopped before the voice was made"

log = logging.getLogger("revox.serving")
_Result = TypeVar("_Result")


@dataclass
class Job:
    """A cloning in the background. `progress` is 0 to 1; `error` one sentence, when it failed."""

    id: str
    name: str
    asked_by: str
    created_at: float
    consent: dict[str, Any]
    sha256: str
    details: dict[str, Any]
    ref_text: str | None = None
    keep_sample: bool = False
    state: str = "queued"
    phase: str | None = None
    progress: float = 0.0
    seconds_left: float | None = None
    started_at: float | None = None
    finished_at: float | None = None
    error: str | None = None
    retry_of: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As it is kept."""
        return dataclasses.asdict(self)

    def shown(self, waiting: int | None, can_retry: bool) -> dict[str, Any]:
        """As it is told to whoever asks; `waiting` jobs come before it."""
        hidden = ("details", "consent", "ref_text", "keep_sample")
        told = {
            key: value for key, value in self.to_json().items() if key not in hidden and value is not None
        }
        told |= {"object": "audio.voice.job", "progress": round(self.progress, 3), "can_retry": can_retry}
        return told if waiting is None else told | {"waiting": waiting}


@dataclass
class _Work:
    """What a job needs while it is in memory."""

    job: Job
    reference: Reference
    cancelled: threading.Event = field(default_factory=threading.Event)


@dataclass
class _OneOff:
    """A cloning that requests wait for; it stops when none does any more."""

    future: asyncio.Future[Voice]
    stop: threading.Event
    waiting: int = 0


def open_voices(state: ServerState) -> Voices:
    """The voices of a server.

    Raises ServeError when its folder cannot be used, or for a way to clone that this checkpoint has not.
    """
    return Voices(state.settings, state.tts, decode=state.references.read_now)  # type: ignore[attr-defined]


class Voices:
    """Presets, uploaded voices and one-off ones (`revox.serving.state.VoiceStore`).

    decode: bytes and origin -> a recording, for retries. Raises ServeError as `open_voices` does.
    """

    def __init__(
        self, settings: ServeSettings, tts: Revox, decode: Callable[[bytes, str], Reference] | None = None
    ) -> None:
        has_encoder = tts.model.audio_tokenizer.has_encoder
        if settings.clone_by == "encoder" and not has_encoder:
            raise ServeError(
                "--clone-by encoder needs a checkpoint with an encoder, and this one has none: put one in "
                "with `revox inject`, or take --clone-by inversion"
            )
        # Uploads are jobs and may take their time; one-off recordings wait, and are inverted only if the
        # operator says so.
        by = settings.clone_by or ("encoder" if has_encoder else "inversion")
        self._settings = settings
        self._tts = tts
        self._decode = decode
        self._cloner = CloneByModel(tts, by, settings.clone_seconds)
        self._one_off_allowed = has_encoder or settings.clone_by == "inversion"
        self._lock = threading.RLock()
        self.files = VoiceFiles(settings.voices_path, tts.model)
        self._loaded: OrderedDict[str, tuple[Any, Voice]] = OrderedDict()
        self._reserved: set[str] = set()
        self._one_offs: dict[tuple[str, str | None], _OneOff] = {}
        self._done: OrderedDict[tuple[str, str | None], Voice] = OrderedDict()
        # Two: what takes seconds never waits for what takes minutes.
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="voice")
        self._cloning = ThreadPoolExecutor(1, thread_name_prefix="one-off")
        self._jobs: dict[str, Job] = {}
        self._queue: deque[_Work] = deque()
        self._running: _Work | None = None
        self._wake = threading.Condition(self._lock)
        self._worker: threading.Thread | None = None
        self._closing = threading.Event()
        self._restore_jobs()

    @property
    def clones_by(self) -> str:
        """How uploads become voices: "encoder", at once, or "inversion", as a job."""
        return self._cloner.by

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
            stamp: Any = record["id"] if record else self._stamp(name)
            kept = self._loaded.get(name)
            if kept is not None and stamp is not None and kept[0] == stamp:
                self._loaded.move_to_end(name)
                return kept[1]
        try:
            # Without the lock: a voice that is removed meanwhile is told as gone.
            voice = self.files.load(name) if record else self._tts.voice(name)
        except (VoiceError, KeyError) as error:
            raise self._unknown(name, error) from None
        with self._lock:
            same = (self.files.records.get(name) or {}).get("id") == (record or {}).get("id")
            if same and stamp is not None:  # of before it was read: a change meanwhile is seen the next time
                self._loaded[name] = (stamp, voice)
                while len(self._loaded) > KEPT_VOICES:
                    self._loaded.popitem(last=False)
        return voice

    def record(self, name: str) -> dict[str, Any] | None:
        """The record of an uploaded voice; None when there is none of that name."""
        with self._lock:
            return self.files.records.get(name)

    def records(self) -> list[dict[str, Any]]:
        """The records of all uploaded voices, by name."""
        with self._lock:
            return [record for _, record in sorted(self.files.records.items())]

    def not_found(self, name: str) -> ApiError:
        """The answer for a name that is no voice's, with the nearest ones."""
        return self._unknown(name, None)

    def remove(self, name: str, by: str) -> None:
        """Delete an uploaded voice and everything derived from it, leaving a tombstone in the log.

        A job that would make it is cancelled. Who speaks with it at this moment goes on to the end.
        Raises ApiError: 403 for a voice of the checkpoint, 404 for none.
        """
        with self._lock:
            going = [job for job in self._jobs.values() if job.name == name and job.state in ACTIVE]
            if name not in self.files.records and not going:
                if name in self._tts.voices():
                    raise ApiError(
                        403,
                        f"voice {name!r} belongs to the checkpoint and cannot be deleted here; presets stay, "
                        "and others are removed with `revox voice remove`",
                        param="name",
                        code="voice_of_the_checkpoint",
                    )
                raise self._unknown(name, None)
            for job in going:
                self.cancel(job.id, by)
            record = self.files.records.get(name)
            if record is not None:
                self._loaded.pop(name, None)
                sha256 = record["provenance"].get("source", {}).get("sha256")
                for key in [key for key in self._done if key[0] == sha256]:
                    del self._done[key]
                self.files.remove(name, by)
            for job in [job for job in self._jobs.values() if job.name == name and job.state not in ACTIVE]:
                del self._jobs[job.id]
                self.files.drop_job(job.id)

    def _stamp(self, name: str) -> Any:
        # What a stranger writes becomes a path only if it can name a voice.
        if name not in self._loaded:
            try:
                check_voice_name(name)
            except VoiceError:
                return None
        try:
            found = (self._tts.folder / VOICE_FOLDER / f"{name}.pt").stat()
        except (OSError, ValueError):
            return None
        return (found.st_ino, found.st_mtime_ns, found.st_size)

    def _unknown(self, name: str, error: BaseException | None) -> ApiError:
        names = self.names()
        if name in names and isinstance(error, CheckpointError):  # it is there, and is damaged
            log.error("voice %r cannot be used: %s", name, error)
            return ApiError(
                500, f"voice {name!r} cannot be read on the server; its log says why", param="voice"
            )
        near = difflib.get_close_matches(name[:200], names, n=3, cutoff=0.5)
        with self._lock:
            making = any(job.name == name and job.state in ACTIVE for job in self._jobs.values())
        if making:
            hint = "it is still being made"
        elif near:
            hint = f"did you mean {' or '.join(near)}?"
        else:
            hint = (
                f"there are {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
                if names
                else "there are none"
            )
        return ApiError(
            404, f"there is no voice {name[:200]!r}: {hint}", param="voice", code="voice_not_found"
        )

    # ------------------------------------------------------------------------------------------------ uploads

    async def upload(
        self,
        reference: Reference,
        *,
        name: str,
        consent: str,
        subject: str | None = None,
        ref_text: str | None = None,
        details: dict[str, Any],
        keep_sample: bool = False,
        asked_by: str,
    ) -> tuple[dict[str, Any] | None, Job | None]:
        """A new voice: its record, or the job that makes it.

        details: further values for its record. Raises ApiError: 400 for a name, consent or recording that
        will not do, 409 for a name that is taken or too many voices, 503 when too many wait.
        """
        agreed = self._agreed(consent, subject, asked_by)
        keep = keep_sample or self._settings.keep_samples
        await self._reserve(name)
        handed_over = False
        try:
            await self._in_thread(partial(self._check_recording, reference, ref_text))
            job = Job(
                id=secrets.token_hex(12),
                name=name,
                asked_by=asked_by,
                created_at=time.time(),
                consent=agreed.model_dump(mode="json", exclude_none=True),
                sha256=hashlib.sha256(reference.data).hexdigest(),
                details=details,
                ref_text=ref_text,
                keep_sample=keep,
            )
            if self._cloner.by == "inversion":
                await self._in_thread(partial(self._enqueue, job, reference))
                handed_over = True
                return None, job
            cloning = self._cloning.submit(self._clone_now, job, reference, agreed)
            handed_over = True
            # Who hangs up meanwhile does not free the name under a cloning that goes on.
            return await asyncio.shield(asyncio.wrap_future(cloning)), None
        except (AudioError, CodingError) as error:
            raise ApiError(400, str(error), param="audio_sample", code="bad_audio") from None
        finally:
            if not handed_over:
                with self._lock:
                    self._reserved.discard(name)

    def _agreed(self, statement: str | None, subject: str | None, asked_by: str) -> Consent:
        if statement is not None and len(statement) > 4000:
            raise ApiError(400, "the consent statement is longer than 4000 characters", param="consent")
        try:
            return record_consent(statement, subject, given_by=asked_by)
        except CodingError as error:
            sentence = str(error).replace(', e.g. --consent "my own voice, recorded by me"', "")
            raise ApiError(400, sentence, param="consent", code="consent_required") from None

    def check_name(self, name: str) -> None:
        """Whether a voice of that name may be uploaded, for who asks before the work.

        Raises ApiError: 400 for a name that will not do, 409 for one that is taken or for too many voices.
        """
        _check_name(name)
        self._check_free(name, self._tts.voices())

    def _check_free(self, name: str, own: list[str]) -> None:
        with self._lock:
            taken = name in self._reserved or name in self.files.records or name in own
            if taken or any(job.name == name and job.state in ACTIVE for job in self._jobs.values()):
                raise ApiError(
                    409,
                    f"there is a voice {name!r} already; choose another name, or delete it first",
                    param="name",
                    code="voice_exists",
                )
            if self.files.in_the_way(name):
                raise ApiError(
                    409,
                    f"a file of the name {name!r} lies with this server's voices and is not a voice of this "
                    "checkpoint; choose another name",
                    param="name",
                    code="voice_exists",
                )
            if len(self.files.records) + len(self._reserved) >= self._settings.max_voices:
                raise ApiError(
                    409,
                    f"this server keeps {self._settings.max_voices} uploaded voices at most; delete one",
                    code="too_many_voices",
                )

    async def _reserve(self, name: str) -> None:
        _check_name(name)
        own = await self._in_thread(self._tts.voices)
        with self._lock:  # without a pause: whoever is cancelled has reserved nothing
            self._check_free(name, own)
            self._reserved.add(name)

    def _check_recording(self, reference: Reference, ref_text: str | None) -> None:
        """What would fail after a minute of search is said at once."""
        from revox.cloning.clone import check_transcript

        check_transcript(ref_text)
        select_reference(reference.audio, rate=self._tts.sampling_rate, whole=ref_text is not None)

    def _clone_now(self, job: Job, reference: Reference, agreed: Consent) -> dict[str, Any]:
        try:
            self._note("asked", job)
            try:
                voice = self._cloner(reference, name=job.name, consent=agreed, ref_text=job.ref_text)
                return self._keep(job, voice, reference)
            except BaseException as error:
                self._note("failed", job, error=as_api_error(error).message)
                raise
        finally:
            with self._lock:
                self._reserved.discard(job.name)

    def _keep(self, job: Job, voice: Voice, reference: Reference) -> dict[str, Any]:
        details = {**job.details, "asked_by": job.asked_by, "frames": voice.frames, "ref_text": job.ref_text}
        with self._lock:
            sample = reference.data if job.keep_sample else None
            return self.files.save(
                job.name, voice, {k: v for k, v in details.items() if v is not None}, sample
            )

    def _note(self, kind: str, job: Job, **more: Any) -> None:
        record = {"consent": job.consent, "source": {"sha256": job.sha256}, "method": self._cloner.by}
        self.files.note(kind, job.name, record, job=job.id, by=job.asked_by, **more)

    # --------------------------------------------------------------------------------------------------- jobs

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs, newest first."""
        with self._lock:
            return [self.told(job) for job in sorted(self._jobs.values(), key=lambda j: -j.created_at)]

    def job(self, id: str) -> dict[str, Any]:
        """One job. Raises ApiError 404."""
        with self._lock:
            return self.told(self._job(id))

    def told(self, job: Job) -> dict[str, Any]:
        """A job as it is told."""
        with self._lock:
            order = [work.job.id for work in self._queue]
            waiting = order.index(job.id) + (self._running is not None) if job.id in order else None
            can_retry = job.state == "failed" and self.files.has_job_sample(job.id)
            return job.shown(waiting, can_retry)

    def cancel(self, id: str, by: str) -> dict[str, Any]:
        """End a job that waits or runs. Raises ApiError: 404 for none, 409 when it has ended already."""
        with self._lock:
            job = self._job(id)
            if job.state not in ACTIVE:
                raise ApiError(409, f"the job has {job.state} already", code="job_ended")
            work = self._running if self._running and self._running.job is job else None
            if work is None:
                work = next((each for each in self._queue if each.job is job), None)
                if work is not None:
                    self._queue.remove(work)
            if work is not None:
                work.cancelled.set()
            self._end(job, "failed", "it was cancelled", keep=False)
            self._note("cancelled", job, cancelled_by=by)
            return self.told(job)

    async def retry(self, id: str, asked_by: str) -> dict[str, Any]:
        """Another try of a job that failed, if its recording was kept. Raises ApiError 404, 409, 503."""
        with self._lock:
            old = self._job(id)
            data = self.files.job_sample(id)
            if old.state != "failed" or data is None or self._decode is None:
                raise ApiError(
                    409,
                    "only a failed job whose recording was kept can be tried again; upload the recording",
                    code="cannot_retry",
                )
        await self._reserve(old.name)
        handed_over = False
        try:
            reference = await self._in_thread(partial(self._decode, data, "upload"))
            job = dataclasses.replace(
                old, id=secrets.token_hex(12), state="queued", phase=None, progress=0.0, seconds_left=None,
                started_at=None, finished_at=None, error=None, retry_of=old.id, created_at=time.time(),
                asked_by=asked_by,
            )  # fmt: skip
            await self._in_thread(partial(self._enqueue, job, reference))
            handed_over = True
            with self._lock:
                self.files.drop_job(old.id, only_sample=True)
                return self.told(job)
        finally:
            if not handed_over:
                with self._lock:
                    self._reserved.discard(old.name)

    def _job(self, id: str) -> Job:
        job = self._jobs.get(id)
        if job is None:
            raise ApiError(404, "there is no such job", param="id", code="job_not_found")
        return job

    def _enqueue(self, job: Job, reference: Reference) -> None:
        with self._lock:
            if self._closing.is_set():
                raise ApiError(503, "the server is stopping", code="not_ready")
            if len(self._queue) >= MAX_WAITING:
                raise ApiError(
                    503,
                    f"{MAX_WAITING} voices wait to be made already; try again later",
                    code="overloaded",
                    headers={"Retry-After": "60"},
                )
            self._note("asked", job)
            self.files.save_job(job.to_json(), reference.data if job.keep_sample else None)
            self._jobs[job.id] = job
            self._queue.append(_Work(job, reference))
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="clone", daemon=True)
                self._worker.start()
            self._wake.notify_all()

    def _work(self) -> None:
        # Speech comes first (per thread on Linux only).
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        while True:
            with self._lock:
                while not self._queue and not self._closing.is_set():
                    self._wake.wait()
                if self._closing.is_set():
                    return
                work = self._running = self._queue.popleft()
                # The first inversion also looks up what the checkpoint's own voices are made of.
                work.job.state, work.job.phase, work.job.started_at = "running", "preparing", time.time()
                self._save(work.job)
            try:
                self._make(work)
            except BaseException:
                log.exception("a voice could not be made")
            finally:
                with self._lock:
                    self._running = None
                    self._wake.notify_all()

    def _make(self, work: _Work) -> None:
        job = work.job

        def progress(at: InversionProgress) -> None:
            share = at.step / max(1, at.steps)
            with self._lock:
                if job.state == "running":
                    job.phase, job.seconds_left = at.phase, round(max(0.0, at.seconds_left), 1)
                    part = DESCENT * share if at.phase == "descent" else DESCENT + (1 - DESCENT) * share
                    job.progress = max(job.progress, min(1.0, part))

        def should_stop() -> bool:
            return work.cancelled.is_set() or self._closing.is_set()

        try:
            voice = self._cloner(
                work.reference,
                name=job.name,
                consent=Consent.model_validate(job.consent),
                ref_text=job.ref_text,
                progress=progress,
                should_stop=should_stop,
            )
            with self._lock:  # a cancellation comes before this or not at all
                if should_stop():
                    if self._closing.is_set() and job.state == "running":
                        self._end(job, "failed", INTERRUPTED, keep=True)
                        self._note("failed", job, error=INTERRUPTED)
                    return
                self._keep(job, voice, work.reference)
                job.progress = 1.0
                self._end(job, "done", None, keep=False)
        except Exception as error:
            with self._lock:
                if job.state != "running":
                    return
                sentence = as_api_error(error).message
                if self._closing.is_set():
                    sentence = INTERRUPTED
                elif isinstance(error, OSError):
                    sentence = f"the voice could not be kept ({error.strerror or 'the disk failed'})"
                self._end(job, "failed", sentence, keep=True)
            with contextlib.suppress(OSError):
                self._note("failed", job, error=sentence)

    def _end(self, job: Job, state: str, error: str | None, keep: bool) -> None:
        """The last of a job: what it came to, its name free again, its recording gone unless it is kept."""
        job.state, job.error, job.finished_at = state, error, time.time()
        job.seconds_left, job.phase = None, None
        self._reserved.discard(job.name)
        self._save(job)
        if not keep:
            with contextlib.suppress(OSError):
                self.files.drop_job(job.id, only_sample=True)
        ended = sorted((j for j in self._jobs.values() if j.state not in ACTIVE), key=lambda j: j.created_at)
        for old in ended[: max(0, len(ended) - KEPT_JOBS)]:
            del self._jobs[old.id]
            with contextlib.suppress(OSError):
                self.files.drop_job(old.id)

    def _save(self, job: Job) -> None:
        try:
            self.files.save_job(job.to_json())
        except OSError as error:
            log.error("the job %s cannot be kept: %s", job.id, error)

    def _restore_jobs(self) -> None:
        for kept in self.files.jobs():
            try:
                job = Job(**kept)
            except TypeError:
                log.warning("a job of another version is left alone: %s", kept.get("id"))
                continue
            self._jobs[job.id] = job
            if job.state in ACTIVE:
                made = self.files.records.get(job.name)
                if made is not None and made["provenance"].get("source", {}).get("sha256") == job.sha256:
                    self._end(job, "done", None, keep=False)  # killed between the voice and the job's end
                else:
                    self._end(job, "failed", INTERRUPTED, keep=True)
                    self._note("failed", job, error=INTERRUPTED)

    # ------------------------------------------------------------------------------------------------ one-off

    async def one_off(
        self, reference: Reference, *, consent: str | None, ref_text: str | None, asked_by: str
    ) -> Voice:
        """A voice for one request; the same recording is not cloned twice while it is remembered.

        Raises ApiError 400 without consent, without a way to clone, or for a recording that will not do; 503
        when too many are being cloned.
        """
        consent = (consent or "").strip() or None
        if consent is None and self._settings.consent_statement is None:
            raise ApiError(
                400,
                "ref_audio needs consent: say in the field consent whose voice it is and that they agreed "
                "(or start the server with --consent-statement)",
                param="consent",
                code="consent_required",
            )
        given_by = asked_by if consent is not None else "the operator of the server"
        agreed = self._agreed(consent or self._settings.consent_statement, None, given_by)
        if not self._one_off_allowed:
            raise ApiError(
                400,
                "ref_audio cannot be used: this checkpoint has no encoder. Upload the recording to "
                "POST /v1/audio/voices, which finds its codes by inversion; speak in a preset; put an "
                "encoder in with `revox inject`; or start the server with --clone-by inversion",
                param="ref_audio",
                code="no_encoder",
            )
        sha256 = hashlib.sha256(reference.data).hexdigest()
        record = provenance(agreed, self._cloner.by, source=source_of(reference.data))
        more = {"by": asked_by, "origin": reference.origin}
        await self._in_thread(partial(self.files.note, "one-off", None, record, **more))
        key = (sha256, ref_text)
        with self._lock:
            voice = self._done.get(key)
        if voice is None:
            voice = await self._one_off_voice(key, reference, agreed, ref_text)
        named = voice.provenance | {"consent": agreed.model_dump(mode="json", exclude_none=True)}
        return Voice("one-off", voice.codes, voice.embedding, named)

    async def _one_off_voice(
        self, key: tuple[str, str | None], reference: Reference, agreed: Consent, ref_text: str | None
    ) -> Voice:
        making = self._one_offs.get(key)
        if making is None:
            if len(self._one_offs) >= MAX_WAITING:
                raise ApiError(
                    503,
                    f"{MAX_WAITING} recordings are being cloned already; try again in a moment",
                    code="overloaded",
                    headers={"Retry-After": "10"},
                )
            stop = threading.Event()

            def make() -> Voice:
                if stop.is_set():
                    raise CloneError("nobody waits for this voice any more")
                return self._cloner(
                    reference,
                    name="one-off",
                    consent=agreed,
                    ref_text=ref_text,
                    should_stop=lambda: stop.is_set() or self._closing.is_set(),
                )

            future = asyncio.wrap_future(self._cloning.submit(make))
            making = self._one_offs[key] = _OneOff(future, stop)
            future.add_done_callback(lambda done: self._one_off_done(key, making, done))
        making.waiting += 1
        try:
            return await asyncio.shield(making.future)
        except (AudioError, CodingError) as error:
            raise ApiError(400, str(error), param="ref_audio", code="bad_audio") from None
        finally:
            making.waiting -= 1
            if not making.waiting and not making.future.done():
                making.stop.set()
                if self._one_offs.get(key) is making:  # who comes now starts anew
                    del self._one_offs[key]

    def _one_off_done(
        self, key: tuple[str, str | None], making: _OneOff | None, done: asyncio.Future[Voice]
    ) -> None:
        if self._one_offs.get(key) is making:
            del self._one_offs[key]
        if done.cancelled() or done.exception() is not None or (making and making.stop.is_set()):
            return
        with self._lock:
            self._done[key] = done.result()
            while len(self._done) > KEPT_ONE_OFF:
                self._done.popitem(last=False)

    # ---------------------------------------------------------------------------------------------------- end

    async def close(self) -> None:
        """End jobs, which are told as interrupted after the next start, and let another server write here."""
        self._closing.set()
        with self._lock:
            self._wake.notify_all()
            worker = self._worker
            for work in self._queue:
                self._end(work.job, "failed", INTERRUPTED, keep=True)
                with contextlib.suppress(OSError):
                    self._note("failed", work.job, error=INTERRUPTED)
            self._queue.clear()
        if worker is not None:
            await asyncio.to_thread(worker.join, 30.0)
        for pool in (self._pool, self._cloning):
            pool.shutdown(wait=False, cancel_futures=True)
        self.files.release()

    async def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        return await asyncio.wrap_future(self._pool.submit(work))


def _check_name(name: str) -> None:
    try:
        check_voice_name(name)
    except VoiceError as error:
        raise ApiError(400, str(error)[:400], param="name", code="bad_name") from None
