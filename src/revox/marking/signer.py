"""Who signs a manifest: a certificate and key of the user's, or a pair made here once and kept.

The made pair is a certificate and the authority that issued it (a signing certificate that is its own issuer
is not allowed), with the extensions of C2PA's certificate profile (specification 2.3, section 14.5). Nobody
vouches for it: whoever reads a manifest sees that the file is unchanged since, not who made it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from revox.marking.errors import MarkError

MADE_NAME = "self-made by revox"
_YEARS = 20  # without a time stamp a manifest is valid as long as its certificate is
_KEPT = "signing.pem"
_ENOUGH = "pip install 'revox[mark]'"


@dataclass(frozen=True)
class Signer:
    """A certificate chain (PEM, the signing one first), its key (PEM) and C2PA's name of the algorithm."""

    certificates: str
    key: str = field(repr=False)
    algorithm: str
    made_here: bool


def state_folder() -> Path:
    """The made pair's and the log's: `$REVOX_STATE`, `$XDG_STATE_HOME/revox` or ~/.local/state/revox."""
    if named := os.environ.get("REVOX_STATE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".local" / "state") / "revox"


def load_signer(
    certificate: str | os.PathLike[str] | None = None,
    key: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Signer | None:
    """The signer from a certificate chain and key (PEM files), or the pair kept in `folder`, made at first.

    `folder` is `state_folder()` unless given. None when nothing was given and the libraries that sign are not
    installed: marks are then tags only. Raises MarkError, with a sentence, on anything that cannot sign.
    """
    if (certificate is None) != (key is None):
        raise MarkError("a signing certificate and its key belong together; give both or neither")
    if certificate is None or key is None:
        if not can_sign():
            return None
        return _kept(Path(folder) if folder is not None else state_folder())
    if not can_sign():
        raise MarkError(f"signing needs c2pa-python and cryptography, which are not installed: {_ENOUGH}")
    what = f"{certificate} and {key}"
    signer = _checked(read_pem(certificate), read_pem(key), what, made_here=False)
    # Its extensions are c2pa's to judge; better now than in every file that is written.
    from revox.marking.manifest import trial

    if refused := trial(signer):
        raise MarkError(f"{what} cannot sign a C2PA manifest ({refused}); ask for a certificate that may")
    return signer


def can_sign() -> bool:
    """Whether c2pa-python and cryptography are installed and load here."""
    try:
        import c2pa  # noqa: F401
        import cryptography  # noqa: F401
    except (ImportError, OSError):  # OSError: its library is for another system
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
        raise MarkError(f"{path} is no PEM file; convert it with openssl and name the result") from None
    except OSError as error:
        raise MarkError(f"{path} cannot be read ({error.strerror}); check the path and permissions") from None


def _checked(certificates: str, key_text: str, what: str, made_here: bool) -> Signer:
    """A signer whose key is its first certificate's, in an algorithm of C2PA's (2.3, section 13.2)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    try:
        chain = x509.load_pem_x509_certificates(certificates.encode())
        key = serialization.load_pem_private_key(key_text.encode(), password=None)
    except TypeError:
        raise MarkError(f"the key of {what} has a password; give a copy without one") from None
    except Exception as error:  # pyo3 raises many kinds on what is no certificate
        said = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise MarkError(f"{what} are no PEM certificate chain and private key ({said})") from None
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if chain[0].public_key().public_bytes(*form) != key.public_key().public_bytes(*form):
        raise MarkError(f"{what} do not belong together; the first certificate must be the key's own")
    if chain[0].not_valid_after_utc <= datetime.now(timezone.utc):
        ended = chain[0].not_valid_after_utc
        raise MarkError(f"the certificate of {what} ended on {ended:%Y-%m-%d}; give a valid one")
    # An authority at the chain's end is left in: c2pa accepts it, and a reader can then trust it by name.
    return Signer(certificates, key_text, _algorithm(key, what), made_here)


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
        "RSA of 2048 bits and more"
    )


def _kept(folder: Path) -> Signer:
    """The pair in one file, so that two first uses at a time cannot mix theirs: the first to link it wins."""
    for _ in range(3):
        if signer := kept_signer(folder):
            return signer
        _make(folder / _KEPT)
    raise MarkError(f"{folder / _KEPT} disappears as soon as it is written; check that folder")


def kept_signer(folder: Path) -> Signer | None:
    """The made pair of `folder`, None when none was made yet. Raises MarkError when it is damaged."""
    path = folder / _KEPT
    try:
        text = path.read_text(encoding="ascii")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or "no PEM"
        raise MarkError(f"{path} cannot be read ({said}); remove it and it is made anew") from None
    cut = text.find("-----BEGIN CERTIFICATE-----")
    if cut < 1:
        raise MarkError(f"{path} is damaged; remove it and it is made anew")
    try:
        return _checked(text[cut:], text[:cut], str(path), made_here=True)
    except MarkError as error:
        raise MarkError(f"{error}; remove {path} and it is made anew") from None


def _make(path: Path) -> None:
    text = _made_pair()
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another command made one meanwhile: that one is used
            os.link(beside, path)
    except OSError as error:
        raise MarkError(
            f"the signing key cannot be kept in {path.parent} ({error.strerror}); set REVOX_STATE to a "
            "folder of your own, or give a certificate and key"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def _made_pair() -> str:
    """A key, its certificate and the certificate of the authority that issued it and is then forgotten."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def name(common: str) -> x509.Name:
        return x509.Name(
            [
                x509.NameAttribute(NameOID.COMMON_NAME, common),
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, MADE_NAME),
            ]
        )

    def usage(**on: bool) -> x509.KeyUsage:
        every = (
            "digital_signature content_commitment key_encipherment data_encipherment key_agreement "
            "key_cert_sign crl_sign encipher_only decipher_only"
        )
        return x509.KeyUsage(**{one: on.get(one, False) for one in every.split()})

    # The number tells one machine's pair from another's, and nothing of the machine or its user.
    number = secrets.token_hex(4)
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority_name = name(f"revox authority {number}")
    now = datetime.now(timezone.utc).replace(microsecond=0)
    ends = now + timedelta(days=round(365.25 * _YEARS))

    def begun(subject: x509.Name, public: Any) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(authority_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(ends)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        )

    authority = (
        begun(authority_name, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    certificate = (
        begun(name(f"revox {number}"), key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
        )
        .sign(authority_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return (private + certificate.public_bytes(pem) + authority.public_bytes(pem)).decode()
