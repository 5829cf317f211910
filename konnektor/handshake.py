"""When a TLS handshake fails: the alert that tells the peer why, and the sentence that tells the operator."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
from datetime import UTC, datetime
from typing import Final, cast

from cryptography import x509

from konnektor.errors import Code, KonnektorError, SessionError

__all__ = [
    "ALPN",
    "NO_ISSUER",
    "AlertingSSLObject",
    "alternative_names",
    "date",
    "explain",
    "first_line",
    "left_silently",
    "printable",
    "with_alerts",
    "words",
]

ALPN: Final = "konnektor/1"

_MAX_NAMES: Final = 8  # of the peer's names that are quoted in an error
_MAX_HOLDER: Final = 300  # characters of whose certificate it is


# -- Alerts: telling the peer why -------------------------------------------------------------------------------------


def with_alerts(context: ssl.SSLContext, sock: socket.socket) -> ssl.SSLContext:
    """``context`` for one connection over ``sock``, whose refusals reach the peer.

    When a handshake fails, asyncio and uvloop close the connection and throw away the TLS alert that says why (RFC
    8446 section 6.2), so that the peer sees no more than an end. All they want of a context is its ``wrap_bio``;
    the one of this one sends the alert by itself.

    Pass the result as ``ssl=`` of ``loop.connect_accepted_socket(..., sock)`` or ``loop.create_connection(...,
    sock=sock)``, the same connected, non-blocking socket.
    """
    return cast("ssl.SSLContext", _Alerting(context, sock))


def left_silently(context: ssl.SSLContext, exc: BaseException | None) -> bool:
    """Whether the peer ended the connection before it had sent a byte, as load balancers do to see if a port is open.

    Args:
        context: of ``with_alerts``, for this connection.
        exc: what the handshake raised.
    """
    # A peer that is silent until its time is up is another matter: it held a place all that while.
    ended = isinstance(exc, ConnectionError) and not isinstance(exc, ConnectionAbortedError)
    return ended and isinstance(context, _Alerting) and not context.heard


class _Alerting:
    """An SSLContext by its one method that matters here; ssl has no cheap way to copy a real one."""

    def __init__(self, context: ssl.SSLContext, sock: socket.socket) -> None:
        self._context = context
        self._sock = sock
        self._ssl_object: AlertingSSLObject | None = None

    # uvloop asks isinstance(context, SSLContext), and this is how an object says yes (as mocks do).
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return ssl.SSLContext

    def __getattr__(self, name: str) -> object:
        return getattr(self._context, name)

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | None = None,
    ) -> ssl.SSLObject:
        ssl_object = self._context.wrap_bio(incoming, outgoing, server_side, server_hostname)
        if isinstance(ssl_object, AlertingSSLObject):
            ssl_object.alert = (outgoing, self._sock)
            ssl_object.incoming = incoming
            self._ssl_object = ssl_object
        return ssl_object

    @property
    def heard(self) -> bool:
        """Whether anything has come from the peer."""
        return self._ssl_object is not None and self._ssl_object.heard


class AlertingSSLObject(ssl.SSLObject):
    """An SSLObject that makes the most of a handshake's failure while its details still exist."""

    alert: tuple[ssl.MemoryBIO, socket.socket] | None = None
    incoming: ssl.MemoryBIO | None = None
    heard = False

    def do_handshake(self) -> None:
        if self.incoming is not None and self.incoming.pending:
            self.heard = True
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            if isinstance(error, ssl.SSLCertVerificationError):
                self._annotate(error)
            self._send_alert()
            raise
        self.alert = None  # the transport's from here on

    def _annotate(self, error: ssl.SSLCertVerificationError) -> None:
        """Note what the refused certificate is for, and when; nobody can ask once the handshake is over."""
        certificate = _unverified(self)
        if certificate is None:
            return
        try:
            now = datetime.now(
                UTC
            )  # it may be that of a CA above whose dates are wrong: then nothing is said of this one's
            if error.verify_code in _WRONG_NAME:
                error.add_note(", ".join(_host_names(certificate)[:_MAX_NAMES]) or "none")
            elif error.verify_code == _EXPIRED and certificate.not_valid_after_utc < now:
                error.add_note(date(certificate.not_valid_after_utc))
                error.add_note(_holder(certificate))
            elif error.verify_code == _NOT_YET_VALID and certificate.not_valid_before_utc > now:
                error.add_note(date(certificate.not_valid_before_utc))
                error.add_note(_holder(certificate))
        except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
            pass  # a damaged certificate: its verdict stands without details

    def _send_alert(self) -> None:
        if self.alert is None:
            return
        (outgoing, sock), self.alert = self.alert, None
        with contextlib.suppress(OSError):  # a peer that is gone needs no reason
            # Past the transport, which closes next; what it wrote before was answered, so nothing is ahead of this.
            sock.send(outgoing.read())


def _unverified(ssl_object: ssl.SSLObject) -> x509.Certificate | None:
    """The peer's certificate of a failed handshake, if this Python has a way to it (a public one since 3.13)."""
    # A server that refuses has only the chain that OpenSSL built to verify it, however that went.
    for name in ("get_unverified_chain", "get_verified_chain"):
        chain = getattr(ssl_object, name, None) or getattr(getattr(ssl_object, "_sslobj", None), name, None)
        try:
            first = (chain() or [None])[0] if chain is not None else None
            if first is not None:
                der = first if isinstance(first, bytes) else ssl.PEM_cert_to_DER_cert(first.public_bytes())
                return x509.load_der_x509_certificate(der)
        except (ValueError, AttributeError, TypeError, ssl.SSLError):
            pass
    return None


def _holder(certificate: x509.Certificate) -> str:
    """Whose certificate it says it is: its identity, if it has one, or its subject."""
    names = alternative_names(certificate)
    uris = [] if names is None else names.get_values_for_type(x509.UniformResourceIdentifier)
    return printable((uris[0] if uris else certificate.subject.rfc4514_string())[:_MAX_HOLDER])


def _host_names(certificate: x509.Certificate) -> list[str]:
    names = alternative_names(certificate)
    if names is None:
        return []
    hosts = [printable(host) for host in names.get_values_for_type(x509.DNSName)]
    return hosts + [str(address) for address in names.get_values_for_type(x509.IPAddress)]


def alternative_names(certificate: x509.Certificate) -> x509.SubjectAlternativeName | None:
    """The host names, addresses and URIs of a certificate; None if it has none."""
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None


# -- Explanations -----------------------------------------------------------------------------------------------------

# X509_V_ERR_* of OpenSSL's x509_vfy.h, as SSLCertVerificationError.verify_code.
_NOT_YET_VALID: Final = 9
_EXPIRED: Final = 10
_WRONG_PURPOSE: Final = 26
NO_ISSUER: Final = frozenset({2, 7, 18, 19, 20, 21})  # no issuer, its signature is another's, or self-signed
_WRONG_NAME: Final = frozenset({62, 64})  # host name, IP address

# What an alert means for us, by its name in RFC 8446 section 6.2, and what to do.
_OUR_CERTIFICATE: Final = {
    "UNKNOWN_CA": "issue it from the CA that the other side trusts",
    "CERTIFICATE_EXPIRED": "issue a new one, and check the clocks of both machines",
    "CERTIFICATE_REVOKED": "issue a new one",
    "BAD_CERTIFICATE": "the name that was dialed may not be in it (--san adds names), or a clock may be wrong",
    "UNSUPPORTED_CERTIFICATE": "its role is not the one wanted there; issue one with the right --role",
    "CERTIFICATE_UNKNOWN": "the log of the other side says why",
    "ACCESS_DENIED": "the log of the other side says why",
    "DECRYPT_ERROR": "issue it again",
}
_NOT_TLS: Final = frozenset(
    {"WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG", "BAD_RECORD_TYPE", "RECORD_LAYER_FAILURE",
     "UNEXPECTED_MESSAGE", "LENGTH_TOO_LONG", "ENCRYPTED_LENGTH_TOO_LONG", "DATA_LENGTH_TOO_LONG"}
)  # fmt: skip
_OLD_TLS: Final = frozenset({"UNSUPPORTED_PROTOCOL", "WRONG_SSL_VERSION", "VERSION_TOO_LOW", "NO_PROTOCOLS_AVAILABLE"})


def explain(exc: BaseException | None, peer: str) -> str:
    """What ended an attempt to get a session, in one sentence for the operator.

    Args:
        exc: what connecting or the handshake raised, or what ``connection_lost`` was given before the peer's HELLO.
            Under TLS 1.3 a client whose certificate is refused is connected at first and hears of it later (RFC 8446
            section 2), or never: then it is None.
        peer: what to call the other end, such as ``the control plane at a.example:8443``.
    """
    match exc:
        case None:
            return (
                f"{peer} closed the connection before a session was up and gave no reason; "
                "it may have refused our certificate, and its log says why"
            )
        case SessionError(code=Code.INTERNAL) if type(exc) is SessionError:  # the connection ended without a word
            return explain(None, peer)
        case SessionError(code=Code.NO_ERROR):
            why = exc.reason or "it gave no reason, and its log may have one"
            return f"{peer} closed the session at its very beginning: {why}"
        case SessionError(code=Code.IDENTITY):
            return f"{peer} refused us: {exc}"
        case SessionError():
            return f"no session with {peer}: {exc}"
        case KonnektorError():
            return str(exc)
        case ssl.SSLCertVerificationError():
            return _explain_verification(exc, peer)
        case ssl.SSLError():
            return _explain_ssl(exc, peer)
        case socket.gaierror():
            return f"{peer} cannot be found: {exc.strerror or exc}; check the host name"
        case ConnectionRefusedError():
            return f"{peer} does not accept connections (connection refused); is it running, and is the port right?"
        case ConnectionAbortedError() if "handshake" in str(exc):  # what sslproto says of a timeout
            return f"{peer} did not finish the TLS handshake in time; does it speak TLS?"
        case ConnectionError():
            return (
                f"{peer} broke off the connection before a session was up; it may have refused our certificate "
                "(its log says why), or not be a konnektor endpoint"
            )
        case TimeoutError():
            return f"{peer} did not answer in time; check the address, and that no firewall is in between"
        case OSError():
            return f"{peer} cannot be reached: {exc.strerror or exc}"
        case _:
            return f"no session with {peer}: {type(exc).__name__}: {first_line(exc)}"


def _explain_verification(exc: ssl.SSLCertVerificationError, peer: str) -> str:
    note, holder = (*getattr(exc, "__notes__", ()), "", "")[:2]
    holder = holder and f" ({holder})"
    code = exc.verify_code
    if code in _WRONG_NAME:
        dialed = re.search(r"'(.*)'", exc.verify_message)
        name = dialed[1] if dialed else "that was dialed"
        remedy = (
            f"use --server-name with one of its names: {note}" if note else "use --server-name with one of its names"
        )
        return f"the certificate of {peer} is not for the name {name}; {remedy}"
    if code in NO_ISSUER:
        return (
            f"the certificate of {peer} was not issued by a CA that we trust ({exc.verify_message}); "
            "issue it from our CA, or add its CA to our CA file"
        )
    if code == _EXPIRED:
        when = f" on {note}" if note else ""
        return (
            f"the certificate of {peer}{holder} expired{when}; issue a new one, and check the clocks of both machines"
        )
    if code == _NOT_YET_VALID:
        when = f" before {note}" if note else " yet"
        return f"the certificate of {peer}{holder} is not valid{when}; check the clocks of both machines"
    if code == _WRONG_PURPOSE:
        return f"the certificate of {peer} is for another role than it has here; issue one with the right --role"
    return f"the certificate of {peer} is refused: {exc.verify_message}; issue it again"


# An SSLError whose reason Python has no name for, as "[SSL] tlsv1 alert no application protocol (_ssl.c:1006)".
_NAMELESS: Final = re.compile(r"\[\w+\] (.+?)(?: \(_ssl\.c:\d+\))?")


def _explain_ssl(exc: ssl.SSLError, peer: str) -> str:
    reason = getattr(exc, "reason", None)
    if not reason and (nameless := _NAMELESS.fullmatch(first_line(exc))):
        reason = nameless[1]
    reason = str(reason or "").upper().replace(" ", "_").replace("/", "_")
    # Python has had TLSV1_ALERT_UNKNOWN_CA, TLSV13_ALERT_..., and OpenSSL 3.2 and later say "ssl/tls alert ...".
    alert = reason.partition("ALERT_")[2]
    if alert in _OUR_CERTIFICATE:
        return f"{peer} refused our certificate: {words(alert)} ({words(reason)}); {_OUR_CERTIFICATE[alert]}"
    if alert == "CERTIFICATE_REQUIRED":
        return f"{peer} wants a certificate, and we sent none"
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return f"{peer} sent no certificate; konnektor endpoints must have one, issued by our CA"
    if reason in {"HTTP_REQUEST", "HTTPS_PROXY_REQUEST"}:
        return f"{peer} speaks plain HTTP, and this is a TLS port for konnektor endpoints"
    if reason in _NOT_TLS:
        return f"{peer} speaks something other than TLS; is that the port of a konnektor endpoint?"
    if reason in _OLD_TLS or alert == "PROTOCOL_VERSION":
        return f"{peer} does not speak TLS 1.3; is that a konnektor endpoint?"
    if alert == "NO_APPLICATION_PROTOCOL":
        return f"{peer} speaks TLS but not {ALPN}; is that the port of a konnektor endpoint?"
    if isinstance(exc, ssl.SSLEOFError | ssl.SSLZeroReturnError) or reason == "UNEXPECTED_EOF_WHILE_READING":
        return explain(None, peer)
    return f"TLS with {peer} failed: {words(reason) if reason else first_line(exc)}"


# -- Wording ----------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Text from outside, fit for one line of a log."""
    return text if text.isprintable() else ascii(text)


def date(moment: datetime) -> str:
    """A moment, to the minute."""
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def words(reason: str) -> str:
    """OpenSSL's name of an error, as words."""
    return reason.lower().replace("_", " ")


def first_line(error: BaseException) -> str:
    """The text of an error, fit for a sentence."""
    return printable(str(error).partition("\n")[0])
