"""The endpoint that accepts: knows its workers by their certificates, and lets frontends use them."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

from konnektor.addresses import Forward, format_hostport, parse_hostport
from konnektor.errors import (
    Code,
    ConfigurationError,
    HandshakeError,
    KonnektorError,
    NoRouteError,
    PeerError,
    SessionClosedError,
    StreamError,
)
from konnektor.frontends.forward import forward_protocol
from konnektor.frontends.http_connect import ConnectRequest
from konnektor.frontends.http_server import HttpConnect
from konnektor.frontends.urls import HttpFrontend, HttpsFrontend, UnixFrontend
from konnektor.limits import Limits
from konnektor.listening import BACKLOG, Acceptor, bind_tcp, bind_unix, bound_name, remove_unix
from konnektor.policy import AllowList, AllowRule
from konnektor.reloading import ReloadingContext
from konnektor.router import Route, Router, granted_routes, parse_route
from konnektor.session import INSTANCE, SOFTWARE, Handlers, Session, SessionStats
from konnektor.settings import Settings
from konnektor.socket_transport import SocketTransport
from konnektor.stream import Stream
from konnektor.stream_types import StreamType, Tcp
from konnektor.targets import tcp_handler
from konnektor.tls import Identity, Role, TLSFiles, explain, frontend_context, peer_identity, with_alerts

__all__ = ["ControlPlane", "WorkerConnected", "WorkerDisconnected", "WorkerEvent", "WorkerSnapshot"]

T = TypeVar("T", bound=StreamType)

REPLACED_GRACE: Final = 25.0
"""Seconds that the streams of a replaced session have to end."""
DEAD_AFTER: Final = 25.0
"""Silence after which another process may take a worker's name: the liveness deadline of a session."""
EVENTS: Final = 1024
HANDSHAKES: Final = 512
"""Connections that may be between TCP accept and HELLO; more wait in the kernel's backlog."""

logger: Final = logging.getLogger("konnektor.control_plane")


@dataclass(frozen=True, slots=True)
class WorkerConnected:
    """A worker's session is up."""

    name: str
    session: Session


@dataclass(frozen=True, slots=True)
class WorkerDisconnected:
    """A worker's session is gone, or drains and takes no more streams."""

    name: str
    session: Session


WorkerEvent = WorkerConnected | WorkerDisconnected


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """One worker as it is now.

    Attributes:
        name: by its certificate.
        address: where it dialed from.
        routes: granted ones.
        software: what it says it runs.
        stats: its session's counters.
    """

    name: str
    address: str
    routes: tuple[str, ...]
    software: str
    stats: SessionStats


class ControlPlane:
    """Accepts workers and opens streams to what they reach.

    An async context manager: entering listens, leaving ends every session.

    Args:
        listen: ``HOST:PORT`` of the tunnel listener; port 0 chooses one.
        tls: certificate, key and CA; read again for every connection, so that renewed files are used.
        grant_routes: routes that a worker may claim beyond ``host=NAME``, as (name, route).
        allow_from: what streams of a worker may reach here, as (name, rule). Nothing, by default.
        limits: of each session.

    Attributes:
        handlers: what serves the workers' streams; ``handle`` adds to it.

    Raises:
        ConfigurationError: the address is not one.
        CertificateError: the files cannot be used.
    """

    def __init__(
        self,
        listen: str,
        *,
        tls: TLSFiles,
        grant_routes: Iterable[tuple[str, Route]] = (),
        allow_from: Iterable[tuple[str, AllowRule]] = (),
        limits: Limits | None = None,
    ) -> None:
        self._listen = parse_hostport(listen, zero=True)
        self._context = ReloadingContext(tls, tls.server_context)
        self.identity: Identity = self._context.identity
        self.limits = limits or Limits()
        self._grants = tuple(grant_routes)
        rules: dict[str, list[AllowRule]] = {}
        for name, rule in allow_from:
            rules.setdefault(name, []).append(rule)
        self._allow_from = {name: AllowList(of_name) for name, of_name in rules.items()}
        self._settings = Settings.of(
            self.limits, software=SOFTWARE, instance=INSTANCE, name=self.identity.name
        )
        self.handlers = Handlers()
        self.handlers.add(Tcp, tcp_handler(lambda session: self._allow_from.get(session.peer_name, _NOTHING)))
        self._workers: dict[str, Session] = {}
        self._all: set[Session] = set()
        self._router = Router(load=self._load)
        self._acceptors: list[Acceptor] = []
        self._sockets: list[socket.socket] = []
        self._servers: list[asyncio.Server] = []
        self._unix: list[tuple[socket.socket, str]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._handshakes = asyncio.Semaphore(HANDSHAKES)
        self._changed = asyncio.Condition()
        self._subscribers: set[asyncio.Queue[WorkerEvent]] = set()
        self._closing = False

    # Life

    async def start(self) -> None:
        """Listens for workers. Cancelled, it listens on nothing.

        Raises:
            ListenError: the address cannot be had.
        """
        self._sockets = await bind_tcp(*self._listen)
        self._acceptors = [Acceptor(sock, self._accepted) for sock in self._sockets]

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @property
    def address(self) -> str:
        """``HOST:PORT`` of the tunnel listener, with the port that was chosen for 0."""
        return bound_name(self._sockets[0])

    async def drain(self, grace: float) -> None:
        """Takes no more clients or workers, tells the workers, and waits for streams, ``grace`` seconds at most."""
        await self._end(lambda session: session.start_drain(grace, "the control plane is shutting down"))

    async def aclose(self) -> None:
        """Ends everything now. Cancelled, it drops the connections."""
        await self._end(lambda session: session.close(Code.SHUTDOWN, "the control plane is closed"))

    async def _end(self, end: Callable[[Session], None]) -> None:
        self._closing = True
        for acceptor in self._acceptors:
            acceptor.close()
        for server in self._servers:
            server.close()
        for sock, path in self._unix:
            remove_unix(sock, path)
        sessions = list(self._all)
        for session in sessions:
            end(session)
        try:
            for session in sessions:
                await session.wait_closed()
        except asyncio.CancelledError:
            for session in sessions:
                session.abort()
            raise
        finally:
            for task in self._tasks:
                task.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)

    # Workers

    def __iter__(self) -> Iterator[Session]:
        """The sessions of the connected workers."""
        return iter(list(self._workers.values()))

    def __len__(self) -> int:
        return len(self._workers)

    def get(self, name: str) -> Session | None:
        """The session of a worker, None if it is not connected."""
        return self._workers.get(name)

    async def wait_for(self, name: str) -> Session:
        """The session of a worker, as soon as it is connected. Cancelling is safe."""
        async with self._changed:
            await self._changed.wait_for(lambda: name in self._workers)
            return self._workers[name]

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[WorkerEvent]]:
        """``async with cp.events() as events: async for event in events``: workers that come and go.

        A subscriber that falls 1,024 events behind misses the oldest.
        """
        queue: asyncio.Queue[WorkerEvent] = asyncio.Queue(EVENTS)
        self._subscribers.add(queue)

        async def iterate() -> AsyncIterator[WorkerEvent]:
            while True:
                yield await queue.get()

        iterator = iterate()
        try:
            yield iterator
        finally:
            self._subscribers.discard(queue)
            await iterator.aclose()  # type: ignore[attr-defined]

    def snapshot(self) -> list[WorkerSnapshot]:
        """Every connected worker as it is now."""
        return [
            WorkerSnapshot(
                name=name,
                address=_where(session),
                routes=tuple(map(str, self._router.routes(name))),
                software=session.peer_settings.software if session.peer_settings else "",
                stats=session.stats(),
            )
            for name, session in self._workers.items()
        ]

    def handle(
        self, request: type[T]
    ) -> Callable[[Callable[[Stream, T], Awaitable[None]]], Callable[[Stream, T], Awaitable[None]]]:
        """Decorator: serves workers' streams of a type of your own; decide by ``stream.session.peer_name``."""

        def add(handler: Callable[[Stream, T], Awaitable[None]]) -> Callable[[Stream, T], Awaitable[None]]:
            self.handlers.add(request, handler)
            return handler

        return add

    # Streams

    async def open_tcp(self, host: str, port: int, *, worker: str | None = None, **kwargs: Any) -> Stream:
        """A TCP connection to ``host:port`` from the worker that serves it, or from the one that is named.

        Workers that share the route are tried in turn where that is safe: nothing was processed.

        Args:
            kwargs: as ``Session.open``, but ``early``.

        Raises:
            NoRouteError: no connected worker serves the destination.
            StreamError: the worker refused.
        """
        error: KonnektorError | None = None
        for choice in self._router.candidates(host, worker):
            session = self._workers.get(choice.worker)
            if session is None:
                continue
            try:
                return await session.open_tcp(choice.host, port, **kwargs)
            except StreamError as refusal:
                error = refusal
                if not refusal.retryable:
                    raise
            except (SessionClosedError, PeerError) as gone:
                error = gone
        raise error or NoRouteError(f"no worker serves {format_hostport(host, port)}")

    async def add_forward(self, forward: Forward) -> str:
        """Listens on a local address for one destination. Returns ``HOST:PORT`` as bound.

        Raises:
            ListenError: the address cannot be had.
        """
        request = Tcp(forward.host, forward.port)

        def choose() -> Session:
            session = self._workers.get(forward.worker)
            if session is None:
                raise NoRouteError(f"worker {forward.worker} is not connected")
            return session

        def refused(error: KonnektorError) -> None:
            logger.warning("forward %s: %s", forward, error)

        def accepted(sock: socket.socket, _address: Any) -> None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            SocketTransport(sock, forward_protocol(choose, request, refused))

        sockets = await bind_tcp(forward.listen_host, forward.listen_port)
        self._acceptors += [Acceptor(sock, accepted) for sock in sockets]
        return bound_name(sockets[0])

    async def add_frontend(self, frontend: HttpFrontend | UnixFrontend | HttpsFrontend) -> str:
        """Serves HTTP CONNECT. Returns the address or path as bound.

        Raises:
            ListenError: the address cannot be had.
            CertificateError: the files of an https frontend cannot be used.
        """
        loop = asyncio.get_running_loop()

        def factory() -> HttpConnect:
            return HttpConnect(self._open_for, self._spawn)

        if isinstance(frontend, UnixFrontend):
            sock = bind_unix(frontend.path)
            self._servers.append(await loop.create_unix_server(factory, sock=sock, backlog=BACKLOG))
            self._unix.append((sock, frontend.path))
            return frontend.path
        context = None
        if isinstance(frontend, HttpsFrontend):
            context = frontend_context(frontend.cert, frontend.key, frontend.client_ca)
        sockets = await bind_tcp(frontend.host, frontend.port)
        name = bound_name(sockets[0])
        for sock in sockets:
            self._servers.append(await loop.create_server(factory, sock=sock, ssl=context, backlog=BACKLOG))
        return name

    async def _open_for(self, request: ConnectRequest) -> Stream:
        return await self.open_tcp(request.host, request.port, worker=request.worker)

    def _load(self, name: str) -> int:
        session = self._workers.get(name)
        return session.stream_count if session is not None else 0

    # Accepting

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _accepted(self, sock: socket.socket, address: Any) -> None:
        self._spawn(self._welcome(sock, format_hostport(*address[:2])))

    async def _welcome(self, sock: socket.socket, where: str) -> None:
        """From a socket to a session, or one line that says why not."""
        peer = f"the client at {where}"

        def check_peer(session: Session) -> None:
            assert session.ssl_object is not None
            identity = peer_identity(
                session.ssl_object, Role.WORKER, trust_domain=self.identity.trust_domain, peer=peer
            )
            session.peer_name = identity.name

        async with self._handshakes:
            if self._closing:
                sock.close()
                return
            try:
                await Session.server(
                    sock,
                    tls=with_alerts(self._context.get(), sock),
                    limits=self.limits,
                    handlers=self.handlers,
                    settings=self._settings,
                    check_peer=check_peer,
                    check_hello=self._check_hello,
                )
            except HandshakeError as error:
                logger.warning("refused %s", explain(error.__cause__, peer))

    def _check_hello(self, session: Session) -> None:
        """The worker has introduced itself: is its name free?"""
        name, settings = session.peer_name, session.peer_settings
        assert settings is not None
        old = self._workers.get(name)
        if old is not None and not old.closed:
            assert old.peer_settings is not None
            same_process = bool(settings.instance) and settings.instance == old.peer_settings.instance
            if not same_process and old.silent_for < DEAD_AFTER:
                logger.warning(
                    "refused worker %s at %s: another process of that name is connected from %s",
                    name, _where(session), _where(old),
                )  # fmt: skip
                session.close(Code.IDENTITY, f"another worker is connected as {name}")
                return
            self._remove(old)
            if same_process:
                logger.info("worker %s reconnected from %s; its session from %s drains", name, _where(session), _where(old))
                old.start_drain(REPLACED_GRACE, "replaced by a newer session of this worker")
            else:
                logger.warning("worker %s at %s replaces %s, which is silent", name, _where(session), _where(old))
                old.close(Code.TIMEOUT, "replaced after silence")
        self._add(session)

    def _add(self, session: Session) -> None:
        name, settings = session.peer_name, session.peer_settings
        assert settings is not None
        claims = []
        for claim in settings.routes:
            try:
                claims.append(parse_route(claim))
            except ConfigurationError as error:
                logger.warning("worker %s: ignored a claimed route: %s", name, error)
        routes, ignored = granted_routes(name, claims, self._grants)
        for route in ignored:
            logger.warning("worker %s: ignored route %s, which no --grant-route grants", name, route)
        self._workers[name] = session
        self._all.add(session)
        self._router.set_routes(name, routes)
        session.on_goaway = self._remove
        session.on_closed = self._gone
        logger.info("worker %s connected from %s", name, _where(session))
        self._publish(WorkerConnected(name, session))

    def _remove(self, session: Session) -> None:
        """No new streams for this session."""
        if self._workers.get(session.peer_name) is session:
            del self._workers[session.peer_name]
            self._router.remove(session.peer_name)
            self._publish(WorkerDisconnected(session.peer_name, session))

    def _gone(self, session: Session) -> None:
        self._all.discard(session)
        self._remove(session)
        logger.info("worker %s at %s disconnected: %s", session.peer_name, _where(session), session.error)

    def _publish(self, event: WorkerEvent) -> None:
        for queue in self._subscribers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)
        if not self._closing:
            self._spawn(self._announce())

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()


_NOTHING: Final = AllowList()


def _where(session: Session) -> str:
    address = session.remote_address
    return format_hostport(*address[:2]) if isinstance(address, tuple) and address else "an unknown address"
