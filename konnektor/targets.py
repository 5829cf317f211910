"""What serves ``tcp`` and ``udp`` streams at either end: the allow list, the dial, the relay."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from functools import partial

from konnektor.addresses import Protocol, format_hostport, format_protocol
from konnektor.changes import Changes
from konnektor.dial import dial, dial_udp, reset_on_close
from konnektor.errors import StreamError
from konnektor.policy import AllowList
from konnektor.session import Session
from konnektor.splice import splice
from konnektor.stream import Stream
from konnektor.stream_types import Tcp, Udp
from konnektor.udp_relay import IDLE, UdpRelay, relay_udp

__all__ = ["Targets"]


class Targets:
    """Dials what ``allowed(session)`` allows, and nothing else; knows the sockets that are open.

    A socket can outlive its stream, and its session: what the peer sent last may still wait for a slow target.

    Args:
        allowed: what the streams of a session may reach.
        udp_idle: seconds without a datagram after which a ``udp`` stream ends.
    """

    def __init__(self, allowed: Callable[[Session], AllowList], udp_idle: float = IDLE) -> None:
        self._allowed = allowed
        self.udp_idle = udp_idle
        self._open: set[socket.socket] = set()
        self._relays: dict[socket.socket, UdpRelay] = {}
        self._leaving = False
        self._changes = Changes()

    async def serve(self, stream: Stream, request: Tcp) -> None:
        """The handler for ``Tcp``.

        The address that was checked is the address dialed. The stream is accepted once the target is connected;
        what keeps it from that is logged here in full, and told to the peer as a code.
        """
        sock = await self._dial(stream, request)
        if sock is None:
            return
        self._open.add(sock)
        closed = partial(self._closed, sock)
        try:
            await splice(stream, sock, on_closed=closed)
        except BaseException:
            closed()
            raise

    async def serve_udp(self, stream: Stream, request: Udp) -> None:
        """The handler for ``Udp``: as ``serve``, but that there is nobody to connect to, and no end but silence."""
        sock = await self._dial(stream, request)
        if sock is not None:
            self._open.add(sock)
            relay = await relay_udp(stream, sock, idle=self.udp_idle, on_closed=partial(self._closed, sock))
            self._relays[sock] = relay
            if self._leaving:
                relay.leave()

    async def _dial(self, stream: Stream, request: Tcp | Udp) -> socket.socket | None:
        """A socket for the target, or None: then the stream is refused."""
        session, host, port = stream.session, request.host, request.port
        allow = self._allowed(session)
        protocol: Protocol = "udp" if isinstance(request, Udp) else "tcp"
        try:
            allow.check_name(host, port, protocol)
            return await (dial_udp if protocol == "udp" else dial)(
                host, port, check=allow.checker(host, port, protocol)
            )
        except StreamError as error:
            target = format_protocol(protocol) + format_hostport(host, port)
            session.log.warning("refused %s a stream to %s: %s", session.peer_name, target, error)
            await stream.reject(error.code)
            return None

    def _closed(self, sock: socket.socket) -> None:
        self._open.discard(sock)
        self._relays.pop(sock, None)
        self._changes.notify()

    def leave(self) -> None:
        """This end shuts down: of UDP, which has no end, what is silent is over soon."""
        self._leaving = True
        for relay in list(self._relays.values()):
            relay.leave()

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
