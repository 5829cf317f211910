"""How a session outlives its connection: suspended when it breaks, resumed over another, within the grace.

Theory of operation. While suspended the session has its streams and no connection: what is written waits, what
was sent and not acknowledged stays in the replay buffer. Streams are not told; only those that the peer has not
accepted fail after UNSETTLED_FOR, because they can be tried elsewhere. On another connection the client sends
RESUME and the server RESUMED, each with the count of sequenced frames it took in; each then sends again, verbatim
and ahead of everything sequenced, what the other does not have. ``rejoin`` has the client's first words there.
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from konnektor.errors import Code, ProtocolError, SessionError, StreamError, stream_error
from konnektor.frames import Close, Hello, HelloTLV, Resume, Resumed
from konnektor.replay import Replay, Ticket
from konnektor.settings import Settings

if TYPE_CHECKING:
    from konnektor.mux import Mux

__all__ = ["NO_SUCH_SESSION", "Resumption", "unreachable"]

NO_SUCH_SESSION: Final = "no such session"
"""Why a RESUME is refused, whatever the reason: who guesses learns nothing."""

UNSETTLED_FOR: Final = 2.0
"""Seconds after which streams that the peer has not accepted fail, once the connection is broken."""


class Resumption:
    """One session's.

    Attributes:
        ticket: what it takes to go on; None if the two sides have not agreed to it.
        replay: what may have to be sent again; None without a ticket.
        greeting: the RESUMED that goes ahead of everything else, until it is sent.
        replaying: what is being sent again, batch after batch of whole frames; None if nothing is.
        suspended: the connection broke, and another may come.
        reason: how it broke, the last time.
        rejoining: the peer wants to go on with another session over this connection: this one will never be, unless
            the other is not to be had, and the peer takes this one instead.
        client_nonce: of the HELLO that said so.
        refusal: what the peer is told in place of any other reason; None mostly.
        due: when ``check`` should be called.
    """

    __slots__ = (
        "_grace_ends",
        "_instead",
        "_mux",
        "_settle_at",
        "client_nonce",
        "greeting",
        "reason",
        "refusal",
        "rejoining",
        "replay",
        "replaying",
        "suspended",
        "ticket",
    )

    def __init__(self, mux: Mux, ticket: Ticket | None, *, offered: bool) -> None:
        self._mux = mux
        self.ticket = ticket
        # A client may send before it knows what the server offers.
        self.replay = Replay() if offered else None
        self.greeting = b""
        self.replaying: Iterator[bytes] | None = None
        self.suspended = False
        self.rejoining = False
        self.client_nonce = b""
        self._instead: tuple[Hello, Ticket | None] | None = None
        self.refusal: Close | None = None
        self.reason = ""
        self._settle_at = math.inf
        self._grace_ends = math.inf

    def agreed(self, ticket: Ticket | None, *, both: bool) -> None:
        """The peer's HELLO is here; a server's may hold a ticket."""
        if self._mux.role == "client":
            self.ticket = ticket
        if not both:
            self.ticket = None
        if self.ticket is None:
            self.replay = None

    @property
    def possible(self) -> bool:
        """Whether the session can outlive its connection."""
        return self._mux.established and self.ticket is not None

    @property
    def room(self) -> int:
        """Bytes that may be kept to be sent again: those set aside, and what the pool can spare."""
        pool = self._mux.pool
        return self._mux.limits.replay_buffer + pool.share(pool.lent)

    def book(self) -> None:
        """Takes from the pool, or gives back, what is kept beyond the bytes set aside."""
        assert self.replay is not None
        self._mux.pool.lend(self.replay.footprint - self._mux.limits.replay_buffer)

    @property
    def given_up(self) -> bool:
        """Whether the connection has been broken for so long that new streams are better opened elsewhere."""
        return self.suspended and self._settle_at == math.inf

    @property
    def due(self) -> float:
        """When something happens by itself."""
        return min(self._settle_at, self._grace_ends)

    # Without a connection

    def suspend(self, reason: str, now: float) -> None:
        """The connection broke, or is given up. Only if ``possible``."""
        assert self.possible
        assert not self.suspended
        grace = self._mux.limits.resume_grace
        self.suspended = True
        self.reason = reason
        self._settle_at = now + UNSETTLED_FOR
        self._grace_ends = now + grace
        self.greeting = b""
        self.replaying = None
        self._mux.disconnected(now)

    def check(self, now: float) -> None:
        """Does what is due."""
        if now >= self._settle_at:
            self._settle_at = math.inf
            self._mux.fail_pending()
        if now >= self._grace_ends:
            self._grace_ends = math.inf
            text = f"{self.reason}, and was not resumed within {self._mux.limits.resume_grace:g} s"
            self._mux.end(SessionError(text, Code.TIMEOUT), None)

    # The client's side of a new connection

    def request(self, nonces: bytes) -> Resume:
        """The RESUME to send; ``nonces`` are those of the two HELLOs on the new connection."""
        ticket = self.ticket
        assert ticket is not None
        assert self.suspended
        ticket.attempt += 1
        rx_seq = self._mux.inbound.acks.seq
        return Resume(ticket.session_id, ticket.attempt, rx_seq, ticket.client_mac(ticket.attempt, rx_seq, nonces))

    def confirm(self, frame: Resumed, nonces: bytes, now: float) -> None:
        """The server's RESUMED came: the session goes on over its connection.

        Raises:
            ProtocolError: it is not from whoever has the session, or claims what cannot be.
        """
        ticket, flight = self.ticket, self._mux.flight
        assert ticket is not None
        if not hmac.compare_digest(frame.mac, ticket.server_mac(ticket.attempt, frame.rx_seq, nonces)):
            raise ProtocolError("RESUMED with a wrong proof")
        if not flight.acked <= frame.rx_seq <= flight.sent:
            raise ProtocolError(f"RESUMED after {frame.rx_seq} frames, of {flight.acked} to {flight.sent}")
        self._go_on(frame.rx_seq, now)

    # The server's side

    def intended(self, hello: Hello) -> None:
        """The client's HELLO says that RESUME follows: no session of its own comes of this connection, or not yet."""
        self.rejoining = True
        self.client_nonce = hello.nonce
        self._instead = (hello, self.ticket) if HelloTLV.AFRESH in hello.tlvs else None
        self.ticket = None
        self._mux.wake()

    def begin_afresh(self) -> bool:
        """The session that RESUME names is not to be had. If the client said so, this one begins in its place; else False.

        Raises:
            ProtocolError: the client's settings are none.
        """
        if self._instead is None:
            return False
        (hello, self.ticket), self._instead = self._instead, None
        self.rejoining = False
        self._mux.outbound.hello_sent = False
        settings = Settings.from_tlvs(hello.tlvs)
        # Who is turned away now has still asked for the old session, and would go on asking. It hears that this is lost,
        # comes again with a connection of its own, and hears the reason there.
        self.refusal = Close(Code.RESUME_REFUSED, NO_SUCH_SESSION)
        try:
            self._mux.established_with(settings, None)
        finally:
            self.refusal = None
        return True

    def may_grant(self, frame: Resume, nonces: bytes) -> bool:
        """Whether a RESUME is from this session's client, made for this connection, new, and possible."""
        ticket, flight = self.ticket, self._mux.flight
        return (
            ticket is not None
            and self.possible
            and hmac.compare_digest(frame.mac, ticket.client_mac(frame.attempt, frame.rx_seq, nonces))
            and frame.attempt > ticket.attempt
            and flight.acked <= frame.rx_seq <= flight.sent
        )

    def grant(self, frame: Resume, nonces: bytes, now: float) -> None:
        """Goes on over the connection that the RESUME came on; after ``may_grant``, and suspended."""
        ticket = self.ticket
        assert ticket is not None
        ticket.attempt = frame.attempt
        rx_seq = self._mux.inbound.acks.seq
        resumed = Resumed(rx_seq, ticket.server_mac(frame.attempt, rx_seq, nonces))
        self.greeting = resumed.encode()
        self._go_on(frame.rx_seq, now)

    # Both

    def _go_on(self, rx_seq: int, now: float) -> None:
        mux = self._mux
        assert self.suspended
        assert self.replay is not None
        self.suspended = False
        self._settle_at = self._grace_ends = math.inf
        mux.liveness.resumed(now, waiting=rx_seq < mux.flight.sent)
        if rx_seq > mux.flight.acked:
            mux.acked(rx_seq, now)
        mux.flight.reconnected()
        self.book()
        self.replaying = self.replay.rest(mux.flight.delivered)
        mux.reconnected(now)


def unreachable(*, refused: bool = True) -> StreamError:
    """What becomes of streams that cannot wait for the connection; ``refused``: nothing of them was processed."""
    return stream_error(Code.UNREACHABLE, "the session's connection is broken", refused=refused)
