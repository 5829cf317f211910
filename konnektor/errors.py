"""Every error konnektor raises, and the codes that carry errors over the wire.

    KonnektorError
    ├── ConfigurationError (ValueError)         a setting, flag or rule that cannot be used
    ├── CertificateError                        a certificate or key that cannot be used
    ├── ListenError (OSError)                   an address that cannot be listened on
    ├── HandshakeError (ConnectionError)        the peer was not reached, or no session came of it
    ├── LocalProtocolError (RuntimeError)       this program used the multiplexer in a wrong state
    ├── StreamClosedError (ClosedResourceError) use of a stream after this side closed it
    ├── SessionClosedError (ClosedResourceError) use of a session after it ended
    └── PeerError (BrokenResourceError, ConnectionError)
        ├── SessionError                        one class per session code (0 to 31)
        │   ├── ProtocolError (1)
        │   │   ├── FrameSizeError (2), FlowControlError (3), StreamStateError (4)
        │   ├── CalmError (5), PeerTimeoutError (6), ShutdownError (7), InternalError (8)
        │   ├── VersionError (9), IdentityError (10), ResumeRefusedError (11)
        │   └── SessionLost                     the connection went away under open streams
        └── StreamError                         one class per stream code (32 and up)
            ├── DeniedError (32), UnsupportedError (33)
            ├── ConnectRefusedError (34), UnreachableError (35), DNSError (36), DialTimeoutError (37)
            ├── NoRouteError (38), LimitError (39), CancelledStreamError (40)
            ├── TargetResetError (41), TargetTLSError (42)
            └── ApplicationError (2**31 and up)

Callers of either world catch what they know: what breaks a stream is an
``anyio.BrokenResourceError`` and a ``ConnectionError``; use after close is an
``anyio.ClosedResourceError``.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar, Final

import anyio

__all__ = [
    "APPLICATION_CODES",
    "ApplicationError",
    "CalmError",
    "CancelledStreamError",
    "CertificateError",
    "Code",
    "ConfigurationError",
    "ConnectRefusedError",
    "DNSError",
    "DeniedError",
    "DialTimeoutError",
    "FlowControlError",
    "FrameSizeError",
    "HandshakeError",
    "IdentityError",
    "InternalError",
    "KonnektorError",
    "LimitError",
    "ListenError",
    "LocalProtocolError",
    "NoRouteError",
    "PeerError",
    "PeerTimeoutError",
    "ProtocolError",
    "ResumeRefusedError",
    "SessionClosedError",
    "SessionError",
    "SessionLost",
    "ShutdownError",
    "StreamClosedError",
    "StreamError",
    "StreamStateError",
    "TargetResetError",
    "TargetTLSError",
    "UnreachableError",
    "UnsupportedError",
    "VersionError",
    "session_error",
    "stream_error",
]


class Code(IntEnum):
    """Wire error codes: below 32 they end a session, from 32 on a stream."""

    NO_ERROR = 0
    PROTOCOL = 1
    FRAME_SIZE = 2
    FLOW_CONTROL = 3
    STREAM_STATE = 4
    CALM = 5
    TIMEOUT = 6
    SHUTDOWN = 7
    INTERNAL = 8
    VERSION = 9
    IDENTITY = 10
    RESUME_REFUSED = 11
    DENIED = 32
    UNSUPPORTED = 33
    CONNECT_REFUSED = 34
    UNREACHABLE = 35
    DNS = 36
    DIAL_TIMEOUT = 37
    NO_ROUTE = 38
    LIMIT = 39
    CANCELLED = 40
    TARGET_RESET = 41
    TARGET_TLS = 42


APPLICATION_CODES: Final = range(2**31, 2**32)
"""Codes that stream types of your own may use."""


class KonnektorError(Exception):
    """Base of everything konnektor raises on purpose.

    Attributes:
        worker: out of ``ControlPlane.open_tcp``, the worker that was asked; empty if none was.
    """

    worker: str = ""


class ConfigurationError(KonnektorError, ValueError):
    """A setting, flag, rule or argument that cannot be used; the text names it and says what would do."""


class CertificateError(KonnektorError):
    """A certificate, key or CA file that is missing, unreadable, mismatched, expired or of the wrong role."""


class ListenError(KonnektorError, OSError):
    """An address or path that cannot be listened on."""


class HandshakeError(KonnektorError, ConnectionError):
    """The peer could not be reached, or refused before the session was up."""


class LocalProtocolError(KonnektorError, RuntimeError):
    """This program asked the multiplexer for something its state does not allow."""


class StreamClosedError(KonnektorError, anyio.ClosedResourceError):
    """The stream (or its sending half) was closed by this side before."""


class SessionClosedError(KonnektorError, anyio.ClosedResourceError):
    """The session is closed or draining and opens no more streams."""


class PeerError(KonnektorError, anyio.BrokenResourceError, ConnectionError):
    """Something beyond this process ended a session or a stream.

    Attributes:
        code: the wire code (a ``Code``, or an int from ``APPLICATION_CODES``).
        reason: human text, already stripped of control characters; for logs.
    """

    default_code: ClassVar[int] = Code.INTERNAL

    def __init__(self, reason: str = "", code: int | None = None) -> None:
        self.code = self.default_code if code is None else code
        self.reason = reason
        super().__init__(reason or describe(self.code))

    def __str__(self) -> str:
        return self.reason or describe(self.code)


class SessionError(PeerError):
    """A session ended, by its wire code."""

    default_code = Code.NO_ERROR


class ProtocolError(SessionError):
    """The peer broke a rule of the protocol."""

    default_code = Code.PROTOCOL


class FrameSizeError(ProtocolError):
    """A frame's length does not fit its type or the agreed maximum."""

    default_code = Code.FRAME_SIZE


class FlowControlError(ProtocolError):
    """More bytes than were granted, or an impossible grant."""

    default_code = Code.FLOW_CONTROL


class StreamStateError(ProtocolError):
    """A frame that its stream's state does not allow."""

    default_code = Code.STREAM_STATE


class CalmError(SessionError):
    """A limit against abuse was exceeded.

    Attributes:
        limit: what the peer sent too much of; empty if it is the peer who says so of this side.
    """

    default_code = Code.CALM

    def __init__(self, reason: str = "", code: int | None = None, *, limit: str = "") -> None:
        super().__init__(reason, code)
        self.limit = limit


class PeerTimeoutError(SessionError):
    """The peer was silent, or made no progress, for too long."""

    default_code = Code.TIMEOUT


class ShutdownError(SessionError):
    """The peer is going away."""

    default_code = Code.SHUTDOWN


class InternalError(SessionError):
    """The peer, or this side, failed inside."""

    default_code = Code.INTERNAL


class VersionError(SessionError):
    """No protocol version in common."""

    default_code = Code.VERSION


class IdentityError(SessionError):
    """The certificate's identity is not acceptable here."""

    default_code = Code.IDENTITY


class ResumeRefusedError(SessionError):
    """The peer would not resume the session."""

    default_code = Code.RESUME_REFUSED


class SessionLost(SessionError):
    """The connection ended under an open stream.

    Attributes:
        sent: bytes this side had put on the wire for the stream.
        received: bytes of the peer's that had arrived.
    """

    def __init__(self, reason: str = "", code: int | None = None, *, sent: int = 0, received: int = 0) -> None:
        super().__init__(reason, code)
        self.sent = sent
        self.received = received


class StreamError(PeerError):
    """A stream was refused or reset, by its wire code.

    Attributes:
        refused: True if the peer did no work for the stream (REFUSE), False if it broke off (RESET, STOP).
        retry_after: seconds the peer asked to wait before trying again, 0 if it did not say.
    """

    refused: bool = False
    retry_after: float = 0.0

    @property
    def retryable(self) -> bool:
        """Whether trying elsewhere can help and is safe: nothing was processed."""
        return self.refused and self.code in _RETRYABLE


class DeniedError(StreamError):
    """Policy at one end does not allow it."""

    default_code = Code.DENIED


class UnsupportedError(StreamError):
    """The peer does not know the stream type, or a critical part of its OPEN."""

    default_code = Code.UNSUPPORTED


class ConnectRefusedError(StreamError):
    """The target refused the connection."""

    default_code = Code.CONNECT_REFUSED


class UnreachableError(StreamError):
    """No way to the target's network or host."""

    default_code = Code.UNREACHABLE


class DNSError(StreamError):
    """The target's name did not resolve at the far end."""

    default_code = Code.DNS


class DialTimeoutError(StreamError):
    """The target did not answer within the stream's deadline."""

    default_code = Code.DIAL_TIMEOUT


class NoRouteError(StreamError):
    """No worker serves the destination."""

    default_code = Code.NO_ROUTE


class LimitError(StreamError):
    """A limit was reached: streams, memory, file descriptors, or a peer that drains."""

    default_code = Code.LIMIT


class CancelledStreamError(StreamError):
    """The stream was given up by the other end."""

    default_code = Code.CANCELLED


class TargetResetError(StreamError):
    """The target broke the connection off."""

    default_code = Code.TARGET_RESET


class TargetTLSError(StreamError):
    """The target's TLS could not be verified."""

    default_code = Code.TARGET_TLS


class ApplicationError(StreamError):
    """A code of the application's own, 2**31 or above."""

    default_code = APPLICATION_CODES.start


_RETRYABLE: Final = frozenset({Code.CONNECT_REFUSED, Code.UNREACHABLE, Code.DNS, Code.DIAL_TIMEOUT, Code.LIMIT})

_SESSION_ERRORS: Final[dict[int, type[SessionError]]] = {
    cls.default_code: cls
    for cls in (
        SessionError, ProtocolError, FrameSizeError, FlowControlError, StreamStateError, CalmError,
        PeerTimeoutError, ShutdownError, InternalError, VersionError, IdentityError, ResumeRefusedError,
    )
}  # fmt: skip

_STREAM_ERRORS: Final[dict[int, type[StreamError]]] = {
    cls.default_code: cls
    for cls in (
        DeniedError, UnsupportedError, ConnectRefusedError, UnreachableError, DNSError, DialTimeoutError,
        NoRouteError, LimitError, CancelledStreamError, TargetResetError, TargetTLSError,
    )
}  # fmt: skip


def describe(code: int) -> str:
    """The code's name in words: ``connect refused``, ``application code 2147483650``, ``code 99``."""
    try:
        return Code(code).name.lower().replace("_", " ")
    except ValueError:
        return f"application code {code}" if code >= APPLICATION_CODES.start else f"code {code}"


def session_error(code: int, reason: str = "") -> SessionError:
    """The one exception class of a session code; an unknown code gives a plain SessionError."""
    return _SESSION_ERRORS.get(code, SessionError)(reason, code)


def stream_error(code: int, reason: str = "", *, refused: bool = False, retry_after: float = 0.0) -> StreamError:
    """The one exception class of a stream code; an unknown code gives a plain StreamError."""
    cls = ApplicationError if code >= APPLICATION_CODES.start else _STREAM_ERRORS.get(code, StreamError)
    error = cls(reason, code)
    error.refused = refused
    error.retry_after = retry_after
    return error
