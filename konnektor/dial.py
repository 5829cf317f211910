"""Connecting to a target: resolve, check every address, race the allowed ones (happy eyeballs, RFC 8305).

The address that was checked is the address dialed. anyio's ``connect_tcp`` and aiohappyeyeballs race addresses well,
but the first resolves inside and returns a stream, and the second merges errors of several kinds into one without a
number; here each must keep its wire code.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from itertools import chain, zip_longest
from typing import Any, Final, NamedTuple

import anyio

from konnektor.addresses import IPAddress, format_hostport, parse_host, quote
from konnektor.errors import (
    ConfigurationError,
    ConnectRefusedError,
    DeniedError,
    DialTimeoutError,
    DNSError,
    LimitError,
    StreamError,
    TargetResetError,
    UnreachableError,
)
from konnektor.resolver import Resolver

__all__ = ["Dialing", "begin_dial", "dial", "dial_udp", "reset_on_close", "set_options"]

STAGGER: Final = 0.25
"""Seconds between attempts: the Connection Attempt Delay of RFC 8305 section 5."""

MAX_ADDRESSES: Final = 16
"""Addresses of one name that are tried: a name with hundreds would hold a descriptor for each."""

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

# Which of several errors tells most: an answer before silence, silence before "no network", as IPv6 often is.
_TELLING: Final[tuple[type[StreamError], ...]] = (
    ConnectRefusedError, TargetResetError, LimitError, DialTimeoutError, UnreachableError,
)  # fmt: skip


class _Address(NamedTuple):
    ip: IPAddress
    family: socket.AddressFamily
    sockaddr: tuple[Any, ...]


def begin_dial(address: IPAddress, port: int) -> tuple[socket.socket, bool]:
    """``dial`` where there is nothing to resolve or to race, without a task.

    Args:
        address: checked by the caller.
        port: the TCP port.

    Returns:
        A non-blocking socket, which the caller owns, and whether it is connected: else it is for ``Dialing``.

    Raises:
        StreamError: as ``dial``.
    """
    _, family, sockaddr = _literal(address, port)
    try:
        sock = _new_socket(family)
    except OSError as error:
        raise _translate(error, format_hostport(address, port)) from None
    number = sock.connect_ex(sockaddr)
    if number == errno.EINPROGRESS and not _is_connected(sock):
        return sock, False
    try:
        _check_connected(sock, 0 if number == errno.EINPROGRESS else number, port)
    except OSError as error:
        sock.close()
        raise _translate(error, format_hostport(address, port)) from None
    return sock, True


class Dialing:
    """What becomes of a socket that ``begin_dial`` has left connecting, by callbacks alone.

    Args:
        sock: the socket.
        address, port: where it goes.
        done: called once, with the connected socket, which is the callee's from then on, or with the error.
    """

    __slots__ = ("_address", "_done", "_loop", "_port", "_sock")

    def __init__(
        self, sock: socket.socket, address: IPAddress, port: int, done: Callable[[socket.socket | StreamError], None]
    ) -> None:
        self._sock = sock
        self._address = address
        self._port = port
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
            _check_connected(sock, sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), self._port)
        except OSError as error:
            self.cancel()
            self._done(_translate(error, format_hostport(self._address, self._port)))
            return
        try:
            self._done(sock)
        finally:
            # Not before: if somebody reads from it by now, the loop goes on with what it has set up for the descriptor.
            self._loop.remove_writer(fd)


async def dial(
    host: str,
    port: int,
    *,
    check: Callable[[IPAddress], None] | None = None,
    within: float | None = None,
    resolver: Resolver | None = None,
) -> socket.socket:
    """Connect to a host and return the connected, non-blocking socket, which the caller owns.

    Cancelling is safe: no socket and no task stays behind.

    Args:
        host: an IP address, or a DNS name to resolve here.
        port: the TCP port.
        check: called with each resolved address before it is dialed; raises DeniedError to veto it
            (``AllowList.checker`` makes one).
        within: seconds for all of it, name resolution included.
        resolver: for names; by default a new one.

    Raises:
        DeniedError: every address was vetoed.
        DNSError: the name did not resolve, or is neither a strict IP address nor a DNS name.
        ConnectRefusedError, TargetResetError, UnreachableError, DialTimeoutError, LimitError: no address could be
            connected; of several errors, the most telling. Its cause is what the system said.
    """
    at = format_hostport(host, port)
    try:
        async with asyncio.timeout(within):
            allowed = _checked(await _resolve(host, port, resolver), check)
            errors: list[OSError] = []
            if len(allowed) == 1:
                sock = await _attempt(allowed[0], errors)
            else:
                sock = await _race(_interleave(allowed), errors)
    except TimeoutError:
        raise DialTimeoutError(f"{at} did not answer within {within:g} s") from None
    if sock is not None:
        return sock
    raise _most_telling(errors, at)


async def dial_udp(
    host: str,
    port: int,
    *,
    check: Callable[[IPAddress], None] | None = None,
    within: float | None = None,
    resolver: Resolver | None = None,
) -> socket.socket:
    """A non-blocking UDP socket, connected to the first address of a host that is allowed and that there is a way to.

    Connected means that the kernel passes on only what comes from there; whether anybody is there nobody knows.
    Arguments and errors as ``dial``.
    """
    at = format_hostport(host, port)
    try:
        async with asyncio.timeout(within):
            allowed = _checked(await _resolve(host, port, resolver), check)
    except TimeoutError:
        raise DialTimeoutError(f"{at} did not resolve within {within:g} s") from None
    errors: list[OSError] = []
    for address in allowed:
        try:
            sock = socket.socket(address.family, socket.SOCK_DGRAM, socket.IPPROTO_UDP)
        except OSError as error:
            errors.append(error)
            continue
        try:
            sock.setblocking(False)
            sock.connect(address.sockaddr)
            return sock
        except OSError as error:
            sock.close()
            errors.append(error)
    raise _most_telling(errors, at)


def _options() -> tuple[tuple[int, int, int], ...]:
    keepalive = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))
    return (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        # not everywhere
        *((socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in keepalive if hasattr(socket, name)),
    )


_OPTIONS: Final = _options()


def set_options(sock: socket.socket) -> None:
    """What every TCP socket of an endpoint gets: no delay for small writes, and a dead peer noticed after a minute."""
    for level, option, value in _OPTIONS:
        sock.setsockopt(level, option, value)


def reset_on_close(sock: socket.socket) -> None:
    """Lets the end of a TCP connection be a reset, not a clean end; a Unix socket knows no difference."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def _resolve(host: str, port: int, resolver: Resolver | None) -> list[_Address]:
    try:
        parsed = parse_host(host)
    except ConfigurationError:
        raise DNSError(f"host {quote(host)} is neither an IP address nor a DNS name") from None
    if not isinstance(parsed, str):
        return [_literal(parsed, port)]
    try:
        # The host as given: its trailing dot, if any, is for the resolver.
        found = await (resolver or Resolver()).look_up(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    except LimitError:
        raise
    except socket.gaierror as error:
        raise DNSError(f"{host} did not resolve: {error.strerror}") from None
    except OSError as error:  # EAI_SYSTEM, by its number: no descriptor for asking, say
        raise _translate(error, host) from None
    addresses = [_Address(ip_address(sockaddr[0]), family, sockaddr) for family, _, _, _, sockaddr in found]
    if not addresses:
        raise DNSError(f"{host} has no address")
    return addresses[:MAX_ADDRESSES]


def _literal(address: IPAddress, port: int) -> _Address:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    return _Address(address, family, (str(address), port))


def _checked(addresses: list[_Address], check: Callable[[IPAddress], None] | None) -> list[_Address]:
    if check is None:
        return addresses
    allowed = []
    veto = None
    for address in addresses:
        try:
            check(address.ip)
        except DeniedError as error:
            veto = veto or error
        else:
            allowed.append(address)
    if veto is not None and not allowed:
        raise veto
    return allowed


def _interleave(addresses: Sequence[_Address]) -> list[_Address]:
    """Families by turns, the resolver's first choice first (RFC 8305 section 4)."""
    first = [a for a in addresses if a.family == addresses[0].family]
    others = [a for a in addresses if a.family != addresses[0].family]
    return [a for a in chain.from_iterable(zip_longest(first, others)) if a is not None]


async def _race(addresses: Sequence[_Address], errors: list[OSError]) -> socket.socket | None:
    """The first socket to connect, attempts starting ``STAGGER`` apart or as soon as the one before has failed."""
    winner: socket.socket | None = None

    async def run(address: _Address, failed: anyio.Event) -> None:
        nonlocal winner
        sock = await _attempt(address, errors)
        if sock is None:
            failed.set()
        elif winner is None:
            winner = sock
            tasks.cancel_scope.cancel()
        else:  # two became ready in one turn of the loop
            sock.close()

    try:
        async with anyio.create_task_group() as tasks:
            for address in addresses:
                failed = anyio.Event()
                tasks.start_soon(run, address, failed)
                with anyio.move_on_after(STAGGER):
                    await failed.wait()
    except BaseException:
        if winner is not None:
            winner.close()
        raise
    return winner


async def _attempt(address: _Address, errors: list[OSError]) -> socket.socket | None:
    """One connected socket, or None and its error in ``errors``."""
    try:
        sock = _new_socket(address.family)
    except OSError as error:
        errors.append(error)
        return None
    try:
        await _connect(sock, address.sockaddr)
        _check_connected(sock, 0, address.sockaddr[1])
    except OSError as error:
        sock.close()
        errors.append(error)
        return None
    except BaseException:
        sock.close()
        raise
    return sock


def _new_socket(family: socket.AddressFamily) -> socket.socket:
    """A socket to connect with, non-blocking."""
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setblocking(False)
        set_options(sock)
    except BaseException:
        sock.close()
        raise
    return sock


async def _connect(sock: socket.socket, sockaddr: tuple[Any, ...]) -> None:
    """``loop.sock_connect`` for an address that is resolved.

    uvloop's own sends even an IP address through the resolver's few threads: a hop for each dial, and a wait for all
    of them behind a slow name server.
    """
    try:
        sock.connect(sockaddr)
        return
    except BlockingIOError as error:
        if error.errno != errno.EINPROGRESS:
            raise
    loop = asyncio.get_running_loop()
    writable: asyncio.Future[None] = loop.create_future()
    fd = sock.fileno()
    loop.add_writer(fd, _settle, writable)
    try:
        await writable
    finally:
        loop.remove_writer(fd)
    if number := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(number, os.strerror(number))


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _is_connected(sock: socket.socket) -> bool:
    """Whether a connection in progress is there: on the loopback interface it is as soon as it was asked for."""
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _check_connected(sock: socket.socket, number: int, port: int) -> None:
    """Raises the OSError that connecting to a port has ended with, if ``number`` is one, or if the socket met itself.

    Dialing a local port that nobody listens on may get that very port as the source, and TCP then meets itself.
    """
    if number:
        raise OSError(number, os.strerror(number))
    try:
        own = sock.getsockname()
        met_itself = own[1] == port and own == sock.getpeername()
    except OSError:  # reset already: whoever reads will be told
        return
    if met_itself:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "connected to itself")


def _most_telling(errors: Sequence[OSError], at: str) -> StreamError:
    cause = min(errors, key=lambda error: _TELLING.index(_class_of(error)))
    telling = _translate(cause, at)
    telling.__cause__ = cause
    return telling


def _class_of(error: OSError) -> type[StreamError]:
    return _ERRNO.get(error.errno, UnreachableError)


def _translate(error: OSError, at: str) -> StreamError:
    return _class_of(error)(f"{at}: {errno.errorcode.get(error.errno or 0, 'error')}")
