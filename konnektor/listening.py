"""Listening sockets: TCP on every address of a name, Unix with safe permissions."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from konnektor.addresses import format_hostport
from konnektor.errors import ListenError
from konnektor.resolver import Resolver

__all__ = ["bind_tcp", "bind_udp", "bind_unix", "bound_name"]

BACKLOG: Final = 1024
UNIX_MODE: Final = 0o660
PORT_ATTEMPTS: Final = 10
_NOT_OURS: Final = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})


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
