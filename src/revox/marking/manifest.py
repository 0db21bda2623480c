"""C2PA manifests, by c2pa-python: written into a file's bytes, read back and checked."""

from __future__ import annotations

import io
import json
import wave
from typing import Any

from revox.marking.errors import MarkError
from revox.marking.record import SENTENCE, MarkRecord, new_record
from revox.marking.signer import Signer

MEDIA_TYPES = {
    "wav": "audio/wav",
    "wav-float": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "m4a": "audio/mp4",
}
"""The formats of `revox.speech.FORMATS` that take a manifest (c2pa-python 0.38); Ogg and ADTS do not."""

RECORD_LABEL = "revox.mark"
# Nothing is fetched, whatever a file asks for, and nothing is unpacked beyond a bound.
_SETTINGS = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_after_sign": False},
    "core": {"allowed_network_hosts": [], "max_decompressed_manifest_size_in_mb": 8},
    "builder": {"thumbnail": {"enabled": False}},
}


def add_manifest(data: bytes, format: str, record: MarkRecord, signer: Signer) -> bytes:
    """`data` of a format of `MEDIA_TYPES` with a signed manifest in it. Raises MarkError when it cannot."""
    import c2pa

    software, _, version = record.software.partition(" ")
    agent = {"name": software, "version": version or "unknown"}
    created = {
        "action": "c2pa.created",
        "when": record.created_at.isoformat().replace("+00:00", "Z"),
        "softwareAgent": agent,
        "digitalSourceType": record.source_type,
        "description": f"{SENTENCE} Model: {record.model}. Voice: {record.voice}.",
    }
    definition = {
        "claim_generator_info": [agent],
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": [created]}},
            {"label": RECORD_LABEL, "data": record.plain()},
        ],
    }
    marked = io.BytesIO()
    try:
        info = c2pa.C2paSignerInfo(
            alg=signer.algorithm,
            sign_cert=signer.certificates.encode(),
            private_key=signer.key.encode(),
            ta_url=None,
        )
        with (
            c2pa.Context(c2pa.Settings.from_dict(_SETTINGS)) as context,
            c2pa.Signer.from_info(info) as signs,
            c2pa.Builder(json.dumps(definition), context) as builder,
        ):
            builder.sign(signs, MEDIA_TYPES[format], io.BytesIO(data), marked)
    except c2pa.C2paError as error:
        raise MarkError(f"the manifest cannot be written ({_first_line(error)})") from None
    return marked.getvalue()


def read_manifest(data: bytes, media_type: str | None, trust: str = "") -> dict[str, Any] | None:
    """c2pa's own report of the manifest in `data`, None when there is none or no container that takes one.

    media_type None lets c2pa find out. `trust` is PEM certificates of authorities that are believed. Raises
    MarkError when there is a manifest that cannot be read.
    """
    import c2pa

    settings: dict[str, Any] = dict(_SETTINGS)
    if trust:
        settings["trust"] = {"user_anchors": trust}
    try:
        with c2pa.Context(c2pa.Settings.from_dict(settings)) as context:
            reader = c2pa.Reader.try_create(media_type, io.BytesIO(data), context=context)
            if reader is None:
                return None
            with reader:
                return json.loads(reader.json())
    except c2pa.C2paError.NotSupported:
        return None
    except c2pa.C2paError as error:
        raise MarkError(f"the manifest cannot be read ({_first_line(error)})") from None


UNTRUSTED = "signingCredential.untrusted"
"""c2pa's code for a certificate that nobody known vouches for; the manifest is valid all the same."""


def trial(signer: Signer) -> str | None:
    """Sign a silence and read it back: None when that holds, else what c2pa says against the certificate."""
    silence = io.BytesIO()
    with wave.open(silence, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(160))
    record = new_record("trial", "trial")
    try:
        report = read_manifest(add_manifest(silence.getvalue(), "wav", record, signer), "audio/wav") or {}
    except MarkError as error:
        return str(error)
    said = [item for item in report.get("validation_status", []) if item.get("code") != UNTRUSTED]
    return str(said[0].get("explanation")) if said else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
