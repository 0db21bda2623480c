"""Whose voice is it, and did they agree? Without an answer no voice is made, and the answer stays with it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from revox.cloning.errors import CloneError

FORMAT = "revox voice 1"
_LONGEST_STATEMENT = 4000  # characters
EXAMPLE = '--consent "my own voice, recorded by me"'


class Consent(BaseModel):
    """A sentence saying whose voice it is and that they agreed, as given by whoever made the voice.

    `given_by` is the key or the part of a server that gave it; the command line has nobody to name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    statement: str = Field(min_length=3, max_length=_LONGEST_STATEMENT)
    subject: str | None = None
    given_by: str | None = None
    recorded_at: datetime

    @field_validator("statement", "subject", "given_by", mode="before")
    @classmethod
    def _one_line(cls, value: Any) -> Any:
        return (" ".join(value.split()) or None) if isinstance(value, str) else value

    @field_validator("statement")
    @classmethod
    def _says_something(cls, value: str) -> str:
        if not any(character.isalpha() for character in value):
            raise ValueError("a sentence is expected")
        return value


class Source(BaseModel):
    """The audio a voice was made from. Only the file's name is kept, not where it lay."""

    model_config = ConfigDict(frozen=True)

    file: str | None = None
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    start_s: float | None = None
    seconds: float | None = None


class MixedVoice(BaseModel):
    """A voice that a mix was made from: its share, and its own record ({} for a preset without one)."""

    model_config = ConfigDict(frozen=True)

    voice: str
    weight: float
    record: dict[str, Any]


class Provenance(BaseModel):
    """What stands in NAME.voice.json: source, method, settings, date, and whose voice with whose consent."""

    model_config = ConfigDict(frozen=True)

    format: str = FORMAT
    created_at: datetime
    revox: str
    method: str
    settings: dict[str, Any] = Field(default_factory=dict)
    source: Source = Source()
    more_sources: tuple[Source, ...] | None = None
    mixed: tuple[MixedVoice, ...] | None = None
    consent: Consent


def record_consent(
    statement: str | None,
    subject: str | None = None,
    now: datetime | None = None,
    given_by: str | None = None,
) -> Consent:
    """The consent given with a request. Raises CloneError when nobody is named as having agreed."""
    try:
        return Consent.model_validate(
            {"statement": statement, "subject": subject, "given_by": given_by, "recorded_at": now or _now()}
        )
    except ValidationError:
        raise CloneError(
            "consent is required, as a sentence of 3 to 4000 characters: say whose voice it is and that they "
            f"agreed to its cloning, e.g. {EXAMPLE}"
        ) from None


def provenance(
    consent: Consent | str | None,
    method: str,
    settings: Mapping[str, Any] | None = None,
    source: Source | Path | str | bytes | None = None,
    start_s: float | None = None,
    seconds: float | None = None,
    now: datetime | None = None,
) -> dict[str, Any]:
    """The record kept beside a voice, as plain JSON values (for `revox.checkpoint.voices.add_voice`).

    consent: the statement, or a `Consent`. method: how the codes were found, e.g. "inversion". settings:
    whatever reproduces them (seed, budget ...). source: the clip (see `source_of`). start_s and seconds: the
    part of the clip that was used. Raises CloneError without consent, or when the clip cannot be read.
    """
    if not isinstance(consent, Consent):
        consent = record_consent(consent, now=now)
    if not isinstance(source, Source):
        source = source_of(source)
    from revox import __version__

    record = Provenance(
        created_at=now or _now(),
        revox=__version__,
        method=method,
        settings=dict(settings or {}),
        source=source.model_copy(update={"start_s": start_s, "seconds": seconds}),
        consent=consent,
    )
    return record.model_dump(mode="json", exclude_none=True)


def mixed_provenance(
    weights: Mapping[str, float], records: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The record of a voice mixed from others: the consent of all of them, and their whole records.

    weights: voice -> share. records: voice -> its record, {} for a preset without one.
    """
    agreed = _consent_of_all({name: records[name] for name in weights})
    record = provenance(agreed, "mix", {"weights": {name: round(w, 6) for name, w in weights.items()}})
    parts = [
        MixedVoice(voice=name, weight=round(w, 6), record=dict(records[name])) for name, w in weights.items()
    ]
    return {**record, "mixed": [part.model_dump(mode="json") for part in parts]}


def mapped_provenance(voice: str, record: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a voice that a map made of `voice`: the consent of that one, and its whole record."""
    made = provenance(_consent_of_all({voice: record}), "mapped", settings)
    return {**made, "from": [{"voice": voice, "record": dict(record)}]}


def _consent_of_all(records: Mapping[str, Mapping[str, Any]]) -> Consent:
    """One consent of what the owners of several voices agreed to, by their records."""
    statements, subjects = [], []
    for name, record in records.items():
        agreed = record.get("consent")
        agreed = agreed if isinstance(agreed, Mapping) else {}
        statement = (
            agreed.get("statement") or "a voice that came with the checkpoint, without a record of consent"
        )
        statements.append(f"{name}: {str(statement)[: _LONGEST_STATEMENT // len(records) - len(name) - 4]}")
        subjects += [str(agreed["subject"])] if agreed.get("subject") else []
    return record_consent("; ".join(statements), "; ".join(subjects) or None)


def source_of(source: Path | str | bytes | None) -> Source:
    """The name and SHA-256 of a clip, given as a path or its bytes.

    Bytes of a name that are no UTF-8 are written as in Python. Raises CloneError when it cannot be read.
    """
    if source is None:
        return Source()
    if isinstance(source, bytes):
        return Source(sha256=hashlib.sha256(source).hexdigest())
    name = os.fsencode(Path(source).name).decode("utf-8", "backslashreplace")
    return Source(file=name, sha256=sha256_of(source))


def sha256_of(path: Path | str) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises CloneError when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise CloneError(
            f"{path} cannot be read ({error.strerror}): check the path and its permissions"
        ) from None
    return digest.hexdigest()


def _now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)
