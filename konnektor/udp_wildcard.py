"""A UDP socket on all addresses of the machine, which answers from the one that was asked.

A packet that names no source leaves from the address that the kernel's routes suggest. On a machine with several that is
not always the one that the client sent to, and a client that is connected takes answers from no other. Linux tells with
each packet where it was sent to, and takes with each answer where it is to leave from (ip(7), RFC 3542 section 6).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
from collections.abc import Iterable
from typing import Any, Final, TypeAlias

from konnektor.udp_relay import UdpSocket

__all__ = ["WildcardSocket", "is_wildcard"]

LARGEST: Final = 65_536
"""More than any UDP packet has, without IPv6's jumbograms."""
READS_A_TURN: Final = 64

# By their numbers in Linux: socket of Python 3.11 lacks the first, and those of other systems mean something else.
IP_PKTINFO: Final = 8
IPV6_RECVPKTINFO: Final = 49
IPV6_PKTINFO: Final = 50

_IN_PKTINFO: Final = struct.Struct("=i4s4s")
"""Interface, our address, and the destination in the packet's header, which may be one of a broadcast."""
_IN6_PKTINFO: Final = struct.Struct("=16si")
"""Our address, or the multicast group; interface."""
SPACE: Final = 64
"""Bytes for what the kernel tells of a packet: one of these two, and its header."""

_Ancillary: TypeAlias = tuple[tuple[int, int, bytes], ...]


def is_wildcard(sock: socket.socket) -> bool:
    """Whether the socket is bound to all addresses, on a system that tells which of them a packet was sent to."""
    return sys.platform == "linux" and sock.getsockname()[0] in {"0.0.0.0", "::"}  # noqa: S104 - nothing is bound here


class WildcardSocket(UdpSocket):
    """As ``UdpSocket``, for one that ``is_wildcard``: where a packet came from includes where it was sent to."""

    __slots__ = ()

    async def open(self) -> None:
        v4 = self._sock.family == socket.AF_INET
        with contextlib.suppress(OSError):  # a kernel that does not tell is no reason not to serve
            self._sock.setsockopt(
                *((socket.IPPROTO_IP, IP_PKTINFO) if v4 else (socket.IPPROTO_IPV6, IPV6_RECVPKTINFO)), 1
            )
        try:
            asyncio.get_running_loop().add_reader(self._sock.fileno(), self._readable)
        except BaseException:
            self._sock.close()
            self.connection_lost(None)
            raise

    def send(self, data: bytes | memoryview, address: Any = None) -> None:
        client, ancillary = address
        try:
            self._sock.sendmsg((data,), ancillary, 0, client)
        except OSError:  # as of UdpSocket's, and the address may be this machine's no more
            self.dropped += 1

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._sock.fileno())
            self._sock.close()
            loop.call_soon(self.connection_lost, None)

    def _readable(self) -> None:
        for _ in range(READS_A_TURN):
            try:
                data, ancillary, _, client = self._sock.recvmsg(LARGEST, SPACE)
            except OSError:  # nothing is left; or it was closed meanwhile
                return
            self._received(data, (client, _answer_from(ancillary)))


def _answer_from(ancillary: Iterable[tuple[int, int, bytes]]) -> _Ancillary:
    """What to send with an answer, by what came with a packet. Equal for all packets to one of our addresses."""
    for level, kind, info in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
            _, ours, _ = _IN_PKTINFO.unpack(info)
            # Any interface: the way back need not be the way there.
            return ((level, kind, _IN_PKTINFO.pack(0, ours, bytes(4))),)
        if (level, kind) == (socket.IPPROTO_IPV6, IPV6_PKTINFO):
            ours, interface = _IN6_PKTINFO.unpack(info)
            if ours[0] == 0xFF:
                return ()  # a group's, from which nothing may be sent
            link_local = ours[0] == 0xFE and ours[1] & 0xC0 == 0x80
            return ((level, kind, _IN6_PKTINFO.pack(ours, interface if link_local else 0)),)
    return ()
