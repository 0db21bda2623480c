"""Read a mark back: is this sound marked as synthetic, by whom, and is it still what was marked?

A manifest covers every byte outside itself and is signed; a tag carries a hash of the sound and is not. So a
tag tells of damage and of careless editing, a manifest of any change by somebody without the key. Neither
tells anything once both have been taken out.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from revox.marking.errors import MarkError
from revox.marking.manifest import RECORD_LABEL, UNTRUSTED, read_manifest
from revox.marking.record import FORMAT, SYNTHETIC
from revox.marking.signer import can_sign, state_folder
from revox.marking.tags import read_tags, sound_hash

MARKED, BROKEN, UNMARKED = "marked", "broken", "unmarked"
MOST_BYTES = 1 << 29

_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_C2PA_TYPES = "http://c2pa.org/digitalsourcetype/"
# The terms of IPTC's list, and C2PA's own, for what a model or an algorithm made, all or in part.
SYNTHETIC_TYPES = frozenset(
    {
        SYNTHETIC,
        _TYPES + "compositeWithTrainedAlgorithmicMedia",
        _TYPES + "compositeSynthetic",
        _TYPES + "algorithmicMedia",
        _C2PA_TYPES + "trainedAlgorithmicData",
    }
)
# What c2pa-rs says of a failed check (C2PA 2.3, section 15.2.2), in words.
_FAILURES = {
    "assertion.dataHash.mismatch": "the file was changed after it was signed",
    "assertion.bmffHash.mismatch": "the file was changed after it was signed",
    "assertion.boxesHash.mismatch": "the file was changed after it was signed",
    "assertion.hashedURI.mismatch": "what the manifest says was changed after it was signed",
    "claimSignature.mismatch": "the signature is not that of its content",
    "claimSignature.outsideValidity": "the certificate was not valid at that time",
    "signingCredential.expired": "the signing certificate has ended",
    "signingCredential.invalid": "the signing certificate is not one that may sign manifests",
    "signingCredential.revoked": "the signing certificate was withdrawn",
}
_UNCHECKED = "Manifests were not looked at; what reads them comes with: pip install 'revox[mark]'"
_NO_MARK = "There is no mark: nothing in the file says that the sound is synthetic."
_LONGEST = 200


@dataclass
class ManifestFound:
    """What a C2PA manifest says and how its checks ended; texts are cut and printable."""

    intact: bool
    failures: list[str] = field(default_factory=list)
    signed_by: str | None = None
    trusted: bool = False
    own: bool = False
    source_types: list[str] = field(default_factory=list)
    says: dict[str, str] = field(default_factory=dict)

    @property
    def synthetic(self) -> bool:
        """Whether one of its actions gives a digital source type that means synthetic."""
        return any(kind in SYNTHETIC_TYPES for kind in self.source_types)


@dataclass
class TagFound:
    """What revox's tag says; `sound`: is it still the tagged one? None when the tag has no hash."""

    sound: bool | None
    manifest: bool
    says: dict[str, str] = field(default_factory=dict)


@dataclass
class Verdict:
    """marked, broken or unmarked; why, in sentences; and what was found."""

    state: str
    sentences: list[str]
    manifest: ManifestFound | None = None
    tag: TagFound | None = None

    def plain(self) -> dict[str, Any]:
        """The verdict as plain JSON values."""
        return asdict(self)


def verify_file(path: str | os.PathLike[str], trust: str | os.PathLike[str] | None = None) -> Verdict:
    """Read a file's mark back; `trust` is a PEM file of certificate authorities to believe.

    Raises MarkError, with a sentence, on a file that cannot be read, is no audio, or is larger than 512 MiB.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise MarkError(f"{path} is a folder; name one audio file")
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise MarkError(f"{path} cannot be read ({error.strerror}); check the path") from None
    if len(data) > MOST_BYTES:
        raise MarkError(f"{path.name} is larger than {MOST_BYTES >> 20} MiB; verify a shorter file")
    if not data:
        raise MarkError(f"{path.name} is empty (0 bytes); there is nothing to verify")
    try:
        return verify_bytes(data, _authorities(trust))
    except MarkError as error:
        raise MarkError(f"{path.name}: {error}") from None


def verify_bytes(data: bytes, trust: str = "") -> Verdict:
    """Read the mark of an audio file's bytes back; `trust` is PEM certificates of authorities to believe.

    Raises MarkError when the bytes are no audio file.
    """
    note = read_tags(data)
    tag = None if note is None else _tag(note, data)
    checked = can_sign()
    manifest: ManifestFound | None = None
    if checked:
        try:
            manifest = _manifest(data, trust)
        except MarkError as error:
            if tag is None and b"c2pa" not in data:
                return Verdict(UNMARKED, [_NO_MARK, f"The file is damaged or cut off ({error})."])
            return Verdict(BROKEN, [f"The mark is broken: {error}.", *_of_sound(tag)], None, tag)
    if manifest is not None:
        return _by_manifest(manifest, tag)
    unchecked = [] if checked else [_UNCHECKED]
    if tag is None:
        return Verdict(UNMARKED, [_NO_MARK, *unchecked])
    if tag.sound is False:
        return Verdict(BROKEN, [*_of_sound(tag), *unchecked], None, tag)
    if tag.manifest and checked:
        said = "The mark is broken: the tag says that there is a signed manifest, and there is none any more."
        return Verdict(BROKEN, [said, *_of_sound(tag)], None, tag)
    text = f"Marked as synthetic by a tag{_described(tag.says)}. A tag is not signed: anybody can write one."
    return Verdict(MARKED, [text, *_of_sound(tag), *unchecked], None, tag)


def _by_manifest(manifest: ManifestFound, tag: TagFound | None) -> Verdict:
    signer = f"Signed by {manifest.signed_by or 'somebody unnamed'}"
    if not manifest.intact:
        reasons = "; ".join(dict.fromkeys(manifest.failures)) or "its checks failed"
        return Verdict(BROKEN, [f"The mark is broken: {reasons}.", *_of_sound(tag)], manifest, tag)
    if manifest.own:
        who = f"{signer}: the certificate made on this machine."
    elif manifest.trusted:
        who = f"{signer}, whose certificate is trusted."
    else:
        who = f"{signer}; nobody known vouches for that certificate, so the name proves nothing."
    if manifest.synthetic:
        said = f"Marked as synthetic{_described(manifest.says)}. Nothing was changed since it was signed."
        return Verdict(MARKED, [said, who], manifest, tag)
    if tag is None:
        said = "There is a valid manifest, but it does not say that the sound is synthetic."
        return Verdict(UNMARKED, [said, who], manifest, tag)
    # Somebody signed the file later, with the tag in it.
    said = f"Marked as synthetic by a tag{_described(tag.says)}; the manifest itself does not say so."
    return Verdict(BROKEN if tag.sound is False else MARKED, [said, *_of_sound(tag), who], manifest, tag)


def _of_sound(tag: TagFound | None) -> list[str]:
    if tag is None:
        return []
    if tag.sound is None:
        return ["The tag has no hash of the sound (it was written during speech), so changes do not show."]
    if tag.sound:
        return ["The sound is still the one that was tagged."]
    return ["The sound was changed or cut after it was marked, or the tag was."]


def _described(says: dict[str, str]) -> str:
    parts = [f"{name} {says[key]}" for key, name in _NAMES.items() if says.get(key)]
    return f" ({', '.join(parts)})" if parts else ""


_NAMES = {"software": "by", "model": "model", "voice": "voice", "created_at": "at"}


def _tag(note: dict[str, Any], data: bytes) -> TagFound | None:
    expected = note.get("sound")
    same: bool | None = None
    if note.get("format") != FORMAT:
        same = False  # the sentence is there, what belongs behind it is not: it was cut or edited
    elif expected is not None:
        try:
            same = sound_hash(data) == expected
        except MarkError:
            same = False
    says = {key: printable(note[key]) for key in _NAMES if isinstance(note.get(key), str)}
    return TagFound(same, note.get("manifest") is True, says)


def _manifest(data: bytes, trust: str) -> ManifestFound | None:
    own, serial = _own_certificates()
    report = read_manifest(data, None, trust + own)
    if report is None:
        return None
    active = report.get("manifests", {}).get(report.get("active_manifest")) or {}
    results = (report.get("validation_results") or {}).get("activeManifest") or {}
    failed = [item for item in results.get("failure", []) if item.get("code") != UNTRUSTED]
    state = report.get("validation_state")
    signature = active.get("signature_info") or {}
    name, organisation = (printable(signature.get(key) or "") for key in ("common_name", "issuer"))
    signed_by = f"{name!r} ({organisation})" if name and organisation else name or organisation or None
    trusted = state == "Trusted"
    return ManifestFound(
        intact=state in ("Valid", "Trusted") and not failed,
        failures=[_FAILURES.get(str(item.get("code")), _explained(item)) for item in failed],
        signed_by=signed_by,
        trusted=trusted,
        own=trusted and serial is not None and signature.get("cert_serial_number") == serial,
        source_types=_source_types(active),
        says=_says(active),
    )


def _explained(item: dict[str, Any]) -> str:
    return f"{printable(item.get('explanation') or 'a check failed')} ({printable(item.get('code'))})"


def _actions(active: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for assertion in active.get("assertions") or []:
        data = assertion.get("data")
        if str(assertion.get("label", "")).startswith("c2pa.actions") and isinstance(data, dict):
            actions = data.get("actions")
            found += [one for one in actions if isinstance(one, dict)] if isinstance(actions, list) else []
    return found


def _source_types(active: dict[str, Any]) -> list[str]:
    return [printable(one["digitalSourceType"]) for one in _actions(active) if one.get("digitalSourceType")]


def _says(active: dict[str, Any]) -> dict[str, str]:
    """Who made it with what and when: revox's own assertion, or else what any maker's actions say."""
    for assertion in active.get("assertions") or []:
        data = assertion.get("data")
        if assertion.get("label") == RECORD_LABEL and isinstance(data, dict):
            return {key: printable(data[key]) for key in _NAMES if isinstance(data.get(key), str)}
    said: dict[str, str] = {}
    for one in _actions(active):
        agent = one.get("softwareAgent")
        name = agent.get("name") if isinstance(agent, dict) else agent
        for key, value in (("software", name), ("created_at", one.get("when"))):
            if isinstance(value, str) and key not in said:
                said[key] = printable(value)
    return said


def printable(value: object) -> str:
    """A text out of anybody's file, cut and without what moves a terminal's cursor or turns a line."""
    text = str(value)[:_LONGEST]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _authorities(trust: str | os.PathLike[str] | None) -> str:
    if trust is None:
        return ""
    from revox.marking.signer import read_pem

    text = read_pem(trust)
    if not can_sign():
        raise MarkError("certificates are not looked at without: pip install 'revox[mark]'")
    from cryptography import x509

    try:
        x509.load_pem_x509_certificates(text.encode())
    except ValueError:
        raise MarkError(f"{trust} has no PEM certificate in it; name the authority's certificate") from None
    return text if text.endswith("\n") else text + "\n"


def _own_certificates() -> tuple[str, str | None]:
    """The certificates of this machine's made pair and the signing one's serial number, if there are any."""
    from revox.marking.signer import kept_signer

    try:
        signer = kept_signer(state_folder())
    except MarkError:
        return "", None
    if signer is None:
        return "", None
    from cryptography import x509

    first = x509.load_pem_x509_certificates(signer.certificates.encode())[0]
    return signer.certificates, str(first.serial_number)
