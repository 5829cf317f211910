"""HTTP CONNECT without I/O: the request of a client that wants a tunnel, and the answers.

h11 reads the head; around it stand the checks that a proxy's front door needs and a lenient reader leaves out: lines
end in CRLF, no line is folded, no control character passes, a CONNECT has no body (RFC 9110 section 9.3.6, RFC 9112
sections 2.2, 5.2 and 11.2). The destination is the request target; ``Host`` never counts, kube-apiserver always says
``127.0.0.1`` there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final, cast

import h11

from konnektor.addresses import parse_hostport, parse_worker_name
from konnektor.errors import (
    CancelledStreamError,
    CertificateError,
    ConfigurationError,
    ConnectRefusedError,
    DeniedError,
    DialTimeoutError,
    DNSError,
    LimitError,
    LocalProtocolError,
    NoRouteError,
    SessionClosedError,
    SessionError,
    StreamError,
    TargetResetError,
    TargetTLSError,
    UnreachableError,
    UnsupportedError,
)

__all__ = ["MAX_HEAD", "BadRequest", "ConnectParser", "ConnectRequest", "response", "status_for"]

MAX_HEAD: Final = 16 * 1024
"""Bytes of request line and headers: bounds what a client that never finishes its head can make this side hold."""

_END: Final = b"\r\n\r\n"
# A control character, a bare LF, a bare CR, a folded line.
_FORBIDDEN: Final = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r[^\n]|\n[\t ]")
_PHRASE: Final = re.compile(r"[!-~]+( [!-~]+)*")
_ESTABLISHED: Final = b"HTTP/1.1 200 Connection Established\r\n\r\n"

_STATUS: Final[tuple[tuple[type[BaseException], int, str], ...]] = (
    (CertificateError, 403, "Certificate Is Not for a Client Here"),
    (DeniedError, 403, "Destination Denied by Policy"),
    (UnsupportedError, 501, "Not Supported by Worker"),
    (ConnectRefusedError, 502, "Connection Refused by Target"),
    (UnreachableError, 502, "Target Unreachable"),
    (DNSError, 502, "Target Name Not Resolved"),
    (DialTimeoutError, 504, "Target Timed Out"),
    (NoRouteError, 503, "No Worker for Target"),
    (LimitError, 503, "Limit Reached"),
    (CancelledStreamError, 502, "Cancelled by Worker"),
    (TargetResetError, 502, "Connection Reset by Target"),
    (TargetTLSError, 502, "Target TLS Not Verified"),
    (StreamError, 502, "Failed at Worker"),
    (SessionError, 503, "Worker Connection Lost"),
    (SessionClosedError, 503, "Worker Connection Lost"),
    (TimeoutError, 504, "Worker Timed Out"),
)


class BadRequest(Exception):
    """A request that gets an error status, after which the connection is closed.

    Attributes:
        status: the HTTP status.
        phrase: its reason phrase.
    """

    def __init__(self, status: int, phrase: str) -> None:
        super().__init__(status, phrase)
        self.status = status
        self.phrase = phrase

    def __str__(self) -> str:
        return f"{self.status} {self.phrase}"


@dataclass(frozen=True, slots=True)
class ConnectRequest:
    """A valid CONNECT.

    Attributes:
        host: an IP address (IPv6 without brackets) or DNS name, in its canonical spelling.
        port: 1 to 65535.
        worker: what the header ``Konnektor-Worker`` says, or None.
        rest: bytes that came after the head: the first of the tunnel.
    """

    host: str
    port: int
    worker: str | None
    rest: bytes


class ConnectParser:
    """Takes bytes at any split until the head of one request is complete; the outcome does not depend on the split.

    Args:
        max_head: bytes that the head may have, its empty line included.
    """

    def __init__(self, max_head: int = MAX_HEAD) -> None:
        self._max_head = max_head
        self._buffer = bytearray()
        self._outcome: ConnectRequest | BadRequest | None = None

    def feed(self, data: bytes | bytearray | memoryview) -> ConnectRequest | None:
        """The request, or None as long as its head is incomplete.

        Raises:
            BadRequest: 400, 405, 431 or 505; again on each further call.
            LocalProtocolError: bytes after the request, which belong to the tunnel.
        """
        if self._outcome is None:
            known = len(self._buffer)
            self._buffer += data
            try:
                self._outcome = self._parse(max(0, known - 3))
            except BadRequest as error:
                self._outcome = error
            if self._outcome is not None:
                self._buffer = bytearray()
        elif isinstance(self._outcome, ConnectRequest):
            raise LocalProtocolError("the request is complete: what follows belongs to the tunnel")
        if isinstance(self._outcome, BadRequest):
            raise self._outcome
        return self._outcome

    def _parse(self, start: int) -> ConnectRequest | None:
        """Look at the buffer from ``start`` on; nothing before it can be wrong or end the head."""
        found = self._buffer.find(_END, start, self._max_head)
        end = found + len(_END) if found >= 0 else min(len(self._buffer), self._max_head)
        # Garbage (a TLS hello, say) is told at once, not after it has filled the buffer.
        if _FORBIDDEN.search(self._buffer, start, end):
            raise BadRequest(400, "Malformed Request")
        if found < 0:
            if len(self._buffer) >= self._max_head:
                raise BadRequest(431, "Request Head Too Large")
            return None
        return _read_head(bytes(self._buffer[:end]), bytes(self._buffer[end:]))


def _read_head(head: bytes, rest: bytes) -> ConnectRequest:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(head)
    try:
        request = cast(h11.Request, connection.next_event())  # of a whole head: a request, or an error
    except h11.RemoteProtocolError:
        raise BadRequest(400, "Malformed Request") from None
    if request.http_version not in (b"1.0", b"1.1"):
        raise BadRequest(505, "HTTP Version Not Supported")
    if request.method != b"CONNECT":
        raise BadRequest(405, "Only CONNECT Is Served Here")
    workers = []
    for name, value in request.headers:
        if name in (b"content-length", b"transfer-encoding"):
            # RFC 9110 section 9.3.6: such a request may be an attempt at smuggling.
            raise BadRequest(400, "CONNECT Has No Body")
        if name == b"konnektor-worker":
            workers.append(value.decode("latin-1"))
    if len(workers) > 1:
        raise BadRequest(400, "Several Konnektor-Worker Headers")
    try:
        worker = parse_worker_name(workers[0]) if workers else None
    except ConfigurationError:
        raise BadRequest(400, "Malformed Konnektor-Worker") from None
    try:
        host, port = parse_hostport(request.target.decode("ascii"))
    except ConfigurationError:
        raise BadRequest(400, "Malformed Target") from None
    return ConnectRequest(host, port, worker, rest)


def response(status: int, phrase: str | None = None) -> bytes:
    """The whole answer: for 200 exactly the head that starts the tunnel, else an error with a short body.

    Args:
        status: the HTTP status.
        phrase: the reason phrase, all that kube-apiserver's operator gets to see. It is this program's own text, never
            a peer's; the standard one if None.

    Raises:
        ValueError: the phrase cannot stand in a status line.
    """
    if status == HTTPStatus.OK:
        return _ESTABLISHED
    phrase = phrase or HTTPStatus(status).phrase
    if not _PHRASE.fullmatch(phrase):
        raise ValueError(f"reason phrase {phrase!r} is not plain text")
    body = f"{status} {phrase}\n"
    allow = "Allow: CONNECT\r\n" if status == HTTPStatus.METHOD_NOT_ALLOWED else ""
    return (
        f"HTTP/1.1 {status} {phrase}\r\n{allow}Connection: close\r\n"
        f"Content-Type: text/plain\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode("ascii")


def status_for(error: BaseException) -> tuple[int, str]:
    """The status and reason phrase that tell a client of an error; the text of the error is never in them."""
    if isinstance(error, BadRequest):
        return error.status, error.phrase
    return next(
        ((status, phrase) for kind, status, phrase in _STATUS if isinstance(error, kind)), (500, "Internal Error")
    )
