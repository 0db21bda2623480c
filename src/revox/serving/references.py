"""`ref_audio` and uploads as recordings: from a data URL, base64, an address or a file, each within its
bounds.

What a stranger sends is only ever decoded in a process of its own (`revox.serving.decode_apart`). Addresses
are fetched by `revox.serving.fetch`, and files opened below one folder only, one step of the path at a time
and through no link, so that nothing changed meanwhile leads outside.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import os
import re
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote_to_bytes, urlsplit

from revox.serving.decode_apart import decode_apart
from revox.serving.errors import ApiError
from revox.serving.fetch import Fetched, fetch
from revox.serving.state import Reference
from revox.speech import AudioError

if TYPE_CHECKING:
    from revox.serving.state import ServerState

FETCH_SECONDS = 15.0
WORKERS = 2
MAX_WAITING = 32

_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
_Result = TypeVar("_Result")


def open_references(state: ServerState) -> References:
    """The resolver of a server. Raises ServeError when its allowed folder is no folder."""
    settings = state.settings
    return References(
        rate=state.tts.sampling_rate,
        max_bytes=settings.max_body_bytes,
        max_seconds=settings.max_reference_seconds,
        allow_urls=settings.allow_urls,
        allowed_folder=settings.allowed_folder,
    )


class References:
    """The ways in for a recording (`revox.serving.state.ReferenceResolver`).

    Args:
        rate: Hz of the decoded audio, mono.
        max_bytes: of a recording as it came.
        max_seconds: of a recording, decoded.
        allow_urls: fetch http(s) addresses.
        allowed_folder: read file:// addresses below it; None: none.
        fetcher: url, bytes, seconds -> what came; the guarded one unless given.

    Raises ServeError when the allowed folder is no folder.
    """

    def __init__(
        self,
        *,
        rate: int,
        max_bytes: int = 16 << 20,
        max_seconds: float = 300.0,
        allow_urls: bool = False,
        allowed_folder: Path | None = None,
        fetcher: Callable[[str, int, float], Fetched] | None = None,
    ) -> None:
        from revox.serving.errors import ServeError

        self.rate = rate
        self.max_bytes = max_bytes
        self.max_seconds = max_seconds
        self.allow_urls = allow_urls
        self.folder = None if allowed_folder is None else allowed_folder.expanduser()
        if self.folder is not None and not self.folder.is_dir():
            raise ServeError(f"--allowed-folder {self.folder} is no folder; create it or name another")
        self._fetch = fetcher or (lambda url, size, seconds: fetch(url, max_bytes=size, seconds=seconds))
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="reference")
        self._waiting = 0
        self._lock = threading.Lock()

    async def resolve(self, ref_audio: str) -> Reference:
        """A data URL, base64, http(s) or file address, decoded.

        Raises ApiError: 400 for what cannot be read, 403 for what may not be, 413 for too much, 503 when too
        many are being read already.
        """
        return await self._apart(lambda: self.resolve_now(ref_audio))

    async def read(self, data: bytes, origin: str = "upload") -> Reference:
        """The bytes of a recording, decoded. Raises ApiError as `resolve` does."""
        return await self._apart(lambda: self.read_now(data, origin))

    def close(self) -> None:
        """Let go of the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _apart(self, work: Callable[[], _Result]) -> _Result:
        with self._lock:
            if self._waiting >= MAX_WAITING:
                raise ApiError(
                    503,
                    f"{MAX_WAITING} recordings are being read already; try again in a moment",
                    code="overloaded",
                    headers={"Retry-After": "5"},
                )
            self._waiting += 1
        future = self._pool.submit(work)
        future.add_done_callback(lambda _: self._done())
        return await asyncio.wrap_future(future)

    def _done(self) -> None:
        with self._lock:
            self._waiting -= 1

    # ------------------------------------------------------------------------------------------ without await

    def resolve_now(self, ref_audio: str) -> Reference:
        """As `resolve`, in the caller's thread."""
        data, origin = self._bytes(ref_audio)
        return self.read_now(data, origin)

    def read_now(self, data: bytes, origin: str) -> Reference:
        """As `read`, in the caller's thread."""
        field = "audio_sample" if origin == "upload" else "ref_audio"
        if len(data) > self.max_bytes:
            raise self._too_large(field)
        try:
            audio = decode_apart(data, self.rate, self.max_seconds)
        except AudioError as error:
            raise ApiError(400, str(error), param=field, code="bad_audio") from None
        return Reference(data, audio, origin)

    def _bytes(self, ref_audio: str) -> tuple[bytes, str]:
        text = ref_audio.strip()
        scheme = text[: text.find(":")].lower() if ":" in text[:16] else ""
        if scheme == "data":
            return self._data_url(text), "data"
        if scheme in ("http", "https"):
            if not self.allow_urls:
                raise ApiError(
                    403,
                    "ref_audio is an address, and this server fetches none (--allow-urls would let it); "
                    "send the recording itself as a data URL",
                    param="ref_audio",
                    code="urls_not_allowed",
                )
            found = self._fetch(text, self.max_bytes, FETCH_SECONDS)
            return found.data, found.origin
        if scheme == "file":
            return self._file(text)
        if not scheme and _BASE64.fullmatch("".join(text.split())):
            return self._base64(text), "data"
        raise ApiError(
            400,
            "ref_audio is neither a data URL (data:audio/wav;base64,...) nor base64 nor an http, https or "
            "file address; send one of them",
            param="ref_audio",
        )

    def _data_url(self, text: str) -> bytes:
        header, comma, body = text.partition(",")
        if not comma:
            raise ApiError(400, "ref_audio's data URL has no comma before its data", param="ref_audio")
        if not header.lower().rstrip().endswith(";base64"):
            raise ApiError(
                400,
                "ref_audio's data URL is not in base64; write data:audio/wav;base64,...",
                param="ref_audio",
            )
        if "%" in body:
            body = unquote_to_bytes(body).decode("ascii", "replace")
        return self._base64(body)

    def _base64(self, text: str) -> bytes:
        text = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
        if len(text) * 3 // 4 > self.max_bytes:
            raise self._too_large()
        try:
            return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise ApiError(
                400, "ref_audio is damaged base64; encode the whole file again", param="ref_audio"
            ) from None

    def _too_large(self, field: str = "ref_audio") -> ApiError:
        return ApiError(
            413,
            f"the recording is larger than {self.max_bytes:,} bytes; send a shorter or compressed one",
            param=field,
        )

    def _file(self, text: str) -> tuple[bytes, str]:
        """The bytes of a regular file below the allowed folder, and its name."""
        if self.folder is None:
            raise ApiError(
                403,
                "ref_audio is a file address, and this server reads none (--allowed-folder would let it); "
                "send the recording itself as a data URL",
                param="ref_audio",
                code="files_not_allowed",
            )
        # One answer for all that may not be read: nothing is learnt of what lies outside.
        refused = ApiError(
            403,
            "ref_audio names no file that may be read: file addresses are read below the allowed folder "
            "only, as file:///folder/name, without .. and without links",
            param="ref_audio",
            code="file_not_allowed",
        )
        try:
            parts = urlsplit(text)
            path = os.fsdecode(unquote_to_bytes(parts.path))
        except ValueError:
            raise refused from None
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or "\0" in path:
            raise refused
        steps = self._below(path)
        if not steps or any(step in ("..", ".", "") for step in steps):
            raise refused
        opened: list[int] = []
        try:
            opened.append(os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY))
            for step in steps[:-1]:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                opened.append(os.open(step, flags, dir_fd=opened[-1]))
            # A pipe would wait for its writer for ever.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            opened.append(os.open(steps[-1], flags, dir_fd=opened[-1]))
            found = os.fstat(opened[-1])
            if not stat.S_ISREG(found.st_mode):
                raise refused
            if found.st_size > self.max_bytes:
                raise self._too_large()
            with os.fdopen(opened.pop(), "rb") as file:
                return file.read(self.max_bytes + 1), f"file {steps[-1]}"
        except (OSError, ValueError):
            raise refused from None
        finally:
            for descriptor in opened:
                with contextlib.suppress(OSError):
                    os.close(descriptor)

    def _below(self, path: str) -> list[str]:
        """The steps from the allowed folder, written as given or as it truly is, to `path`; [] if not
        below."""
        assert self.folder is not None
        for base in (os.path.abspath(self.folder), os.path.realpath(self.folder)):
            if path.startswith(base.rstrip("/") + "/"):
                return path[len(base.rstrip("/")) + 1 :].split("/")
        return []
