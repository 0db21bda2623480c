"""Everything `revox serve` can be told, validated once. The defaults are the safe choices."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from revox.serving.errors import ServeError

_MODEL_NAME = re.compile(r"[\w:-][\w.:-]*(?:/[\w:-][\w.:-]*)*")
_HOST = re.compile(r"[a-zA-Z0-9_-]+(?:\.[a-zA-Z0-9_-]+)*")
_ORIGIN = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^/\s]+")


def _origin(value: str) -> str:
    # Browsers send it exactly so; anything else would never match.
    if value != "*" and not _ORIGIN.fullmatch(value):
        raise ValueError("an origin is expected, as https://example.org or http://127.0.0.1:8001")
    return value.lower()


def _host(value: str) -> str:
    if not _HOST.fullmatch(value):
        raise ValueError("a name alone is expected, as tts.example.org")
    return value.lower()


class ServeSettings(BaseModel):
    """The options of a server. Sizes are in bytes, durations in seconds.

    checkpoint: the folder (or hub id) that is served. model_name: its id in /v1/models; else the folder's
    name. voices_folder: where uploaded voices, their records and the log of removals are kept; `voices_path`
    is what holds when none is given. allowed_folder: file:// references may be read below it only (None: not
    at all). allow_urls: http(s) references are fetched. consent_statement: the operator's own, for one-off
    references that come without one. clone_by: how recordings become voices ("encoder", "inversion"; None:
    the encoder where the checkpoint has one, or else not at all). clone_seconds: the time an inversion may
    take. api_keys: the file of hashed keys (None: everybody may ask). rate_limit: requests a minute for a key
    that has no limit of its own (None: none). allowed_hosts: names by which this server may be called,
    besides addresses and names that lead nowhere outside (asked only where there are no keys). max_streams:
    requests that are spoken together. keep_pace: fewer while somebody listens to a stream, where the machine
    would speak so many slower than they are heard. max_queue: requests that wait for their turn; the next one
    is a 429. lead_frames: frames that a stream may be ahead of its reader before it rests. marking: what is
    spoken says that it is synthetic, in file and headers, signed with sign_certificate and sign_key (PEM) or
    a pair made here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str
    model_name: str | None = None
    device: str | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    voices_folder: Path | None = None
    keep_samples: bool = False
    max_voices: Annotated[int, Field(ge=0)] = 1000
    allowed_folder: Path | None = None
    allow_urls: bool = False
    consent_statement: Annotated[str, Field(min_length=3, max_length=4000)] | None = None
    clone_by: Literal["encoder", "inversion"] | None = None
    clone_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    api_keys: Path | None = None
    rate_limit: Annotated[int, Field(ge=1)] | None = None
    cors_origins: tuple[Annotated[str, AfterValidator(_origin)], ...] = ()
    allowed_hosts: tuple[Annotated[str, AfterValidator(_host)], ...] = ()
    max_body_bytes: Annotated[int, Field(ge=1024)] = 16 << 20
    max_reference_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 300.0
    max_text_characters: Annotated[int, Field(ge=1)] = 4096
    max_streams: Annotated[int, Field(ge=1, le=256)] = 8
    keep_pace: bool = True
    max_queue: Annotated[int, Field(ge=0)] = 64
    lead_frames: Annotated[int, Field(ge=1)] = 1024
    drain_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    marking: bool = True
    sign_certificate: Path | None = None
    sign_key: Path | None = None

    @field_validator("consent_statement")
    @classmethod
    def _says_something(cls, value: str | None) -> str | None:
        if value is not None and not any(character.isalpha() for character in value):
            raise ValueError("a sentence is expected")
        return value

    @field_validator("model_name")
    @classmethod
    def _names_a_model(cls, value: str | None) -> str | None:
        # The voices' folder is named after it.
        if value is not None and not _MODEL_NAME.fullmatch(value):
            raise ValueError("letters, digits, _, -, . and : are expected, and / between parts")
        return value

    @property
    def served_name(self) -> str:
        """The model's id in /v1/models."""
        return self.model_name or Path(self.checkpoint).expanduser().resolve().name or "voxtral"

    @property
    def voices_path(self) -> Path:
        """The folder of uploaded voices: the one given, or one in the user's data folder for this model."""
        if self.voices_folder is not None:
            return self.voices_folder.expanduser()
        data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
        return Path(data) / "revox" / "voices" / self.served_name


def settings_from(**options: Any) -> ServeSettings:
    """Settings from the command line's options. Raises ServeError, one sentence, when one cannot be."""
    try:
        return ServeSettings(**options)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-") if first["loc"] else "the options"
        # These options are given once for each.
        name = {"cors-origins": "cors-origin", "allowed-hosts": "allow-host"}.get(name, name)
        said = first["msg"].removeprefix("Value error, ")
        raise ServeError(f"--{name} {first.get('input')!r} will not do: {said}") from None
