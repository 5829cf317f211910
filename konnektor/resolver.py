"""Names to addresses: ``getaddrinfo`` in threads of our own, so that a name without an answer holds up itself alone.

The threads of an event loop are few and everybody's, go on with what nobody waits for any more, and are joined at exit;
anyio's are joined, too. A daemon thread ends with the process, whatever its name server does.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial
from threading import Thread
from typing import Any, Final

from konnektor.errors import LimitError

__all__ = ["Found", "Resolver"]

THREADS: Final = 64
"""Names that one resolver looks up at a time: a dead name server takes half a minute of a thread for each of its names."""
WAITING: Final = 256
"""Names that may wait for a thread; another one is refused: against a flood of names whose server is dead."""

Found = Sequence[tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[Any, ...]]]
"""What ``socket.getaddrinfo`` returns."""


class _Lookup:
    """One name that is looked up, for all who want it."""

    __slots__ = ("ask", "callers", "outcome")

    def __init__(self, ask: Callable[[], Found]) -> None:
        self.ask = ask
        self.callers = 0
        self.outcome: asyncio.Future[Found] = asyncio.get_running_loop().create_future()


class Resolver:
    """Looks names up, each once at a time, for one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[Any, ...], _Lookup] = {}
        self._running: dict[tuple[Any, ...], _Lookup] = {}

    async def look_up(self, host: str, port: int, *, type: socket.SocketKind, proto: int = 0, flags: int = 0) -> Found:
        """``loop.getaddrinfo``. Cancelling is safe: what nobody waits for is not begun.

        Raises:
            OSError: as ``socket.getaddrinfo``; EAGAIN if there is no thread to be had.
            LimitError: too many other names wait.
        """
        key = host.lower(), type, proto, flags
        lookup = self._running.get(key) or self._waiting.get(key)
        if lookup is None:
            if len(self._waiting) >= WAITING:
                raise LimitError(f"{host} is not looked up: {WAITING} other names wait for an answer already")
            # Without the port, which is not what takes time: all ports of a name are one question.
            lookup = _Lookup(partial(socket.getaddrinfo, host, 0, type=type, proto=proto, flags=flags))
            self._waiting[key] = lookup
            self._begin()
        lookup.callers += 1
        try:
            await asyncio.wait((lookup.outcome,))
        finally:
            lookup.callers -= 1
            if not lookup.callers and self._waiting.get(key) is lookup:
                del self._waiting[key]
        return [
            (family, kind, number, name, (address[0], port, *address[2:]))
            for family, kind, number, name, address in lookup.outcome.result()
        ]

    def _begin(self) -> None:
        """A thread for each name that waits, as long as there are any."""
        loop = asyncio.get_running_loop()
        while self._waiting and len(self._running) < THREADS:
            key = next(iter(self._waiting))
            lookup = self._running[key] = self._waiting.pop(key)
            try:
                Thread(target=self._ask, args=(loop, key, lookup.ask), name="resolver", daemon=True).start()
            except RuntimeError:
                self._settle(key, OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)))

    def _answered(self, key: tuple[Any, ...], answer: Found | Exception) -> None:
        self._settle(key, answer)
        self._begin()

    def _settle(self, key: tuple[Any, ...], answer: Found | Exception) -> None:
        outcome = self._running.pop(key).outcome
        if isinstance(answer, Exception):
            outcome.set_exception(answer)
            outcome.exception()  # perhaps nobody else asks any more
        else:
            outcome.set_result(answer)

    def _ask(self, loop: asyncio.AbstractEventLoop, key: tuple[Any, ...], ask: Callable[[], Found]) -> None:
        """What a thread does."""
        answer: Found | Exception
        try:
            answer = ask()
        except Exception as error:  # noqa: BLE001
            answer = error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._answered, key, answer)
