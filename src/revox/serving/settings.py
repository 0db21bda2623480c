"""The options of `revox serve`, validated once. The defaults are the safe choices."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from revox.serving.errors import ServeError


def _matching(pattern: str, expected: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"expected {expected}")
        return value

    return AfterValidator(check)


# The default folder of voices is named after it.
ModelName = Annotated[
    str,
    _matching(r"[\w:-][\w.:-]*(?:/[\w:-][\w.:-]*)*", "letters, digits, _, -, . and :, and / between parts"),
]
HostName = Annotated[
    str,
    StringConstraints(to_lower=True),
    _matching(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*", "a host name such as tts.example.org"),
]
# As browsers send it; anything else would never match.
Origin = Annotated[
    str,
    StringConstraints(to_lower=True),
    _matching(
        r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", "an origin such as https://example.org or http://127.0.0.1:8001"
    ),
]


class ServeSettings(BaseModel):
    """The options of a server. Sizes are in bytes, durations in seconds.

    checkpoint: the folder that is served. adapter: LoRA factors added to its weights, a folder in the format
    of peft. model_name: its id in /v1/models; default the folder's name. aliases: other names of the model
    and of voices. compatible: fields without effect are ignored and named, where they are refused otherwise,
    and files are MP3 by default, as OpenAI's.
    voices_folder: uploaded voices with their records and the log of consent and removals (see `voices_path`).
    allowed_folder: file:// references are read below it only (None: not at all). allow_urls: http(s)
    references are fetched. consent_statement: the operator's own, for inline references without consent.
    method: how recordings become voices ("auto": the encoder if the checkpoint has one, else a trained
    student; otherwise uploads are inverted and inline references refused). clone_seconds: the time limit of
    an inversion. api_keys: the file of hashed keys (None: no key is required). rate_limit: requests a minute
    for a key without a limit of its own (None: no limit). allowed_hosts: host names of this server, in
    addition to addresses and private names (checked only without keys). max_streams: concurrent utterances.
    max_chars: the longest piece of a text spoken at a time. takes: how often a piece is spoken at most until
    it is good. text_normalization, lexicon: see `revox.synthesis.normalize`. admission_control: run fewer
    while a client plays a stream that the machine could not keep up with. cache_mb: memory for keys and
    values of concurrent utterances, at their longest (None: half of the memory, or on CUDA of what is free
    once the weights are loaded). max_queue: requests that wait; further ones are a 429. lead_frames: frames
    that a stream may be ahead of its client before it pauses. marking: speech is marked as synthetic, in file
    and headers, signed with sign_certificate and sign_key (PEM) or a generated pair.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str
    model_name: ModelName | None = None
    aliases: dict[str, str] = {}
    compatible: bool = False
    device: str | None = None
    weights: str = "auto"
    adapter: Path | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    wyoming: Annotated[str, _matching(r"tcp://.+:\d+", "an address such as tcp://127.0.0.1:10200")] | None = (
        None
    )
    voices_folder: Path | None = None
    keep_samples: bool = False
    max_voices: Annotated[int, Field(ge=0)] = 1000
    allowed_folder: Path | None = None
    allow_urls: bool = False
    consent_statement: (
        Annotated[str, Field(min_length=3, max_length=4000), _matching(r"(?s).*[^\W\d_].*", "a sentence")]
        | None
    ) = None
    method: Literal["auto", "encoder", "student", "inversion"] = "auto"
    clone_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    api_keys: Path | None = None
    rate_limit: Annotated[int, Field(ge=1)] | None = None
    cors_origins: tuple[Origin, ...] = ()
    allowed_hosts: tuple[HostName, ...] = ()
    max_body_bytes: Annotated[int, Field(ge=1024)] = 16 << 20
    max_reference_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 300.0
    max_text_characters: Annotated[int, Field(ge=1)] = 4096
    max_chars: Annotated[int, Field(ge=20, le=2000)] = 300
    takes: Annotated[int, Field(ge=1, le=10)] = 3
    text_normalization: Literal["basic", "full", "none"] = "basic"
    lexicon: Path | None = None
    max_streams: Annotated[int, Field(ge=1, le=256)] = 8
    admission_control: bool = True
    cache_mb: Annotated[int, Field(ge=1)] | None = None
    max_queue: Annotated[int, Field(ge=0)] = 64
    lead_frames: Annotated[int, Field(ge=1)] = 1024
    drain_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    marking: bool = True
    sign_certificate: Path | None = None
    sign_key: Path | None = None

    @property
    def served_name(self) -> str:
        """The model's id in /v1/models."""
        return self.model_name or Path(self.checkpoint).expanduser().resolve().name or "voxtral"

    @property
    def voices_path(self) -> Path:
        """The folder of uploaded voices; default one in the user's data folder for this model."""
        if self.voices_folder is not None:
            return self.voices_folder.expanduser()
        data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
        return Path(data) / "revox" / "voices" / self.served_name


def settings_from(**options: Any) -> ServeSettings:
    """Settings from the command line's options. Raises ServeError, one sentence, when one is invalid."""
    try:
        return ServeSettings(**options)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-") if first["loc"] else "the options"
        # Options that may be repeated have singular names.
        name = {"cors-origins": "cors-origin", "allowed-hosts": "allow-host"}.get(name, name)
        message = first["msg"].removeprefix("Value error, ")
        raise ServeError(f"--{name} is {first.get('input')!r}: {message}") from None
