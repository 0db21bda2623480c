"""Recordings from `ref_audio` and uploads: a data URL, base64, an address or a file, each within its limits.

Recordings are decoded in a sandboxed process (`revox.serving.sandboxed_decode`). Addresses are fetched by
`revox.serving.fetch`. Files are opened below one folder only, one path segment at a time and without
following links, so that a concurrent change cannot lead outside.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes, urlsplit

from revox.serving.errors import ApiError, ServeError
from revox.serving.fetch import fetch
from revox.serving.limits import Places
from revox.serving.sandboxed_decode import sandboxed_decode
from revox.speech import Audio, AudioError

if TYPE_CHECKING:
    from revox.serving.settings import ServeSettings

FETCH_SECONDS = 15.0
WORKERS = 2
MAX_WAITING = 32

_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")


@dataclass(frozen=True)
class Reference:
    """A recording that came with a request: its bytes, decoded audio, and origin.

    `origin` is for logs: "upload", "data", "https://host/..." or the file's name; never its content.
    """

    data: bytes
    audio: Audio
    origin: str


class References:
    """Reads recordings, at most `MAX_WAITING` at a time, as the settings allow.

    Those inside a request are not larger than its body may be (`revox.serving.limits.BodyLimit`).

    rate: Hz of the decoded audio, mono. Raises ServeError if the allowed folder is not a folder.
    """

    def __init__(self, settings: ServeSettings, rate: int) -> None:
        self.rate = rate
        self.max_bytes, self.max_seconds = settings.max_body_bytes, settings.max_reference_seconds
        self.allow_urls = settings.allow_urls
        self.folder = settings.allowed_folder and settings.allowed_folder.expanduser()
        if self.folder is not None and not self.folder.is_dir():
            raise ServeError(f"--allowed-folder {self.folder} is not a folder; create it or name another")
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="reference")
        self._places = Places(MAX_WAITING, "recordings are being read")

    async def resolve(self, ref_audio: str) -> Reference:
        """The recording in a data URL or base64, or at an http(s) or file address.

        Raises ApiError: 400 for what cannot be read, 403 for what is not allowed, 413 for too much, 503 when
        too many are being read.
        """
        with self._places:
            return await self._decode(*await self._bytes(ref_audio))

    async def read(self, data: bytes, origin: str = "upload") -> Reference:
        """A recording from its bytes. Raises ApiError as `resolve` does."""
        with self._places:
            return await self._decode(data, origin)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _decode(self, data: bytes, origin: str) -> Reference:
        decoding = asyncio.get_running_loop().run_in_executor(
            self._pool, sandboxed_decode, data, self.rate, self.max_seconds
        )
        try:
            return Reference(data, await decoding, origin)
        except AudioError as error:
            field = "audio_sample" if origin == "upload" else "ref_audio"
            raise ApiError(400, str(error), param=field, code="bad_audio") from None

    async def _bytes(self, ref_audio: str) -> tuple[bytes, str]:
        text = ref_audio.strip()
        scheme = text[: text.find(":")].lower() if ":" in text[:16] else ""
        if scheme == "data":
            return self._data_url(text), "data"
        if scheme in ("http", "https"):
            if not self.allow_urls:
                raise _not_allowed("an http(s) address", "--allow-urls", "urls_not_allowed")
            return await fetch(text, max_bytes=self.max_bytes, seconds=FETCH_SECONDS)
        if scheme == "file":
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._file, text)
        if not scheme and _BASE64.fullmatch("".join(text.split())):
            return self._base64(text), "data"
        raise _bad(
            "ref_audio is not a data URL (data:audio/wav;base64,...), base64, or an http, https or file "
            "address; send one of them"
        )

    def _data_url(self, text: str) -> bytes:
        header, comma, body = text.partition(",")
        if not comma:
            raise _bad("ref_audio's data URL has no comma before its data")
        if not header.lower().rstrip().endswith(";base64"):
            raise _bad("ref_audio's data URL is not in base64; write data:audio/wav;base64,...")
        if "%" in body:
            body = unquote_to_bytes(body).decode("ascii", "replace")
        return self._base64(body)

    def _base64(self, text: str) -> bytes:
        text = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
        try:
            return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise _bad("ref_audio is damaged base64; encode the whole file again") from None

    def _file(self, text: str) -> tuple[bytes, str]:
        """The bytes of a regular file below the allowed folder, and its name."""
        if self.folder is None:
            raise _not_allowed("a file address", "--allowed-folder", "files_not_allowed")
        # One answer for everything that may not be read, which reveals nothing about other files.
        refused = ApiError(
            403,
            "ref_audio names no readable file: files are read below the allowed folder only, as "
            "file:///folder/name, without .. and without links",
            param="ref_audio",
            code="file_not_allowed",
        )
        with contextlib.ExitStack() as opened:
            try:
                segments = self._segments(text)
                descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
                opened.callback(os.close, descriptor)
                for segment in segments[:-1]:
                    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                    descriptor = os.open(segment, flags, dir_fd=descriptor)
                    opened.callback(os.close, descriptor)
                # Without O_NONBLOCK a pipe would block until something writes to it.
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
                descriptor = os.open(segments[-1], flags, dir_fd=descriptor)
                opened.callback(os.close, descriptor)
                found = os.fstat(descriptor)
                if stat.S_ISREG(found.st_mode) and found.st_size <= self.max_bytes:
                    with os.fdopen(descriptor, "rb", closefd=False) as file:
                        return file.read(self.max_bytes + 1), f"file {segments[-1]}"
            except (OSError, ValueError):
                raise refused from None
        if not stat.S_ISREG(found.st_mode):
            raise refused
        raise ApiError(
            413,
            f"the recording is larger than {self.max_bytes:,} bytes; send a shorter or compressed one",
            param="ref_audio",
        )

    def _segments(self, text: str) -> list[str]:
        """The path segments from the allowed folder, as given or resolved, to the file.

        Raises ValueError if the address is not below the folder.
        """
        assert self.folder is not None
        parts = urlsplit(text)
        path = os.fsdecode(unquote_to_bytes(parts.path))
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or "\0" in path:
            raise ValueError
        for base in (os.path.abspath(self.folder), os.path.realpath(self.folder)):
            prefix = base.rstrip("/") + "/"
            segments = path.removeprefix(prefix).split("/")
            if path.startswith(prefix) and not {"..", ".", ""} & set(segments):
                return segments
        raise ValueError


def _bad(message: str) -> ApiError:
    return ApiError(400, message, param="ref_audio")


def _not_allowed(what: str, option: str, code: str) -> ApiError:
    return ApiError(
        403,
        f"ref_audio is {what}, which this server does not read ({option} allows it); send the recording "
        "itself as a data URL",
        param="ref_audio",
        code=code,
    )
