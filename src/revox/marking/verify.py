"""Read a mark back: is this sound marked as synthetic, by whom, and is it still what was marked?

A manifest covers every byte outside itself and is signed; a tag carries a hash of the sound and is not. So a
tag shows damage and careless editing, a manifest any change by somebody without the key. Neither shows
anything once both have been removed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from revox.marking.errors import MarkError
from revox.marking.manifest import RECORD_LABEL, UNTRUSTED, read_manifest
from revox.marking.record import FORMAT, SYNTHETIC
from revox.marking.signer import can_sign, own_signer, read_pem, state_folder
from revox.marking.tags import read_tags, sound_hash

MARKED, BROKEN, UNMARKED = "marked", "broken", "unmarked"
MAX_BYTES = 1 << 29

_IPTC, _C2PA = "http://cv.iptc.org/newscodes/digitalsourcetype/", "http://c2pa.org/digitalsourcetype/"
SYNTHETIC_TYPES = frozenset(
    {
        SYNTHETIC,
        _IPTC + "compositeWithTrainedAlgorithmicMedia",
        _IPTC + "compositeSynthetic",
        _IPTC + "algorithmicMedia",
        _C2PA + "trainedAlgorithmicData",
    }
)
"""IPTC's terms, and C2PA's own, for what a model or an algorithm made, all or in part."""

# c2pa-rs's codes of failed checks (C2PA 2.3, section 15.2.2), in words.
_CHANGED = "the file was changed after it was signed"
_FAILURES = {
    "assertion.dataHash.mismatch": _CHANGED,
    "assertion.bmffHash.mismatch": _CHANGED,
    "assertion.boxesHash.mismatch": _CHANGED,
    "assertion.hashedURI.mismatch": "the content of the manifest was changed after it was signed",
    "claimSignature.mismatch": "the signature does not match the manifest",
    "claimSignature.outsideValidity": "the certificate was not valid at that time",
    "signingCredential.expired": "the signing certificate has expired",
    "signingCredential.invalid": "the signing certificate may not sign manifests",
    "signingCredential.revoked": "the signing certificate was revoked",
}
_UNCHECKED = "Manifests were not checked; what reads them comes with: pip install 'revox[mark]'"
_NO_MARK = "There is no mark: nothing in the file says that the sound is synthetic."
_FIELDS = {"software": "by", "model": "model", "voice": "voice", "created_at": "at"}
_MADE_OF = ("parentOf", "componentOf")  # and not inputTo: what a model was given
_LONGEST = 200  # characters of a text out of a file


@dataclass
class ManifestFound:
    """What a C2PA manifest says and how its checks ended; texts are cut and printable."""

    intact: bool
    failures: list[str] = field(default_factory=list)
    signed_by: str | None = None
    trusted: bool = False
    own: bool = False
    source_types: list[str] = field(default_factory=list)
    ingredient_types: list[str] = field(default_factory=list)
    says: dict[str, str] = field(default_factory=dict)

    @property
    def synthetic(self) -> bool:
        """Whether one of its actions gives a digital source type that means synthetic."""
        return any(kind in SYNTHETIC_TYPES for kind in self.source_types)


@dataclass
class TagFound:
    """What revox's tag says. `sound`: is it still the sound that was tagged? None without a hash."""

    sound: bool | None
    manifest: bool
    says: dict[str, str] = field(default_factory=dict)


@dataclass
class Verification:
    """A file's `state` ("marked", "broken" or "unmarked"), the reasons in sentences, and what was found."""

    state: str
    sentences: list[str]
    manifest: ManifestFound | None = None
    tag: TagFound | None = None


def verify_file(path: str | os.PathLike[str], trust: str | os.PathLike[str] | None = None) -> Verification:
    """Read a file's mark back; `trust` is a PEM file of certificate authorities to trust.

    Raises MarkError on a file that cannot be read, is not audio, or is larger than 512 MiB.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise MarkError(f"{path} is a folder; name one audio file")
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise MarkError(f"{path} cannot be read ({error.strerror}); check the path") from None
    if len(data) > MAX_BYTES:
        raise MarkError(f"{path.name} is larger than {MAX_BYTES >> 20} MiB, of which a mark is not read")
    if not data:
        raise MarkError(f"{path.name} is empty (0 bytes); there is nothing to verify")
    try:
        return verify_bytes(data, _authorities(trust))
    except MarkError as error:
        raise MarkError(f"{path.name}: {error}") from None


def verify_bytes(data: bytes, trust: str = "") -> Verification:
    """Read the mark of an audio file's bytes back; `trust` is PEM certificates of trusted authorities.

    Raises MarkError when the bytes are not an audio file.
    """
    note = read_tags(data)
    tag = None if note is None else _tag(note, data)
    about_sound = _about_sound(tag)
    if not can_sign():
        if tag is None:
            return Verification(UNMARKED, [_NO_MARK, _UNCHECKED])
        return _by_tag(tag, [*about_sound, _UNCHECKED])
    try:
        manifest = _manifest(data, trust)
    except MarkError as error:
        if tag is None and b"c2pa" not in data:
            return Verification(UNMARKED, [_NO_MARK, f"The file is damaged or cut off ({error})."])
        return Verification(BROKEN, [f"The mark is broken: {error}.", *about_sound], None, tag)
    if manifest is not None:
        return _by_manifest(manifest, tag, about_sound)
    if tag is None:
        return Verification(UNMARKED, [_NO_MARK])
    if tag.manifest and tag.sound is not False:
        missing = "The mark is broken: the tag names a signed manifest, and there is none any more."
        return Verification(BROKEN, [missing, *about_sound], None, tag)
    return _by_tag(tag, about_sound)


def _by_tag(tag: TagFound, more: list[str]) -> Verification:
    if tag.sound is False:
        return Verification(BROKEN, more, None, tag)
    text = f"Marked as synthetic by a tag{_described(tag.says)}. A tag is not signed: anybody can write one."
    return Verification(MARKED, [text, *more], None, tag)


def _by_manifest(manifest: ManifestFound, tag: TagFound | None, about_sound: list[str]) -> Verification:
    if not manifest.intact:
        reasons = "; ".join(dict.fromkeys(manifest.failures)) or "its checks failed"
        return Verification(BROKEN, [f"The mark is broken: {reasons}.", *about_sound], manifest, tag)
    who = f"Signed by {manifest.signed_by or 'an unnamed signer'}"
    if manifest.own:
        who += ": the certificate made on this machine."
    elif manifest.trusted:
        who += ", whose certificate is trusted."
    else:
        who += "; no known authority vouches for that certificate, so the name proves nothing."
    if manifest.synthetic:
        text = f"Marked as synthetic{_described(manifest.says)}. Nothing was changed since it was signed."
        if tag is None or tag.sound is not False:
            return Verification(MARKED, [text, who], manifest, tag)
        # It was changed before it was signed, by somebody who left the tag as it was. Of a signer that nobody
        # vouches for that is as good as no signature.
        state = MARKED if manifest.own or manifest.trusted else BROKEN
        return Verification(state, [text, *about_sound, who], manifest, tag)
    if not SYNTHETIC_TYPES.isdisjoint(manifest.ingredient_types):
        text = "Made of sound that was marked as synthetic, and edited and signed since."
        return Verification(MARKED, [text, *about_sound, who], manifest, tag)
    if tag is None:
        text = "There is a valid manifest, but it does not say that the sound is synthetic."
        return Verification(UNMARKED, [text, who], manifest, tag)
    # Somebody signed the file later, with the tag in it.
    text = f"Marked as synthetic by a tag{_described(tag.says)}; the manifest itself does not say so."
    state = BROKEN if tag.sound is False else MARKED
    return Verification(state, [text, *about_sound, who], manifest, tag)


def _about_sound(tag: TagFound | None) -> list[str]:
    if tag is None:
        return []
    if tag.sound is None:
        return ["The tag has no hash of the sound (it was written during speech), so changes do not show."]
    if tag.sound:
        return ["The sound is still the one that was tagged."]
    return ["The sound was changed or cut after it was marked, or the tag was."]


def _described(says: dict[str, str]) -> str:
    parts = [f"{name} {says[key]}" for key, name in _FIELDS.items() if says.get(key)]
    return f" ({', '.join(parts)})" if parts else ""


def _fields(record: dict[str, Any]) -> dict[str, str]:
    return {key: printable(record[key]) for key in _FIELDS if isinstance(record.get(key), str)}


def _tag(note: dict[str, Any], data: bytes) -> TagFound:
    expected = note.get("sound")
    same: bool | None = None
    if note.get("format") != FORMAT:
        same = False  # the sentence is there, the record behind it is not: it was cut or edited
    elif expected is not None:
        try:
            same = sound_hash(data) == expected
        except MarkError:
            same = False
    return TagFound(same, note.get("manifest") is True, _fields(note))


def _manifest(data: bytes, trust: str) -> ManifestFound | None:
    try:
        own = own_signer(state_folder())
    except MarkError:  # a damaged pair must not prevent anybody from verifying
        own = None
    report = read_manifest(data, trust + (own.certificates if own else ""))
    if report is None:
        return None
    active = report.get("manifests", {}).get(report.get("active_manifest")) or {}
    results = (report.get("validation_results") or {}).get("activeManifest") or {}
    failed = [item for item in results.get("failure", []) if item.get("code") != UNTRUSTED]
    state = report.get("validation_state")
    signature = active.get("signature_info") or {}
    name, organization = (printable(signature.get(key) or "") for key in ("common_name", "issuer"))
    signed_by = f"{name!r} ({organization})" if name and organization else name or organization or None
    trusted = state == "Trusted"
    actions = _actions(active)
    return ManifestFound(
        intact=state in ("Valid", "Trusted") and not failed,
        failures=[_FAILURES.get(str(item.get("code")), _explained(item)) for item in failed],
        signed_by=signed_by,
        trusted=trusted,
        own=trusted and own is not None and signature.get("cert_serial_number") == str(own.serial),
        source_types=_source_types(actions),
        ingredient_types=_source_types(_actions_of_ingredients(report.get("manifests", {}), active)),
        says=_says(active, actions),
    )


def _explained(item: dict[str, Any]) -> str:
    return f"{printable(item.get('explanation') or 'a check failed')} ({printable(item.get('code'))})"


def _source_types(actions: list[dict[str, Any]]) -> list[str]:
    return [printable(action["digitalSourceType"]) for action in actions if action.get("digitalSourceType")]


def _actions_of_ingredients(manifests: dict[str, Any], active: dict[str, Any]) -> list[dict[str, Any]]:
    """The actions of all manifests that the active one was made of, as editors keep them."""
    found: list[dict[str, Any]] = []
    known, ahead = set[str](), [active]
    while ahead:
        for ingredient in ahead.pop().get("ingredients") or []:
            if not isinstance(ingredient, dict) or ingredient.get("relationship") not in _MADE_OF:
                continue
            name = ingredient.get("active_manifest")
            manifest = manifests.get(name) if isinstance(name, str) and name not in known else None
            if isinstance(manifest, dict):
                known.add(str(name))
                ahead.append(manifest)
                found += _actions(manifest)
    return found


def _actions(active: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for assertion in active.get("assertions") or []:
        data = assertion.get("data")
        if str(assertion.get("label", "")).startswith("c2pa.actions") and isinstance(data, dict):
            actions = data.get("actions")
            found += [one for one in actions if isinstance(one, dict)] if isinstance(actions, list) else []
    return found


def _says(active: dict[str, Any], actions: list[dict[str, Any]]) -> dict[str, str]:
    """Who made it with what and when: revox's own assertion, or else any maker's actions."""
    for assertion in active.get("assertions") or []:
        data = assertion.get("data")
        if assertion.get("label") == RECORD_LABEL and isinstance(data, dict):
            return _fields(data)
    found: dict[str, str] = {}
    for action in actions:
        agent = action.get("softwareAgent")
        name = agent.get("name") if isinstance(agent, dict) else agent
        for key, value in (("software", name), ("created_at", action.get("when"))):
            if isinstance(value, str) and key not in found:
                found[key] = printable(value)
    return found


def printable(value: object) -> str:
    """A text out of anybody's file, cut, and without characters that move a cursor or break a line."""
    text = str(value)[:_LONGEST]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _authorities(trust: str | os.PathLike[str] | None) -> str:
    if trust is None:
        return ""
    text = read_pem(trust)
    if not can_sign():
        raise MarkError("certificates cannot be checked without: pip install 'revox[mark]'")
    from cryptography import x509

    try:
        x509.load_pem_x509_certificates(text.encode())
    except ValueError:
        raise MarkError(f"{trust} holds no PEM certificate; name the authority's certificate") from None
    return text if text.endswith("\n") else text + "\n"
