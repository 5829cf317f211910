"""The endpoint that dials: keeps a session up to every control plane it was given, and serves their streams."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import ClassVar, Final

from konnektor.addresses import canonical_host, format_hostport, parse_hostport
from konnektor.dial import dial
from konnektor.endpoint import Endpoint
from konnektor.errors import (
    Code,
    ConfigurationError,
    DialTimeoutError,
    HandshakeError,
    IdentityError,
    KonnektorError,
    ResumeRefusedError,
    SessionClosedError,
)
from konnektor.frames import Feature
from konnektor.handshake import explain, with_alerts
from konnektor.limits import Limits
from konnektor.policy import AllowList, AllowRule
from konnektor.priorities import PriorityRule
from konnektor.resolver import Resolver
from konnektor.router import Route, as_routes
from konnektor.session import INSTANCE, SOFTWARE, Session
from konnektor.settings import Settings
from konnektor.tls import Role, TLSFiles, peer_identity

__all__ = ["Backoff", "Worker"]

FIRST_DELAY: Final = 0.1
LAST_DELAY: Final = 30.0
STRANGERS: Final = 3
"""Control planes of another name met at the address (one of several behind it, perhaps) before the session is given up."""
LAST_RESUMING: Final = 5.0
"""Longest wait between attempts to resume: streams are waiting, and not for ever."""
CALM: Final = 10.0
"""Seconds after which a session was a success: what follows it starts with the first delay again."""

logger: Final = logging.getLogger("konnektor.worker")


class Backoff:
    """Delays between attempts: doubling, with jitter, so that a thousand workers do not return as one.

    Half of each delay is random ("equal jitter"): never zero, never in step.

    Attributes:
        fresh: nothing has failed of late.
    """

    def __init__(self, first: float = FIRST_DELAY, last: float = LAST_DELAY) -> None:
        self._first = first
        self._last = last
        self._delay = first
        self.fresh = True

    def next(self) -> float:
        """Seconds to wait before the next attempt."""
        delay = self._delay
        self._delay = min(self._last, delay * 2)
        self.fresh = False
        return delay * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """An attempt succeeded."""
        self._delay = self._first
        self.fresh = True


class Worker(Endpoint):
    """Dials control planes and serves what they ask for, as far as ``allow`` goes.

    An async context manager: entering starts it, leaving ends it. It never gives up reconnecting, unless ``once``.

    Args:
        connect: addresses of control planes, ``HOST:PORT`` each; a session is kept to every one. Where two lead to one
            control plane there is one session, and a warning: it keeps only the newest of a worker.
        tls: certificate, key and CA; looked at again for every connection, so that renewed files are used.
        allow: what may be dialed here: ``tcp(...)``, ``udp(...)``, or ``[udp:]HOST-OR-CIDR:PORTS`` as ``parse_allow`` reads
            it. Nothing is, by default.
        routes: destinations to claim: ``host=GLOB``, ``cidr=NET``, ``default``.
        server_name: what control planes' certificates must name, if not the host that is dialed.
        limits: of each session.
        priorities: class and weight of streams by their destination, ``PATTERN=CLASS[:WEIGHT]``; the first that fits.
        labels: free pairs to declare.
        once: connect once; a failure, or the end of the session, ends the worker.

    Raises:
        ConfigurationError: an address, name, route, rule or other argument is not one.
        CertificateError: the files cannot be used.
    """

    _kind: ClassVar[str] = "worker"

    def __init__(
        self,
        connect: Sequence[str],
        *,
        tls: TLSFiles,
        allow: Iterable[AllowRule | str] = (),
        routes: Iterable[Route | str] = (),
        server_name: str | None = None,
        limits: Limits | None = None,
        priorities: Iterable[PriorityRule | str] = (),
        labels: Mapping[str, str] | None = None,
        once: bool = False,
    ) -> None:
        if isinstance(connect, str) or not connect:
            raise ConfigurationError("a worker needs a list of control planes to connect to, each as HOST:PORT")
        self._addresses = list(dict.fromkeys(map(parse_hostport, connect)))
        self._server_name = None if server_name is None else canonical_host(server_name)
        self._once = once
        self.allow = AllowList(allow)
        super().__init__(tls, TLSFiles.client_context, lambda _session: self.allow, limits, priorities)
        self._settings = Settings.of(
            self.limits,
            software=SOFTWARE,
            instance=INSTANCE,
            name=self.identity.name,
            routes=tuple(map(str, as_routes(routes))),
            labels=labels,
            features=Feature.DATAGRAM | (Feature.RESUME if self.limits.resume_grace else 0),
        )
        self._sessions: dict[tuple[str, int], Session] = {}
        self._begun: dict[tuple[str, int], Session] = {}
        """Up, on the connection that was to resume another, and not yet known to who keeps a session up."""
        self._dialed: dict[tuple[str, int], Session] = {}
        """On their way to be up: the control plane may have given up others for them, and they do not know it yet."""
        self._twins: set[frozenset[tuple[str, int]]] = set()
        """Addresses that were seen to lead to one control plane, and told."""
        self._resuming = {address: Backoff(last=LAST_RESUMING) for address in self._addresses}
        self._links: list[asyncio.Task[None]] = []
        # Not that of the targets: whatever peers ask for, there is a way back to the control plane.
        self._resolver = Resolver()
        self._error: KonnektorError | None = None

    def set_allow(self, rules: Iterable[AllowRule | str]) -> None:
        """Replaces the rules of ``allow`` at once: streams that the new ones do not allow end with DENIED.

        So do those of sessions that wait for a connection; their peers hear of it when there is one.

        Raises:
            ConfigurationError: a rule is not one; nothing has changed then.
        """
        self.allow = AllowList(rules)
        self._targets.judge()

    # Life

    async def _start(self) -> None:
        self._links = [self._spawn(self._keep(address)) for address in self._addresses]

    async def wait_connected(self) -> Session:
        """A session that is up, as soon as there is one. Cancelling is safe.

        Raises:
            ConfigurationError: the worker was not started.
            HandshakeError: with ``once``, every attempt failed.
            SessionClosedError: the worker was closed.
        """
        self._check_started()
        await self._changes.wait_for(lambda: self.sessions or self._finished)
        if self.sessions:
            return self.sessions[0]
        raise self._error or SessionClosedError("the worker is closed")

    async def wait_closed(self) -> None:
        """Waits until the worker has ended: closed, drained, or (with ``once``) its sessions over. Cancelling is safe.

        Raises:
            ConfigurationError: the worker was not started.
            HandshakeError: with ``once``, a session did not come about, or broke.
        """
        self._check_started()
        await self._changes.wait_for(lambda: self._finished and not self._live)
        if self._error is not None and not self._leaving:
            raise self._error

    @property
    def _finished(self) -> bool:
        return self._leaving or (bool(self._links) and all(task.done() for task in self._links))

    def _leave(self, *, drain: bool) -> None:
        for task in self._links:
            task.cancel()
        super()._leave(drain=drain)

    # Sessions

    @property
    def sessions(self) -> list[Session]:
        """Those that are up and take streams."""
        return [session for _, session in self._up()]

    @property
    def connected(self) -> list[str]:
        """``HOST:PORT`` of the control planes that sessions are up with."""
        return [format_hostport(*address) for address, _ in self._up()]

    def _up(self) -> list[tuple[tuple[str, int], Session]]:
        return [
            item for item in self._sessions.items() if not (item[1].closed or item[1].draining or item[1].suspended)
        ]

    async def _keep(self, address: tuple[str, int]) -> None:
        """Keeps a session up to one control plane."""
        try:
            await (self._try(address) if self._once else self._try_forever(address))
        finally:
            # Not in a turn of the loop to come: whoever looks next finds the task done.
            asyncio.get_running_loop().call_soon(self._changes.notify)

    async def _try(self, address: tuple[str, int]) -> None:
        try:
            session = await self._connect(address)
        except HandshakeError as error:
            self._error = error
            return
        await session.wait_closed()
        if session.error is not None and session.error.code not in (Code.NO_ERROR, Code.SHUTDOWN):
            self._error = HandshakeError(f"the session with {format_hostport(*address)} broke: {session.error}")

    async def _try_forever(self, address: tuple[str, int]) -> None:
        backoff = Backoff()
        loop = asyncio.get_running_loop()
        session: Session | None = None
        while True:
            if session is not None and address not in self._begun:
                await self._make_way(session, address)
            try:
                session = await self._connect(address)
            except Exception as error:
                if not isinstance(error, HandshakeError):
                    logger.exception("internal error")  # and yet the worker goes on
                delay = backoff.next()
                logger.warning("%s; trying again in %.1f s", error, delay)
                await asyncio.sleep(delay)
                continue
            since = loop.time()
            await self._changes.wait_for(lambda: session.closed or session.draining)  # noqa: B023 - awaited here
            if loop.time() - since > CALM:
                backoff.reset()
            if address in self._begun:
                continue
            if session.closed or not backoff.fresh:
                await asyncio.sleep(backoff.next())
            else:
                # It drains. The replacement is dialed now, ahead of its end, to take the new streams; but if
                # that one drains as soon, it is no way to run.
                backoff.next()

    async def _make_way(self, session: Session, address: tuple[str, int]) -> None:
        """Waits while a session over another address is up with the control plane that this one was with.

        A control plane keeps only the newest session of a worker: another one would end that, as that has ended this.
        One that waits for a connection would have its streams cut off at once, so that it is waited for, too.
        """
        while (twin := self._twin(session, address)) is not None:
            where, up = twin
            if up and (pair := frozenset((where, address))) not in self._twins:
                self._twins.add(pair)
                here, there = format_hostport(*address), format_hostport(*where)
                logger.warning(
                    "%s and %s lead to one control plane, %s, which keeps one session of a worker: staying with %s; "
                    "connect to one of the two only",
                    here, there, session.peer_name, there, extra=session._log_fields,
                )  # fmt: skip
            await self._changes.wait_for(lambda: self._twin(session, address) != twin)

    def _twin(self, session: Session, address: tuple[str, int]) -> tuple[tuple[str, int], bool] | None:
        """The other address with a session to the same control plane, and whether that is sure: its HELLO has come."""
        assert session.peer_settings is not None
        instance = session.peer_settings.instance
        for where, other in (*self._sessions.items(), *self._dialed.items()):
            gone = other.closed or other.draining
            if gone or where == address or other.peer_name != session.peer_name or not instance:
                continue
            if other.peer_settings is None or other.peer_settings.instance == instance:
                return where, other.peer_settings is not None
        return None

    async def _follow(self, session: Session, address: tuple[str, int], since: float) -> None:
        """Gets the session another connection whenever one breaks, draining or not; until it is cancelled.

        ``since`` is when it began in the place of one whose connection broke.
        """
        peer = f"the control plane at {format_hostport(*address)}"
        loop = asyncio.get_running_loop()
        backoff = self._resuming[address]
        failing = False
        strangers = 0
        while True:
            instead = None
            await self._changes.wait_for(lambda: session.suspended)
            if not failing and loop.time() - since > CALM:
                backoff.reset()
            elif not backoff.fresh or loop.time() - since < CALM:
                # After a connection that broke soon, a moment: what breaks them need not break thousands a minute. Only
                # attempts that fail, or only lead to another session, make it longer, for streams have 2 s to be
                # accepted on a path that comes and goes.
                await asyncio.sleep(backoff.next())
            backoff.fresh = False
            failing = True
            try:
                sock = await self._dial(address, peer)
                if not (self._once or self._leaving or session.draining):
                    instead = self._session(peer, partial(self._begin, address))
                context = with_alerts(self._context.get(), sock)
                await session.resume(sock, context, self._server_name or address[0], instead=instead)
                since = loop.time()
                backoff.reset()
                failing = False
            except ResumeRefusedError as error:
                if instead is not None and instead.peer_settings is not None:
                    continue
                logger.warning(
                    "%s no longer knows the session; starting afresh (%s)", peer, error, extra=session._log_fields
                )
            except KonnektorError as error:
                if session.suspended:
                    why = _why(error, peer)
                    logger.warning("cannot resume the session: %s; trying again", why, extra=session._log_fields)
                strangers += isinstance(error.__cause__, IdentityError)
                if strangers == STRANGERS:
                    session.close(Code.IDENTITY, f"{peer} is not the one that has the session")
            except Exception:
                logger.exception("internal error")  # and yet the worker goes on

    async def _dial(self, address: tuple[str, int], peer: str) -> socket.socket:
        try:
            return await dial(*address, within=self.limits.hello_timeout, resolver=self._resolver)
        except KonnektorError as error:
            raise HandshakeError(f"cannot reach {peer}: {_obstacle(error, format_hostport(*address))}") from error

    async def _connect(self, address: tuple[str, int]) -> Session:
        """One attempt, with one clear sentence if it fails.

        Raises:
            HandshakeError: no session.
        """
        if (begun := self._begun.pop(address, None)) is not None:
            return begun
        peer = f"the control plane at {format_hostport(*address)}"
        sock = await self._dial(address, peer)
        session = self._dialed[address] = self._session(peer)
        try:
            await session.connect(sock, with_alerts(self._context.get(), sock), self._server_name or address[0])
            await session.wait_established()
        except HandshakeError as error:
            raise HandshakeError(explain(error.__cause__, peer)) from error
        finally:
            del self._dialed[address]
            self._changes.notify()
        self._add(session, address)
        return session

    def _session(self, peer: str, check_hello: Callable[[Session], None] | None = None) -> Session:
        """A new one, without a connection."""

        def check_peer(session: Session) -> None:
            assert session.ssl_object is not None
            session.peer_name = peer_identity(
                session.ssl_object, Role.CONTROL_PLANE, trust_domain=self.identity.trust_domain, peer=peer
            ).name

        return Session(
            "client",
            limits=self.limits,
            handlers=self.handlers,
            settings=self._settings,
            check_peer=check_peer,
            check_hello=check_hello,
            classify=self._classify,
        )

    def _begin(self, address: tuple[str, int], session: Session) -> None:
        """On the connection that was to resume another, which the control plane has no more."""
        logger.warning("%s no longer knows the session; starting afresh", session.peer_name, extra=session._log_fields)
        self._begun[address] = session
        self._add(session, address, asyncio.get_running_loop().time())
        if self._leaving:
            session.close(Code.SHUTDOWN, "the worker is shutting down")

    def _add(self, session: Session, address: tuple[str, int], since: float = -math.inf) -> None:
        where = format_hostport(*address)
        self._sessions[address] = session
        session.on_goaway = lambda _: self._changes.notify()
        session.on_ended = lambda _: self._changes.notify()
        session.on_suspended = lambda session: self._suspended(session, where)
        session.on_resumed = lambda session: self._resumed(session, where)
        logger.info("connected to %s at %s", session.peer_name, where, extra=session._log_fields)
        self._live.add(session)
        _ = self._spawn(self._see_out(session, address, since))
        self._changes.notify()

    def _suspended(self, session: Session, where: str) -> None:
        logger.warning(
            "lost the connection to %s at %s; resuming the session", session.peer_name, where, extra=session._log_fields
        )
        self._changes.notify()

    def _resumed(self, session: Session, where: str) -> None:
        logger.info(
            "resumed the session with %s at %s: %d streams go on",
            session.peer_name, where, session.stream_count, extra=session._log_fields,
        )  # fmt: skip
        self._changes.notify()

    async def _see_out(self, session: Session, address: tuple[str, int], since: float) -> None:
        following = self._spawn(self._follow(session, address, since))
        await session.wait_closed()
        following.cancel()
        self._live.discard(session)
        if self._sessions.get(address) is session:
            del self._sessions[address]
        self._changes.notify()
        logger.info(
            "disconnected from %s at %s: %s",
            session.peer_name, format_hostport(*address), session.error, extra=session._log_fields,
        )  # fmt: skip


def _obstacle(error: KonnektorError, where: str) -> str:
    """Why there is no way to ``where``, which the sentence has named already."""
    match error.__cause__:
        case ConnectionRefusedError():
            return "connection refused; start it, or check the port"
        case OSError(errno=int(number)):
            return os.strerror(number)
        case _:
            text = str(error).replace(where, "it", 1)
            return f"{text}; check the address and the firewalls" if isinstance(error, DialTimeoutError) else text


def _why(error: KonnektorError, peer: str) -> str:
    """Why there is no new connection, in one sentence for the operator."""
    cause = error.__cause__
    return str(error) if cause is None or isinstance(cause, KonnektorError) else explain(cause, peer)
