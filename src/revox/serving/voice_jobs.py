"""Uploads become voices in jobs: with an encoder a client waits for it, and an inversion is polled.

One thread runs the jobs in turn, at a lower priority than speech. A job is saved whenever its state changes;
after a restart the unfinished ones are failed, and can be retried if their recording was kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from revox.serving.errors import ApiError, as_api_error
from revox.serving.limits import Places

if TYPE_CHECKING:
    from revox.checkpoint.voices import Voice
    from revox.cloning.clone import SelectedSpeech
    from revox.progress import Progress, ProgressCallback
    from revox.serving.voice_files import VoiceFiles

MAX_WAITING = 16
MAX_ENDED_JOBS = 100
DESCENT_SHARE = 0.7  # of an inversion's time; the rest is local search

ACTIVE = ("queued", "running")
INTERRUPTED = "the server was stopped before the voice was made"

log = logging.getLogger("revox.serving")


@dataclass(kw_only=True)
class Job:
    """A cloning. `progress` is 0 to 1; `error` one sentence, if it failed."""

    id: str = field(default_factory=lambda: secrets.token_hex(12))
    name: str
    asked_by: str
    created_at: float = field(default_factory=time.time)
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

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ACTIVE

    def public(self, waiting: int | None, can_retry: bool) -> dict[str, Any]:
        """The job as the API shows it; `waiting` jobs come before it."""
        hidden = ("details", "consent", "ref_text", "keep_sample")
        shown = dataclasses.asdict(self) | {"waiting": waiting, "progress": round(self.progress, 3)}
        shown = {key: value for key, value in shown.items() if key not in hidden and value is not None}
        return shown | {"object": "audio.voice.job", "can_retry": can_retry}

    def again(self, asked_by: str) -> Job:
        """A new job for the same recording and name."""
        return Job(
            name=self.name, asked_by=asked_by, consent=self.consent, sha256=self.sha256,
            details=self.details, ref_text=self.ref_text, keep_sample=self.keep_sample, retry_of=self.id,
        )  # fmt: skip


class VoiceJobs:
    """The jobs of a server.

    lock: guards `files` and the jobs together. clone: makes the voice of a job; asked whether to stop.
    method: how, for the log.
    """

    def __init__(
        self,
        files: VoiceFiles,
        lock: threading.RLock,
        clone: Callable[[Job, SelectedSpeech, ProgressCallback, Callable[[], bool]], Voice],
        method: str,
    ) -> None:
        self._files, self._lock, self._clone, self._method = files, lock, clone, method
        self._jobs: dict[str, Job] = {}
        self._queue: list[Job] = []  # the first one runs, or is about to
        self._places = Places(MAX_WAITING, "voices wait to be made", retry_after=60)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="clone", initializer=_lower_priority)
        self._closing = threading.Event()
        self._restore()

    @property
    def active_names(self) -> set[str]:
        """Names of the voices that are being made."""
        with self._lock:
            return {job.name for job in self._jobs.values() if job.active}

    def listed(self) -> list[dict[str, Any]]:
        """All jobs, newest first."""
        with self._lock:
            return [self.show(job) for job in sorted(self._jobs.values(), key=lambda job: -job.created_at)]

    def get(self, id: str) -> dict[str, Any]:
        """One job. Raises ApiError 404."""
        with self._lock:
            return self.show(self._find(id))

    def show(self, job: Job) -> dict[str, Any]:
        """A job as the API shows it."""
        with self._lock:
            ahead = self._queue.index(job) if job.state == "queued" else None
            return job.public(ahead, job.state == "failed" and self._files.has_job_sample(job.id))

    def submit(self, job: Job, speech: SelectedSpeech, data: bytes) -> Future[dict[str, Any] | None]:
        """Start a job, or queue it behind the others; it ends with the voice's record, None if it is stopped.

        data: the recording that `speech` is of. Raises ApiError 503 if too many wait, OSError.
        """
        with self._lock:
            if self._closing.is_set():
                raise ApiError(503, "the server is stopping", code="not_ready")
            self._places.check(sum(waiting.state == "queued" for waiting in self._queue))
            sample = data if job.keep_sample else None
            self.note("asked", job)
            self._files.save_job(dataclasses.asdict(job), sample)
            self._jobs[job.id] = job
            self._queue.append(job)
            return self._pool.submit(self._run, job, speech, sample)

    def cancel(self, id: str, by: str) -> dict[str, Any]:
        """Stop a job that waits or runs. Raises ApiError: 404 for none, 409 if it has ended already."""
        with self._lock:
            job = self._find(id)
            if not job.active:
                raise ApiError(409, f"the job has ended already ({job.state})", code="job_ended")
            if job.state == "queued":
                self._queue.remove(job)
            self._end(job, "it was cancelled")
            self.note("cancelled", job, cancelled_by=by)
            return self.show(job)

    def retry(self, id: str, asked_by: str) -> tuple[Job, bytes]:
        """A new job for one that failed, and its recording, for `submit`. Raises ApiError 404, 409."""
        with self._lock:
            old = self._find(id)
            data = self._files.job_sample(id)
            if old.state != "failed" or data is None:
                raise ApiError(
                    409,
                    "only a failed job whose recording was kept can be retried; upload the recording",
                    code="cannot_retry",
                )
            return old.again(asked_by), data

    def forget(self, name: str, by: str) -> bool:
        """Cancel the jobs of a voice and delete all that have ended; whether any was active."""
        with self._lock:
            jobs = [job for job in self._jobs.values() if job.name == name]
            active = [job for job in jobs if job.active]
            for job in active:
                self.cancel(job.id, by)
            for job in jobs:
                if job not in active:
                    self._delete(job)
            return bool(active)

    def note(self, kind: str, job: Job, **more: Any) -> None:
        """Add an event of the job to the log of consent."""
        record = {"consent": job.consent, "source": {"sha256": job.sha256}, "method": self._method}
        self._files.note(kind, job.name, record, job=job.id, by=job.asked_by, **more)

    def close(self, seconds: float = 30.0) -> None:
        """Stop all jobs, as failed; the running one has so many seconds to stop."""
        self._closing.set()
        with self._lock:
            for job in self._queue:
                if job.state == "queued":
                    self._fail(job, INTERRUPTED)
            last = self._pool.submit(int)  # comes after the running job; those between do nothing any more
        wait([last], seconds)
        self._pool.shutdown(wait=False, cancel_futures=True)

    # ----------------------------------------------------------------------------------- in the jobs' thread

    def _run(self, job: Job, speech: SelectedSpeech, sample: bytes | None) -> dict[str, Any] | None:
        def should_stop() -> bool:
            return not job.active or self._closing.is_set()

        with self._lock:
            if should_stop():
                return None
            # The first inversion also recovers the codes of the checkpoint's presets.
            job.state, job.phase, job.started_at = "running", "preparing", time.time()
            self._save(job)
        try:
            voice = self._clone(job, speech, lambda at: self._show_progress(job, at), should_stop)
            with self._lock:  # a cancellation comes before this or not at all
                if not should_stop():
                    record = self._save_voice(job, voice, sample)
                    job.progress = 1.0
                    self._end(job)
                    return record
                if job.active:
                    self._fail(job, INTERRUPTED)
                return None
        except Exception as error:
            with self._lock:
                if job.active:
                    self._fail(job, self._reason(error))
            raise
        finally:
            with self._lock:
                self._queue.remove(job)

    def _save_voice(self, job: Job, voice: Voice, sample: bytes | None) -> dict[str, Any]:
        details = {**job.details, "asked_by": job.asked_by, "frames": voice.frames}
        if job.ref_text is not None:
            details["ref_text"] = job.ref_text
        return self._files.save(job.name, voice, details, sample)

    def _reason(self, error: Exception) -> str:
        message = as_api_error(error).message
        if self._closing.is_set():
            return INTERRUPTED
        if isinstance(error, OSError):
            return f"the voice could not be saved ({error.strerror or 'the disk failed'})"
        return message

    def _show_progress(self, job: Job, at: Progress) -> None:
        share = at.done / max(1.0, at.total or 0.0)
        if at.what == "descent":
            share *= DESCENT_SHARE
        else:
            share = DESCENT_SHARE + (1 - DESCENT_SHARE) * share
        with self._lock:
            if job.state == "running":
                job.phase = at.what
                job.seconds_left = round(max(0.0, float(at.facts.get("seconds_left", 0.0))), 1)
                job.progress = max(job.progress, min(1.0, share))

    # ------------------------------------------------------------------------------------------------- states

    def _find(self, id: str) -> Job:
        job = self._jobs.get(id)
        if job is None:
            raise ApiError(404, "there is no such job", param="id", code="job_not_found")
        return job

    def _end(self, job: Job, error: str | None = None, keep_sample: bool = False) -> None:
        """Record how a job ended, delete its recording unless it is kept, and delete the oldest jobs."""
        job.state, job.error, job.finished_at = "failed" if error else "done", error, time.time()
        job.seconds_left, job.phase = None, None
        self._save(job)
        if not keep_sample:
            with contextlib.suppress(OSError):
                self._files.drop_job(job.id, only_sample=True)
        ended = sorted((one for one in self._jobs.values() if not one.active), key=lambda one: one.created_at)
        for old in ended[: max(0, len(ended) - MAX_ENDED_JOBS)]:
            self._delete(old)

    def _fail(self, job: Job, message: str) -> None:
        """Record a failure; the recording is kept for a retry."""
        self._end(job, message, keep_sample=True)
        with contextlib.suppress(OSError):
            self.note("failed", job, error=message)

    def _delete(self, job: Job) -> None:
        del self._jobs[job.id]
        with contextlib.suppress(OSError):
            self._files.drop_job(job.id)

    def _save(self, job: Job) -> None:
        try:
            self._files.save_job(dataclasses.asdict(job))
        except OSError as error:
            log.error("the job %s cannot be saved: %s", job.id, error)

    def _restore(self) -> None:
        for saved in self._files.jobs():
            try:
                job = Job(**saved)
            except TypeError:
                log.warning("a job of another version is ignored: %s", saved.get("id"))
                continue
            self._jobs[job.id] = job
            if job.active:
                made = self._files.records.get(job.name)
                if made is not None and made["provenance"].get("source", {}).get("sha256") == job.sha256:
                    # Killed between saving the voice and the job's end.
                    self._end(job)
                else:
                    self._fail(job, INTERRUPTED)


def _lower_priority() -> None:
    with contextlib.suppress(OSError, AttributeError):  # of one thread, on Linux only
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
