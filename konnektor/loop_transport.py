"""One of the event loop's transports, TLS above all, with the end that a splice needs.

The loops keep bytes beneath TLS of which they tell nobody, and give what is left at ``close`` so many seconds and drop it then; of a
connection that nobody reads from they do not hear that it was reset; and an end that TLS does not vouch for they tell like any other.
What is between those and a splice stands here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any, Final

from konnektor.addresses import format_hostport
from konnektor.socket_transport import unacknowledged

__all__ = ["LoopTransport"]

LOOK_AGAIN: Final = 0.02
"""Seconds until it is looked again whether all is sent, at first; later looks are ever less frequent."""
LOOK_AT_MOST: Final = 1.0
LOOK_AFTER: Final = 5.0
"""Seconds between looks whether a paused connection is still there: what came before a reset is kept for one to two of them."""
GIVE_UP: Final = 30.0
"""Seconds in which the other end has to take something of what is left, or it is reset."""
PIECE: Final = 64 * 1024
"""Bytes taken out of TLS at once."""
logger: Final = logging.getLogger("konnektor.splice")

_TCP_CLOSE: Final = 7  # include/net/tcp_states.h


class LoopTransport:
    """Has the methods of a ``SocketTransport`` that a splice calls.

    Args:
        transport: the loop's.
        on_broken: called when the other end has reset the connection unnoticed, or takes nothing of what is left; it should
            ``abort``.

    Attributes:
        read_size: not heeded; the loop has its own.
    """

    __slots__ = (
        "_closing",
        "_looking",
        "_loop",
        "_on_broken",
        "_paused",
        "_peer",
        "_ssl_object",
        "_transport",
        "read_size",
    )

    def __init__(self, transport: asyncio.Transport, on_broken: Callable[[], object]) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._on_broken = on_broken
        self._paused = False
        self._looking = False
        self._closing = False
        # Asked for now: once the connection is lost, the loops may have neither.
        self._ssl_object: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        self._peer: Any = transport.get_extra_info("peername")
        self.read_size = 0

    def write(self, data: bytes | bytearray | memoryview, more: bool = False) -> None:
        self._transport.write(bytes(data))

    def writelines(self, chunks: Sequence[bytes | bytearray | memoryview], more: bool = False) -> int:
        """Returns how many bytes of them may wait in a buffer: all."""
        data = b"".join(chunks)
        self._transport.write(data)
        return len(data)

    def can_write_eof(self) -> bool:
        return self._transport.can_write_eof()

    def write_eof(self) -> None:
        with contextlib.suppress(OSError):  # reset: reading tells
            self._transport.write_eof()

    def is_closing(self) -> bool:
        """Not while what is left is sent: until then the other end may go on sending, too."""
        return self._transport.is_closing()

    def abort(self) -> None:
        self._transport.abort()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def unacknowledged(self) -> int:
        """Bytes written that the loop tells of, or that the other end's kernel has not taken yet."""
        sock = self._sock()
        return self._transport.get_write_buffer_size() + (0 if sock is None else unacknowledged(sock.fileno()))

    def _sock(self) -> socket.socket | None:
        """None in the turn before the loop says that the connection is lost."""
        sock: socket.socket | None = self._transport.get_extra_info("socket")
        return sock

    # Reading

    def resume_reading(self) -> None:
        self._paused = False
        self._transport.resume_reading()

    def pause_reading(self) -> None:
        self._paused = True
        self._transport.pause_reading()
        if not self._looking:
            self._looking = True
            self._loop.call_later(LOOK_AFTER, self._look, False)

    def _look(self, gone: bool) -> None:
        """Whether the other end is gone: the loop would notice by reading."""
        self._looking = False
        if self._paused and not self._transport.is_closing():
            is_gone = _is_gone(self._sock())
            if gone and is_gone:
                self._on_broken()
            else:
                self._looking = True
                self._loop.call_later(LOOK_AFTER, self._look, is_gone)

    # The end

    def is_whole(self, deliver: Callable[[bytes], object]) -> bool:
        """Whether the other end has sent all that it meant to, once the loop says that no more comes.

        TLS vouches for an end by close_notify (RFC 8446 section 6.1); after a bare FIN, which anyone on the path can forge, nobody
        knows. The loops do not tell the two apart: asyncio calls ``eof_received`` for either, and uvloop, where reading is paused,
        for neither. OpenSSL does. What the other end does after ``close`` does not matter, nor is there anything to tell without TLS.

        Args:
            deliver: given what TLS still holds and the loop would drop, which on uvloop is all that came while reading was paused.
        """
        if self._closing or self._ssl_object is None:
            return True
        try:
            while data := self._ssl_object.read(PIECE):
                deliver(data)
        except ssl.SSLZeroReturnError:  # as above, after a close_notify of ours
            return True
        except ssl.SSLError:  # SSLWantReadError: it waits for more
            who = format_hostport(*self._peer[:2]) if isinstance(self._peer, tuple) else "a client"
            logger.debug("%s ended without close_notify: what it sent may be cut short, and ends as a reset", who)
            return False
        return True

    def close(self) -> None:
        """Closes once the kernel has everything: from then on the loop gives it only so long."""
        if not self._closing:
            self._closing = True
            # Not before the loop has tried to write what was written last.
            self._loop.call_soon(self._close_when_sent, -1, 0.0, LOOK_AGAIN)

    def _close_when_sent(self, before: int, since: float, pause: float) -> None:
        """While there is something left beneath TLS, the kernel has as many bytes as it takes."""
        transport, sock = self._transport, self._sock()
        if transport.is_closing() or sock is None:
            return
        left = self.unacknowledged()
        # Room in a kernel that was full says nothing: the loop may be about to fill it again.
        first = before < 0
        if not left or (first and not transport.get_write_buffer_size() and _has_room(sock.fileno())):
            transport.close()
            return
        if left != before:
            since = self._loop.time()
        elif self._loop.time() - since >= GIVE_UP:
            self._on_broken()
            return
        self._loop.call_later(pause, self._close_when_sent, left, since, min(2 * pause, LOOK_AT_MOST))


def _is_gone(sock: socket.socket | None) -> bool:
    """Whether a TCP connection was reset, or timed out."""
    if sock is None or sock.family == socket.AF_UNIX:
        return False
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE


def _has_room(fd: int) -> bool:
    """Whether the kernel would take more."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))
