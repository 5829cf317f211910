"""The endpoint that accepts: knows its workers by their certificates, and lets frontends use them."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from konnektor.addresses import Forward, format_hostport, parse_forward, parse_hostport
from konnektor.arguments import listed
from konnektor.claims import Claims, about, parse_grants
from konnektor.endpoint import Endpoint, checked_limits
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
from konnektor.frames import Feature
from konnektor.frontends.clients import Clients
from konnektor.frontends.http_connect import ConnectRequest
from konnektor.frontends.urls import Frontend, parse_frontend
from konnektor.handshake import explain, left_silently, with_alerts
from konnektor.limits import Limits, format_size, parse_size
from konnektor.listening import bind_tcp
from konnektor.newcomers import Newcomers, Place
from konnektor.policy import AllowList, AllowRule, parse_grant_from
from konnektor.priorities import PriorityRule
from konnektor.router import Route, Router
from konnektor.session import SOFTWARE, Session, SessionStats
from konnektor.settings import Settings
from konnektor.stream import Stream
from konnektor.stream_types import StreamType, Tcp
from konnektor.subscription import Subscription
from konnektor.tls import Role, TLSFiles, peer_identity

__all__ = ["ControlPlane", "WorkerConnected", "WorkerDisconnected", "WorkerEvent", "WorkerSnapshot"]

REPLACED_GRACE: Final = 25.0
"""Seconds that the streams of a replaced session have to end."""
EVENTS: Final = 1024
SESSIONS: Final = 8
"""Of one worker at a time, draining and suspended ones included: against one that connects without end."""
SUSPENDED: Final = 2
"""Sessions of one worker that may wait for another connection at a time; the oldest goes first."""

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


class ControlPlane(Endpoint):
    """Accepts workers and opens streams to what they reach.

    An async context manager: entering listens, leaving ends every session.

    Args:
        listen: ``HOST:PORT`` of the tunnel listener; port 0 chooses one.
        tls: certificate, key and CA; looked at again for every connection, so that renewed files are used.
        grant_routes: routes that a worker may claim beyond ``host=NAME``: ``NAME=ROUTE``, or (name, route).
        allow_from: what streams of a worker may reach here: ``NAME=HOST:PORTS``, or (name, rule). Nothing, by default.
        limits: of each session.
        memory: bytes, or a size such as ``4GiB``, that all sessions together may be granted, each
            ``limits.session_memory``; when they are taken, no other worker is let in, and those that are there notice
            nothing. None: no bound.
        priorities: class and weight of streams by their destination, ``PATTERN=CLASS[:WEIGHT]``; the first that fits.

    Raises:
        ConfigurationError: the address, a route, a rule or another argument is not one, or there is not memory for one
            session.
        CertificateError: the files cannot be used.
    """

    _kind: ClassVar[str] = "control plane"

    def __init__(
        self,
        listen: str,
        *,
        tls: TLSFiles,
        grant_routes: Iterable[str | tuple[str, Route | str]] = (),
        allow_from: Iterable[str | tuple[str, AllowRule | str]] = (),
        limits: Limits | None = None,
        memory: int | str | None = None,
        priorities: Iterable[PriorityRule | str] = (),
    ) -> None:
        self._listen = parse_hostport(listen, zero=True)
        self._claims = Claims(parse_grants(grant_routes))
        self._allowed = _parse_allowed(allow_from)
        limits = checked_limits(limits)
        self._memory = None if memory is None else _parse_memory(memory)
        one = limits.session_memory
        if self._memory is not None and self._memory < one:
            raise ConfigurationError(
                f"memory {format_size(self._memory)} is less than one session may be granted, {format_size(one)}: "
                "raise it, or lower the receive pool and the replay buffer"
            )
        super().__init__(
            tls,
            TLSFiles.server_context,
            lambda session: self._allowed.get(session.peer_name, _NOTHING),
            limits,
            priorities,
        )
        self._granted_memory = 0
        self._settings = Settings.of(
            self.limits,
            software=SOFTWARE,
            instance=os.urandom(16),  # not the process's: a program may have several control planes of one name
            name=self.identity.name,
            features=Feature.DATAGRAM | (Feature.RESUME if self.limits.resume_grace else 0),
        )
        self._resumable: dict[bytes, Session] = {}
        self._workers: dict[str, Session] = {}
        self._of: dict[str, list[Session]] = {}
        """All sessions of a worker that have not ended, oldest first: the one that takes streams, and those that drain."""
        self._router = Router(load=self._load)
        self._know_named()
        self._newcomers: Newcomers | None = None
        self._handshakes: set[asyncio.Task[None]] = set()
        self._clients = Clients(self._open_for, self._session_of)
        self._subscribers: set[Subscription[WorkerEvent]] = set()

    def set_grants(
        self,
        *,
        grant_routes: Iterable[str | tuple[str, Route | str]] | None = None,
        allow_from: Iterable[str | tuple[str, AllowRule | str]] | None = None,
    ) -> None:
        """Replaces what workers may claim and reach, at once; what is left out stays as it is.

        Streams that go by a route which their worker may not claim any more end with DENIED, and so do workers' own
        streams to what they may not reach any more; also those of sessions that wait for a connection, whose worker
        hears of it when there is one. Claims that were not granted before count from now on, if they are.

        Raises:
            ConfigurationError: a route or a rule is not one; nothing has changed then.
        """
        grants = self._claims.grants if grant_routes is None else parse_grants(grant_routes)
        self._allowed = self._allowed if allow_from is None else _parse_allowed(allow_from)
        losers = self._claims.replace(grants)
        self._know_named()
        for name, session in self._workers.items():
            self._router.set_routes(name, self._claims.routes(session))
        for session in losers:
            self._claims.judge(session)
        self._targets.judge()

    def _know_named(self) -> None:
        """Whom the operator names there is, though it may have to connect yet."""
        for name in {name for name, _ in self._claims.grants} | self._allowed.keys():
            self._router.know(name)

    # Life

    async def _start(self) -> None:
        self._newcomers = Newcomers(await bind_tcp(*self._listen), self._heard)

    @property
    def address(self) -> str:
        """``HOST:PORT`` of the tunnel listener, with the port that was chosen for 0.

        Raises:
            ConfigurationError: the control plane was not started.
            SessionClosedError: it was closed before it was started.
        """
        self._check_started()
        if self._newcomers is None:
            raise SessionClosedError("the control plane is closed")
        return self._newcomers.name

    def _leave(self, *, drain: bool) -> None:
        if self._newcomers is not None:
            self._newcomers.close()
        for task in self._handshakes:
            task.cancel()
        self._clients.leave()
        for session in list(self._resumable.values()):
            if session.suspended:
                session.close(Code.SHUTDOWN, "the control plane is shutting down")
        if not drain:
            self._clients.abort()
        super()._leave(drain=drain)
        self._end_events()

    def _drop(self) -> None:
        super()._drop()
        self._clients.abort()

    async def _wait_ended(self) -> None:
        await super()._wait_ended()
        await self._clients.wait_closed()

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
        """The session of a worker, as soon as it is connected. Cancelling is safe.

        Raises:
            ConfigurationError: the control plane was not started.
            SessionClosedError: the control plane is closed or drains: no worker will connect.
        """
        self._check_started()
        await self._changes.wait_for(lambda: name in self._workers or self._leaving)
        session = self._workers.get(name)
        if session is None:
            raise SessionClosedError("the control plane is closed")
        return session

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[WorkerEvent]]:
        """``async with cp.events() as events: async for event in events``: workers that come and go.

        The iteration ends with the context, and once the control plane is closed or drained and the last worker has
        gone. Cancelling ``anext(events)``, as by a timeout, loses nothing. A subscriber that falls 1,024 events behind
        misses the oldest.

        Raises:
            ConfigurationError: the control plane was not started.
        """
        self._check_started()
        events = Subscription[WorkerEvent](EVENTS)
        self._subscribers.add(events)
        self._end_events()
        try:
            yield events
        finally:
            self._subscribers.discard(events)
            events.end()

    def _end_events(self) -> None:
        """If no worker will come or go any more."""
        if self._leaving and not self._live:
            for events in self._subscribers:
                events.end()

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

    # Streams

    async def open_tcp(self, host: str, port: int, *, worker: str | None = None, **kwargs: Any) -> Stream:
        """A TCP connection to ``host:port`` from the worker that serves it, or from the one that is named.

        Workers that share the route are tried in turn where that is safe: nothing was processed. Cancelling
        withdraws the request.

        Args:
            kwargs: as ``Session.open``, but ``early``.

        Raises:
            ConfigurationError: ``host`` is neither an IP address nor a host name, ``port`` is not 1 to 65535, or the
                control plane was not started.
            NoRouteError: no connected worker serves the destination.
            StreamError: the worker refused.
            SessionLost: the worker went away meanwhile.
        """
        self._check_started()
        StreamType.encode(Tcp(host, port))  # the host is looked at below: it may name the worker, too
        error: KonnektorError | None = None
        for choice in self._router.candidates(host, worker):
            session = self._workers.get(choice.worker)
            if session is None:
                continue  # it went while another was asked
            grants = self._claims.grants
            try:
                stream = await session.open_tcp(choice.host, port, **kwargs)
            except StreamError as refusal:
                refusal.worker = choice.worker
                error = refusal
                if not refusal.retryable:
                    raise
            except (SessionClosedError, PeerError) as gone:
                gone.worker = choice.worker
                error = gone
            else:
                if worker is None and choice.host is host:
                    if self._claims.grants is not grants and not self._claims.serves(session, host):
                        stream.reset(Code.DENIED)  # the route was withdrawn meanwhile
                        continue
                    self._claims.note(stream._mux, session, host)
                return stream
        raise error or NoRouteError(f"no worker serves {format_hostport(host, port)}")

    async def add_forward(self, forward: str | Forward) -> str:
        """Listens on a local address for one destination. Returns ``HOST:PORT`` as bound.

        Of UDP each address that sends has a stream of its own, until nothing has come either way for 60 s.

        Args:
            forward: ``LISTEN=WORKER/HOST:PORT``, LISTEN being ``HOST:PORT``; with ``udp:`` in front, of UDP.

        Raises:
            ConfigurationError: it is not one, or the control plane was not started.
            ListenError: the address cannot be had.
            SessionClosedError: the control plane is closed or drains.
        """
        self._check_started()
        if isinstance(forward, str):
            forward = parse_forward(forward)
        self._router.know(forward.worker)
        return await self._clients.add_forward(forward)

    async def add_frontend(self, frontend: str | Frontend) -> str:
        """Serves HTTP CONNECT. Returns the address or path as bound.

        Args:
            frontend: ``http://HOST:PORT`` on a loopback address, ``http+unix:///PATH``, or
                ``https://HOST:PORT?cert=F&key=F&client-ca=F``, whose files are looked at again for every connection.

        Raises:
            ConfigurationError: it is not one, or the control plane was not started.
            ListenError: the address cannot be had.
            SessionClosedError: the control plane is closed or drains.
            CertificateError: the files of an https frontend cannot be used.
        """
        self._check_started()
        return await self._clients.add_frontend(parse_frontend(frontend) if isinstance(frontend, str) else frontend)

    async def _open_for(self, request: ConnectRequest) -> Stream:
        return await self.open_tcp(request.host, request.port, worker=request.worker)

    def _session_of(self, name: str) -> Session:
        session = self._workers.get(name)
        if session is None:
            raise NoRouteError(f"worker {name} is not connected")
        return session

    def _load(self, name: str) -> int:
        session = self._workers.get(name)
        return session.stream_count if session is not None else 0

    # Accepting

    def _heard(self, sock: socket.socket, address: Any, place: Place) -> None:
        begun = False

        async def welcome() -> None:
            nonlocal begun
            begun = True
            await self._welcome(sock, f"the client at {format_hostport(*address[:2])}")

        def welcomed(task: asyncio.Task[None]) -> None:
            self._handshakes.discard(task)
            if not begun:
                sock.close()  # cancelled before its first step
            place.leave()

        task = self._spawn(welcome())
        self._handshakes.add(task)
        task.add_done_callback(welcomed)

    async def _welcome(self, sock: socket.socket, peer: str) -> None:
        """From a socket to a session, or one line that says why not."""
        verdict: str | None = None
        fields: dict[str, Any] = {}

        def check_hello(session: Session) -> None:
            nonlocal verdict, fields
            fields = about(session)
            verdict = self._check_hello(session)

        context = with_alerts(self._context.get(), sock)
        try:
            await Session.server(
                sock,
                tls=context,
                limits=self.limits,
                handlers=self.handlers,
                settings=self._settings,
                check_peer=lambda session: self._check_peer(session, peer),
                check_hello=check_hello,
                find_session=self._resumable.get,
                classify=self._classify,
            )
        except HandshakeError as error:
            if left_silently(context, error.__cause__):
                logger.debug("%s left without having sent anything", peer)
            elif verdict is None:
                logger.warning("refused a connection: %s", explain(error.__cause__, peer))
            elif verdict:  # else it was a session, if only for a moment, and its end was told
                logger.warning("refused %s", verdict, extra=fields)

    def _check_peer(self, session: Session, peer: str) -> None:
        assert session.ssl_object is not None
        session.peer_name = peer_identity(
            session.ssl_object, Role.WORKER, trust_domain=self.identity.trust_domain, peer=peer
        ).name

    def _check_hello(self, session: Session) -> str:
        """The worker has introduced itself: is its name free? Takes it on, or returns why not, for the log."""
        name, settings, here = session.peer_name, session.peer_settings, _where(session)
        assert settings is not None
        old = self._workers.get(name)
        if old is not None:
            same_process = _same_process(old, session)
            if not same_process and not old.suspended and not old.overdue:
                session.close(Code.IDENTITY, f"another process is connected as {name}")
                return f"worker {name} at {here}: another process of that name is connected from {_where(old)}"
            if old.suspended:
                # Its worker would have resumed it, if it could: a restarted one must not leave streams hanging.
                logger.info("worker %s starts afresh from %s", name, here, extra=about(session))
                old.close(Code.SHUTDOWN, "replaced by a newer session of this worker")
            elif not same_process:
                logger.warning(
                    "worker %s at %s replaces %s, which is silent", name, here, _where(old), extra=about(session)
                )
                old.close(Code.TIMEOUT, "replaced after silence")
        for other in self._suspended_of(name):
            if not _same_process(other, session):
                other.close(Code.SHUTDOWN, "the worker was restarted")
        if len(self._of.get(name, ())) >= SESSIONS:
            session.close(Code.CALM, f"{name} has {SESSIONS} sessions already")
            return f"worker {name} at {here}: it has {SESSIONS} sessions already, as many as one worker may have"
        if self._memory is not None and self._granted_memory + self.limits.session_memory > self._memory:
            session.close(Code.LIMIT, "no memory is left for another session")
            return (
                f"worker {name} at {here}: its session would exceed the memory of {format_size(self._memory)} for all"
            )
        if old is not None and not old.closed:
            logger.info(
                "worker %s reconnected from %s; its session from %s drains",
                name,
                here,
                _where(old),
                extra=about(session),
            )
            self._remove(old)
            if not old.draining:  # else it ends at its own time
                old.start_drain(REPLACED_GRACE, "replaced by a newer session of this worker")
        self._add(session)
        return ""

    def _add(self, session: Session) -> None:
        name = session.peer_name
        self._workers[name] = session
        self._of.setdefault(name, []).append(session)
        self._granted_memory += self.limits.session_memory
        self._claims.add(session)
        self._router.set_routes(name, self._claims.routes(session))
        session.on_goaway = self._remove
        session.on_ended = self._gone
        session.on_suspended = self._suspended
        session.on_resumed = self._resumed
        if session.session_id:
            self._resumable[session.session_id] = session
        self._live.add(session)
        _ = self._spawn(self._see_out(session))
        logger.info("worker %s connected from %s", name, _where(session), extra=about(session))
        self._publish(WorkerConnected(name, session))

    def _remove(self, session: Session) -> None:
        """No new streams for this session."""
        if self._workers.get(session.peer_name) is session:
            del self._workers[session.peer_name]
            self._router.remove(session.peer_name)
            self._publish(WorkerDisconnected(session.peer_name, session))

    def _suspended(self, session: Session) -> None:
        logger.warning(
            "lost the connection of worker %s at %s; it may resume its session within %g s",
            session.peer_name, _where(session), self.limits.resume_grace, extra=about(session),
        )  # fmt: skip
        if self._leaving:
            # Nobody is let in any more to resume it.
            session.close(Code.SHUTDOWN, "the control plane is shutting down")
            return
        waiting = [other for other in self._suspended_of(session.peer_name) if other is not session]
        for other in waiting[: max(0, len(waiting) + 1 - SUSPENDED)]:
            other.close(Code.CALM, "too many broken sessions of this worker")

    def _suspended_of(self, name: str) -> list[Session]:
        return [session for session in self._of.get(name, ()) if session.suspended]

    def _resumed(self, session: Session) -> None:
        logger.info(
            "worker %s resumed its session from %s: %d streams go on",
            session.peer_name, _where(session), session.stream_count, extra=about(session),
        )  # fmt: skip

    def _gone(self, session: Session) -> None:
        self._remove(session)
        self._resumable.pop(session.session_id, None)
        self._claims.remove(session)
        self._granted_memory -= self.limits.session_memory
        of_name = self._of[session.peer_name]
        of_name.remove(session)
        if not of_name:
            del self._of[session.peer_name]
        logger.info(
            "worker %s at %s disconnected: %s",
            session.peer_name, _where(session), session.error, extra=about(session),
        )  # fmt: skip

    async def _see_out(self, session: Session) -> None:
        await session.wait_closed()
        self._live.discard(session)
        self._end_events()

    def _publish(self, event: WorkerEvent) -> None:
        for events in self._subscribers:
            events.publish(event)
        self._changes.notify()


_NOTHING: Final = AllowList()


def _parse_allowed(grants: Iterable[object]) -> dict[str, AllowList]:
    rules: dict[str, list[AllowRule]] = {}
    for name, rule in map(parse_grant_from, listed("allow_from", grants, '["node-1=10.0.0.1:6443"]')):
        rules.setdefault(name, []).append(rule)
    return {name: AllowList(of_name) for name, of_name in rules.items()}


def _parse_memory(memory: object) -> int:
    if isinstance(memory, str):
        return parse_size(memory)
    if isinstance(memory, int) and not isinstance(memory, bool):
        return memory
    raise ConfigurationError(f"memory takes bytes or a size, not {memory!a:.80}: write for example 4GiB")


def _same_process(a: Session, b: Session) -> bool:
    assert a.peer_settings is not None
    assert b.peer_settings is not None
    return bool(a.peer_settings.instance) and a.peer_settings.instance == b.peer_settings.instance


def _where(session: Session) -> str:
    address = session.remote_address
    return format_hostport(*address[:2]) if isinstance(address, tuple) and address else "an unknown address"
