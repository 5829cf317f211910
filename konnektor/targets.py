"""What serves ``tcp`` and ``udp`` streams at either end: the allow list, the dial, the relay."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address
from itertools import islice
from typing import Final

from konnektor.addresses import IPAddress, Protocol, format_hostport, format_protocol, parse_host, quote
from konnektor.changes import Changes
from konnektor.connecting import Address, Dialing, begin_dial, keep_alive, literal, reset_on_close
from konnektor.dial import dial, dial_udp
from konnektor.errors import Code, ConfigurationError, DeniedError, StreamError
from konnektor.inbox import Inbox
from konnektor.mux import MuxStream
from konnektor.policy import AllowList
from konnektor.resolver import Resolver
from konnektor.serving import fail
from konnektor.session import Session
from konnektor.splice import Splice, join, splice
from konnektor.stream import Stream
from konnektor.stream_types import Tcp, Udp
from konnektor.udp_relay import IDLE, UdpRelay, relay_udp

__all__ = ["Targets"]

DIALS_A_TURN: Final = 8
"""Targets that are dialed before the loop has its turn: then what the first of them have answered goes out, and the other end works on it
while the next are dialed. Were all of them dialed first, the two ends would take turns."""


OLD: Final = 10.0
"""Seconds after which a connection, at most, is kept alive: four calls to the kernel, which the many that are over by then are spared."""
KEPT_ALIVE_A_TURN: Final = 256
"""Connections, of those that have come to that age together."""


class _Target:
    """What a socket is for.

    Attributes:
        address: which is dialed; None if the connection was gone before it could be told.
    """

    __slots__ = ("address", "host", "port", "protocol", "session", "stream")

    def __init__(
        self, session: Session, stream: MuxStream, host: str, port: int, protocol: Protocol, address: IPAddress | None
    ) -> None:
        self.session = session
        self.stream = stream
        self.host = host
        self.port = port
        self.protocol: Protocol = protocol
        self.address = address

    @property
    def inbox(self) -> Inbox:
        """The stream's sink until it is joined to the socket."""
        inbox = self.stream.sink
        assert isinstance(inbox, Inbox)
        return inbox

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
        self._resolver = Resolver()
        self._new: dict[MuxStream, tuple[Address, _Target]] = {}
        """Opened, and not dialed for yet."""
        self._scheduled = False
        self._open: dict[socket.SocketType, _Target] = {}
        self._relays: dict[socket.SocketType, UdpRelay] = {}
        self._young: dict[socket.SocketType, None] = {}
        """Of the open ones those that are not kept alive yet, the oldest first."""
        self._ageing: asyncio.TimerHandle | None = None
        self._leaving = False
        self._changes = Changes()

    def begin(self, session: Session, stream: MuxStream, request: Tcp) -> bool:
        """``serve`` where the host is an address, for which nothing needs a task."""
        try:
            address = literal(request.host, request.port)
        except ConfigurationError:
            return False
        if address is None:
            return False
        inbox = Inbox()
        stream.sink = inbox
        inbox.on_cancel = partial(self._give_up_early, stream)
        if not self._scheduled:
            self._scheduled = True
            session.loop.call_soon(self._connect_new)
        self._new[stream] = address, _Target(session, stream, request.host, request.port, "tcp", address.ip)
        return True

    def _connect_new(self) -> None:
        """Dials for the next of the streams that were opened before this turn of the loop.

        By now all that came with them is here. Each target so gets its first bytes as soon as it is connected, and works on them
        while the next one is dialed.
        """
        self._scheduled = False
        try:
            for stream in list(islice(self._new, DIALS_A_TURN)):
                new = self._new.pop(stream, None)
                if new is None:  # given up while another was dialed
                    continue
                address, target = new
                try:
                    self._connect(target, address)
                except Exception as error:  # noqa: BLE001
                    _fail(target, error)
        finally:
            # Not before: what there is to be sent by now, and what is read before the next turn, goes out ahead of it.
            if self._new and not self._scheduled:
                self._scheduled = True
                asyncio.get_running_loop().call_soon(self._connect_new)

    def _connect(self, target: _Target, address: Address) -> None:
        inbox = target.inbox
        inbox.on_cancel = None
        allow = self._allowed(target.session)
        try:
            allow.check_name(target.host, target.port)
            sock, connected = begin_dial(address)
        except StreamError as error:
            _refuse(target, error)
            return
        if connected:
            self._join(target, sock)
        else:
            dialing = Dialing(sock, address, partial(self._dialed, target, allow))
            inbox.on_cancel = partial(_give_up, target, dialing)

    def _give_up_early(self, stream: MuxStream) -> None:
        del self._new[stream]
        _drop(stream)

    def _dialed(self, target: _Target, allow: AllowList, outcome: socket.SocketType | StreamError) -> None:
        """The end of the dial that ``_connect`` began."""
        target.inbox.on_cancel = None
        try:
            if isinstance(outcome, StreamError):
                raise outcome
            self._recheck(target, outcome, allow)
            self._join(target, outcome)
        except StreamError as error:
            _refuse(target, error)
        except Exception as error:  # noqa: BLE001
            _fail(target, error)

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
                host, port, check=allow.checker(host, port, protocol), resolver=self._resolver
            )
            target = _Target(session, stream._mux, host, port, protocol, _peer_address(sock))
            self._recheck(target, sock, allow)
        except StreamError as error:
            _log_refusal(session, format_protocol(protocol) + format_hostport(_readable(host), port), error)
            await stream.reject(error.code)
            return None
        self._open[sock] = target
        return sock

    def _join(self, target: _Target, sock: socket.SocketType) -> None:
        """Joins the stream of a target to its socket, which is open from here on."""
        self._open[sock] = target
        self._young[sock] = None
        if self._ageing is None:
            self._ageing = target.session.loop.call_later(OLD, self._keep_alive)
        closed = partial(self._closed, sock)
        try:
            join(target.stream, sock, on_closed=closed)
        except BaseException:
            closed()
            raise

    def _keep_alive(self) -> None:
        self._ageing = None
        for sock in list(islice(self._young, KEPT_ALIVE_A_TURN)):
            del self._young[sock]
            with contextlib.suppress(OSError):  # broken meanwhile
                keep_alive(sock)
        if self._young:
            self._ageing = asyncio.get_running_loop().call_later(0, self._keep_alive)

    def _recheck(self, target: _Target, sock: socket.SocketType, allow: AllowList) -> None:
        """Closes what was dialed by rules that have changed meanwhile, and raises DeniedError, unless the new ones allow it."""
        if self._allowed(target.session) is not allow:
            try:
                self._check(target)
            except BaseException:
                sock.close()
                raise

    def _check(self, target: _Target) -> None:
        """Raises DeniedError if the rules as they are now do not allow what was dialed."""
        if target.address is None:
            raise DeniedError(f"{target}: nobody knows any more what address this was")
        self._allowed(target.session).check_address(target.host, target.address, target.port, target.protocol)

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

    def _closed(self, sock: socket.SocketType) -> None:
        self._open.pop(sock, None)
        self._young.pop(sock, None)
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
        if self._ageing is not None:
            self._ageing.cancel()
            self._ageing = None


def _give_up(target: _Target, dialing: Dialing) -> None:
    """The peer has, or the session is over: the answer is settled."""
    dialing.cancel()
    _drop(target.stream)


def _drop(stream: MuxStream) -> None:
    """Nobody is to have what came, nor what may come."""
    inbox = stream.sink
    assert isinstance(inbox, Inbox)
    inbox.on_cancel = None
    inbox.clear()
    stream.release()


def _refuse(target: _Target, error: StreamError) -> None:
    _log_refusal(target.session, str(target), error)
    target.inbox.clear()
    target.stream.refuse(error.code)
    target.stream.release()


def _fail(target: _Target, error: Exception) -> None:
    if isinstance(inbox := target.stream.sink, Inbox):
        inbox.clear()
    fail(target.session, target.stream, error)


def _log_refusal(session: Session, asked: str, error: StreamError) -> None:
    session.log.warning("refused %s a stream to %s: %s", session.peer_name, asked, error)


def _readable(host: str) -> str:
    """A host as it may stand in the log: what a peer calls one can be any text."""
    try:
        parse_host(host)
    except ConfigurationError:
        return quote(host)
    return host


def _peer_address(sock: socket.SocketType) -> IPAddress | None:
    try:
        return ip_address(sock.getpeername()[0].partition("%")[0])
    except OSError:  # reset already
        return None
