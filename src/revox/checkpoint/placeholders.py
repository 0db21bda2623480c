"""What downloads and editors leave in the place of a file, in words: pointers, web pages, parts of files."""

from __future__ import annotations

import codecs
from pathlib import Path

_PARTS = (".aria2", ".part", ".partial", ".incomplete", ".crdownload", ".download")
"""Endings that aria2, wget and curl wrappers, the hub's client and browsers give to an unfinished file."""


def why_not(path: Path) -> str | None:
    """Why a file that cannot be read is not what its name says, as a sentence; None if nothing tells."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError:
        return None
    if head.startswith(b"version https://git-lfs"):
        return (
            f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder, or "
            "download the file."
        )
    if head.lstrip()[:9].lower() in (b"<!doctype", b"<html>") or head.lstrip()[:6].lower() == b"<html ":
        return (
            f"{path} is a web page, not the file itself; download the file (log in if the page asks for it)."
        )
    if head.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return (
            f"{path} begins with a byte order mark, which loaders of checkpoints do not read; save it as "
            "UTF-8 without one, or download it again."
        )
    if not head:
        return f"{path} is empty; download it again."
    return unfinished(path)


def unfinished(path: Path) -> str | None:
    """What of an unfinished download of `path` is there, as a sentence; None if nothing is."""
    # aria2 lays out the whole file first; others rename what is complete, and what is left over says nothing.
    endings = (".aria2",) if path.exists() else _PARTS
    parts = [path.with_name(path.name + ending) for ending in endings]
    found = next((part for part in parts if part.exists()), None)
    if found is None and not path.exists():
        # The hub's client: into a folder, or into its cache (snapshots/COMMIT beside blobs).
        folder = path.parent.absolute()
        caches = [above / "blobs" for above in folder.parents[1:2]]
        places = (folder / ".cache" / "huggingface" / "download", *caches)
        found = next((part for place in places for part in sorted(place.rglob("*.incomplete"))), None)
    if found is None:
        return None
    return f"{path} is not complete: its download stopped ({found.name}); run the download again."
