"""What serves ``tcp`` streams at either end: the allow list, the dial, the splice."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from functools import partial

from konnektor.addresses import format_hostport
from konnektor.changes import Changes
from konnektor.dial import dial, reset_on_close
from konnektor.errors import StreamError
from konnektor.policy import AllowList
from konnektor.session import Session
from konnektor.splice import splice
from konnektor.stream import Stream
from konnektor.stream_types import Tcp

__all__ = ["Targets"]


class Targets:
    """Dials what ``allowed(session)`` allows, and nothing else; knows the sockets that are open.

    A socket can outlive its stream, and its session: what the peer sent last may still wait for a slow target.
    """

    def __init__(self, allowed: Callable[[Session], AllowList]) -> None:
        self._allowed = allowed
        self._open: set[socket.socket] = set()
        self._changes = Changes()

    async def serve(self, stream: Stream, request: Tcp) -> None:
        """The handler for ``Tcp``.

        The address that was checked is the address dialed. The stream is accepted once the target is connected;
        what keeps it from that is logged here in full, and told to the peer as a code.
        """
        session = stream.session
        allow = self._allowed(session)
        try:
            allow.check_name(request.host, request.port)
            sock = await dial(request.host, request.port, check=allow.checker(request.host, request.port))
        except StreamError as error:
            target = format_hostport(request.host, request.port)
            session.log.warning("refused %s a stream to %s: %s", session.peer_name, target, error)
            await stream.reject(error.code)
            return
        self._open.add(sock)
        closed = partial(self._closed, sock)
        try:
            await splice(stream, sock, on_closed=closed)
        except BaseException:
            closed()
            raise

    def _closed(self, sock: socket.socket) -> None:
        self._open.discard(sock)
        self._changes.notify()

    def abort(self) -> None:
        """Gives up what targets have not taken yet."""
        for sock in self._open:
            # The splice is told by its next call to the kernel, which fails.
            reset_on_close(sock)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    async def wait_closed(self) -> None:
        """Waits until every socket is closed. Cancelling is safe."""
        await self._changes.wait_for(lambda: not self._open)
