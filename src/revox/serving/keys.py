"""API keys: who may ask, and how often.

A key is 32 random bytes, shown once when it is made; the file keeps its SHA-256 only (a slow hash is for
secrets that people think up, which these are not). The file is read again when it changes, so keys come and
go without a restart. How often: a token bucket a key, a minute's worth at once and then as they come.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import math
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from revox.serving.errors import ApiError, ServeError
from revox.speech.files import replace_file

if TYPE_CHECKING:
    from revox.serving.settings import ServeSettings

FORMAT = "revox keys 1"
ANONYMOUS = "anonymous"
PREFIX = "rvx-"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}")
_MAX_HEADER = 512

log = logging.getLogger("revox.serving")


class Key(BaseModel):
    """What is kept of a key: its name, its hash, since when, and its own limit (requests a minute)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=f"^{_NAME.pattern}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created_at: datetime
    rate_limit: Annotated[int, Field(ge=1)] | None = None


class KeyFile(BaseModel):
    """The file of keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str = Field(default=FORMAT, pattern=f"^{FORMAT}$")
    keys: tuple[Key, ...] = ()

    @model_validator(mode="after")
    def _names_differ(self) -> KeyFile:
        if len({key.name for key in self.keys}) != len(self.keys):
            raise ValueError("two keys have one name")
        return self


def read_keys(path: str | Path) -> KeyFile:
    """The keys of a file. Raises ServeError when it is missing or is no file of keys."""
    path = Path(path).expanduser()
    try:
        return KeyFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ServeError(
            f"the file of keys {path} cannot be read ({error.strerror}); "
            f"make one with: revox keys add NAME --file {path}"
        ) from None
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise ServeError(f"{path} is no file of keys ({why}); make one with: revox keys add") from None


def add_key(path: str | Path, name: str, rate_limit: int | None = None, now: datetime | None = None) -> str:
    """Make a key and keep its hash in the file, which is made if it is not there. Returns the key itself.

    Raises ServeError when the name will not do or is taken, or the file cannot be used.
    """
    path = Path(path).expanduser()
    if not _NAME.fullmatch(name) or name == ANONYMOUS:
        raise ServeError(
            f"{name!r} cannot name a key: use 1 to 64 of the characters A-Z, a-z, 0-9, _, -, . and @"
        )
    if rate_limit is not None and rate_limit < 1:
        raise ServeError(f"a limit of {rate_limit} requests a minute lets nobody in; give 1 or more")
    with _changing(path):
        kept = read_keys(path).keys if path.exists() else ()
        if any(key.name == name for key in kept):
            raise ServeError(f"{path} already has a key {name!r}; remove it first, or choose another name")
        secret = PREFIX + secrets.token_urlsafe(32)
        made = Key(name=name, sha256=hash_of(secret), created_at=now or _now(), rate_limit=rate_limit)
        _write(path, KeyFile(keys=(*kept, made)))
    return secret


def remove_key(path: str | Path, name: str) -> None:
    """Take a key out of the file; a running server notices. Raises ServeError when there is none."""
    path = Path(path).expanduser()
    with _changing(path):
        kept = read_keys(path).keys
        if not any(key.name == name for key in kept):
            known = ", ".join(key.name for key in kept) or "none"
            raise ServeError(f"{path} has no key {name!r}; it has {known}")
        _write(path, KeyFile(keys=tuple(key for key in kept if key.name != name)))


def hash_of(secret: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def open_keys(settings: ServeSettings) -> Keys:
    """The keys of a server. Raises ServeError when its file cannot be used or holds no key."""
    return Keys(settings.api_keys, settings.rate_limit)


class Keys:
    """Admits by key, and not too often (`revox.serving.state.KeyRing`).

    path: the file of keys; None: everybody may ask, together as often as `rate_limit` says (requests a
    minute; None: without limit). clock: seconds, for tests. Raises ServeError when the file cannot be used.
    """

    def __init__(
        self,
        path: str | Path | None,
        rate_limit: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = None if path is None else Path(path).expanduser()
        self._rate_limit = rate_limit
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[tuple[str, str], _Bucket] = {}
        self._keys: tuple[Key, ...] = ()
        self._seen: tuple[int, ...] | None = None
        if self._path is not None:
            self._seen = _stamp(self._path)
            self._keys = read_keys(self._path).keys
            if not self._keys:
                raise ServeError(
                    f"{self._path} holds no key, so nobody could ask anything; "
                    f"make one with: revox keys add NAME --file {self._path}"
                )

    def admit(self, authorization: str | None) -> str:
        """The name of the key in an `Authorization: Bearer ...` header.

        Raises ApiError: 401 without a key that is known, 429 with Retry-After when it asks too often.
        """
        with self._lock:
            if self._path is None:
                name, kept, limit = ANONYMOUS, "", self._rate_limit
            else:
                key = self._find(authorization)
                name, kept, limit = key.name, key.sha256, key.rate_limit or self._rate_limit
            if limit is not None:
                self._take(name, kept, limit)
            return name

    def _find(self, authorization: str | None) -> Key:
        self._read_again()
        scheme, _, secret = (authorization or "").strip().partition(" ")
        secret = secret.strip()
        if scheme.lower() != "bearer" or not secret or len(secret) > _MAX_HEADER:
            raise _unauthorised("no API key came with the request: send Authorization: Bearer KEY")
        given = hash_of(secret)
        found = None
        for key in self._keys:  # all of them, always: how long it takes tells nothing
            if hmac.compare_digest(key.sha256, given):
                found = key
        if found is None:
            raise _unauthorised("the API key is not known; check it, or ask whoever runs the server for one")
        return found

    def _take(self, name: str, kept: str, limit: int) -> None:
        bucket = self._buckets.get((name, kept))
        if bucket is None or bucket.limit != limit:
            bucket = self._buckets[name, kept] = _Bucket(limit, self._clock())
        wait = bucket.take(self._clock())
        if wait > 0:
            seconds = max(1, math.ceil(wait))
            raise ApiError(
                429,
                f"{name} has asked more than {limit} times a minute; try again in {seconds} s",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(seconds)},
            )

    def _read_again(self) -> None:
        assert self._path is not None
        stamp = _stamp(self._path)
        if stamp == self._seen:
            return
        self._seen = stamp
        if stamp is None:
            # Whoever deletes the file wants nobody let in.
            log.error("the file of keys %s is gone: nobody is admitted until it is back", self._path)
            self._keys = ()
            return
        try:
            self._keys = read_keys(self._path).keys
        except ServeError as error:
            log.error("%s; the keys read before hold until it is mended", error)
            return
        known = {(key.name, key.sha256) for key in self._keys}
        self._buckets = {kept: bucket for kept, bucket in self._buckets.items() if kept in known}


class _Bucket:
    """A token bucket: `limit` at once, and one more every 60 / `limit` seconds."""

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self._tokens = float(limit)
        self._at = now

    def take(self, now: float) -> float:
        """0 and a token less, or the seconds until there is one."""
        self._tokens = min(self.limit, self._tokens + max(0.0, now - self._at) * self.limit / 60)
        self._at = now
        if self._tokens >= 1 - 1e-9:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) * 60 / self.limit


def _unauthorised(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size)


def _write(path: Path, keys: KeyFile) -> None:
    fresh = not path.exists()
    replace_file(path, json.dumps(keys.model_dump(mode="json", exclude_none=True), indent=2) + "\n")
    if fresh:
        path.chmod(0o600)


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[None]:
    """Keeps two that change the file apart. Raises ServeError when the folder cannot be written."""
    import fcntl

    try:
        descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ServeError(f"{path.parent} cannot be written ({error.strerror}); name another --file") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)
