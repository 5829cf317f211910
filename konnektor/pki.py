"""A small certificate authority in a directory: enough to run konnektor without another tool.

``init_ca`` makes the CA, ``issue`` the certificates it signs. Keys are ECDSA
P-256, signatures SHA-256; extensions follow RFC 5280 section 4.2 and SPIFFE
X509-SVID, so that any verifier, however strict, accepts them. Nothing is ever
overwritten, and nothing is left half written.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from konnektor.errors import CertificateError, ConfigurationError
from konnektor.tls import (
    DNS_PATTERN,
    Identity,
    Role,
    check_name,
    check_trust_domain,
    read_certificates,
    read_key,
    same_key,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["CA_CERT", "CA_KEY", "Issued", "init_ca", "issue"]

CA_CERT: Final = "ca.pem"
CA_KEY: Final = "ca.key"
_CA_NAME: Final = "ca"

_BACKDATE: Final = timedelta(minutes=5)
"""Clocks of two machines differ; a fresh certificate must be valid on both."""

_MAX_DAYS: Final = 36500
_LOCAL: Final = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Issued:
    """What was written.

    Attributes:
        cert: the certificate's file.
        key: the private key's file, mode 0600.
        not_after: when the certificate expires.
        shortened: whether that is sooner than asked, because the CA itself expires then.
    """

    cert: Path
    key: Path
    not_after: datetime
    shortened: bool = False


def init_ca(directory: str | os.PathLike[str], trust_domain: str = "konnektor.local", days: int = 3650) -> Issued:
    """Make a CA: ``ca.pem``, to be given to every endpoint, and ``ca.key``, to be given to none.

    The certificate carries its trust domain as ``spiffe://TRUST-DOMAIN`` (X509-SVID, section 3.2), from where
    ``issue`` takes it. Its path length is 0: it signs endpoints, not further CAs.

    Args:
        directory: where to write; made with mode 0700 if it is not there.
        trust_domain: the first part of every identity that this CA issues.
        days: how long it lasts.

    Raises:
        ConfigurationError: a bad argument, a file that exists, a directory that cannot be written.
    """
    check_trust_domain(trust_domain)
    lifetime = _lifetime(days)
    folder = _made(directory)
    key = ec.generate_private_key(ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # Two CAs with one subject would make a foreign certificate look like a forged one.
    subject = _common_name(f"konnektor CA {identifier.digest.hex()[:8]}")
    now = _now()
    certificate = (
        _builder(subject, key.public_key(), now, now + lifetime)
        .issuer_name(subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    return _write(folder / CA_CERT, certificate, folder / CA_KEY, key)


def issue(
    directory: str | os.PathLike[str],
    role: Role | str,
    name: str,
    sans: Iterable[str] = (),
    days: int = 365,
    *,
    out: str | os.PathLike[str] | None = None,
) -> Issued:
    """Issue ``NAME.pem``, which has the CA's certificate behind its own, and ``NAME.key`` from the CA in ``directory``.

    A worker's and a client's certificate can only dial (clientAuth), a control plane's only accept (serverAuth).
    Workers check the host name that they dial, so a control plane's certificate is for its NAME and for ``sans``;
    without ``sans`` also for this machine alone (localhost, 127.0.0.1, ::1), where a first trial happens and
    where no other machine can be taken for it.

    Args:
        directory: where ``ca.pem`` and ``ca.key`` are.
        role: worker, control-plane or client.
        name: the endpoint's name, unique within its role.
        sans: host names and IP addresses that the endpoint is dialed by.
        days: how long it lasts; never longer than the CA.
        out: where to write; made with mode 0700 if it is not there. None: where the CA is.

    Raises:
        ConfigurationError: a bad argument, a file that exists, a directory that cannot be written.
        CertificateError: the CA is missing or cannot be used.
    """
    try:
        role = Role(role)
    except ValueError:
        raise ConfigurationError(f"role {role!r} is unknown; use {', '.join(Role)}") from None
    if check_name(name) == _CA_NAME:
        raise ConfigurationError(f"name {name} is reserved: {CA_CERT} and {CA_KEY} are the CA's; choose another name")
    lifetime = _lifetime(days)
    hosts = [_host(san) for san in sans]
    if role is Role.CONTROL_PLANE:
        hosts = _own_names(name) + (hosts or [_host(host) for host in _LOCAL])
    folder = _named(directory)
    authority, signer, trust_domain = _load_ca(folder)

    key = ec.generate_private_key(ec.SECP256R1())
    now = _now()
    not_after = min(now + lifetime, authority.not_valid_after_utc)
    usage = ExtendedKeyUsageOID.SERVER_AUTH if role is Role.CONTROL_PLANE else ExtendedKeyUsageOID.CLIENT_AUTH
    uri = x509.UniformResourceIdentifier(str(Identity(trust_domain, role, name)))
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(_common_name(name), key.public_key(), now, not_after)
        .issuer_name(authority.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .add_extension(x509.SubjectAlternativeName([uri, *dict.fromkeys(hosts)]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    target = folder if out is None else _made(out)
    cert_file, key_file = target / f"{name}.pem", target / f"{name}.key"
    return _write(cert_file, certificate, key_file, key, issuer=authority, shortened=not_after < now + lifetime)


def _made(directory: str | os.PathLike[str]) -> Path:
    """The directory, which is there now.

    Raises:
        ConfigurationError: it has no name, or cannot be made.
    """
    folder = _named(directory)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"directory {folder} cannot be made: {error.strerror}; choose one where this user may write"
        ) from None
    return folder


def _named(directory: str | os.PathLike[str]) -> Path:
    """The directory, if it has a name: an empty one, as of a variable that is not set, would be the current directory."""
    if not os.fspath(directory):
        raise ConfigurationError("the directory has an empty name: write one such as pki, or . for the current one")
    return Path(directory)


def _load_ca(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey, str]:
    cert_file, key_file = folder / CA_CERT, folder / CA_KEY
    if not cert_file.exists() and not key_file.exists():
        raise CertificateError(f"{folder} holds no CA; make one with: konnektor pki init --dir {folder}")
    certificate = read_certificates(cert_file, "CA file")[0]
    key = read_key(key_file, "CA key file")
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not same_key(certificate, key):
        raise CertificateError(f"CA key file {key_file} does not belong to {cert_file}; restore the two together")
    now = _now()
    if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
        raise CertificateError(
            f"CA file {cert_file} is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC only (now {now:%Y-%m-%d %H:%M}); "
            "make a new CA with konnektor pki init in another directory, or check this machine's clock"
        )
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        trust_domain = check_trust_domain(uri.removeprefix("spiffe://"))
    except (x509.ExtensionNotFound, ValueError):  # ConfigurationError is a ValueError
        raise CertificateError(
            f"CA file {cert_file} was not made by konnektor pki init (it names no trust domain); "
            f"make one in another directory"
        ) from None
    return certificate, key, trust_domain


def _builder(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, not_after: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(not_after)
    )


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _own_names(name: str) -> list[x509.GeneralName]:
    """The name itself, unless it can be no host's, such as ``a..b``."""
    try:
        return [_host(name)]
    except ConfigurationError:
        return []


def _host(text: str) -> x509.GeneralName:
    """A subject alternative name from a host name (perhaps ``*.example``) or an IP address (perhaps in brackets)."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(bare))
    host = text.lower()
    last = host.rpartition(".")[2]
    if DNS_PATTERN.fullmatch(host.removeprefix("*.")) and not last.isdigit():
        return x509.DNSName(host)
    raise ConfigurationError(
        f"{text!a} is neither a host name nor an IP address; "
        "use --san cp.example.com, --san 192.0.2.1 or --san 2001:db8::1, without scheme and port"
    )


def _lifetime(days: int) -> timedelta:
    if not 1 <= days <= _MAX_DAYS:
        raise ConfigurationError(f"{days} days cannot be a lifetime; use 1 to {_MAX_DAYS}")
    return timedelta(days=days)


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)  # as certificates count


def _write(
    cert_file: Path,
    certificate: x509.Certificate,
    key_file: Path,
    key: ec.EllipticCurvePrivateKey,
    *,
    issuer: x509.Certificate | None = None,
    shortened: bool = False,
) -> Issued:
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    chain = certificate.public_bytes(Encoding.PEM)
    if issuer is not None:
        # Sent with it in any case; but if the file has it not, OpenSSL finds and verifies its own chain anew in each handshake.
        chain += issuer.public_bytes(Encoding.PEM)
    contents = ((key_file, private, 0o600), (cert_file, chain, 0o644))
    for file, _, _ in contents:
        if os.path.lexists(file):
            raise _exists(file)
    made: list[Path] = []
    try:
        for file, data, mode in contents:
            _create(file, data, mode, made)
        _sync_directory(key_file.parent)
    except BaseException as error:
        for half in made:
            with contextlib.suppress(OSError):
                half.unlink()
        if isinstance(error, FileExistsError):
            raise _exists(file) from None
        if isinstance(error, OSError):
            raise ConfigurationError(f"{file} cannot be written: {error.strerror}") from None
        raise
    return Issued(cert_file, key_file, certificate.not_valid_after_utc, shortened)


def _exists(file: Path) -> ConfigurationError:
    return ConfigurationError(f"{file} exists already, and is never overwritten; move it away, or choose another name")


def _create(file: Path, data: bytes, mode: int, made: list[Path]) -> None:
    """Write a new file durably; note it in ``made`` as soon as it is there."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    made.append(file)
    with os.fdopen(descriptor, "wb") as stream:
        if mode == 0o600:
            file.chmod(mode)  # a strict umask would leave the owner a key that cannot be read
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_directory(folder: Path) -> None:
    """Make the new names durable, too (not on Windows, which cannot open a directory)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
