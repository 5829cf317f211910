"""Session: one connection with its multiplexer, its streams and its tasks."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import ssl
from collections.abc import Callable, Coroutine, MutableMapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final, Self, TypeVar

from konnektor.addresses import format_hostport
from konnektor.continuity import Continuity
from konnektor.driver import Alarm, Driver, clock
from konnektor.errors import (
    CalmError,
    Code,
    HandshakeError,
    KonnektorError,
    SessionClosedError,
    SessionError,
    SessionLost,
    describe,
)
from konnektor.frames import Feature, Resume
from konnektor.handlers import Handlers
from konnektor.handshake import explain
from konnektor.inbox import Inbox
from konnektor.limits import Limits
from konnektor.listener import StreamListener
from konnektor.mux import Mux, MuxStream, Role, Sink
from konnektor.replay import KEY_SIZE, SESSION_ID_SIZE, Ticket
from konnektor.serving import Classify, Serving
from konnektor.settings import Settings
from konnektor.stream import Stream
from konnektor.stream_types import StreamType, Tcp, Udp, check_request
from konnektor.transport import StreamTransport

__all__ = ["Session", "SessionStats"]

T = TypeVar("T", bound=StreamType)
P = TypeVar("P", bound=asyncio.BaseProtocol)

SOFTWARE: Final = f"konnektor/{version('konnektor-tunnel')}"
INSTANCE: Final = os.urandom(16)
"""Tells the peer whether a second connection of our name comes from this process."""

logger: Final = logging.getLogger("konnektor.session")
_numbers = itertools.count(1)


class _Log(logging.LoggerAdapter[logging.Logger]):
    """Puts the session in front of each line, with its peer's name once that is known."""

    def __init__(self, session: Session) -> None:
        super().__init__(logger, {})
        self._session = session

    def process(self, msg: str, kwargs: MutableMapping[str, Any]) -> tuple[str, MutableMapping[str, Any]]:
        session = self._session
        name = session.peer_name.replace("%", "?")  # a part of the format
        kwargs["extra"] = {**(kwargs.get("extra") or {}), **session._log_fields}
        return f"[{session.number}{name and ' ' + name}] {msg}", kwargs


@dataclass(frozen=True, slots=True)
class SessionStats:
    """A session's counters at one moment. Sizes are bytes, times seconds.

    Attributes:
        streams: open now.
        bytes_sent, bytes_received: of frames, below TLS, on all its connections.
        rtt: smoothed round trip; 0 before it was measured.
        in_flight: sent and not acknowledged.
        granted: what peers may still send, or have sent unread, beyond each stream's first window.
        granted_idle: the part of it that streams hold which have had no use for it in the last 30 s.
        pool_free: of the receive pool, neither reserved nor granted, nor lent to what was sent and not acknowledged.
        datagrams_sent, datagrams_received: on the wire, ever.
        datagrams_dropped: thrown away here, ever: pushed out by newer ones, or nobody could take them.
        resumed: how often it went on over another connection.
    """

    streams: int
    bytes_sent: int
    bytes_received: int
    rtt: float
    in_flight: int
    granted: int
    granted_idle: int
    pool_free: int
    datagrams_sent: int
    datagrams_received: int
    datagrams_dropped: int
    resumed: int


class Session:
    """One session with a peer. Either side opens streams.

    Made by ``Worker`` and ``ControlPlane``, by ``Session.client`` and ``Session.server`` on a socket of your own, or
    by ``testing.memory_session_pair``. An async context manager: leaving it closes the session.

    Attributes:
        number: counts this process's sessions, for logs.
        limits: as given.
        peer_name: who the peer is, by its certificate; empty without one.
        remote_address: as the socket says.
        ssl_object: of the connection, None before it is there and without TLS.
        loop: the event loop it runs on.
        resumed_session: the older session that went on over this one's connection, whereupon this one ended.
        on_goaway: called when the peer drains.
        on_suspended: called when the connection broke and the session waits for another.
        on_resumed: called when it has one.
        on_ended: called once, when the session is over; its connection may take a moment more to close.
    """

    def __init__(
        self,
        role: Role,
        *,
        limits: Limits | None = None,
        handlers: Handlers | None = None,
        settings: Settings | None = None,
        check_peer: Callable[[Session], None] | None = None,
        check_hello: Callable[[Session], None] | None = None,
        find_session: Callable[[bytes], Session | None] | None = None,
        classify: Classify | None = None,
    ) -> None:
        self.loop: Final = asyncio.get_running_loop()
        self.number = next(_numbers)
        self.limits = limits or Limits()
        self.handlers = handlers if handlers is not None else Handlers()
        self.peer_name = ""
        self.remote_address: Any = None
        self.ssl_object: ssl.SSLObject | None = None
        self.peer_settings: Settings | None = None
        self._role: Role = role
        self._check_peer = check_peer
        self._check_hello = check_hello
        self._tasks: set[asyncio.Task[None]] = set()
        self._pings: dict[int, list[asyncio.Future[float]]] = {}
        self._hello: asyncio.Future[None] = self.loop.create_future()
        self._closed: asyncio.Future[None] = self.loop.create_future()
        self._lost_reason: Exception | None = None
        self._closed_here = False
        self._classify = classify
        self._serving = Serving(self, classify)
        self._continuity = Continuity(self, find_session)
        self.resumed_session: Session | None = None
        self.on_goaway: Callable[[Session], None] | None = None
        self.on_suspended: Callable[[Session], None] | None = None
        self.on_resumed: Callable[[Session], None] | None = None
        self.on_ended: Callable[[Session], None] | None = None
        self.log = _Log(self)
        self._driver = Driver(self._connected, self._connection_lost)
        self._alarm = Alarm(self._due, self._failed)
        # Straight to the driver and the timer: called once or twice in every turn of the loop.
        self.output_pending = self._driver.output_pending
        self.deadline_moved = self._alarm.set
        settings = settings or Settings.of(self.limits, software=SOFTWARE, instance=INSTANCE)
        grants = role == "server" and settings.features & Feature.RESUME
        self._mux = Mux(
            role,
            self,
            self.limits,
            settings,
            nonce=os.urandom(32),
            now=clock(),
            ticket=Ticket(os.urandom(SESSION_ID_SIZE), os.urandom(KEY_SIZE)) if grants else None,
        )
        self._driver.mux = self._mux

    def __repr__(self) -> str:
        state = (
            "closed" if self._mux.error
            else "suspended" if self.suspended
            else "draining" if self._mux.draining
            else "up"
        )  # fmt: skip
        return f"<Session {self.number} with {self.peer_name or self.remote_address} {state}>"

    @property
    def _log_fields(self) -> dict[str, Any]:
        """What records of the log say of the session in fields of their own (``extra=``), as ``--log-format json`` shows."""
        return {"session": self.number, "peer": self.peer_name}

    def _peer(self) -> str:
        """The peer, as a sentence calls it."""
        address = self.remote_address
        where = f" at {format_hostport(*address[:2])}" if isinstance(address, tuple) else ""
        return f"{self.peer_name or 'the peer'}{where}"

    # Making one

    @classmethod
    async def client(
        cls,
        sock: socket.socket,
        *,
        tls: ssl.SSLContext | None = None,
        server_name: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """A session over a connected socket of yours, as the side that dialed.

        Without ``tls`` nothing is encrypted or authenticated: for tests, or inside something that is.

        Args:
            sock: connected; it belongs to the session from now on, whatever happens.
            tls: as ``TLSFiles.client_context`` makes it.
            server_name: what the server's certificate must name; needed with ``tls``.
            kwargs: ``limits``, ``handlers``, ``settings``.

        Raises:
            HandshakeError: no session came of it.
        """
        self = cls("client", **kwargs)
        await self.connect(sock, tls, server_name)
        await self.wait_established()
        return self

    @classmethod
    async def server(cls, sock: socket.socket, *, tls: ssl.SSLContext | None = None, **kwargs: Any) -> Self:
        """As ``client``, as the side that accepted."""
        self = cls("server", **kwargs)
        await self.connect(sock, tls)
        await self.wait_established()
        return self

    async def connect(
        self, sock: socket.socket, tls: ssl.SSLContext | None = None, server_name: str | None = None
    ) -> None:
        """Gives a session that was made without one its connection; arguments and errors as ``client``.

        Does not wait for the peer's HELLO. Cancelled, it drops the connection.
        """
        try:
            await self._driver.connect(self._role, sock, tls, server_name, within=self.limits.hello_timeout)
        except BaseException as error:
            with contextlib.suppress(RuntimeError):
                self.abort()
            # uvloop has closed what it was still connecting, and says so to nobody.
            self._driver.connection_lost(None)
            if isinstance(error, OSError):
                raise HandshakeError(str(error)) from error
            raise

    async def resume(
        self,
        sock: socket.socket,
        tls: ssl.SSLContext | None = None,
        server_name: str | None = None,
        *,
        instead: Session | None = None,
    ) -> None:
        """Goes on over another connection to the same server; arguments as ``client``.

        For a session that is ``suspended``. Without success it stays so, and another attempt may be made, until
        ``limits.resume_grace`` is over; cancelled, too.

        Args:
            instead: a client's session without a connection. If the server has the old one no more (it was restarted,
                say), this one may begin on the same connection, which spares a second TLS handshake. Then it is
                up, or soon will be (``wait_established``), when ResumeRefusedError is raised. If this was cancelled
                meanwhile, its ``remote_address`` tells: it is None until it has a connection.

        Raises:
            HandshakeError: not over this connection; its ``__cause__`` says why.
            ResumeRefusedError: the server has the session no more, and now it is over here, too.
            SessionClosedError: it was over before, or ended meanwhile.
            LocalProtocolError: it is not suspended, or another attempt is under way.
        """
        await self._continuity.resume(sock, tls, server_name, instead)

    def protocol(self) -> Driver:
        """The asyncio protocol of the session, for a server's protocol factory."""
        return self._driver

    async def wait_established(self) -> None:
        """Waits for the peer's HELLO. Cancelled, it drops the connection.

        Raises:
            HandshakeError: the session ended first; its ``__cause__`` says why.
        """
        try:
            await asyncio.shield(self._hello)
        except asyncio.CancelledError:
            self.abort()
            raise
        error = self._mux.error
        if error is not None and self.resumed_session is None:
            cause = self._lost_reason or error
            # "No error" is no sentence: the peer's HELLO and its goodbye may come in one reading.
            text = explain(cause, self._peer()) if error.code == Code.NO_ERROR else str(error)
            raise HandshakeError(text) from cause

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # Streams

    async def open(
        self,
        request: StreamType,
        *,
        early: bool = False,
        deadline: float | None = None,
        priority: int | None = None,
        weight: int | None = None,
    ) -> Stream:
        """Opens a stream, and waits until the peer accepts it. Cancelling withdraws the request.

        Args:
            early: return at once; data may be sent before the peer's answer, and a refusal breaks the stream.
            deadline: seconds that the peer may take, ``Limits.open_deadline`` by default.
            priority: class 0 interactive, 1 default, 2 bulk; by the endpoint's rules, or the type's own, by default.
            weight: of its class's share, compared with others of that class, 1 to 255; 1 by default.

        Raises:
            ConfigurationError: this is no request, or a field is not what its type takes; nothing was sent.
            LocalProtocolError: there is no such class or weight.
            StreamError: the peer refused; one class per reason.
            SessionClosedError: the session is over or draining.
            SessionLost: the session ended while waiting.
        """
        inbox = Inbox()
        mux_stream = self.open_sink(request, inbox, deadline=deadline, priority=priority, weight=weight)
        stream = Stream(self, mux_stream, inbox, request)
        if not early:
            try:
                await stream.opened()
            except BaseException:
                stream.reset()
                raise
        return stream

    async def open_tcp(self, host: str, port: int, **kwargs: Any) -> Stream:
        """Opens a TCP connection from the peer to ``host:port``; arguments and errors as ``open``.

        Raises:
            ConfigurationError: ``host`` is neither an IP address nor a host name, or ``port`` is not 1 to 65535.
        """
        return await self.open(Tcp(host, port), **kwargs)

    async def open_udp(self, host: str, port: int, **kwargs: Any) -> Stream:
        """Opens a UDP socket at the peer, connected to ``host:port``; arguments and errors as ``open``.

        Its datagrams are ``Stream.send_datagram`` and ``Stream.receive_datagram``.

        Raises:
            ConfigurationError: as ``open_tcp``.
            UnsupportedError: the peer has no datagrams, too.
        """
        return await self.open(Udp(host, port), **kwargs)

    def open_sink(
        self,
        request: StreamType,
        sink: Sink,
        *,
        deadline: float | None = None,
        priority: int | None = None,
        weight: int | None = None,
    ) -> MuxStream:
        """Opens a stream whose events go to a sink of yours, without waiting; for relays like ``Splice``."""
        check_request(request)
        rule = self._classify(request) if self._classify is not None and priority is None and weight is None else None
        if rule is not None:
            priority, weight = rule
        stream = self._mux.open(
            request.name,
            request.encode(),
            sink,
            now=clock(),
            priority=request.priority if priority is None else priority,
            weight=1 if weight is None else weight,
            deadline=deadline,
            datagrams=request.datagrams,
            repeatable=request.repeatable,
        )
        stream.pinned = rule is not None
        return stream

    async def create_connection(
        self, protocol_factory: Callable[[], P], host: str, port: int, **kwargs: Any
    ) -> tuple[asyncio.Transport, P]:
        """As ``loop.create_connection``, to ``host:port`` from the peer; arguments and errors as ``open``."""
        async with AsyncExitStack() as stack:
            # A protocol that cannot be made leaves no stream behind.
            stream = await stack.enter_async_context(await self.open_tcp(host, port, **kwargs))
            protocol = protocol_factory()
            stack.pop_all()
        return StreamTransport(stream, protocol), protocol

    def listen(self, request: type[T]) -> StreamListener[T]:
        """Serves this session's streams of a type by an anyio ``Listener``: ``serve(f)`` runs ``f(stream)`` for each.

        Raises:
            ConfigurationError: the type is none, or its name.
            LocalProtocolError: the type has a handler or a listener already.
            SessionClosedError: the session is over.
        """
        return self._serving.listen(request)

    # Asking

    @property
    def closed(self) -> bool:
        """Whether the session has ended."""
        return self._mux.error is not None

    @property
    def draining(self) -> bool:
        """Whether either side is going away: no new streams."""
        return self._mux.draining

    @property
    def suspended(self) -> bool:
        """Whether the connection is broken and the session waits for another."""
        return self._mux.resumption.suspended and self._mux.error is None

    @property
    def session_id(self) -> bytes:
        """What a client names to resume the session; empty if it cannot be."""
        ticket = self._mux.resumption.ticket
        return ticket.session_id if ticket is not None else b""

    @property
    def error(self) -> SessionError | None:
        """Why the session ended; None while it lives."""
        return self._mux.error

    @property
    def stream_count(self) -> int:
        """Streams open now."""
        return len(self._mux.streams)

    @property
    def silent_for(self) -> float:
        """Seconds since the peer was last heard."""
        return clock() - self._mux.received_at

    @property
    def overdue(self) -> bool:
        """Whether the peer has been silent past the liveness deadline; the session is given up in a moment, if it stays so."""
        return self._mux.liveness.overdue(clock(), self._mux.flight.rtt)

    def stats(self) -> SessionStats:
        """Counters as they are now."""
        mux = self._mux
        return SessionStats(
            streams=len(mux.streams),
            bytes_sent=self._continuity.bytes_sent + mux.bytes_sent,
            bytes_received=self._continuity.bytes_received + mux.bytes_received,
            rtt=mux.flight.rtt,
            in_flight=mux.flight.in_flight,
            granted=mux.pool.extra,
            granted_idle=mux.idle_credit(clock()),
            pool_free=mux.pool.free,
            datagrams_sent=mux.datagrams.sent,
            datagrams_received=mux.datagrams.received,
            datagrams_dropped=mux.datagrams.dropped,
            resumed=self._continuity.resumed,
        )

    async def ping(self) -> float:
        """Round-trip time in seconds, of a PING sent now. Cancelling is safe.

        Ten at once are sent without delay, and then three a second; calls that wait share the next one.

        Raises:
            SessionError: the session ended first.
            SessionClosedError: it had ended before.
        """
        if self.closed:
            raise SessionClosedError("the session is closed")
        future: asyncio.Future[float] = self.loop.create_future()
        self._pings.setdefault(self._mux.ping(), []).append(future)
        return await future

    # Ending

    async def drain(self, grace: float) -> None:
        """GOAWAY: no new streams; open ones have ``grace`` seconds. Returns when the session is closed.

        Cancelled, the drain goes on by itself.
        """
        self.start_drain(grace)
        await self.wait_closed()

    def start_drain(self, grace: float, reason: str = "") -> None:
        """As ``drain``, without waiting."""
        self._mux.drain(grace, clock(), reason=reason)

    def close(self, code: int = Code.NO_ERROR, reason: str = "") -> None:
        """Ends the session now, without waiting: every stream breaks with SessionLost, CLOSE says why."""
        self._closed_here = True
        if code == Code.NO_ERROR and not self._hello.done():
            self._lost_reason = SessionClosedError("this side closed the session before it was up")
        self._mux.close(code, reason)

    def abort(self) -> None:
        """Drops the connection without a word."""
        try:
            self._mux.connection_lost("dropped by this side")
        finally:
            self._driver.abort()

    async def aclose(self) -> None:
        """Ends the session now and waits until connection and tasks are gone. Cancelled, it drops the connection.

        A handler of the session's own that calls it is cancelled, as all are.
        """
        self.close()
        try:
            await self.wait_closed()
        except asyncio.CancelledError:
            if asyncio.current_task() not in self._tasks:
                self.abort()
            raise

    async def wait_closed(self) -> None:
        """Waits until the session has ended, its connection is closed and its tasks are done. Cancelling is safe."""
        await asyncio.shield(self._closed)
        current = asyncio.current_task()
        while others := [task for task in self._tasks if task is not current]:
            await asyncio.wait(others)

    # What the driver says

    def _due(self, now: float) -> None:
        self._mux.handle_timeout(now)

    def _failed(self, error: Exception) -> None:
        self._driver.fail(error)

    def _connected(self, transport: asyncio.Transport) -> None:
        self.remote_address = transport.get_extra_info("peername")
        self.ssl_object = transport.get_extra_info("ssl_object")
        if self._check_peer is not None:
            try:
                self._check_peer(self)
            except KonnektorError as error:
                # The peer may know what is wrong with its own certificate.
                self._lost_reason = error
                self._mux.close(Code.IDENTITY, str(error))
                return
        self._mux.start()

    def _connection_lost(self, exc: Exception | None) -> None:
        reason = (
            f"connection lost: {exc}" if exc is not None
            else "connection closed by the peer without a word" if self.peer_settings is not None
            else "connection closed by the peer before its HELLO"
        )  # fmt: skip
        if self._mux.resumption.possible:
            self._continuity.suspend(reason)
            return
        if self._mux.error is None:  # else CLOSE said why; how the connection went after it is no matter
            self._lost_reason = exc
        try:
            self._mux.connection_lost(reason)
        finally:
            self._finish()

    def _finish(self) -> None:
        """The connection is gone, and the session with it."""
        if not self._closed.done():
            self._closed.set_result(None)

    def _ping_again(self) -> None:
        """The PONGs of a connection that is gone will not come: one PING on the new one is for all who wait."""
        waiting = [future for futures in self._pings.values() for future in futures]
        self._pings.clear()
        if waiting:
            self._pings[self._mux.ping()] = waiting

    # What the multiplexer says (mux.Handler)

    def hello_received(self, settings: Settings) -> None:
        """The session is up."""
        self.peer_settings = settings
        if self._check_hello is not None:
            self._check_hello(self)
        if not self._hello.done():
            self._hello.set_result(None)

    def stream_opened(self, mux_stream: MuxStream) -> None:
        """Starts the type's handler, or refuses."""
        self._serving.opened(mux_stream)

    def connection_dead(self, reason: str) -> None:
        """The peer does not answer on this connection."""
        self._continuity.suspend(reason)

    def resume_requested(self, frame: Resume, nonces: bytes) -> None:
        """The client means another session."""
        self._continuity.requested(frame, nonces)

    def pong_received(self, opaque: int, rtt: float) -> None:
        """Wakes the callers of ``ping``."""
        for future in self._pings.pop(opaque, ()):
            if not future.done():
                future.set_result(rtt)

    def goaway_received(self, code: int, grace: float, reason: str) -> None:
        """The peer drains."""
        self.log.info("the peer drains within %.0f s: %s", grace, reason or describe(code))
        if self.on_goaway is not None:
            self.on_goaway(self)

    def session_closed(self, error: SessionError) -> None:
        """Everything ends; what is left to write is written."""
        if isinstance(error, CalmError):
            who = self._peer()
            if error.limit:
                self.log.warning("ended the session with %s, which sent too many %s: %s", who, error.limit, error)
            elif not self._closed_here:
                self.log.warning("%s ended the session, because this side exceeded a limit: %s", who, error)
        if count := self._mux.cut_off:
            streams = "1 stream" if count == 1 else f"{count} streams"
            self.log.warning("the grace is over: cut off %s with %s", streams, self._peer())
        if not self._hello.done():
            self._hello.set_result(None)
        for futures in self._pings.values():
            for future in futures:
                if not future.done():
                    future.set_exception(SessionLost(str(error), error.code))
        self._pings.clear()
        self._serving.ended()
        for task in self._tasks:
            task.cancel()
        self._alarm.stop()
        self._continuity.ended(error)
        if self._driver.transport is None:
            self._finish()
        else:
            self._driver.close()
        if self.on_ended is not None:
            self.on_ended(self)

    # Tasks

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs a coroutine as a task of the session's: cancelled when the session ends."""
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self.closed:
            task.cancel()
        return task
