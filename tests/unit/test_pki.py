"""pki.py: what is in the certificates, and what is on the disk, whatever goes wrong."""

import ipaddress
import os
import stat
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from konnektor import pki
from konnektor.errors import CertificateError, ConfigurationError
from konnektor.tls import Identity, Role, TLSFiles


@pytest.fixture
def ca(tmp_path):
    pki.init_ca(tmp_path / "pki")
    return tmp_path / "pki"


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def load(path):
    return x509.load_pem_x509_certificate(path.read_bytes())


def extension(certificate, kind):
    return certificate.extensions.get_extension_for_class(kind)


def sans(certificate):
    names = extension(certificate, x509.SubjectAlternativeName).value
    return (
        names.get_values_for_type(x509.UniformResourceIdentifier),
        names.get_values_for_type(x509.DNSName),
        [str(address) for address in names.get_values_for_type(x509.IPAddress)],
    )


def test_the_ca_is_a_signing_certificate_with_its_trust_domain(tmp_path):
    made = pki.init_ca(tmp_path, "tunnel.example", days=10)
    ca = load(made.cert)
    assert made.cert.name == "ca.pem" and made.key.name == "ca.key" and not made.shortened
    constraints, usage = extension(ca, x509.BasicConstraints), extension(ca, x509.KeyUsage)
    assert constraints.critical and constraints.value.ca and constraints.value.path_length == 0
    assert usage.critical and usage.value.key_cert_sign and usage.value.crl_sign and not usage.value.digital_signature
    assert sans(ca) == (["spiffe://tunnel.example"], [], [])
    assert isinstance(ca.public_key().curve, ec.SECP256R1) and isinstance(ca.signature_hash_algorithm, hashes.SHA256)
    assert ca.not_valid_after_utc - ca.not_valid_before_utc == timedelta(days=10, minutes=5)
    ca.verify_directly_issued_by(ca)


@pytest.mark.parametrize(
    ("role", "usage"),
    [
        (Role.WORKER, ExtendedKeyUsageOID.CLIENT_AUTH),
        (Role.CONTROL_PLANE, ExtendedKeyUsageOID.SERVER_AUTH),
        (Role.CLIENT, ExtendedKeyUsageOID.CLIENT_AUTH),
    ],
)
def test_a_leaf_is_good_for_its_role_and_nothing_else(ca, role, usage):
    issued = pki.issue(ca, role, "a-1", days=30)
    leaf, authority = load(issued.cert), load(ca / "ca.pem")
    leaf.verify_directly_issued_by(authority)
    assert x509.load_pem_x509_certificates(issued.cert.read_bytes()) == [leaf, authority]
    constraints, key_usage = extension(leaf, x509.BasicConstraints), extension(leaf, x509.KeyUsage)
    assert constraints.critical and not constraints.value.ca
    assert key_usage.critical and key_usage.value.digital_signature and not key_usage.value.key_cert_sign
    assert list(extension(leaf, x509.ExtendedKeyUsage).value) == [usage]
    signer = extension(leaf, x509.AuthorityKeyIdentifier).value.key_identifier
    assert signer == extension(authority, x509.SubjectKeyIdentifier).value.digest
    assert sans(leaf)[0] == [f"spiffe://konnektor.local/{role}/a-1"]
    assert TLSFiles(ca / "ca.pem", issued.cert, issued.key).identity() == Identity("konnektor.local", role, "a-1")


def test_names_of_a_control_plane(ca):
    local = sans(load(pki.issue(ca, "control-plane", "cp").cert))
    assert local[1:] == (["cp", "localhost"], ["127.0.0.1", "::1"])
    given = pki.issue(ca, "control-plane", "cp2", ["CP.example", "*.cp.example", "192.0.2.1", "[2001:db8::1]", "cp2"])
    assert sans(load(given.cert))[1:] == (["cp2", "cp.example", "*.cp.example"], ["192.0.2.1", "2001:db8::1"])
    assert sans(load(pki.issue(ca, "control-plane", "10.0.0.1", ["x"]).cert))[1:] == (["x"], ["10.0.0.1"])
    assert sans(load(pki.issue(ca, "control-plane", "a..b", ["x"]).cert))[1:] == (["x"], [])  # a name, no host's
    assert sans(load(pki.issue(ca, "worker", "w").cert))[1:] == ([], [])


def test_serials_differ_and_start_in_the_past(ca):
    one, two = load(pki.issue(ca, "worker", "a").cert), load(pki.issue(ca, "worker", "b").cert)
    assert one.serial_number != two.serial_number
    assert one.not_valid_before_utc < datetime.now(UTC) - timedelta(minutes=4)


def test_a_leaf_never_outlives_its_ca(tmp_path):
    made = pki.init_ca(tmp_path, days=5)
    issued = pki.issue(tmp_path, "worker", "w", days=6)
    assert issued.shortened and issued.not_after == made.not_after == load(issued.cert).not_valid_after_utc
    assert not pki.issue(tmp_path, "worker", "w2", days=4).shortened


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o277])
def test_keys_are_the_owners_alone(tmp_path, umask):
    before = os.umask(umask)
    try:
        made = pki.init_ca(tmp_path / "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE(made.key.stat().st_mode) == 0o600
    assert stat.S_IMODE(made.cert.stat().st_mode) == 0o644 & ~umask
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700 & ~umask
    assert made.key.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")  # PKCS8
    assert isinstance(load_pem_private_key(made.key.read_bytes(), None).curve, ec.SECP256R1)


@pytest.mark.parametrize("existing", ["ca.pem", "ca.key"])
def test_init_overwrites_nothing_and_leaves_nothing_half_written(tmp_path, existing):
    (tmp_path / existing).write_text("precious")
    with pytest.raises(ConfigurationError, match=f"{existing} exists already"):
        pki.init_ca(tmp_path)
    assert listing(tmp_path) == [existing] and (tmp_path / existing).read_text() == "precious"


@pytest.mark.parametrize("existing", ["w.pem", "w.key"])
def test_issue_overwrites_nothing_not_even_a_dangling_link(ca, existing):
    (ca / existing).symlink_to(ca / "elsewhere")
    with pytest.raises(ConfigurationError, match=f"{existing} exists already"):
        pki.issue(ca, "worker", "w")
    assert listing(ca) == sorted(["ca.key", "ca.pem", existing])


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_a_certificate_may_be_written_elsewhere_than_next_to_the_ca(ca, tmp_path, umask):
    old = pki.issue(ca, "worker", "w")
    out = tmp_path / "new" / "pki"
    before = os.umask(umask)
    try:
        renewed = pki.issue(ca, "worker", "w", out=out)
    finally:
        os.umask(before)
    assert (renewed.cert, renewed.key) == (out / "w.pem", out / "w.key")
    assert listing(out) == ["w.key", "w.pem"] and listing(ca) == ["ca.key", "ca.pem", "w.key", "w.pem"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o700 and stat.S_IMODE(renewed.key.stat().st_mode) == 0o600
    assert load(renewed.cert).serial_number != load(old.cert).serial_number
    TLSFiles(ca / "ca.pem", renewed.cert, renewed.key).client_context()
    with pytest.raises(ConfigurationError, match=r"pki/w\.key exists already"):
        pki.issue(ca, "worker", "w", out=out)
    assert load(renewed.cert).serial_number == load(out / "w.pem").serial_number


def test_nothing_is_made_elsewhere_when_there_is_no_certificate_for_it(ca, tmp_path):
    (ca / "ca.key").unlink()
    with pytest.raises(CertificateError):
        pki.issue(ca, "worker", "w", out=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    pki.init_ca(tmp_path / "other")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"directory .*/file cannot be made"):
        pki.issue(tmp_path / "other", "worker", "w", out=tmp_path / "file")


def test_an_endpoint_cannot_be_named_over_the_ca(ca):
    for out in (None, ca / "elsewhere"):  # where it would look as if it were the CA's
        with pytest.raises(ConfigurationError, match=r"^name ca is reserved: ca\.pem and ca\.key are the CA's; choose"):
            pki.issue(ca, "worker", "ca", out=out)
    assert listing(ca) == ["ca.key", "ca.pem"]


def test_a_directory_without_a_name_is_not_the_current_one(ca, monkeypatch):
    monkeypatch.chdir(ca)
    for call in (
        lambda: pki.init_ca(""),
        lambda: pki.issue("", "worker", "w"),
        lambda: pki.issue(ca, "worker", "w", out=""),
    ):
        with pytest.raises(
            ConfigurationError, match=r"^the directory has an empty name: write one such as pki, or \. for"
        ):
            call()
    assert listing(ca) == ["ca.key", "ca.pem"]


@pytest.mark.parametrize("nth", [1, 2])
def test_when_a_write_fails_the_first_file_goes_too(ca, monkeypatch, nth):
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == nth:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ConfigurationError, match=r"w\.(key|pem) cannot be written: No space left on device"):
        pki.issue(ca, "worker", "w")
    assert listing(ca) == ["ca.key", "ca.pem"]


def test_a_race_for_the_same_name_has_one_winner(ca, monkeypatch):
    def create(file, data, mode, made, real=pki._create):
        if file.suffix == ".pem":
            file.write_text("the other's")
        real(file, data, mode, made)

    monkeypatch.setattr(pki, "_create", create)
    with pytest.raises(ConfigurationError, match=r"w\.pem exists already"):
        pki.issue(ca, "worker", "w")
    assert (ca / "w.pem").read_text() == "the other's" and not (ca / "w.key").exists()


def test_an_interrupted_write_leaves_nothing(ca, monkeypatch):
    def fsync(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt):
        pki.issue(ca, "worker", "w")
    assert listing(ca) == ["ca.key", "ca.pem"]


def test_a_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigurationError, match=r"cannot be made: .+; choose one where this user may write$"):
            pki.init_ca(directory)
    with pytest.raises(CertificateError, match="holds no CA; make one with: konnektor pki init"):
        pki.issue(tmp_path, "worker", "w")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "Node-1"}, "cannot be a name; use up to 63"),
        ({"name": ""}, "cannot be a name"),
        ({"name": "../x"}, "cannot be a name"),
        ({"name": "x\n"}, "cannot be a name"),
        ({"name": "a" * 64}, "cannot be a name"),
        ({"role": "admin"}, "role 'admin' is unknown; use worker, control-plane, client"),
        ({"sans": ["https://cp:1"]}, "neither a host name nor an IP address"),
        ({"sans": ["cp:8443"]}, "neither a host name nor an IP address"),
        ({"sans": ["1.2.3.4.5"]}, "neither a host name nor an IP address"),
        ({"sans": ["bücher.example"]}, "neither a host name nor an IP address"),
        ({"sans": [""]}, "neither a host name nor an IP address"),
        ({"days": 0}, "0 days cannot be a lifetime; use 1 to 36500"),
        ({"days": 10**9}, "cannot be a lifetime"),
    ],
)
def test_bad_arguments(ca, arguments, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        pki.issue(**{"directory": ca, "role": "control-plane", "name": "w", **arguments})
    assert listing(ca) == ["ca.key", "ca.pem"]


@pytest.mark.parametrize("domain", ["", "Example", "a_b", "a/b", "a..b", "-a", "x" * 256, "a.example\n"])
def test_bad_trust_domains(tmp_path, domain):
    with pytest.raises(ConfigurationError, match="cannot be a trust domain"):
        pki.init_ca(tmp_path / "new", domain)
    assert not (tmp_path / "new").exists()


def test_a_key_of_another_ca(ca, tmp_path):
    pki.init_ca(tmp_path / "other")
    (ca / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    with pytest.raises(CertificateError, match="does not belong to"):
        pki.issue(ca, "worker", "w")


def test_a_ca_without_its_key(ca):
    (ca / "ca.key").unlink()
    with pytest.raises(CertificateError, match=r"CA key file .*ca.key does not exist; restore it"):
        pki.issue(ca, "worker", "w")


def test_an_expired_ca(ca, monkeypatch):
    later = datetime.now(UTC) + timedelta(days=4000)
    monkeypatch.setattr(pki, "_now", lambda: later)
    with pytest.raises(CertificateError, match=r"is valid from .* make a new CA"):
        pki.issue(ca, "worker", "w")


def test_a_ca_of_another_make(tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    subject = pki._common_name("someone's")
    now = pki._now()
    foreign = (
        pki._builder(subject, key.public_key(), now, now + timedelta(days=1))
        .issuer_name(subject)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("::1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pki._write(tmp_path / "ca.pem", foreign, tmp_path / "ca.key", key)
    with pytest.raises(CertificateError, match="was not made by konnektor pki init"):
        pki.issue(tmp_path, "worker", "w")
