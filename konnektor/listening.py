"""Listening sockets: TCP on every address of a name, Unix with safe permissions, and an accept loop that never spins."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable
from typing import Any, Final

from konnektor.addresses import format_hostport
from konnektor.errors import ListenError

__all__ = ["Acceptor", "bind_tcp", "bind_unix", "bound_name", "remove_unix"]

BACKLOG: Final = 1024
UNIX_MODE: Final = 0o660
ACCEPT_PAUSE: Final = 0.5
"""Seconds without accepting after the process ran out of descriptors or memory."""
ACCEPTS_A_TURN: Final = 64

logger: Final = logging.getLogger("konnektor.listening")


async def bind_tcp(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on every address of the host.

    Raises:
        ListenError: it does not resolve, or an address is in use or not ours.
    """
    where = format_hostport(host, port)
    loop = asyncio.get_running_loop()
    try:
        infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ListenError(f"cannot listen on {where}: the host does not resolve ({error.strerror})") from None
    sockets: list[socket.socket] = []
    try:
        for family, kind, proto, _, address in dict.fromkeys(infos):
            sock = socket.socket(family, kind, proto)
            sockets.append(sock)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # With port 0, the addresses of a name share the port that the first one got.
            bind_to = (address[0], port or sockets[0].getsockname()[1] if len(sockets) > 1 else port, *address[2:])
            sock.bind(bind_to)
            sock.listen(BACKLOG)
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise ListenError(f"cannot listen on {where}: {_why(error)}") from None
    return sockets


def _why(error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return "the address is in use; stop the other program or choose another port"
        case errno.EACCES:
            return "permission denied; ports below 1024 and foreign directories need privileges"
        case errno.EADDRNOTAVAIL:
            return "the address is not one of this machine's"
        case _:
            return os.strerror(error.errno) if error.errno else str(error)


def bind_unix(path: str) -> socket.socket:
    """A listening Unix socket with mode 0660 from its first moment; a stale one in its place is removed.

    Raises:
        ListenError: something else is there, a live server listens, or the directory does not allow it.
    """
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        pass
    else:
        if not stat.S_ISSOCK(mode):
            raise ListenError(f"cannot listen on {path}: something that is not a socket is there; remove it first")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            try:
                probe.connect(path)
            except (ConnectionRefusedError, FileNotFoundError):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            except OSError as error:
                raise ListenError(f"cannot listen on {path}: {_why(error)}") from None
            else:
                raise ListenError(f"cannot listen on {path}: another program is listening there")
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    # bind() creates the file: only the umask can narrow its mode without a moment of more.
    before = os.umask(0o777 & ~UNIX_MODE)
    try:
        sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ListenError(f"cannot listen on {path}: {_why(error)}") from None
    finally:
        os.umask(before)
    return sock


def remove_unix(sock: socket.socket, path: str) -> None:
    """Removes the file of a socket of ours, unless another program has put its own there."""
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(0.2)
                try:
                    probe.connect(path)
                except OSError:
                    os.unlink(path)


def bound_name(sock: socket.socket) -> str:
    """``HOST:PORT`` of a listening socket."""
    host, port = sock.getsockname()[:2]
    return format_hostport(host, port)


class Acceptor:
    """Accepts connections and hands over each socket, non-blocking.

    Out of descriptors, it pauses rather than spin on a listening socket that stays readable; what waits in
    the backlog is served when there are descriptors again.
    """

    def __init__(self, sock: socket.socket, accepted: Callable[[socket.socket, Any], object]) -> None:
        self._sock = sock
        self._accepted = accepted
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._loop.add_reader(sock.fileno(), self._ready)

    def _ready(self) -> None:
        for _ in range(ACCEPTS_A_TURN):
            try:
                sock, address = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                logger.warning("cannot accept on %s: %s", bound_name(self._sock), os.strerror(error.errno))
                self._loop.remove_reader(self._sock.fileno())
                self._timer = self._loop.call_later(ACCEPT_PAUSE, self._resume)
                return
            sock.setblocking(False)
            self._accepted(sock, address)

    def _resume(self) -> None:
        self._timer = None
        self._loop.add_reader(self._sock.fileno(), self._ready)

    def close(self) -> None:
        """Accepts no more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
