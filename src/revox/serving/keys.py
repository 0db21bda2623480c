"""API keys: who may call the server, and how often.

A key is 32 random bytes, shown once when it is created; the file holds only its SHA-256 (slow hashes are for
passwords that people choose). The file is read again when it changes, so keys can be added and removed
without a restart. Rates are limited by a token bucket for each key, with a minute's worth of tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
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
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from revox.serving.errors import ApiError, ServeError
from revox.speech.files import file_stamp, replace_file

FORMAT = "revox keys 1"
ANONYMOUS = "anonymous"
PREFIX = "rvx-"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}")
_MAX_HEADER = 512

log = logging.getLogger("revox.serving")


class Key(BaseModel):
    """A stored key: its name, its hash, its date, and its own limit (requests a minute)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=f"^{_NAME.pattern}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created_at: datetime
    rate_limit: Annotated[int, Field(ge=1)] | None = None


class KeyFile(BaseModel):
    """The key file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str = Field(default=FORMAT, pattern=f"^{FORMAT}$")
    keys: tuple[Key, ...] = ()

    @model_validator(mode="after")
    def _names_differ(self) -> KeyFile:
        if len({key.name for key in self.keys}) != len(self.keys):
            raise ValueError("two keys have one name")
        return self


def read_keys(path: str | Path) -> KeyFile:
    """The keys in a file. Raises ServeError if it is missing or is not a key file."""
    path = Path(path).expanduser()
    try:
        return KeyFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ServeError(
            f"the key file {path} cannot be read ({error.strerror}); "
            f"create one with: revox keys add NAME --file {path}"
        ) from None
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise ServeError(f"{path} is not a key file ({why}); create one with: revox keys add") from None


def add_key(path: str | Path, name: str, rate_limit: int | None = None) -> str:
    """Create a key and add its hash to the file, which is created if need be. Returns the key itself.

    Raises ServeError if the name is invalid or taken, or the file cannot be used.
    """
    path = Path(path).expanduser()
    if not _NAME.fullmatch(name) or name == ANONYMOUS:
        raise ServeError(
            f"{name!r} cannot name a key: use 1 to 64 of the characters A-Z, a-z, 0-9, _, -, . and @"
        )
    if rate_limit is not None and rate_limit < 1:
        raise ServeError(f"the rate limit is {rate_limit} requests a minute, expected 1 or more")
    with _changing(path):
        keys = read_keys(path).keys if path.exists() else ()
        if any(key.name == name for key in keys):
            raise ServeError(f"{path} already has a key {name!r}; remove it first, or choose another name")
        secret = PREFIX + secrets.token_urlsafe(32)
        now = datetime.now(timezone.utc).replace(microsecond=0)
        made = Key(name=name, sha256=hash_of(secret), created_at=now, rate_limit=rate_limit)
        _write(path, KeyFile(keys=(*keys, made)))
    return secret


def remove_key(path: str | Path, name: str) -> None:
    """Remove a key from the file; a running server notices. Raises ServeError if there is none."""
    path = Path(path).expanduser()
    with _changing(path):
        keys = read_keys(path).keys
        if not any(key.name == name for key in keys):
            known = ", ".join(key.name for key in keys) or "none"
            raise ServeError(f"{path} has no key {name!r}; it has {known}")
        _write(path, KeyFile(keys=tuple(key for key in keys if key.name != name)))


def hash_of(secret: str) -> str:
    """The hash of a key, as stored."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


class Keys:
    """Admits requests by key and rate.

    path: the key file; None: no key is required, and all clients share `rate_limit` (requests a minute; None:
    no limit). clock: seconds, for tests. Raises ServeError if the file cannot be used or holds no key.
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
        self._stamp: tuple[int, ...] | None = None
        if self._path is not None:
            self._stamp = file_stamp(self._path)
            self._keys = read_keys(self._path).keys
            if not self._keys:
                raise ServeError(
                    f"{self._path} holds no key, so every request would be refused; "
                    f"create one with: revox keys add NAME --file {self._path}"
                )

    def admit(self, authorization: str | None) -> str:
        """The name of the key in an `Authorization: Bearer ...` header.

        Raises ApiError: 401 without a known key, 429 with Retry-After above its rate.
        """
        with self._lock:
            if self._path is None:
                name, sha256, limit = ANONYMOUS, "", self._rate_limit
            else:
                key = self._find(authorization)
                name, sha256, limit = key.name, key.sha256, key.rate_limit or self._rate_limit
            if limit is not None:
                self._take(name, sha256, limit)
            return name

    def _find(self, authorization: str | None) -> Key:
        self._read_again()
        scheme, _, secret = (authorization or "").strip().partition(" ")
        secret = secret.strip()
        if scheme.lower() != "bearer" or not secret or len(secret) > _MAX_HEADER:
            raise _unauthorized("the request has no API key; send Authorization: Bearer KEY")
        given = hash_of(secret)
        found = None
        for key in self._keys:  # always all of them: the time must not depend on the match
            if hmac.compare_digest(key.sha256, given):
                found = key
        if found is None:
            raise _unauthorized("the API key is unknown; check it, or ask the server's operator for one")
        return found

    def _take(self, name: str, sha256: str, limit: int) -> None:
        bucket = self._buckets.get((name, sha256))
        if bucket is None or bucket.limit != limit:
            bucket = self._buckets[name, sha256] = _Bucket(limit, self._clock())
        wait = bucket.take(self._clock())
        if wait > 0:
            seconds = max(1, math.ceil(wait))
            raise ApiError(
                429,
                f"{name} made more than {limit} requests a minute; try again in {seconds} s",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(seconds)},
            )

    def _read_again(self) -> None:
        assert self._path is not None
        stamp = file_stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        if stamp is None:
            # Deleting the file revokes every key.
            log.error("the key file %s is gone: all requests are refused until it is back", self._path)
            self._keys = ()
            return
        try:
            self._keys = read_keys(self._path).keys
        except ServeError as error:
            log.error("%s; the keys read before stay valid until it is fixed", error)
            return
        known = {(key.name, key.sha256) for key in self._keys}
        self._buckets = {key: bucket for key, bucket in self._buckets.items() if key in known}


class _Bucket:
    """A token bucket of `limit` tokens that refills in a minute."""

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self._tokens = float(limit)
        self._at = now

    def take(self, now: float) -> float:
        """Take a token and return 0, or return the seconds until there is one."""
        self._tokens = min(self.limit, self._tokens + max(0.0, now - self._at) * self.limit / 60)
        self._at = now
        if self._tokens >= 1 - 1e-9:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) * 60 / self.limit


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _write(path: Path, keys: KeyFile) -> None:
    fresh = not path.exists()
    replace_file(path, keys.model_dump_json(exclude_none=True, indent=2) + "\n")
    if fresh:
        path.chmod(0o600)


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[None]:
    """Holds the lock for changing the file. Raises ServeError if the folder cannot be written."""
    import fcntl

    if path.is_dir():
        raise ServeError(f"{path} is a folder; name a file in it with --file")
    try:
        descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ServeError(f"{path.parent} cannot be written ({error.strerror}); name another --file") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
