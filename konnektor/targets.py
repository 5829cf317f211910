"""What serves ``tcp`` and ``udp`` streams at either end: the allow list, the dial, the relay."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address
from typing import NamedTuple

from konnektor.addresses import Protocol, format_hostport, format_protocol
from konnektor.changes import Changes
from konnektor.dial import dial, dial_udp, reset_on_close
from konnektor.errors import Code, DeniedError, StreamError
from konnektor.mux import MuxStream
from konnektor.policy import AllowList
from konnektor.session import Session
from konnektor.splice import Splice, splice
from konnektor.stream import Stream
from konnektor.stream_types import Tcp, Udp
from konnektor.udp_relay import IDLE, UdpRelay, relay_udp

__all__ = ["Targets"]


class _Target(NamedTuple):
    """What a socket is for."""

    session: Session
    stream: MuxStream
    host: str
    port: int
    protocol: Protocol
    address: str | None
    """Which was dialed; None if the connection was gone before it could be told."""

    def __str__(self) -> str:
        return format_protocol(self.protocol) + format_hostport(self.host, self.port)


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
        self._open: dict[socket.socket, _Target] = {}
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
            relay = await relay_udp(stream, sock, idle=self.udp_idle, on_closed=partial(self._closed, sock))
            self._relays[sock] = relay
            if self._leaving:
                relay.leave()

    async def _dial(self, stream: Stream, request: Tcp | Udp) -> socket.socket | None:
        """A socket for the target, which is open from here on, or None: then the stream is refused."""
        session, host, port = stream.session, request.host, request.port
        allow = self._allowed(session)
        protocol: Protocol = "udp" if isinstance(request, Udp) else "tcp"
        try:
            allow.check_name(host, port, protocol)
            sock = await (dial_udp if protocol == "udp" else dial)(
                host, port, check=allow.checker(host, port, protocol)
            )
            target = _Target(session, stream._mux, host, port, protocol, _peer_address(sock))
            if self._allowed(session) is not allow:  # the rules have changed meanwhile
                try:
                    self._check(target)
                except DeniedError:
                    sock.close()
                    raise
        except StreamError as error:
            asked = format_protocol(protocol) + format_hostport(host, port)
            session.log.warning("refused %s a stream to %s: %s", session.peer_name, asked, error)
            await stream.reject(error.code)
            return None
        self._open[sock] = target
        return sock

    def _check(self, target: _Target) -> None:
        """Raises DeniedError if the rules as they are now do not allow what was dialed."""
        if target.address is None:
            raise DeniedError(f"{target}: nobody knows any more what address this was")
        address = ip_address(target.address.partition("%")[0])
        self._allowed(target.session).check_address(target.host, address, target.port, target.protocol)

    def judge(self) -> None:
        """The rules have changed: what they no longer allow ends, for its peer with DENIED."""
        for target in list(self._open.values()):
            try:
                self._check(target)
            except DeniedError as error:
                target.session.log.warning("ended a stream of %s to %s: %s", target.session.peer_name, target, error)
                target.stream.break_off(DeniedError("no longer allowed"), Code.DENIED)
                if isinstance(joint := target.stream.sink, Splice):
                    joint.break_off()  # the socket may have outlived what the stream had to say

    def _closed(self, sock: socket.socket) -> None:
        self._open.pop(sock, None)
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


def _peer_address(sock: socket.socket) -> str | None:
    try:
        return str(sock.getpeername()[0])
    except OSError:  # reset already
        return None
