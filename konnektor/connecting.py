"""Connecting to one address: its socket, the options that every socket gets, and the end of it, without a task."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeVar

from konnektor.addresses import IPAddress, format_hostport, parse_host
from konnektor.errors import (
    ConnectRefusedError,
    DialTimeoutError,
    LimitError,
    StreamError,
    TargetResetError,
    UnreachableError,
)

__all__ = [
    "Address",
    "Dialing",
    "begin_dial",
    "check_connected",
    "class_of",
    "keep_alive",
    "literal",
    "new_socket",
    "reset_on_close",
    "set_options",
    "translate",
]

S = TypeVar("S", bound=socket.SocketType)

_NON_BLOCKING_STREAM: Final = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
_CONNECTED: Final = (1, 8)
"""TCP_ESTABLISHED and TCP_CLOSE_WAIT: the first byte of TCP_INFO is the connection's state (linux/tcp.h)."""

_ERRNO: Final[dict[int | None, type[StreamError]]] = {
    errno.ECONNREFUSED: ConnectRefusedError,
    errno.ECONNRESET: TargetResetError,
    errno.ECONNABORTED: TargetResetError,
    errno.ETIMEDOUT: DialTimeoutError,
    errno.EAGAIN: LimitError,  # no local port is free
    errno.EMFILE: LimitError,
    errno.ENFILE: LimitError,
    errno.ENOBUFS: LimitError,
    errno.ENOMEM: LimitError,
}  # fmt: skip


class Address(NamedTuple):
    """One that a host has, and how the system wants to hear it."""

    ip: IPAddress
    family: socket.AddressFamily
    sockaddr: tuple[Any, ...]

    def __str__(self) -> str:
        return format_hostport(self.ip, self.sockaddr[1])


@lru_cache(maxsize=1024, typed=True)
def literal(host: str, port: int) -> Address | None:
    """Of a host that is an IP address; None of a name.

    Raises:
        ConfigurationError: it is neither.
    """
    address = parse_host(host)
    if isinstance(address, str):
        return None
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    return Address(address, family, (str(address), port))


def begin_dial(address: Address) -> tuple[socket.SocketType, bool]:
    """Connects to an address: where there is nothing to resolve or to race, nothing needs a task.

    Args:
        address: checked by the caller.

    Returns:
        A non-blocking socket, which the caller owns, and whether it is connected: else it is for ``Dialing``. Its class is
        beneath ``socket.socket``, which is less work to make and to close, and it is not to ``keep_alive`` yet.

    Raises:
        StreamError: as ``dial.dial``.
    """
    try:
        sock = new_socket(socket.SocketType, address.family)
    except OSError as error:
        raise translate(error, str(address)) from None
    number = sock.connect_ex(address.sockaddr)
    if number == errno.EINPROGRESS and not _is_connected(sock):
        return sock, False
    try:
        check_connected(sock, 0 if number == errno.EINPROGRESS else number, address)
    except OSError as error:
        sock.close()
        raise translate(error, str(address)) from None
    return sock, True


class Dialing:
    """What becomes of a socket that ``begin_dial`` has left connecting, by callbacks alone.

    Args:
        sock: the socket.
        address: where it goes.
        done: called once, with the connected socket, which is the callee's from then on, or with the error.
    """

    __slots__ = ("_address", "_done", "_loop", "_sock")

    def __init__(
        self, sock: socket.SocketType, address: Address, done: Callable[[socket.SocketType | StreamError], None]
    ) -> None:
        self._sock = sock
        self._address = address
        self._done = done
        self._loop = asyncio.get_running_loop()
        try:
            self._loop.add_writer(sock.fileno(), self._writable)
        except BaseException:
            sock.close()
            raise

    def cancel(self) -> None:
        """Closes the socket, before ``done`` was called; it will not be."""
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()

    def _writable(self) -> None:
        sock = self._sock
        fd = sock.fileno()
        try:
            check_connected(sock, sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), self._address)
        except OSError as error:
            self.cancel()
            self._done(translate(error, str(self._address)))
            return
        try:
            self._done(sock)
        finally:
            # Not before: if somebody reads from it by now, the loop goes on with what it has set up for the descriptor.
            self._loop.remove_writer(fd)


def _keepalive() -> tuple[tuple[int, int, int], ...]:
    times = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))
    return (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        # not everywhere
        *((socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in times if hasattr(socket, name)),
    )


_KEEPALIVE: Final = _keepalive()


def keep_alive(sock: socket.SocketType) -> None:
    """Lets a dead peer be noticed after a minute of silence."""
    for level, option, value in _KEEPALIVE:
        sock.setsockopt(level, option, value)


def set_options(sock: socket.SocketType) -> None:
    """What a listening socket passes on to those that it accepts: no delay for small writes, and ``keep_alive``."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    keep_alive(sock)


def reset_on_close(sock: socket.SocketType) -> None:
    """Lets the end of a TCP connection be a reset, not a clean end; a Unix socket knows no difference."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def new_socket(kind: type[S], family: socket.AddressFamily) -> S:
    """A socket to connect with, that does not delay small writes. It is non-blocking from the start, without a call (socket(2))."""
    sock = kind(family, _NON_BLOCKING_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def _is_connected(sock: socket.SocketType) -> bool:
    """Whether a connection in progress is there: on the loopback interface it is as soon as it was asked for.

    ``getpeername`` would tell as well, and write out an address that nobody wants, which takes longer.
    """
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in _CONNECTED


def check_connected(sock: socket.SocketType, number: int, address: Address) -> None:
    """Raises the OSError that connecting has ended with, if ``number`` is one, or if the socket met itself.

    Dialing a local port that nobody listens on may get that very port as the source, and TCP then meets itself.
    """
    if number:
        raise OSError(number, os.strerror(number))
    try:
        own = sock.getsockname()
        met_itself = own[1] == address.sockaddr[1] and own == sock.getpeername()
    except OSError:  # reset already: whoever reads will be told
        return
    if met_itself:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "connected to itself")


def class_of(error: OSError) -> type[StreamError]:
    """What an error is to whoever asked for a connection."""
    return _ERRNO.get(error.errno, UnreachableError)


def translate(error: OSError, at: str) -> StreamError:
    """The same, with a text; ``at`` is where it happened."""
    return class_of(error)(f"{at}: {errno.errorcode.get(error.errno or 0, 'error')}")
