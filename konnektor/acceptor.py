"""An accept loop that never spins."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from konnektor.listening import bound_name
from konnektor.poller import poller_of

__all__ = ["Acceptor"]

ACCEPT_PAUSE: Final = 0.5
"""Seconds without accepting after the process ran out of descriptors or memory."""
RESERVE: Final = 1024
"""Descriptors that modest listeners leave to others: those newcomers to the tunnel, at most, and as many for what they begin."""
ACCEPTS_A_TURN: Final = 64
# Linux passes errors that are pending on the new connection, see accept(2).
_OF_ONE_CONNECTION: Final = frozenset(
    {errno.ECONNABORTED, errno.EPERM, errno.EPROTO, errno.ENETDOWN, errno.ENOPROTOOPT, errno.EHOSTDOWN,
     errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EOPNOTSUPP}
)  # fmt: skip


logger: Final = logging.getLogger("konnektor.listening")  # the name that log configurations know


class Acceptor:
    """Accepts connections and hands over each socket, non-blocking.

    Out of descriptors, it pauses rather than spin on a listening socket that stays readable; what waits in
    the backlog is served when there are descriptors again. It owns the listening socket, and the file of a Unix one.

    Args:
        sock: listening.
        accepted: called with each new socket, which is then its, and the peer's address.
        modest: leaves the last quarter of the process's descriptors, ``RESERVE`` at most, to whoever is not.
        kind: of the sockets. ``socket.SocketType``, which is beneath what event loops want, is less work to make and to close.
    """

    def __init__(
        self,
        sock: socket.socket,
        accepted: Callable[[Any, Any], object],
        *,
        modest: bool = False,
        kind: type[socket.SocketType] = socket.socket,
    ) -> None:
        self.name = bound_name(sock)
        self._sock = sock
        self._accepted = accepted
        self._modest = modest
        self._kind = kind
        # CPython's own, and private: ``sock.accept`` calls it, and makes enumerations and a ``socket.socket`` each time.
        self._accept_fd: Callable[[], tuple[int, Any]] = sock._accept  # type: ignore[attr-defined]
        self._family, self._type, self._proto = int(sock.family), int(sock.type), sock.proto
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._reading = False
        self._starved = False
        self._file = _file(self.name) if sock.family == socket.AF_UNIX else None
        self.resume()

    def _ready(self) -> None:
        accepted = 0
        allowance = _allowance() if self._modest else sys.maxsize
        while accepted < ACCEPTS_A_TURN and self._reading and self._accept(allowance):
            accepted += 1
        if accepted:
            # Most clients have said something by now. It goes out in the same write as what accepting them brings about.
            poller_of(self._loop).serve()

    def _accept(self, allowance: int) -> bool:
        """Accepts a connection, on a descriptor below ``allowance``; returns whether to go on."""
        try:
            fd, address = self._accept_fd()
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            if error.errno in _OF_ONE_CONNECTION:
                return True
            self._starve(os.strerror(error.errno or 0))
            return False
        sock = self._kind(self._family, self._type, self._proto, fd)
        # The kernel gives the lowest number that is free.
        if fd >= allowance:
            sock.close()
            self._starve("the last descriptors are kept for workers; raise the limit of open files")
            return False
        sock.setblocking(False)
        try:
            self._accepted(sock, address)
        except OSError as error:
            # It had the last descriptor, and its owner needs another to watch it.
            sock.close()
            self._starve(os.strerror(error.errno or 0))
            return False
        self._starved = False
        return True

    def _starve(self, why: str) -> None:
        if not self._starved:  # told once, until it gets better
            logger.warning("cannot accept on %s: %s", self.name, why)
        self._starved = True
        self.pause()
        self._timer = self._loop.call_later(ACCEPT_PAUSE, self.resume)

    def pause(self) -> None:
        """Leaves connections to the kernel's backlog until ``resume``."""
        self._stop_timer()
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._sock.fileno())

    def resume(self) -> None:
        """Accepts again, unless closed."""
        self._stop_timer()
        if not self._reading and self._sock.fileno() >= 0:
            self._reading = True
            self._loop.add_reader(self._sock.fileno(), self._ready)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """Accepts no more; the file of a Unix socket goes, unless another program has put its own there."""
        self.pause()
        self._sock.close()
        if self._file is not None and self._file == _file(self.name):
            self._file = None
            with contextlib.suppress(OSError):
                Path(self.name).unlink()


def _allowance() -> int:
    """Descriptors that modest listeners may use."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft - min(RESERVE, soft // 4)


def _file(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
