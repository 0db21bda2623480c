"""Keeps the process that restores the encoder from reading the reference encoder.

Two guards, set up before anything else is imported. The kernel's (Landlock, Linux 5.19 and later) restricts
reading to the interpreter's, the system's and the run's own files, for child processes too. Python's (an
audit hook, on every system) refuses the forbidden files by device and inode, under any name, and the import
of the module that reads them for scoring. The hook cannot be removed.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lab.errors import LabError

SCORING = ("revox.evaluation.reference_encoder", "lab.recover_scores")
"""Modules that the restoring process must not import."""

SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc", "/proc", "/sys", "/dev", "/run", "/opt")

Identity = tuple[int, int]
"""Device and inode of a file, the same under any name."""


class ForbiddenError(LabError):
    """The restoring process asked for something that only scoring may read."""


def identity(path: str | os.PathLike[str]) -> Identity:
    """The identity of the file at `path`, links followed."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def forbid(files: Iterable[Identity]) -> None:
    """From now on, opening any of `files` through Python or safetensors raises ForbiddenError, and so does
    importing a module that reads them."""
    forbidden = frozenset(files)

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            try:
                found = identity(arguments[0])  # type: ignore[arg-type]
            except (OSError, ValueError):
                return
            if found in forbidden:
                raise ForbiddenError("the restoring process must not open the reference encoder")
        elif event == "import" and arguments[0] in SCORING:
            raise ForbiddenError(f"the restoring process must not import {arguments[0]}")

    sys.addaudithook(refuse)
    _announce_safetensors()


def _announce_safetensors() -> None:
    """Raise the audit event for its files, which are opened by Rust without one."""
    import safetensors

    opened = safetensors.safe_open

    def safe_open(filename: Any, *rest: Any, **named: Any) -> Any:
        sys.audit("open", filename, "r", os.O_RDONLY)
        return opened(filename, *rest, **named)

    setattr(safetensors, "safe_open", safe_open)  # noqa: B010 - a class, which mypy does not let be assigned
    for name in ("safetensors.torch", "safetensors.numpy"):
        if name in sys.modules:
            sys.modules[name].safe_open = safe_open  # type: ignore[attr-defined]


_READ_FILE, _REFER = 1 << 2, 1 << 13
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_NO_NEW_PRIVILEGES = 38


class _Ruleset(ctypes.Structure):
    _fields_ = (("handled_access_fs", ctypes.c_uint64),)


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def confine(own: Path) -> bool:
    """Restrict reading by this thread and its children to the system's, Python's and revox's files and `own`.

    Call it before any thread is started. Returns False if the kernel cannot do it (no Landlock, or before its
    version 2). https://docs.kernel.org/userspace-api/landlock.html
    """
    if sys.platform != "linux":
        return False
    call = ctypes.CDLL(None, use_errno=True).syscall
    if call(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1)) < 2:
        return False
    # If REFER were not handled, hard links into other folders would be refused everywhere.
    asked = _Ruleset(_READ_FILE | _REFER)
    ruleset = call(
        _CREATE_RULESET, ctypes.byref(asked), ctypes.c_size_t(ctypes.sizeof(asked)), ctypes.c_uint32(0)
    )
    if ruleset < 0:
        return False
    try:
        for root in readable_roots():
            _allow(call, ruleset, root, _READ_FILE)
        _allow(call, ruleset, own, _READ_FILE | _REFER)
        if ctypes.CDLL(None).prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
            return False
        return call(_RESTRICT_SELF, ruleset, ctypes.c_uint32(0)) == 0
    finally:
        os.close(ruleset)


def readable_roots() -> list[Path]:
    """Folders and files that any Python process here needs to read.

    Of the lab its modules and lists one by one: the reference encoder is in the same folder.
    """
    import revox

    lab = Path(__file__).parent
    places = [Path(revox.__file__).parent, *map(Path, (sys.prefix, sys.base_prefix, *SYSTEM))]
    places += [*lab.glob("*.py"), lab / "lists", lab / "recovery"]
    places += [Path(entry) for entry in sys.path if "site-packages" in entry or "lib/python" in entry]
    return [place for place in dict.fromkeys(place.resolve() for place in places) if place.exists()]


def _allow(call: Any, ruleset: int, root: Path, access: int) -> None:
    descriptor = os.open(root, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = _Beneath(access, descriptor)
        call(_ADD_RULE, ruleset, ctypes.c_int(1), ctypes.byref(rule), ctypes.c_uint32(0))
    finally:
        os.close(descriptor)
