"""Listening sockets: TCP on every address of a name, Unix with safe permissions, and an accept loop that never spins."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from konnektor.addresses import format_hostport
from konnektor.errors import ListenError
from konnektor.poller import poller_of
from konnektor.resolver import Resolver

__all__ = ["Acceptor", "bind_tcp", "bind_udp", "bind_unix", "bound_name"]

BACKLOG: Final = 1024
UNIX_MODE: Final = 0o660
ACCEPT_PAUSE: Final = 0.5
"""Seconds without accepting after the process ran out of descriptors or memory."""
RESERVE: Final = 1024
"""Descriptors that modest listeners leave to others: those newcomers to the tunnel, at most, and as many for what they begin."""
ACCEPTS_A_TURN: Final = 64
PORT_ATTEMPTS: Final = 10
_NOT_OURS: Final = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
# Linux passes errors that are pending on the new connection, see accept(2).
_OF_ONE_CONNECTION: Final = frozenset(
    {errno.ECONNABORTED, errno.EPERM, errno.EPROTO, errno.ENETDOWN, errno.ENOPROTOOPT, errno.EHOSTDOWN,
     errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EOPNOTSUPP}
)  # fmt: skip

logger: Final = logging.getLogger("konnektor.listening")


async def bind_tcp(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on every address of the host; with port 0, on one port that is free on all of them.

    Addresses of a name that this machine does not have (``::1`` without IPv6) are left out, if another is left.

    Raises:
        ListenError: it does not resolve, or an address is in use or not ours.
    """
    return await _bind_name(host, port, socket.SOCK_STREAM)


async def bind_udp(host: str, port: int) -> list[socket.socket]:
    """Bound UDP sockets, otherwise as ``bind_tcp``."""
    return await _bind_name(host, port, socket.SOCK_DGRAM)


async def _bind_name(host: str, port: int, kind: socket.SocketKind) -> list[socket.socket]:
    where = format_hostport(host, port)
    try:
        infos = await Resolver().look_up(host, port, type=kind, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ListenError(f"cannot listen on {where}: the host does not resolve ({error.strerror})") from None
    infos = list(dict.fromkeys(infos))
    attempts = PORT_ATTEMPTS
    while True:
        attempts -= 1
        try:
            return _bind_all(infos, port)
        except OSError as error:
            # The free port of the first address may be taken on the second.
            if port or error.errno != errno.EADDRINUSE or not attempts:
                raise ListenError(f"cannot listen on {where}: {_why(error)}") from None


def _bind_all(infos: Sequence[tuple[Any, ...]], port: int) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, kind, proto, _, address in infos:
            try:
                sock = _bind(family, kind, proto, (address[0], port, *address[2:]))
            except OSError as error:
                if error.errno not in _NOT_OURS:
                    raise
                missing = error
                continue
            sockets.append(sock)
            port = sock.getsockname()[1]
        if missing is not None and not sockets:
            raise missing
        for sock in sockets:
            if sock.type == socket.SOCK_STREAM:
                sock.listen(BACKLOG)
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _bind(family: int, kind: int, proto: int, address: tuple[Any, ...]) -> socket.socket:
    sock = socket.socket(family, kind, proto)
    try:
        sock.setblocking(False)
        if kind == socket.SOCK_STREAM:
            # For UDP it means something else: that another program may take the port over.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _why(error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return "the address is in use; stop the other program or choose another port"
        case errno.EACCES:
            return "permission denied; ports below 1024 and foreign directories need privileges"
        case errno.ENOENT:
            return "its directory does not exist; make it first"
        case errno.EADDRNOTAVAIL | errno.EAFNOSUPPORT:
            return "the address is not one of this machine's"
        case _:
            return os.strerror(error.errno) if error.errno else str(error)


def bind_unix(path: str) -> socket.socket:
    """A listening Unix socket with mode 0660 from its first moment; a stale one in its place is removed.

    Raises:
        ListenError: something else is there, a live server listens, or the directory does not allow it.
    """
    sock = socket.socket(socket.AF_UNIX)
    # bind() creates the file: only the umask can narrow its mode without a moment of more.
    before = os.umask(0o777 & ~UNIX_MODE)
    try:
        _remove_stale(path)
        sock.setblocking(False)
        sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if isinstance(error, ListenError):
            raise
        raise ListenError(f"cannot listen on {path}: {_why(error)}") from None
    finally:
        os.umask(before)
    return sock


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"cannot listen on {path}: something that is not a socket is there; remove it first")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # a live server with a full backlog would make it wait
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                Path(path).unlink()
            return
        except BlockingIOError:
            pass
    raise ListenError(f"cannot listen on {path}: another program is listening there; stop it or choose another path")


def bound_name(sock: socket.socket) -> str:
    """``HOST:PORT`` of a listening TCP socket, the path of a Unix one."""
    address = sock.getsockname()
    return address if isinstance(address, str) else format_hostport(*address[:2])


class Acceptor:
    """Accepts connections and hands over each socket, non-blocking.

    Out of descriptors, it pauses rather than spin on a listening socket that stays readable; what waits in
    the backlog is served when there are descriptors again. It owns the listening socket, and the file of a Unix one.

    Args:
        sock: listening.
        accepted: called with each new socket, which is then its, and the peer's address.
        modest: leaves the last quarter of the process's descriptors, ``RESERVE`` at most, to whoever is not.
    """

    def __init__(
        self, sock: socket.socket, accepted: Callable[[socket.socket, Any], object], *, modest: bool = False
    ) -> None:
        self.name = bound_name(sock)
        self._sock = sock
        self._accepted = accepted
        self._modest = modest
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._reading = False
        self._starved = False
        self._file = _file(self.name) if sock.family == socket.AF_UNIX else None
        self.resume()

    def _ready(self) -> None:
        accepted = 0
        while accepted < ACCEPTS_A_TURN and self._reading and self._accept():
            accepted += 1
        if accepted:
            # Most clients have said something by now. It goes out in the same write as what accepting them brings about.
            poller_of(self._loop).serve()

    def _accept(self) -> bool:
        """Accepts a connection; returns whether to go on."""
        try:
            sock, address = self._sock.accept()
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            if error.errno in _OF_ONE_CONNECTION:
                return True
            self._starve(os.strerror(error.errno or 0))
            return False
        # The kernel gives the lowest number that is free.
        if self._modest and sock.fileno() >= _allowance():
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
