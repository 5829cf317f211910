"""Connecting to a target: resolve, check every address, race the allowed ones (happy eyeballs, RFC 8305).

The address that was checked is the address dialed. anyio's ``connect_tcp`` and aiohappyeyeballs race addresses well,
but the first resolves inside and returns a stream, and the second merges errors of several kinds into one without a
number; here each must keep its wire code.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from itertools import chain, zip_longest
from typing import Any, Final

import anyio

from konnektor.addresses import IPAddress, format_hostport, quote
from konnektor.connecting import Address, check_connected, class_of, keep_alive, literal, new_socket, translate
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

__all__ = ["dial", "dial_udp"]

STAGGER: Final = 0.25
"""Seconds between attempts: the Connection Attempt Delay of RFC 8305 section 5."""

MAX_ADDRESSES: Final = 16
"""Addresses of one name that are tried: a name with hundreds would hold a descriptor for each."""

# Which of several errors tells most: an answer before silence, silence before "no network", as IPv6 often is.
_TELLING: Final[tuple[type[StreamError], ...]] = (
    ConnectRefusedError, TargetResetError, LimitError, DialTimeoutError, UnreachableError,
)  # fmt: skip


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


async def _resolve(host: str, port: int, resolver: Resolver | None) -> list[Address]:
    try:
        address = literal(host, port)
    except ConfigurationError:
        raise DNSError(f"host {quote(host)} is neither an IP address nor a DNS name") from None
    if address is not None:
        return [address]
    try:
        # The host as given: its trailing dot, if any, is for the resolver.
        found = await (resolver or Resolver()).look_up(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    except LimitError:
        raise
    except socket.gaierror as error:
        raise DNSError(f"{host} did not resolve: {error.strerror}") from None
    except OSError as error:  # EAI_SYSTEM, by its number: no descriptor for asking, say
        raise translate(error, host) from None
    addresses = [Address(ip_address(sockaddr[0]), family, sockaddr) for family, _, _, _, sockaddr in found]
    if not addresses:
        raise DNSError(f"{host} has no address")
    return addresses[:MAX_ADDRESSES]


def _checked(addresses: list[Address], check: Callable[[IPAddress], None] | None) -> list[Address]:
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


def _interleave(addresses: Sequence[Address]) -> list[Address]:
    """Families by turns, the resolver's first choice first (RFC 8305 section 4)."""
    first = [a for a in addresses if a.family == addresses[0].family]
    others = [a for a in addresses if a.family != addresses[0].family]
    return [a for a in chain.from_iterable(zip_longest(first, others)) if a is not None]


async def _race(addresses: Sequence[Address], errors: list[OSError]) -> socket.socket | None:
    """The first socket to connect, attempts starting ``STAGGER`` apart or as soon as the one before has failed."""
    winner: socket.socket | None = None

    async def run(address: Address, failed: anyio.Event) -> None:
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


async def _attempt(address: Address, errors: list[OSError]) -> socket.socket | None:
    """One connected socket, or None and its error in ``errors``."""
    try:
        sock = new_socket(socket.socket, address.family)
    except OSError as error:
        errors.append(error)
        return None
    try:
        keep_alive(sock)
        await _connect(sock, address.sockaddr)
        check_connected(sock, 0, address)
    except OSError as error:
        sock.close()
        errors.append(error)
        return None
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


def _most_telling(errors: Sequence[OSError], at: str) -> StreamError:
    cause = min(errors, key=lambda error: _TELLING.index(class_of(error)))
    telling = translate(cause, at)
    telling.__cause__ = cause
    return telling
