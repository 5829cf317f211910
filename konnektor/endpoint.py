"""What the worker and the control plane have in common: who they are, what they serve, and how they end."""

from __future__ import annotations

import asyncio
import encodings.idna  # noqa: F401 - getaddrinfo imports it, perhaps when descriptors have run out
import ssl
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, ClassVar, Final, Self, TypeVar

from anyio.lowlevel import checkpoint

from konnektor.changes import Changes
from konnektor.errors import CertificateError, Code, ConfigurationError
from konnektor.handlers import Handlers
from konnektor.limits import Limits
from konnektor.policy import AllowList
from konnektor.priorities import Priorities, PriorityRule
from konnektor.reloading import ReloadingContext
from konnektor.session import Session
from konnektor.stream import Stream
from konnektor.stream_types import StreamType, Tcp, Udp, check_type
from konnektor.targets import Targets
from konnektor.tls import Identity, TLSFiles

__all__ = ["Endpoint", "checked_limits"]

T = TypeVar("T", bound=StreamType)

LAST_WORDS: Final = 3.0
"""Seconds after the grace of a drain that peers have to take the last frames and say goodbye."""


class Endpoint(ABC):
    """One end, with any number of sessions. An async context manager: entering starts it, leaving ends it.

    It owns a task for each session and each attempt to get one; ending is waiting for them.

    Args:
        tls: its files.
        build: makes a TLS context from them, a method of theirs.
        allowed: what the streams of a session may reach here.
        limits: of each session.
        priorities: rules for class and weight of streams, whoever opens them.

    Attributes:
        handlers: what serves the peers' streams; ``handle`` adds to it.
        identity: who this end is, by its certificate.
        limits: of each session.

    Raises:
        ConfigurationError: an argument is not what it is to be.
        CertificateError: the files cannot be used.
    """

    _kind: ClassVar[str]

    def __init__(
        self,
        tls: TLSFiles,
        build: Callable[[TLSFiles], ssl.SSLContext],
        allowed: Callable[[Session], AllowList],
        limits: Limits | None,
        priorities: Iterable[PriorityRule | str],
    ) -> None:
        _expect("tls", tls, TLSFiles)
        self.limits = checked_limits(limits)
        rules = Priorities(priorities)
        self._classify = rules.of if rules.rules else None
        self.identity: Identity = tls.identity()

        def build_as_before() -> ssl.SSLContext:
            identity = tls.identity()
            if identity != self.identity:
                raise CertificateError(f"the certificate now names {identity}, not {self.identity}")
            return build(tls)

        self._context = ReloadingContext(build_as_before, tls.cert, tls.key, tls.ca, owner=self.identity.name)
        self._targets = Targets(allowed)
        self.handlers = Handlers()
        self.handlers.add(Tcp, self._targets.serve, self._targets.begin)
        self.handlers.add(Udp, self._targets.serve_udp)
        self._live: set[Session] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._changes = Changes()
        self._started = False
        self._leaving = False

    async def start(self) -> None:
        """Begins, and returns: a control plane listens then, a worker is connecting. Cancelled, it does neither.

        Raises:
            ConfigurationError: it was started before; an endpoint that has ended does not start again.
            ListenError: the address of a control plane cannot be had.
        """
        if self._started or self._leaving:
            raise ConfigurationError(f"the {self._kind} was started before")
        # anyio imports its asyncio half at first use, which must not be when descriptors have run out.
        await checkpoint()
        await self._start()
        self._started = True
        if not self._leaving:
            self._context.watch()

    def _check_started(self) -> None:
        """Raises ConfigurationError before the start, when what is waited for would not come."""
        if not (self._started or self._leaving):
            raise ConfigurationError(f"the {self._kind} was not started: enter it with async with")

    @abstractmethod
    async def _start(self) -> None: ...

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def handle(
        self, request: type[T]
    ) -> Callable[[Callable[[Stream, T], Awaitable[None]]], Callable[[Stream, T], Awaitable[None]]]:
        """Decorator: serves peers' streams of a type of your own; ``stream.session.peer_name`` says whose it is.

        Raises:
            ConfigurationError: the type is none, or its name, or what is decorated is no coroutine function.
            LocalProtocolError: the type has a handler.
        """
        check_type(request)

        def add(handler: Callable[[Stream, T], Awaitable[None]]) -> Callable[[Stream, T], Awaitable[None]]:
            self.handlers.add(request, handler)
            return handler

        return add

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # The end

    async def drain(self, grace: float) -> None:
        """Takes nothing new, tells every peer, and waits for what is open: ``grace`` seconds, then it is reset.

        Returns when nothing is left, a few seconds after the grace at the latest. Cancelled, it drops what is left.
        """
        self._leave(drain=True)
        try:
            async with asyncio.timeout(grace + LAST_WORDS):
                for session in self._live:
                    session.start_drain(grace, f"the {self._kind} is shutting down")
                await self._wait_ended()
        except TimeoutError:
            pass
        finally:
            self._drop()
        await self._wait_ended()

    async def aclose(self) -> None:
        """Ends everything now: streams that are open break. Cancelled, it drops the connections."""
        self._leave(drain=False)
        for session in self._live:
            session.close(Code.SHUTDOWN, f"the {self._kind} is closed")
        self._targets.abort()
        try:
            await self._wait_ended()
        except asyncio.CancelledError:
            self._drop()
            raise

    def _leave(self, *, drain: bool) -> None:
        """Takes no new peers; ``drain`` lets what is open go on."""
        self._leaving = True
        self._context.stop()
        self._targets.leave()
        self._changes.notify()

    def _drop(self) -> None:
        """Drops every connection, with one word: without it the peer would wait for this end to come back."""
        for session in self._live:
            session.close(Code.SHUTDOWN, f"the {self._kind} is closed")
            session.abort()
        self._targets.abort()

    async def _wait_ended(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._targets.wait_closed()


def checked_limits(limits: Limits | None) -> Limits:
    """The limits that were given, or the default ones.

    Raises:
        ConfigurationError: something else was given.
    """
    if limits is None:
        return Limits()
    _expect("limits", limits, Limits)
    return limits


def _expect(what: str, given: object, kind: type) -> None:
    if not isinstance(given, kind):
        raise ConfigurationError(f"{what} takes {kind.__name__}(...), not {given!a:.80}")
