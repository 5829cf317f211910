"""The client's first words on a new connection, when it means to go on with a session whose old one broke.

Theory of operation. HELLO says so (RESUME_INTENT), and the server, which allocates no session then, answers with
its own. RESUME proves that this is the session's client and says how much of the server's it has; RESUMED
proves the same of the server. From there the connection is the multiplexer's. Nothing else may be said
before; a refusal is a CLOSE, and all refusals look alike.

A server that has the session no more, after a restart say, may begin another on the same connection, if the client has one
ready and says so (AFRESH): a second HELLO in place of RESUMED. A TLS handshake is most of what a connection costs, and after a
restart all clients come at once.

``Rejoin`` stands in for the multiplexer at the driver, and has the methods the driver calls.
"""

from __future__ import annotations

import math
from typing import Protocol

from konnektor.errors import Code, ProtocolError, SessionError, VersionError, session_error
from konnektor.frames import (
    HEADER,
    HEADER_SIZE,
    VERSION,
    Buffer,
    Close,
    Frame,
    FrameType,
    Hello,
    HelloTLV,
    Resumed,
    check_header,
    decode,
)
from konnektor.mux import Mux
from konnektor.resumption import NO_SUCH_SESSION

__all__ = ["Rejoin", "RejoinHandler"]


class RejoinHandler(Protocol):
    """What ``Rejoin`` tells its driver."""

    def output_pending(self) -> None:
        """There is something to send."""

    def rejoined(self) -> None:
        """The multiplexer goes on: what comes next is for it."""

    def began_afresh(self) -> None:
        """The session is lost, and the multiplexer that was ready in its place goes on: what comes next is for that."""

    def rejoin_failed(self, error: SessionError) -> None:
        """Not over this connection (the session may try another), or, with a ResumeRefusedError, never again.

        What ``data_to_send`` still gives should be written, then the connection closed.
        """


class Rejoin:
    """One attempt to go on with ``mux``'s session.

    Args:
        mux: suspended.
        nonce: 32 random bytes.
        instead: new, for a session that may begin if this one is not to be had.
    """

    __slots__ = (
        "_handler",
        "_instead",
        "_mux",
        "_nonce",
        "_nonces",
        "_outgoing",
        "awake",
        "error",
        "hello_received",
        "pause_reading_until",
    )

    def __init__(self, mux: Mux, handler: RejoinHandler, nonce: bytes, instead: Mux | None = None) -> None:
        self._mux = mux
        self._handler = handler
        self._instead = instead
        self._nonce = nonce
        self._nonces = b""
        tlvs = {**mux.settings.to_tlvs(), int(HelloTLV.RESUME_INTENT): b""}
        if instead is not None:
            tlvs = {**instead.settings.to_tlvs(), int(HelloTLV.RESUME_INTENT): b"", int(HelloTLV.AFRESH): b""}
        self._outgoing = Hello(VERSION, VERSION, nonce, tlvs).encode()
        self.awake = True
        self.hello_received = False
        self.pause_reading_until = -math.inf
        self.error: SessionError | None = None

    def data_to_send(self, now: float) -> bytes:
        """What to write next."""
        self.awake = False
        outgoing, self._outgoing = self._outgoing, b""
        return outgoing

    def chunks_to_send(self, now: float) -> list[Buffer]:
        """The same, as ``Mux.chunks_to_send`` has it."""
        outgoing = self.data_to_send(now)
        return [outgoing] if outgoing else []

    def receive(self, data: Buffer, now: float) -> int:
        """Takes in whole frames, RESUMED at the most; what follows it is the multiplexer's, and so is a second HELLO."""
        view = memoryview(data)
        pos = 0
        try:
            while self.error is None and len(view) - pos >= HEADER_SIZE:
                kind, flags, length, stream_id = HEADER.unpack_from(view, pos)
                check_header(kind, flags, length, stream_id, self._mux.limits.max_frame)
                body = pos + HEADER_SIZE
                if body + length > len(view):
                    break
                if kind == FrameType.HELLO and self.hello_received and self._instead is not None:
                    self.error = session_error(Code.RESUME_REFUSED, NO_SUCH_SESSION)
                    self._instead.outbound.hello_sent = True
                    self._handler.began_afresh()
                    return pos
                pos = body + length
                frame = decode(kind, flags, stream_id, view[body:pos], self._mux.limits.max_frame)
                if self._take(frame, now):
                    break
        except (ProtocolError, VersionError) as error:
            self._fail(error, Close(error.code, error.reason).encode())
        # After the end nothing is kept for later, or a peer that talks on would fill the driver's buffer.
        return pos if self.error is None else len(view)

    def write_blocked(self, now: float) -> None:
        """No matter: the attempt as a whole has a deadline."""

    def write_resumed(self) -> None:
        """No matter, too."""

    def close(self, code: int, reason: str = "") -> None:
        """Gives the attempt up."""
        self._fail(session_error(code, reason), Close(code, reason).encode())

    def connection_lost(self, reason: str) -> None:
        """The new connection broke, too."""
        self._fail(SessionError(reason), b"")

    def _take(self, frame: Frame | None, now: float) -> bool:
        """One frame's effect. True if the multiplexer has taken over."""
        match frame:
            case Hello(vmin, vmax, nonce, tlvs) if not self.hello_received:
                if HelloTLV.RESUME_INTENT in tlvs:
                    raise ProtocolError("RESUME_INTENT in a server's HELLO")
                if not vmin <= VERSION <= vmax:
                    raise VersionError(f"the session speaks version {VERSION}, the peer now {vmin} to {vmax}")
                self.hello_received = True
                self._nonces = self._nonce + nonce
                self._outgoing = self._mux.resumption.request(self._nonces).encode()
                self.awake = True
                self._handler.output_pending()
            case Resumed() if self.hello_received:
                self._mux.resumption.confirm(frame, self._nonces, now)
                self._handler.rejoined()
                return True
            case Close(code, text):
                self._fail(session_error(code, text), b"")
            case None:
                pass  # ignorable
            case _:
                raise ProtocolError(f"{type(frame).__name__.upper()} while a session is being resumed")
        return False

    def _fail(self, error: SessionError, outgoing: bytes) -> None:
        if self.error is None:
            self.error = error
            self._outgoing = outgoing
            self.awake = bool(outgoing)
            self._handler.rejoin_failed(error)
