"""Files on disk: written to a temporary path and renamed into place, and caches that know their inputs.

Nothing else in the project renames a file into place or decides whether a cached file is still valid.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

_DISK_FULL_BELOW = 1 << 20  # bytes free
_TAIL = 1 << 18  # bytes of a log that are read for a line that is there already


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Replace `path` in one step: yields an empty temporary file beside it, renamed when the block ends.

    For libraries that write to a path themselves; `replace_file` is shorter where the content is at hand. The
    file is synced before it is renamed and keeps the permissions of the one it replaces. A `path` that is a
    link (a hub cache's files are links into blobs that revisions share) becomes a real file, and the link's
    target stays as it was. If the block raises, `path` is untouched and the temporary file is removed.

    Raises OSError, also in place of a library's own exception when the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file, contextlib.suppress(FileNotFoundError):
            os.fchmod(file.fileno(), path.stat().st_mode & 0o777 | 0o200)
        mode = temporary.stat().st_mode & 0o777
        yield temporary
        with open(temporary, "rb") as file:
            os.fchmod(file.fileno(), mode)  # some libraries make the file anew, for its owner alone
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        full = isinstance(error, Exception) and not isinstance(error, OSError) and _is_full(path.parent)
        with contextlib.suppress(OSError):
            temporary.unlink()
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    sync_folder(path.parent)


def replace_file(path: str | os.PathLike[str], content: bytes | str | Callable[[BinaryIO], None]) -> None:
    """Put `content` at `path` in one step, as `replacing` does.

    Text is written as UTF-8; a callable is given the open binary file. Raises OSError.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content.encode() if isinstance(content, str) else content)


def read_text(path: str | os.PathLike[str], error: type[Exception]) -> str:
    """A file's UTF-8 text without a byte order mark. Raises `error`, with a sentence, when there is none."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as problem:
        why = getattr(problem, "strerror", None) or "it is not UTF-8 text"
        raise error(f"{path} cannot be read ({why}); name a file of UTF-8 text") from None


def append_line(
    path: str | os.PathLike[str], line: bytes, unless: Callable[[bytes], bool] | None = None
) -> None:
    """Add `line` (without its end) to a log that several processes write, and sync it. Raises OSError.

    A line that a crash cut off stays a line of its own. The file is made for its owner alone. `unless` is
    given the log's last 256 KiB while nobody else writes; when it returns True, nothing is added.
    """
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        start = max(0, size - _TAIL)
        tail = os.pread(descriptor, size - start, start)
        if unless is not None and unless(tail):
            return
        data = (b"\n" if tail and not tail.endswith(b"\n") else b"") + line + b"\n"
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pt_bytes(value: object) -> bytes:
    """The bytes that `torch.save` writes for `value`, for `replace_file`."""
    import torch

    whole = io.BytesIO()
    torch.save(value, whole)
    return whole.getvalue()


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the folder's list of names durable, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def stamp_of(*parts: Any) -> str:
    """A stamp for everything that a cached result depends on: SHA-256 (hex) of the parts as JSON.

    What JSON does not know (a path, a dtype) counts by its `str`.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def load_or_build(path: str | os.PathLike[str], stamp: str, build: Callable[[], bytes]) -> bytes:
    """The content cached at `path` for `stamp`, built and saved first if it is not there."""
    content = load_stamped(path, stamp)
    if content is None:
        content = build()
        save_stamped(path, stamp, content)
    return content


def load_stamped(path: str | os.PathLike[str], stamp: str) -> bytes | None:
    """The content that `save_stamped` wrote to `path`; None if it is missing, damaged or of another stamp."""
    try:
        checksum, _, content = Path(path).read_bytes().partition(b"\n")
    except OSError:
        return None
    return content if checksum == _checksum(stamp, content) else None


def save_stamped(path: str | os.PathLike[str], stamp: str, content: bytes) -> None:
    """Cache `content` at `path` as valid for `stamp`; the folder is made if need be. Raises OSError.

    The file is one line, a checksum of stamp and content, and then the content.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, _checksum(stamp, content) + b"\n" + content)


def file_stamp(path: str | os.PathLike[str]) -> tuple[int, int, int] | None:
    """Inode, time of change (ns) and size, which change with the file; None if it is missing."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _checksum(stamp: str, content: bytes) -> bytes:
    return hashlib.sha256(stamp.encode() + b"\n" + content).hexdigest().encode()


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _DISK_FULL_BELOW
    except OSError:
        return False
