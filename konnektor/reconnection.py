"""One attempt to get a suspended session another connection."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import ssl
from typing import TYPE_CHECKING

from konnektor.driver import Driver
from konnektor.errors import (
    Code,
    HandshakeError,
    KonnektorError,
    ResumeRefusedError,
    SessionClosedError,
    SessionError,
)
from konnektor.rejoin import Rejoin

if TYPE_CHECKING:
    from konnektor.continuity import Continuity
    from konnektor.session import Session

__all__ = ["Reconnection"]


class Reconnection:
    """A connection on its way to becoming the session's; what ``Rejoin`` reports to.

    Args:
        instead: gets the connection if the server has the session no more.
    """

    def __init__(self, session: Session, continuity: Continuity, instead: Session | None) -> None:
        self._session = session
        self._continuity = continuity
        self._instead = instead
        self._driver = Driver(self._connected, self._lost)
        self._rejoin = Rejoin(session._mux, self, os.urandom(32), None if instead is None else instead._mux)
        self._driver.mux = self._rejoin
        self._done: asyncio.Future[None] = session.loop.create_future()
        self._reason: Exception | None = None
        self._deadline = asyncio.timeout(2 * session.limits.hello_timeout)  # for TLS, and for what follows
        self.output_pending = self._driver.output_pending

    async def run(self, sock: socket.socket, tls: ssl.SSLContext | None, server_name: str | None) -> None:
        """See ``Session.resume``."""
        session = self._session
        within = session.limits.hello_timeout
        try:
            async with self._deadline:
                await self._driver.connect("client", sock, tls, server_name, within=within)
                await self._done
            if self._rejoin.error is not None:
                raise self._rejoin.error
        except BaseException as error:
            if self._driver.mux is not self._rejoin:
                if isinstance(error, TimeoutError):  # a moment too late
                    if self._rejoin.error is None:
                        return
                    raise self._rejoin.error from None
                raise
            self._driver.detach()
            if session.closed and isinstance(error, OSError | SessionError):
                raise SessionClosedError("the session ended meanwhile") from error
            if isinstance(error, ResumeRefusedError):
                self._continuity.refused(error)
                raise
            if isinstance(error, TimeoutError):
                raise HandshakeError(f"not resumed within {2 * within:g} s") from error
            if isinstance(error, OSError | SessionError):
                raise HandshakeError(str(error)) from (self._reason or error)
            raise

    def session_ended(self, error: SessionError) -> None:
        """Nothing is left to go on with: the server, which may just have granted it, hears of that."""
        waiting = not self._done.done() and not self._deadline.expired()
        self._rejoin.close(error.code, error.reason)
        if waiting:
            self._deadline.reschedule(-math.inf)  # it may not even be connected

    def _connected(self, transport: asyncio.Transport) -> None:
        try:
            self._continuity.judge(transport.get_extra_info("ssl_object"))
        except KonnektorError as error:
            self._reason = error
            self._rejoin.close(Code.IDENTITY, str(error))

    def _lost(self, exc: Exception | None) -> None:
        self._reason = self._reason or exc
        self._rejoin.connection_lost(f"connection lost: {exc}" if exc is not None else "connection closed by the peer")

    def rejoined(self) -> None:
        """The session goes on."""
        self._continuity.adopt(self._driver)
        self._continuity.go_on()
        if not self._done.done():
            self._done.set_result(None)

    def began_afresh(self) -> None:
        """Another session goes on in its place."""
        error, instead = self._rejoin.error, self._instead
        assert isinstance(error, ResumeRefusedError)
        assert instead is not None
        self._continuity.refused(error)
        if instead.closed:
            self._driver.close()
        else:
            instead._continuity.begin(self._driver)
        if not self._done.done():
            self._done.set_result(None)

    def rejoin_failed(self, error: SessionError) -> None:
        """It does not, over this connection."""
        if not self._done.done():
            self._done.set_result(None)
        self._driver.close()
