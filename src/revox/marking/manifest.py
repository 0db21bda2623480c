"""C2PA manifests, by c2pa-python: written into a file's bytes, read back and checked."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from revox.marking.errors import MarkError
from revox.marking.record import SENTENCE, MarkRecord, new_record
from revox.marking.signer import (
    Signer,
    can_sign,
    made_signer,
    read_pem,
    read_signer,
    state_folder,
)
from revox.speech import Audio, encode_audio

MEDIA_TYPES = {
    "wav": "audio/wav",
    "wav-float": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "m4a": "audio/mp4",
}
"""The formats of `revox.speech.FORMATS` that hold a manifest (c2pa-python 0.38); Ogg and ADTS do not."""

RECORD_LABEL = "revox.mark"
UNTRUSTED = "signingCredential.untrusted"
"""c2pa's code for a certificate of no known authority; the manifest is valid all the same."""

# Nothing is fetched, whatever a file asks for, and nothing is unpacked beyond a bound.
_SETTINGS = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_after_sign": False},
    "core": {"allowed_network_hosts": [], "max_decompressed_manifest_size_in_mb": 8},
    "builder": {"thumbnail": {"enabled": False}},
}


def load_signer(
    certificate: str | os.PathLike[str] | None = None,
    key: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Signer | None:
    """The signer from a certificate chain and key (PEM files), or the pair made on this machine.

    Without them the files are those of `signing_files`. The made pair is stored in `folder` (`state_folder()`
    by default) on first use. Returns None when no files
    are given and the signing libraries are not installed: marks are then tags only. Raises MarkError on files
    that cannot sign a C2PA manifest.
    """
    certificate, key = signing_files(certificate, key)
    if (certificate is None) != (key is None):
        raise MarkError("a signing certificate and its key belong together; give both or neither")
    if certificate is None or key is None:
        if not can_sign():
            return None
        return made_signer(Path(folder) if folder is not None else state_folder())
    if not can_sign():
        raise MarkError(
            "signing needs c2pa-python and cryptography, which are not installed: pip install 'revox[mark]'"
        )
    what = f"{certificate} and {key}"
    signer = read_signer(read_pem(certificate), read_pem(key), what)
    # Only c2pa knows the rules for a certificate's extensions: try it now, not in every file.
    if problem := _certificate_problem(signer):
        raise MarkError(f"{what} cannot sign a C2PA manifest ({problem}); ask for a certificate that may")
    return signer


def signing_files(
    certificate: str | os.PathLike[str] | None = None, key: str | os.PathLike[str] | None = None
) -> tuple[str | os.PathLike[str] | None, str | os.PathLike[str] | None]:
    """The certificate chain and key that sign: those given, else of `REVOX_SIGNING_CERTIFICATE` and
    `REVOX_SIGNING_KEY`, else None."""
    if certificate is None and key is None:
        return os.environ.get("REVOX_SIGNING_CERTIFICATE"), os.environ.get("REVOX_SIGNING_KEY")
    return certificate, key


def add_manifest(plain: BinaryIO, signed: BinaryIO, format: str, record: MarkRecord, signer: Signer) -> None:
    """Copy a file of a format of `MEDIA_TYPES` to another, empty one, with a signed manifest in it.

    Raises MarkError when it cannot.
    """
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
    plain.seek(0)
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
            builder.sign(signs, MEDIA_TYPES[format], plain, signed)
    except c2pa.C2paError as error:
        raise MarkError(f"the manifest cannot be written ({_first_line(error)})") from None


def read_manifest(data: bytes, trust: str = "") -> dict[str, Any] | None:
    """c2pa's report of the manifest in `data`; None when there is none or the container cannot hold one.

    `trust` is PEM certificates of trusted authorities. Raises MarkError on a manifest that cannot be read.
    """
    import c2pa

    settings: dict[str, Any] = dict(_SETTINGS)
    if trust:
        settings["trust"] = {"user_anchors": trust}
    try:
        with c2pa.Context(c2pa.Settings.from_dict(settings)) as context:
            reader = c2pa.Reader.try_create(None, io.BytesIO(data), context=context)
            if reader is None:
                return None
            with reader:
                return json.loads(reader.json())
    except c2pa.C2paError.NotSupported:
        return None
    except c2pa.C2paError as error:
        raise MarkError(f"the manifest cannot be read ({_first_line(error)})") from None


def _certificate_problem(signer: Signer) -> str | None:
    """Sign a silence and read it back: None when c2pa accepts it, else its objection."""
    silence, signed = encode_audio(Audio(np.zeros(80, np.float32), 8000), "wav")[0], io.BytesIO()
    try:
        add_manifest(io.BytesIO(silence), signed, "wav", new_record("test", "test"), signer)
        report = read_manifest(signed.getvalue()) or {}
    except MarkError as error:
        return str(error)
    problems = [item for item in report.get("validation_status", []) if item.get("code") != UNTRUSTED]
    return str(problems[0].get("explanation")) if problems else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
