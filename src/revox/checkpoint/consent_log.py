"""The log of whose voice was cloned, by whom, with which consent, and of every removal.

One JSON object a line, only ever added to and synced at once: a voice that is removed leaves its tombstone
here. A line that was torn by a crash is passed over and never joined to the next one. Keys of a line: `id`,
`at` (UTC), `event`, `voice`, and what is known of `consent` (statement, subject, recorded_at, given_by),
`sha256` and `file` of the recording, `method`, `created_at` of the voice.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from revox.speech.files import append_line

FORMAT = "revox consent 1"


def event(kind: str, voice: str | None, record: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A line for the log about a voice with this record (`revox.cloning.consent.provenance`, or {})."""
    consent, source = record.get("consent"), record.get("source")
    source = source if isinstance(source, Mapping) else {}
    line = {
        "id": secrets.token_hex(16),
        "at": now(),
        "event": kind,
        "voice": voice,
        "consent": dict(consent) if isinstance(consent, Mapping) else None,
        "sha256": source.get("sha256"),
        "file": source.get("file"),
        "method": record.get("method"),
        "created_at": record.get("created_at"),
        **more,
    }
    return {key: value for key, value in line.items() if value is not None}


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).replace(microsecond=0).isoformat().replace("+00:00", "Z")


def append(path: str | Path, line: Mapping[str, Any], once: bool = False) -> None:
    """Add a line and sync it. `once`: not if one with its id is there. Raises OSError."""

    def is_there(tail: bytes) -> bool:
        return any(one.get("id") == line.get("id") for one in _lines(tail))

    # JSON escapes newlines, so no text from outside can begin a line of its own.
    append_line(path, json.dumps(dict(line), ensure_ascii=True).encode(), is_there if once else None)


def read(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log, oldest first; none when there is no log. Raises OSError when it cannot be read."""
    try:
        return _lines(Path(path).read_bytes())
    except FileNotFoundError:
        return []


def document(
    voices: Iterable[tuple[str, Mapping[str, Any]]], lines: Iterable[Mapping[str, Any]], where: str
) -> dict[str, Any]:
    """Everything about consent as one JSON: who agreed to what, when, of which recording, made how.

    voices: name and record of those that exist. lines: of the log; voices that only it knows are "removed".
    """
    known = ("consent", "sha256", "file", "method", "created_at")
    found: dict[str, dict[str, Any]] = {}
    for name, record in voices:
        line = event("", name, record)
        facts = {key: line[key] for key in known if key in line}
        found[name] = {"voice": name, "status": "present", **facts, "log": []}
    inline: list[dict[str, Any]] = []
    for logged in lines:
        of = logged.get("voice")
        if isinstance(of, str):
            entry = found.setdefault(of, {"voice": of, "status": "removed", "log": []})
            entry["log"].append(dict(logged))
        else:
            inline.append(dict(logged))
    return {
        "format": FORMAT,
        "exported_at": now(),
        "of": where,
        "voices": list(found.values()),
        "inline_references": inline,
    }


def _lines(data: bytes) -> list[dict[str, Any]]:
    found = []
    for text in data.split(b"\n"):
        try:
            line = from_json(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            found.append(line)
    return found
