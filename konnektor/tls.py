"""Mutual TLS: contexts from files, and who the peer is.

Both ends prove themselves with an X.509 certificate that carries one SPIFFE
URI, ``spiffe://TRUST-DOMAIN/ROLE/NAME`` (SPIFFE X509-SVID, section 2), and an
extended key usage that fits the role. OpenSSL verifies the chain, the dates and
(at the dialing end) the host name; this module then reads the identity.

What goes wrong is found as early as possible: a context is only handed out after
a rehearsal in memory, in which OpenSSL judges our own certificate by our own CA
file exactly as the peer will. Every error is one sentence that names the file or
the peer and says what to do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import ssl
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from konnektor.errors import CertificateError, ConfigurationError
from konnektor.handshake import (
    ALPN,
    NO_ISSUER,
    AlertingSSLObject,
    alternative_names,
    date,
    first_line,
    printable,
    words,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

__all__ = [
    "DNS_PATTERN",
    "NAME_PATTERN",
    "Identity",
    "Role",
    "TLSFiles",
    "certificate_identity",
    "check_frontend_client",
    "check_name",
    "check_trust_domain",
    "frontend_context",
    "peer_identity",
    "read_certificates",
    "read_key",
    "same_key",
]

logger = logging.getLogger(__name__)

NAME_PATTERN: Final = re.compile(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?")
"""Names of workers, control planes and clients; use ``fullmatch``."""

_LABEL: Final = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
DNS_PATTERN: Final = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*")
"""Lower-case host names; use ``fullmatch``. Trust domains have the same shape, of up to 255 characters."""

_TRUST_DOMAIN: Final = re.compile(rf"(?=.{{1,255}}\Z){_LABEL}(\.{_LABEL})*")
_SPIFFE: Final = re.compile(r"spiffe://(?P<domain>[^/]*)/(?P<role>[^/]*)/(?P<name>[^/]*)")

_MAX_FILE: Final = 1 << 20  # no bundle of certificates is larger, and /dev/zero must not fill the memory
_MAX_NAMES: Final = 8  # of the peer's names that are quoted in an error


class Role(StrEnum):
    """What a certificate's holder may act as."""

    WORKER = "worker"
    CONTROL_PLANE = "control-plane"
    CLIENT = "client"


_ROLES: Final = frozenset(Role)
_USAGE: Final = {
    Role.WORKER: ExtendedKeyUsageOID.CLIENT_AUTH,
    Role.CONTROL_PLANE: ExtendedKeyUsageOID.SERVER_AUTH,
    Role.CLIENT: ExtendedKeyUsageOID.CLIENT_AUTH,
}
_USAGE_NAMES: Final = {ExtendedKeyUsageOID.CLIENT_AUTH: "clientAuth", ExtendedKeyUsageOID.SERVER_AUTH: "serverAuth"}


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a certificate speaks for; equal identities are the same party, whatever the key or serial."""

    trust_domain: str
    role: Role
    name: str

    def __str__(self) -> str:
        return f"spiffe://{self.trust_domain}/{self.role}/{self.name}"

    @classmethod
    def parse(cls, uri: str) -> Identity:
        """Read ``spiffe://TRUST-DOMAIN/ROLE/NAME``, with nothing before, after or between.

        Raises:
            CertificateError: another scheme, role or shape; a user, port, query or fragment.
        """
        match = _SPIFFE.fullmatch(uri)
        if (
            match is None
            or not _TRUST_DOMAIN.fullmatch(match["domain"])
            or match["role"] not in _ROLES
            or not NAME_PATTERN.fullmatch(match["name"])
        ):
            roles = "|".join(Role)
            raise CertificateError(f"{_quote(uri)} is not a konnektor identity (spiffe://TRUST-DOMAIN/{roles}/NAME)")
        return cls(match["domain"], Role(match["role"]), match["name"])


def check_name(name: str) -> str:
    """Return ``name`` if it can name a worker, control plane or client.

    Raises:
        ConfigurationError: it cannot.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise ConfigurationError(
            f"{_quote(name)} cannot be a name; use up to 63 of a-z, 0-9, '-' and '.', "
            "with a letter or digit at both ends, such as node-1"
        )
    return name


def check_trust_domain(domain: str) -> str:
    """Return ``domain`` if it can be a trust domain (SPIFFE-ID, section 2.1, without underscores).

    Raises:
        ConfigurationError: it cannot.
    """
    if not _TRUST_DOMAIN.fullmatch(domain):
        raise ConfigurationError(
            f"{_quote(domain)} cannot be a trust domain; use a lower-case domain name, such as konnektor.local"
        )
    return domain


# -- Our own files ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TLSFiles:
    """Where the PEM files of one endpoint are; nothing is read before a method is called.

    Attributes:
        ca: one or more CA certificates; a peer's chain must end at one of them.
        cert: this endpoint's certificate, then the intermediate CAs if there are any.
        key: the certificate's private key, not encrypted.
    """

    ca: str | os.PathLike[str]
    cert: str | os.PathLike[str]
    key: str | os.PathLike[str]

    def identity(self) -> Identity:
        """Who this endpoint is, from its own certificate.

        Raises:
            CertificateError: the certificate cannot be read, or has no konnektor identity.
        """
        return self._identity(read_certificates(self.cert, "certificate file")[0])

    def server_context(self) -> ssl.SSLContext:
        """A context for the accepting end, the control plane.

        Raises:
            CertificateError: a file that cannot be used, or not for a control plane.
            ConfigurationError: the key log that SSLKEYLOGFILE names cannot be written.
        """
        return self._context(Role.CONTROL_PLANE)

    def client_context(self, role: Role = Role.WORKER) -> ssl.SSLContext:
        """A context for the dialing end.

        Raises:
            CertificateError: a file that cannot be used, or not for ``role``.
            ConfigurationError: the key log that SSLKEYLOGFILE names cannot be written.
        """
        if role is Role.CONTROL_PLANE:
            raise ConfigurationError("a control plane does not dial: client_context() takes worker or client")
        return self._context(role)

    def _identity(self, certificate: x509.Certificate) -> Identity:
        try:
            return certificate_identity(certificate)
        except CertificateError as error:
            raise CertificateError(
                f"certificate file {_name(self.cert)} cannot be used: {error}; issue one with "
                "konnektor pki issue --role worker|control-plane --name NAME"
            ) from None

    def _context(self, role: Role) -> ssl.SSLContext:
        authorities = _read_authorities(self.ca)
        leaf = _read_pair(self.cert, self.key)[0]
        identity = self._identity(leaf)
        if identity.role is not role:
            raise CertificateError(
                f"certificate file {_name(self.cert)} is for a {identity.role} ({identity.name}), not for a {role}; "
                f"give the one of a {role}, or issue it with konnektor pki issue --dir DIR --role {role} --name NAME"
            )
        try:
            _check_usage(leaf, role)
        except CertificateError as error:
            raise CertificateError(f"certificate file {_name(self.cert)} cannot be used: {error}") from None
        self._rehearse(authorities, role)
        return _log_keys(self._build(authorities, server_side=role is Role.CONTROL_PLANE))

    def _build(self, authorities: Sequence[x509.Certificate], *, server_side: bool) -> ssl.SSLContext:
        context = _context(ssl.SSLContext, self.cert, self.key, authorities, server_side=server_side)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols([ALPN])
        return context

    def _rehearse(self, authorities: Sequence[x509.Certificate], role: Role) -> None:
        """Let OpenSSL judge our certificate by our CA file, in a handshake with ourselves in memory.

        The peer's OpenSSL will apply the same rules (chains, dates of every link, purposes, RFC 5280 strictness), so
        none of them is written down a second time here.
        """
        server = self._build(authorities, server_side=True)
        client = self._build(authorities, server_side=False)
        client.check_hostname = False
        (client if role is not Role.CONTROL_PLANE else server).verify_mode = ssl.CERT_NONE
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = (
            client.wrap_bio(to_client, to_server),
            server.wrap_bio(to_server, to_client, server_side=True),
        )
        try:
            for end in ends * 2:  # hello, hello; client's end, server's end
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
        except ssl.SSLCertVerificationError as error:
            raise self._verdict(error, authorities) from None
        except ssl.SSLError as error:
            raise _unusable(self.cert, self.key, error) from None

    def _verdict(
        self, error: ssl.SSLCertVerificationError, authorities: Sequence[x509.Certificate]
    ) -> CertificateError:
        if error.verify_code in NO_ISSUER:
            return CertificateError(
                f"certificate file {_name(self.cert)} was not issued by a CA in {_name(self.ca)}; "
                "issue it from that CA, or give the CA file that belongs to it"
            )
        for certificate in authorities:
            _check_dates(certificate, "CA file", self.ca)
        for certificate in read_certificates(self.cert, "certificate file"):
            _check_dates(certificate, "certificate file", self.cert)
        return CertificateError(
            f"certificate file {_name(self.cert)} does not pass verification with CA file {_name(self.ca)}: "
            f"{error.verify_message}; issue it again (konnektor pki issue makes certificates that pass)"
        )


def frontend_context(
    cert: str | os.PathLike[str], key: str | os.PathLike[str], client_ca: str | os.PathLike[str]
) -> ssl.SSLContext:
    """A context for an ``https://`` frontend: TLS 1.2 or later, and a client certificate from ``client_ca``.

    Its clients (a kube-apiserver, say) are not konnektor's: no ALPN, no identity in a URI. Those that have one all
    the same are for ``check_frontend_client`` to judge, after the handshake.

    Raises:
        CertificateError: a file that cannot be used.
        ConfigurationError: the key log that SSLKEYLOGFILE names cannot be written.
    """
    authorities = _read_authorities(client_ca)
    leaf = _read_pair(cert, key)[0]
    usages = _usages(leaf)
    if usages and ExtendedKeyUsageOID.SERVER_AUTH not in usages:
        raise CertificateError(
            f"certificate file {_name(cert)} is not for servers: its extended key usage lacks serverAuth"
        )
    context = _context(_FrontendContext, cert, key, authorities, server_side=True)
    own = _identities(leaf)
    context.trust_domain = own[0].trust_domain if own else None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    return _log_keys(context)


class _FrontendContext(ssl.SSLContext):
    """A frontend's, which knows the trust domain of its own certificate; None if that has no konnektor identity."""

    trust_domain: str | None = None


_C = TypeVar("_C", bound=ssl.SSLContext)


def _context(
    kind: type[_C],
    cert: str | os.PathLike[str],
    key: str | os.PathLike[str],
    authorities: Sequence[x509.Certificate],
    *,
    server_side: bool,
) -> _C:
    """What every context of ours has in common: certificates both ways, strictly checked, and no resumption."""
    context = kind(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.sslobject_class = AlertingSSLObject
    context.verify_mode = ssl.CERT_REQUIRED
    # As Python 3.13's defaults: RFC 5280 to the letter, and any CA in the file is a trust anchor.
    context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    # A resumed session would skip the verification of certificates, and with it every rotation of a CA.
    context.options |= ssl.OP_NO_TICKET
    if server_side:
        context.num_tickets = 0
    else:
        context.hostname_checks_common_name = False
    context.load_verify_locations(cadata=b"".join(ca.public_bytes(Encoding.DER) for ca in authorities))
    try:
        # The files were checked, but may change in between: never let OpenSSL ask the terminal for a password.
        context.load_cert_chain(cert, key, password="")
    except (OSError, ValueError) as error:
        raise _unusable(cert, key, error) from None
    return context


def _log_keys(context: ssl.SSLContext) -> ssl.SSLContext:
    """Have the secrets of the context's connections appended to the file that SSLKEYLOGFILE names, if it is set.

    As ``ssl.create_default_context`` does, and a bare ``SSLContext`` does not. A rehearsal's context is left out: its
    connections go nowhere.
    """
    path = None if sys.flags.ignore_environment else os.environ.get("SSLKEYLOGFILE")
    if path:
        try:
            # Created here, because OpenSSL would let the umask decide who may read it.
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
            context.keylog_filename = path
        except OSError as error:
            raise ConfigurationError(
                f"key log {_name(path)} cannot be written: {error.strerror}; change SSLKEYLOGFILE, or unset it"
            ) from None
        logger.warning("TLS secrets go to %s (SSLKEYLOGFILE): whoever reads it can read all traffic", _name(path))
    return context


def _unusable(cert: str | os.PathLike[str], key: str | os.PathLike[str], error: Exception) -> CertificateError:
    reason = getattr(error, "reason", None)  # ssl.SSLError has one, mostly
    why = words(reason) if reason else first_line(error)
    return CertificateError(f"certificate file {_name(cert)} with key file {_name(key)} cannot be used: {why}")


def _read_authorities(path: str | os.PathLike[str]) -> list[x509.Certificate]:
    authorities = read_certificates(path, "CA file")
    for certificate in authorities:
        if not _is_authority(certificate):
            raise CertificateError(
                f"CA file {_name(path)} holds a certificate that is not a CA's "
                f"({_quote(certificate.subject.rfc4514_string())}); give the CA's own certificate, such as ca.pem"
            )
    now = datetime.now(UTC)
    # In a bundle that is being rotated an expired CA is no error, as long as one serves.
    if not any(ca.not_valid_before_utc <= now <= ca.not_valid_after_utc for ca in authorities):
        _check_dates(authorities[0], "CA file", path)
    return authorities


def _read_pair(cert: str | os.PathLike[str], key: str | os.PathLike[str]) -> list[x509.Certificate]:
    chain = read_certificates(cert, "certificate file")
    private = read_key(key, "key file")
    if not same_key(chain[0], private):
        raise CertificateError(
            f"key file {_name(key)} does not belong to certificate file {_name(cert)}; "
            "give the two files that were issued together"
        )
    _check_dates(chain[0], "certificate file", cert)
    return chain


def read_certificates(path: str | os.PathLike[str], what: str) -> list[x509.Certificate]:
    """Read the certificates of a PEM file, at least one.

    Args:
        path: the file.
        what: what to call it in an error: ``CA file`` or ``certificate file``.

    Raises:
        CertificateError: missing, unreadable, not PEM, no certificate in it.
    """
    data = _read(path, what)
    if b"-----BEGIN CERTIFICATE-----" not in data:
        found = "a private key" if b"PRIVATE KEY-----" in data else "something else"
        raise CertificateError(f"{what} {_name(path)} holds no certificate in PEM form, but {found}")
    try:
        certificates = x509.load_pem_x509_certificates(data)
        for certificate in certificates:
            _ = certificate.extensions  # parsed on demand only; be told now
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise CertificateError(f"{what} {_name(path)} holds a damaged certificate: {_quote(str(error))}") from None
    return certificates


def read_key(path: str | os.PathLike[str], what: str) -> PrivateKeyTypes:
    """Read the private key of a PEM file.

    Raises:
        CertificateError: missing, unreadable, not PEM, encrypted, of an unknown kind.
    """
    data = _read(path, what)
    # `openssl ecparam -genkey` puts its parameters first, and some keep key and certificate in one file.
    block = re.search(rb"-----BEGIN ([A-Z ]*PRIVATE KEY)-----.*?-----END \1-----", data, re.DOTALL)
    if block is None:
        found = "a certificate" if b"-----BEGIN CERTIFICATE-----" in data else "something else"
        raise CertificateError(f"{what} {_name(path)} holds no private key in PEM form, but {found}")
    try:
        return load_pem_private_key(block[0], password=None)
    except TypeError:
        raise CertificateError(
            f"{what} {_name(path)} is encrypted, and nobody is there to type its password; "
            "decrypt it with: openssl pkey -in FILE -out NEW-FILE"
        ) from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CertificateError(f"{what} {_name(path)} holds a damaged private key: {first_line(error)}") from None


def same_key(certificate: x509.Certificate, key: PrivateKeyTypes) -> bool:
    """Whether ``key`` is the private key of ``certificate``."""
    own, named = key.public_key(), certificate.public_key()
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return own.public_bytes(*form) == named.public_bytes(*form)


_REMEDY: Final = {
    "CA file": "check the path, or copy the CA's ca.pem there",
    "CA key file": "restore it, or issue where the CA was made",
    "certificate file": "check the path, or issue one with konnektor pki issue",
    "key file": "check the path, or issue one, with its certificate, with konnektor pki issue",
}
"""What to do about a file that is not there, by what it is called in errors."""


def _read(path: str | os.PathLike[str], what: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_FILE + 1)
    except FileNotFoundError:
        raise CertificateError(f"{what} {_name(_looked_for(path))} does not exist; {_REMEDY[what]}") from None
    except IsADirectoryError:
        raise CertificateError(f"{what} {_name(path)} is a directory; name the file inside it") from None
    except PermissionError:
        raise CertificateError(
            f"{what} {_name(path)} may not be read by this user; change its owner, or run as the user that owns it"
        ) from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise CertificateError(f"{what} {_name(path)} cannot be read: {why}") from None
    if len(data) > _MAX_FILE:
        raise CertificateError(f"{what} {_name(path)} is larger than {_MAX_FILE} bytes: not a PEM file")
    return data


def _looked_for(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The path in full: a service has another directory than the shell in which the command was tried."""
    try:
        return Path(path).absolute()
    except OSError:  # the directory itself is gone
        return path


def _check_dates(certificate: x509.Certificate, what: str, path: str | os.PathLike[str]) -> None:
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise CertificateError(
            f"{what} {_name(path)} expired on {date(certificate.not_valid_after_utc)} (now {date(now)}); issue a new one"
        )
    if now < certificate.not_valid_before_utc:
        raise CertificateError(
            f"{what} {_name(path)} is not valid before {date(certificate.not_valid_before_utc)} (now {date(now)}); "
            "check this machine's clock"
        )


# -- The peer ---------------------------------------------------------------------------------------------------------


def peer_identity(ssl_object: ssl.SSLObject, expected: Role, *, trust_domain: str, peer: str = "the peer") -> Identity:
    """Who is at the other end of a finished handshake, as far as konnektor is concerned.

    Chain, dates and host name were OpenSSL's business and are done; this is the rest: TLS 1.3 and our ALPN were
    agreed on, and the certificate is a leaf with one identity of the expected role in our trust domain.

    Args:
        ssl_object: ``transport.get_extra_info("ssl_object")``, under asyncio or uvloop.
        expected: the role the peer must have.
        trust_domain: our own.
        peer: what to call it in an error, such as ``the worker at 192.0.2.1:50000``.

    Raises:
        CertificateError: any of this fails; such a peer may be told, and is sent nothing else.
    """
    if ssl_object.version() != "TLSv1.3":
        raise CertificateError(f"{peer} agreed on {ssl_object.version()}, not on TLSv1.3")
    if ssl_object.selected_alpn_protocol() != ALPN:
        raise CertificateError(
            f"{peer} speaks TLS but not {ALPN}; is it a konnektor endpoint, and nothing in between that ends TLS?"
        )
    der = ssl_object.getpeercert(binary_form=True)
    if der is None:
        raise CertificateError(f"{peer} sent no certificate")
    try:
        certificate = x509.load_der_x509_certificate(der)
        identity = certificate_identity(certificate)
        if identity.role is not expected:
            raise CertificateError(f"it is for a {identity.role} ({identity.name}), not for a {expected}")
        if identity.trust_domain != trust_domain:
            raise CertificateError(f"it belongs to trust domain {identity.trust_domain}, not to ours, {trust_domain}")
        _check_usage(certificate, expected)
    except CertificateError as error:
        raise CertificateError(f"the certificate of {peer} is refused: {error}") from None
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise CertificateError(f"the certificate of {peer} is damaged: {_quote(str(error))}") from None
    return identity


def check_frontend_client(ssl_object: ssl.SSLObject) -> None:
    """May the client of an ``https://`` frontend be served, whose handshake with a ``frontend_context`` is finished?

    OpenSSL has found that ``client_ca`` issued its certificate. But that may be the tunnel's own CA, and a worker's key
    must not open the way to all other workers: who has a konnektor identity must have it as a client, of our trust domain
    if our own certificate names one. Certificates without one, such as a kube-apiserver's, are good as they are.

    Args:
        ssl_object: ``transport.get_extra_info("ssl_object")``, under asyncio or uvloop.

    Raises:
        CertificateError: nothing may be served to this client.
    """
    der = ssl_object.getpeercert(binary_form=True)
    if der is None:
        raise CertificateError("the client sent no certificate")
    try:
        identities = _identities(x509.load_der_x509_certificate(der))
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise CertificateError(f"the client's certificate is damaged: {_quote(str(error))}") from None
    ours = getattr(ssl_object.context, "trust_domain", None)
    for identity in identities:
        if identity.role is not Role.CLIENT:
            raise CertificateError(
                f"its certificate is for a {identity.role}, {identity}; "
                "issue one with konnektor pki issue --role client --name NAME"
            )
        if ours is not None and identity.trust_domain != ours:
            raise CertificateError(
                f"its certificate, {identity}, belongs to trust domain {identity.trust_domain}, not to ours, {ours}"
            )


def _identities(certificate: x509.Certificate) -> list[Identity]:
    """Every konnektor identity in a certificate; other URIs are none of our business."""
    found = []
    for uri in _uris(certificate):
        with contextlib.suppress(CertificateError):
            found.append(Identity.parse(uri))
    return found


def certificate_identity(certificate: x509.Certificate) -> Identity:
    """The one konnektor identity of a leaf certificate.

    Raises:
        CertificateError: it has no URI, or several (X509-SVID, section 2: exactly one), or another kind of URI.
    """
    uris = _uris(certificate)
    if not uris:
        raise CertificateError("it has no konnektor identity (no URI spiffe://TRUST-DOMAIN/ROLE/NAME)")
    if len(uris) > 1:
        quoted = ", ".join(_quote(uri) for uri in uris[:_MAX_NAMES])
        raise CertificateError(f"it has {len(uris)} URIs where exactly one must be: {quoted}")
    return Identity.parse(uris[0])


def _check_usage(certificate: x509.Certificate, role: Role) -> None:
    """Refuse what RFC 5280 section 4.2.1 and X509-SVID section 4 do not let act as ``role``."""
    if _is_authority(certificate):
        raise CertificateError("it is a CA's certificate, which signs others and connects nowhere")
    if _USAGE[role] not in _usages(certificate):  # anyExtendedKeyUsage does not do: a role is one usage
        raise CertificateError(f"its extended key usage lacks {_USAGE_NAMES[_USAGE[role]]}, which a {role} needs")


def _uris(certificate: x509.Certificate) -> list[str]:
    names = alternative_names(certificate)
    return [] if names is None else names.get_values_for_type(x509.UniformResourceIdentifier)


def _usages(certificate: x509.Certificate) -> list[x509.ObjectIdentifier]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return []


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _name(path: str | os.PathLike[str]) -> str:
    return printable(os.fspath(path))


def _quote(text: str) -> str:
    return ascii(text if len(text) <= 300 else text[:300] + "...")
