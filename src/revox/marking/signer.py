"""Signing keys: a certificate chain and key of the user's, or a pair made on this machine on first use.

The made pair is a certificate and the authority that issued it (C2PA does not allow a self-issued signing
certificate), with the extensions of C2PA's certificate profile (specification 2.3, section 14.5). No known
authority vouches for it: a manifest then proves that the file is unchanged, not who made it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from revox.marking.errors import MarkError

OWN_NAME = "self-made by revox"
_OWN_FILE = "signing.pem"
_YEARS = 20  # without a time stamp a manifest is valid as long as its certificate is


@dataclass(frozen=True)
class Signer:
    """A certificate chain (PEM, the signing one first), its key (PEM) and C2PA's name of the algorithm.

    serial: the serial number of the signing certificate.
    """

    certificates: str
    key: str = field(repr=False)
    algorithm: str
    serial: int


def state_folder() -> Path:
    """Where the made pair and the log are: $REVOX_STATE, $XDG_STATE_HOME/revox or ~/.local/state/revox."""
    if named := os.environ.get("REVOX_STATE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".local" / "state") / "revox"


def can_sign() -> bool:
    """Whether c2pa-python and cryptography are installed and load here."""
    try:
        import c2pa  # noqa: F401
        import cryptography  # noqa: F401
    except (ImportError, OSError):  # OSError: the library is for another system
        return False
    return True


def read_pem(path: str | os.PathLike[str]) -> str:
    """The text of a PEM file. Raises MarkError when it cannot be one."""
    path = Path(path).expanduser()
    try:
        if path.stat().st_size > 1 << 20:
            raise MarkError(f"{path} is larger than 1 MiB; name a PEM file with a certificate or key")
        return path.read_text(encoding="ascii")
    except UnicodeDecodeError:
        raise MarkError(f"{path} is not a PEM file; convert it with openssl and name the result") from None
    except OSError as error:
        raise MarkError(f"{path} cannot be read ({error.strerror}); check the path and permissions") from None


def read_signer(certificates: str, key_text: str, what: str) -> Signer:
    """The signer of a PEM chain and key. `what` names them in errors.

    Raises MarkError unless the key belongs to the first certificate, which is still valid, and is of a kind
    that C2PA signs with (2.3, section 13.2).
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    try:
        chain = x509.load_pem_x509_certificates(certificates.encode())
        key = serialization.load_pem_private_key(key_text.encode(), password=None)
    except TypeError:
        raise MarkError(f"the key of {what} has a password; give a copy without one") from None
    except Exception as error:  # cryptography raises many kinds on what is not a certificate
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise MarkError(
            f"{what} are not a PEM certificate chain and its private key ({reason}); give PEM files"
        ) from None
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if chain[0].public_key().public_bytes(*form) != key.public_key().public_bytes(*form):
        raise MarkError(f"{what} do not belong together; the first certificate must be the key's own")
    ends = chain[0].not_valid_after_utc
    if ends <= datetime.now(timezone.utc):
        raise MarkError(f"the certificate of {what} ended on {ends:%Y-%m-%d}; give a valid one")
    # An authority at the chain's end stays in: c2pa accepts it, and a reader can then trust it by name.
    return Signer(certificates, key_text, _algorithm(key, what), chain[0].serial_number)


def _algorithm(key: Any, what: str) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= 2048:
        return "ps256"
    if isinstance(key, ec.EllipticCurvePrivateKey):
        names = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
        if key.curve.name in names:
            return names[key.curve.name]
    raise MarkError(
        f"the key of {what} is of a kind that C2PA does not sign with; use P-256, P-384, P-521, Ed25519 or "
        "RSA of 2048 bits or more"
    )


def own_signer(folder: Path) -> Signer | None:
    """The made pair of `folder`; None before its first use. Raises MarkError when it is damaged."""
    path = folder / _OWN_FILE
    return _read_pair(path) if os.path.exists(path) else None


def _read_pair(path: Path) -> Signer:
    try:
        key, begin, certificates = read_pem(path).partition("-----BEGIN CERTIFICATE-----")
        return read_signer(begin + certificates, key, str(path))
    except MarkError as error:
        raise MarkError(f"{error}; or remove {path} and a new pair is made") from None


def made_signer(folder: Path) -> Signer:
    """The made pair of `folder`, made now if there is none. Raises MarkError.

    Key and certificates are one file, and of several processes that make it the first to link it wins.
    """
    if signer := own_signer(folder):
        return signer
    pair, path = _new_pair(), folder / _OWN_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=folder) as file:  # readable by its owner alone
            file.write(pair)
            file.flush()
            os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(file.name, path)
    except OSError as error:
        raise MarkError(
            f"the signing key cannot be stored in {folder} ({error.strerror}); set REVOX_STATE to a folder "
            "that you can write to, or give a certificate and key"
        ) from None
    return _read_pair(path)


def _new_pair() -> str:
    """PEM of a key, its certificate and its authority's certificate; the authority's key is not kept."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    # The number tells one machine's pair from another's, and nothing of the machine or its user.
    number = secrets.token_hex(4)
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(timezone.utc).replace(microsecond=0)

    def name(common: str) -> x509.Name:
        parts = ((NameOID.COMMON_NAME, common), (NameOID.ORGANIZATION_NAME, OWN_NAME))
        return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts])

    def certificate(common: str, public: Any, authority: bool) -> x509.CertificateBuilder:
        off = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
        usage = x509.KeyUsage(
            digital_signature=not authority,
            key_cert_sign=authority,
            crl_sign=authority,
            **dict.fromkeys((*off, "encipher_only", "decipher_only"), False),
        )
        constraints = x509.BasicConstraints(ca=authority, path_length=0 if authority else None)
        return (
            x509.CertificateBuilder(name(f"revox authority {number}"), name(common), public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=round(365.25 * _YEARS)))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(constraints, critical=True)
            .add_extension(usage, critical=True)
        )

    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
    own = certificate(f"revox {number}", key.public_key(), authority=False)
    own = own.add_extension(purpose, critical=False).add_extension(issuer, critical=False)
    authority = certificate(f"revox authority {number}", authority_key.public_key(), authority=True)
    pem = serialization.Encoding.PEM
    parts = [key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())]
    parts += [each.sign(authority_key, hashes.SHA256()).public_bytes(pem) for each in (own, authority)]
    return b"".join(parts).decode()
