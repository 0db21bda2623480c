"""The content of a mark: that the sound is synthetic, and which model spoke it, in which voice, when."""

from __future__ import annotations

import json
from datetime import datetime, timezone

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from revox.marking.errors import MarkError

SYNTHETIC = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's digital source type of media made by a trained model; C2PA asks for it on `c2pa.created`."""

SENTENCE = "Synthetic speech, made by a machine."
FORMAT = "revox mark 1"


class MarkRecord(BaseModel):
    """A mark's content. It has neither the text that was spoken nor the consent behind a voice."""

    model_config = ConfigDict(frozen=True)

    format: str = FORMAT
    synthetic: bool = True
    source_type: str = Field(default=SYNTHETIC, max_length=200)
    software: str = Field(min_length=1, max_length=100)
    model: str = Field(min_length=1, max_length=200)
    voice: str = Field(min_length=1, max_length=200)
    created_at: datetime

    @field_validator("model", "voice", "software", mode="before")
    @classmethod
    def _one_line(cls, value: object) -> object:
        return " ".join(value.split()) if isinstance(value, str) else value

    def plain(self) -> dict[str, object]:
        """The record as plain JSON values."""
        return self.model_dump(mode="json")


def new_record(model: str, voice: str, now: datetime | None = None) -> MarkRecord:
    """The record of something spoken now by this revox: the checkpoint's name and the voice's.

    Raises MarkError when a name is empty or has more than 200 characters.
    """
    from revox import __version__

    when = (now or datetime.now(timezone.utc)).astimezone(timezone.utc).replace(microsecond=0)
    try:
        return MarkRecord(software=f"revox {__version__}", model=model, voice=voice, created_at=when)
    except ValidationError:
        raise MarkError(
            "a mark names the model and the voice in 1 to 200 characters each; give shorter names"
        ) from None


def stream_headers(record: MarkRecord) -> dict[str, str]:
    """HTTP headers that mark a stream as a mark does a file; every value is ASCII on one line.

    `AI-Disclosure` is a field of an Internet-Draft (draft-abaris-aicdh-01, section 3), not yet a standard: a
    structured dictionary (RFC 9651). `X-Revox-Synthetic` is "?1", a structured boolean; `X-Revox-Mark` is
    the record as JSON.
    """
    when = int(record.created_at.timestamp())
    return {
        "X-Revox-Synthetic": "?1",
        "X-Revox-Mark": json.dumps(record.plain(), sort_keys=True, separators=(",", ":")),
        "AI-Disclosure": (
            f"mode=machine-generated, model={_structured(record.model)}, "
            f"provider={_structured(record.software)}, date=@{when}"
        ),
    }


def _structured(text: str) -> str:
    """A structured field's string (RFC 9651, 3.3.3): printable ASCII, quotes and backslashes escaped."""
    ascii_only = "".join(c if " " <= c <= "~" else "?" for c in text)
    return '"' + ascii_only.replace("\\", "\\\\").replace('"', '\\"') + '"'
