from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from revox.cli.marked import who_signs
from revox.marking import MarkError, load_signer, mark_bytes, verify_bytes, verify_file

PEM = serialization.Encoding.PEM
YEAR = timedelta(days=365)


def private_pem(key, password=None) -> bytes:
    how = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, how)


def issued(key, issuer_key, common, issuer, ends=YEAR, authority=False, may_sign=True):
    """A certificate as an authority would give it, by hand."""
    now = datetime.now(timezone.utc)
    digest = None if isinstance(issuer_key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
         "decipher_only", "crl_sign"), False,
    )  # fmt: skip

    def name(text):
        parts = [x509.NameAttribute(NameOID.COMMON_NAME, text)]
        return x509.Name([*parts, x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Example GmbH")])

    builder = (
        x509.CertificateBuilder()
        .subject_name(name(common))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, now + ends) - 2 * YEAR)
        .not_valid_after(now + ends)
        .add_extension(x509.BasicConstraints(authority, None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=authority, **usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
    )
    if not authority:
        use = ExtendedKeyUsageOID.EMAIL_PROTECTION if may_sign else ExtendedKeyUsageOID.SERVER_AUTH
        builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
    return builder.sign(issuer_key, digest)


def pair(folder, key, **options):
    """Files of a chain and key whose authority's certificate lies beside them."""
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = issued(authority_key, authority_key, "Example Root", "Example Root", authority=True)
    certificate = issued(key, authority_key, "Ada's Studio", "Example Root", **options)
    (folder / "chain.pem").write_bytes(certificate.public_bytes(PEM) + authority.public_bytes(PEM))
    (folder / "key.pem").write_bytes(private_pem(key))
    (folder / "root.pem").write_bytes(authority.public_bytes(PEM))
    return folder / "chain.pem", folder / "key.pem"


def test_the_made_pair_is_made_once_and_only_its_owner_reads_it(state):
    first, again = load_signer(), load_signer()
    assert first == again
    (file,) = state.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert "PRIVATE" not in repr(first)


def test_the_made_chain_is_what_c2pas_profile_asks_for(state):
    certificate, authority = x509.load_pem_x509_certificates(load_signer().certificates.encode())
    certificate.verify_directly_issued_by(authority)
    authority.verify_directly_issued_by(authority)
    assert certificate.subject != certificate.issuer  # its own issuer is not allowed
    extensions = certificate.extensions
    assert extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_cert_sign
    purposes = list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert purposes == [ExtendedKeyUsageOID.EMAIL_PROTECTION]
    assert extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    now = datetime.now(timezone.utc)
    assert certificate.not_valid_before_utc < now < certificate.not_valid_after_utc - 10 * YEAR
    said = certificate.subject.rfc4514_string()
    import getpass
    import socket

    assert socket.gethostname() not in said
    assert getpass.getuser() not in said.replace("revox", "")


def test_first_uses_at_the_same_time_end_with_one_pair(state):
    with ThreadPoolExecutor(6) as pool:
        signers = list(pool.map(lambda _: load_signer(), range(6)))
    assert len({signer.key for signer in signers}) == 1
    assert [file.name for file in state.iterdir()] == ["signing.pem"]


@pytest.mark.parametrize(
    "kind",
    [
        lambda: ec.generate_private_key(ec.SECP256R1()),
        lambda: ec.generate_private_key(ec.SECP384R1()),
        lambda: ec.generate_private_key(ec.SECP521R1()),
        ed25519.Ed25519PrivateKey.generate,
        lambda: rsa.generate_private_key(65537, 2048),
    ],
    ids=["p256", "p384", "p521", "ed25519", "rsa"],
)
def test_a_certificate_of_ones_own_signs_and_who_trusts_its_authority_is_told(
    kind, tmp_path, state, encoded, record
):
    signer = load_signer(*pair(tmp_path, kind()))
    data = mark_bytes(encoded["mp3"], "mp3", record=record, signer=signer)
    unknown = verify_bytes(data)
    assert unknown.state == "marked"
    assert not unknown.manifest.trusted
    assert "no known authority vouches" in unknown.sentences[1]
    (tmp_path / "a.mp3").write_bytes(data)
    known = verify_file(tmp_path / "a.mp3", tmp_path / "root.pem")
    assert (known.state, known.manifest.trusted, known.manifest.own) == ("marked", True, False)
    assert '"Ada\'s Studio" (Example GmbH), whose certificate is trusted' in known.sentences[1]


def test_this_machines_own_pair_is_known_and_anothers_is_not(state, tmp_path, encoded, record):
    own = verify_bytes(mark_bytes(encoded["wav"], "wav", record=record, signer=load_signer()))
    assert own.manifest.own
    assert "made on this machine" in own.sentences[1]
    other = load_signer(folder=tmp_path / "elsewhere")
    told = verify_bytes(mark_bytes(encoded["wav"], "wav", record=record, signer=other))
    assert (told.state, told.manifest.own, told.manifest.trusted) == ("marked", False, False)
    assert "the name proves nothing" in told.sentences[1]


def test_verifying_makes_no_key(state, marked):
    verify_bytes(marked["wav"])
    assert not state.exists()


def test_what_cannot_sign_is_a_sentence(tmp_path, state):
    key = ec.generate_private_key(ec.SECP256R1())
    chain, key_file = pair(tmp_path, key)

    def refused(*arguments):
        with pytest.raises(MarkError) as told:
            load_signer(*arguments)
        assert len(str(told.value).splitlines()) == 1
        return str(told.value)

    assert "belong together" in refused(chain, None)
    assert "belong together" in refused(None, key_file)
    assert "cannot be read" in refused(tmp_path / "none.pem", key_file)
    assert "cannot be read" in refused(tmp_path, key_file)
    assert "not a PEM" in refused(key_file, key_file)
    (tmp_path / "other.pem").write_bytes(private_pem(ec.generate_private_key(ec.SECP256R1())))
    assert "do not belong together" in refused(chain, tmp_path / "other.pem")
    (tmp_path / "locked.pem").write_bytes(private_pem(key, b"secret"))
    assert "has a password" in refused(chain, tmp_path / "locked.pem")
    (tmp_path / "binary.pem").write_bytes(b"\xff" * 100)
    assert "not a PEM file" in refused(tmp_path / "binary.pem", key_file)
    (tmp_path / "broken.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    assert "not a PEM certificate" in refused(tmp_path / "broken.pem", key_file)
    assert "ended on" in refused(*pair(tmp_path, key, ends=-YEAR))
    assert "does not sign with" in refused(*pair(tmp_path, ec.generate_private_key(ec.SECP256K1())))


def test_whoever_marks_reads_the_environment_and_is_refused_what_cannot_sign(tmp_path, state, monkeypatch):
    chain, key = pair(tmp_path, ec.generate_private_key(ec.SECP256R1()))
    monkeypatch.setenv("REVOX_SIGNING_CERTIFICATE", str(chain))
    monkeypatch.setenv("REVOX_SIGNING_KEY", str(key))
    assert who_signs().certificates == load_signer(chain, key).certificates
    monkeypatch.delenv("REVOX_SIGNING_KEY")
    with pytest.raises(MarkError, match="belong together"):
        who_signs()


def test_a_certificate_that_may_not_sign_manifests_is_found_before_anything_is_spoken(tmp_path, state):
    with pytest.raises(MarkError, match="C2PA"):
        load_signer(*pair(tmp_path, ec.generate_private_key(ec.SECP256R1()), may_sign=False))


@pytest.mark.parametrize("text", ["", "-----BEGIN CERTIFICATE-----\n", "\xff\xfe", "x" * 3000])
def test_a_damaged_kept_pair_is_a_sentence_that_names_the_file(state, text):
    load_signer()
    (state / "signing.pem").write_bytes(text.encode("latin-1"))
    with pytest.raises(MarkError, match=r"signing\.pem"):
        load_signer()


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("REVOX_STATE", str(tmp_path / "file" / "state"))
    with pytest.raises(MarkError, match="set REVOX_STATE"):
        load_signer()
