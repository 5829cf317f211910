"""How a session goes from one connection to the next: what breaks, what is taken over, and who may.

Theory of operation. The multiplexer's ``Resumption`` has the bytes and the proofs; here are the connections they travel
on. A connection that is gone suspends the session. A client gets it another one by ``resume``: one ``Reconnection`` at a
time brings a driver of its own, and hands it over when both sides agree. At a server the new connection begins
as a session like any; when its client names another in RESUME, that one takes the driver over, and this one ends.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING

from konnektor.driver import Driver, clock
from konnektor.errors import (
    Code,
    IdentityError,
    LocalProtocolError,
    ResumeRefusedError,
    SessionClosedError,
    SessionError,
)
from konnektor.frames import Resume
from konnektor.reconnection import Reconnection
from konnektor.resumption import NO_SUCH_SESSION

if TYPE_CHECKING:
    from konnektor.session import Session

__all__ = ["Continuity"]


class Continuity:
    """One session's.

    Args:
        session: whose.
        find_session: of a server: the session that has this id, if there is one.

    Attributes:
        resumed: how often the session has gone on over another connection.
        bytes_sent, bytes_received: on connections that are gone.
    """

    def __init__(self, session: Session, find_session: Callable[[bytes], Session | None] | None) -> None:
        self._session = session
        self._find_session = find_session
        self._reconnection: Reconnection | None = None
        self.resumed = 0
        self.bytes_sent = self.bytes_received = 0

    # Without a connection

    def suspend(self, reason: str) -> None:
        """The connection is gone, or given up; the session is not."""
        session = self._session
        mux = session._mux
        session._driver.detach()
        self.bytes_sent += mux.bytes_sent
        self.bytes_received += mux.bytes_received
        session.log.info("suspended for up to %g s: %s", session.limits.resume_grace, reason)
        mux.resumption.suspend(reason, clock())
        if session.on_suspended is not None and session.suspended:
            session.on_suspended(session)

    def ended(self, error: SessionError) -> None:
        """The session is over: nothing is left to go on with."""
        if self._reconnection is not None:
            self._reconnection.session_ended(error)

    # The client's side

    async def resume(
        self, sock: socket.socket, tls: ssl.SSLContext | None, server_name: str | None, instead: Session | None
    ) -> None:
        """See ``Session.resume``."""
        session = self._session
        if not session.suspended or self._reconnection is not None:
            sock.close()
            if session.closed:
                raise SessionClosedError("the session is closed")
            why = "not suspended" if not session.suspended else "being resumed already"
            raise LocalProtocolError(f"the session is {why}")
        self._reconnection = Reconnection(session, self, instead)
        try:
            await self._reconnection.run(sock, tls, server_name)
        finally:
            self._reconnection = None

    def judge(self, ssl_object: ssl.SSLObject | None) -> None:
        """Is the peer on another connection the one that it was?

        Raises:
            KonnektorError: it is not.
        """
        session = self._session
        if session._check_peer is None:
            return
        before, name = session.ssl_object, session.peer_name
        session.ssl_object = ssl_object
        try:
            session._check_peer(session)
            if session.peer_name != name:
                raise IdentityError(f"the peer is now {session.peer_name}, and was {name}")
        finally:
            session.ssl_object, session.peer_name = before, name

    def refused(self, error: ResumeRefusedError) -> None:
        """There will be no other connection: the server has the session no more."""
        mux = self._session._mux
        mux.end(ResumeRefusedError(f"{mux.resumption.reason}, and the peer says: {error}"), None)

    # The server's side

    def requested(self, frame: Resume, nonces: bytes) -> None:
        """The client means another session: that one takes the connection over, and this one ends."""
        session = self._session
        found = self._find_session(frame.session_id) if self._find_session is not None else None
        granted = (
            found is not None
            and found.peer_name == session.peer_name
            and found._mux.resumption.may_grant(frame, nonces)
        )
        if found is not None and granted and not found.suspended:
            found._continuity.suspend("the peer came back over another connection")
        if found is None or not granted or not found.suspended:  # it may just have ended, as draining ones do
            if not session._mux.resumption.begin_afresh():
                session._mux.close(Code.RESUME_REFUSED, NO_SUCH_SESSION)
            elif not session.closed:
                session.log.info("the session that the peer would resume is not here; this one begins")
            return
        driver, session._driver = session._driver, Driver(session._connected, session._connection_lost)
        session._driver.mux = session._mux
        session.resumed_session = found
        found._continuity.adopt(driver)
        found._mux.resumption.grant(frame, nonces, clock())
        found._continuity.go_on()
        session._mux.end(SessionError("an older session goes on over its connection"), None)

    # Both

    def adopt(self, driver: Driver) -> None:
        """Takes over a connection, on which the two sides have agreed to go on with this session."""
        session, transport = self._session, driver.transport
        assert transport is not None
        session._driver = driver
        session.output_pending = driver.output_pending
        driver.hand_over(session._connected, session._connection_lost, session._mux)
        session.remote_address = transport.get_extra_info("peername")
        session.ssl_object = transport.get_extra_info("ssl_object")

    def begin(self, driver: Driver) -> None:
        """Begins on a connection that was made for another session, with the HELLO that comes next."""
        self.adopt(driver)
        assert driver.transport is not None
        self._session._connected(driver.transport)

    def go_on(self) -> None:
        """The session has gone on, over the connection that was adopted."""
        session = self._session
        if session.closed:
            # It waited for nothing but to hear that all it had sent has arrived: CLOSE is what is left.
            session._driver.close()
            return
        self.resumed += 1
        session._ping_again()
        session._driver.output_pending()
        session.log.info("resumed")
        if session.on_resumed is not None:
            session.on_resumed(session)
