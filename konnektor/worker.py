"""The endpoint that dials: keeps a session up to every control plane it was given, and serves their streams."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Final, Self, TypeVar

from konnektor.addresses import format_hostport, parse_hostport
from konnektor.dial import dial
from konnektor.errors import (
    Code,
    ConfigurationError,
    HandshakeError,
    KonnektorError,
    SessionClosedError,
)
from konnektor.limits import Limits
from konnektor.policy import AllowList, AllowRule
from konnektor.reloading import ReloadingContext
from konnektor.router import parse_route
from konnektor.session import INSTANCE, SOFTWARE, Handlers, Session
from konnektor.settings import Settings
from konnektor.stream import Stream
from konnektor.stream_types import StreamType, Tcp
from konnektor.targets import tcp_handler
from konnektor.tls import Identity, Role, TLSFiles, explain, peer_identity, with_alerts

__all__ = ["Backoff", "Worker"]

T = TypeVar("T", bound=StreamType)

FIRST_DELAY: Final = 0.1
LAST_DELAY: Final = 30.0
CALM: Final = 10.0
"""A session that lived this long was a success: the next attempt starts without delay's history."""

logger: Final = logging.getLogger("konnektor.worker")


class Backoff:
    """Delays between attempts: doubling, with jitter, so that a thousand workers do not return as one.

    Half of each delay is random ("equal jitter"): never zero, never in step.
    """

    def __init__(self, first: float = FIRST_DELAY, last: float = LAST_DELAY) -> None:
        self._first = first
        self._last = last
        self._delay = first

    def next(self) -> float:
        """Seconds to wait before the next attempt."""
        delay = self._delay
        self._delay = min(self._last, delay * 2)
        return delay * random.uniform(0.5, 1.0)  # noqa: S311 - spreading load, not guarding anything

    def reset(self) -> None:
        """An attempt succeeded."""
        self._delay = self._first


class Worker:
    """Dials control planes and serves what they ask for, as far as ``allow`` goes.

    An async context manager: entering starts it, leaving ends it. It never gives up reconnecting, unless ``once``.

    Args:
        connect: addresses of control planes, ``HOST:PORT`` each; a session is kept to every one.
        tls: certificate, key and CA; read again for every connection, so that renewed files are used.
        allow: what may be dialed here (``tcp(...)`` or ``parse_allow``). Nothing is, by default.
        routes: destinations to claim: ``host=GLOB``, ``cidr=NET``, ``default``.
        server_name: what control planes' certificates must name, if not the host that is dialed.
        limits: of each session.
        labels: free pairs to declare.
        once: connect once; a failure, or the end of the session, ends the worker.

    Raises:
        ConfigurationError: an address or route is not one.
        CertificateError: the files cannot be used.
    """

    def __init__(
        self,
        connect: Sequence[str],
        *,
        tls: TLSFiles,
        allow: Iterable[AllowRule] = (),
        routes: Sequence[str] = (),
        server_name: str | None = None,
        limits: Limits | None = None,
        labels: Mapping[str, str] | None = None,
        once: bool = False,
    ) -> None:
        if not connect:
            raise ConfigurationError("a worker needs a control plane to connect to, as HOST:PORT")
        self._addresses = [parse_hostport(address) for address in dict.fromkeys(connect)]
        self._server_name = server_name
        self._once = once
        self.limits = limits or Limits()
        self._context = ReloadingContext(tls, tls.client_context)
        self.identity: Identity = self._context.identity
        self._settings = Settings.of(
            self.limits,
            software=SOFTWARE,
            instance=INSTANCE,
            name=self.identity.name,
            routes=tuple(str(parse_route(route)) for route in routes),
            labels=labels,
        )
        self.allow = AllowList(allow)
        self.handlers = Handlers()
        self.handlers.add(Tcp, tcp_handler(lambda _session: self.allow))
        self._sessions: dict[tuple[str, int], Session] = {}
        self._retiring: set[Session] = set()
        self._links: list[asyncio.Task[None]] = []
        self._changed = asyncio.Condition()
        self._error: KonnektorError | None = None
        self._leaving = False

    # Life

    async def start(self) -> None:
        """Starts connecting, and returns. Cancelling is safe."""
        if self._links:
            raise ConfigurationError("the worker was started before")
        loop = asyncio.get_running_loop()
        self._links = [loop.create_task(self._keep(address)) for address in self._addresses]

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def wait_connected(self) -> Session:
        """A session that is up, as soon as there is one. Cancelling is safe.

        Raises:
            HandshakeError: with ``once``, the attempt failed.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self.sessions or self._finished)
        if self.sessions:
            return self.sessions[0]
        raise self._error or SessionClosedError("the worker is closed")

    async def wait_closed(self) -> None:
        """Waits until the worker has ended: closed, drained, or (with ``once``) its session over. Cancelling is safe.

        Raises:
            HandshakeError: with ``once``, no session came about.
        """
        if self._links:
            await asyncio.wait(self._links)
        for session in [*self._sessions.values(), *self._retiring]:
            await session.wait_closed()
        if self._error is not None and not self._leaving:
            raise self._error

    async def drain(self, grace: float) -> None:
        """Tells every control plane that this worker goes, and waits for its streams, ``grace`` seconds at most."""
        await self._end(lambda session: session.start_drain(grace, "the worker is shutting down"))

    async def aclose(self) -> None:
        """Ends every session now. Cancelled, it drops the connections."""
        await self._end(lambda session: session.close(Code.SHUTDOWN, "the worker is closed"))

    async def _end(self, end: Callable[[Session], None]) -> None:
        self._leaving = True
        for task in self._links:
            task.cancel()
        sessions = [*self._sessions.values(), *self._retiring]
        for session in sessions:
            end(session)
        try:
            if self._links:
                await asyncio.wait(self._links)
            for session in sessions:
                await session.wait_closed()
        except asyncio.CancelledError:
            for session in sessions:
                session.abort()
            raise
        await self._announce()

    @property
    def _finished(self) -> bool:
        return self._leaving or (bool(self._links) and all(task.done() for task in self._links))

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # Sessions

    @property
    def sessions(self) -> list[Session]:
        """Those that are up and take streams."""
        return [session for session in self._sessions.values() if not session.closed]

    @property
    def connected(self) -> list[str]:
        """``HOST:PORT`` of the control planes that sessions are up with."""
        return [format_hostport(*address) for address, session in self._sessions.items() if not session.closed]

    def handle(
        self, request: type[T]
    ) -> Callable[[Callable[[Stream, T], Awaitable[None]]], Callable[[Stream, T], Awaitable[None]]]:
        """Decorator: serves control planes' streams of a type of your own (see ``Handlers.add``)."""

        def add(handler: Callable[[Stream, T], Awaitable[None]]) -> Callable[[Stream, T], Awaitable[None]]:
            self.handlers.add(request, handler)
            return handler

        return add

    async def _keep(self, address: tuple[str, int]) -> None:
        """Keeps a session up to one control plane."""
        where = format_hostport(*address)
        backoff = Backoff()
        loop = asyncio.get_running_loop()
        while True:
            try:
                session = await self._connect(address, where)
            except HandshakeError as error:
                if self._once:
                    self._error = error
                    await self._announce()
                    return
                delay = backoff.next()
                logger.warning("%s; trying again in %.1f s", error, delay)
                await asyncio.sleep(delay)
                continue
            since = loop.time()
            logger.info("connected to %s at %s", session.peer_name, where)
            self._sessions[address] = session
            await self._announce()
            try:
                await self._wait_leaving(session)
            finally:
                if self._sessions.get(address) is session and (session.closed or not self._leaving):
                    del self._sessions[address]
            if not session.closed:
                # It drains: the replacement is dialed now, and takes the new streams.
                self._retire(session)
            logger.warning("session with %s at %s %s", session.peer_name, where, _fate(session))
            if self._once:
                await session.wait_closed()
                if session.error is not None and session.error.code not in (Code.NO_ERROR, Code.SHUTDOWN):
                    self._error = HandshakeError(f"the session with {where} ended: {session.error}")
                await self._announce()
                return
            if loop.time() - since > CALM:
                backoff.reset()
            await asyncio.sleep(backoff.next())

    async def _wait_leaving(self, session: Session) -> None:
        """Until the session is closed or its peer drains."""
        leaving = asyncio.Event()
        session.on_goaway = lambda _: leaving.set()
        session.on_closed = lambda _: leaving.set()
        if session.closed or session.draining:
            leaving.set()
        await leaving.wait()

    def _retire(self, session: Session) -> None:
        self._retiring.add(session)
        session.on_closed = self._retiring.discard

    async def _connect(self, address: tuple[str, int], where: str) -> Session:
        """One attempt, with one clear sentence if it fails."""
        peer = f"the control plane at {where}"

        def check_peer(session: Session) -> None:
            assert session.ssl_object is not None
            identity = peer_identity(
                session.ssl_object, Role.CONTROL_PLANE, trust_domain=self.identity.trust_domain, peer=peer
            )
            session.peer_name = identity.name

        try:
            sock = await dial(*address, within=self.limits.hello_timeout)
        except KonnektorError as error:
            raise HandshakeError(f"cannot reach {peer}: {error}") from error
        try:
            return await Session.client(
                sock,
                tls=with_alerts(self._context.get(), sock),
                server_name=self._server_name or address[0],
                limits=self.limits,
                handlers=self.handlers,
                settings=self._settings,
                check_peer=check_peer,
            )
        except HandshakeError as error:
            raise HandshakeError(explain(error.__cause__, peer)) from error


def _fate(session: Session) -> str:
    return f"ended: {session.error}" if session.error is not None else "drains"
