"""One direction of a proxied connection, and the two sockets that such directions join.

A link is a queue of bytes, each with the time it is due at; one timer serves it, set for the head. What holds
the head back is its time, the rate, a silence, or a socket that takes no more.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any, Final, cast

from konnektor.scratch import scratch
from konnektor.socket_transport import SocketTransport

__all__ = ["CutOrder", "Link", "Mark", "Socket"]

TICK: Final = 0.001
"""Seconds: as exact as the timers of uvloop are. What is due within a tick goes now."""
PACE: Final = 2 * TICK
"""Least wait, in seconds, between two deliveries under a rate."""
BURST: Final = 0.02
"""Seconds' worth of the rate that may go at once when a timer was late."""


class Mark(Enum):
    """What a link carries besides bytes, in order with them."""

    EOF = "eof"
    RESET = "reset"


class CutOrder:
    """Cut the connection on which this many bytes have arrived first; done once, wherever it was given."""

    __slots__ = ("count", "spent")

    def __init__(self, count: int) -> None:
        self.count = count
        self.spent = False


class Link:
    """From one socket to the other.

    Args:
        source: what it reads; paused while ``buffer`` bytes are under way.
        sink: what it delivers to.
        delay: seconds that each byte is under way.
        rate: bytes a second, at most; None for no limit.
        buffer: bytes.
        on_cut: called when a ``CutOrder`` was carried out to the byte.

    Attributes:
        delivered: bytes handed to the sink so far.
        delay: may be changed; what is under way keeps its time.
    """

    __slots__ = (
        "_buffer",
        "_closed",
        "_credit",
        "_cut_at",
        "_filled",
        "_loop",
        "_on_cut",
        "_order",
        "_queue",
        "_queued",
        "_rate",
        "_silent",
        "_sink",
        "_source",
        "_timer",
        "delay",
        "delivered",
    )

    def __init__(
        self,
        source: Socket,
        sink: Socket,
        *,
        delay: float,
        rate: float | None,
        buffer: int,
        on_cut: Callable[[], object],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._source = source
        self._sink = sink
        self.delay = delay
        self._rate = rate
        self._buffer = buffer
        self._on_cut = on_cut
        self.delivered = 0
        self._queue: deque[tuple[float, bytes | memoryview | Mark]] = deque()
        self._queued = 0
        self._credit = 0.0
        self._filled = self._loop.time()
        self._order: CutOrder | None = None
        self._cut_at = sys.maxsize
        self._silent = False
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        source.outgoing = self
        sink.incoming = self

    # What comes in

    @property
    def room(self) -> int:
        """Bytes that the buffer still takes; as many as you like once what comes is dropped."""
        return sys.maxsize if self._closed else self._buffer - self._queued

    def push(self, item: bytes | Mark) -> None:
        """The source sent this."""
        if self._closed:
            return
        self._queue.append((self._loop.time() + self.delay, item))
        if not isinstance(item, Mark):
            self._queued += len(item)
            if self._queued >= self._buffer:
                self._source.read(False)
        if self._timer is None:
            self._deliver()

    # What goes out

    def wake(self) -> None:
        """Something has changed that may have held the head back."""
        if self._timer is not None:
            self._timer.cancel()
        self._deliver()

    def _deliver(self) -> None:
        self._timer = None
        sink, queue = self._sink, self._queue
        now = self._loop.time()
        while not self._closed and not self._cut_is_due():
            if not queue or self._silent:
                break
            # A reset, always the last, does not wait for somebody who reads no more.
            due, item = queue[0 if sink.writable else -1]
            if not sink.writable and item is not Mark.RESET:
                break
            if due - now >= TICK:
                self._timer = self._loop.call_at(due, self._deliver)
                break
            if isinstance(item, Mark):
                queue.popleft()
                if item is Mark.RESET:
                    self.close()
                sink.end(item)
                continue
            room = min(self._allowance(now), self._cut_at - self.delivered)
            if not room:
                assert self._rate is not None
                self._timer = self._loop.call_later(max(PACE, (1 - self._credit) / self._rate), self._deliver)
                break
            if room < len(item):
                item = memoryview(item)
                queue[0] = (due, item[room:])
                item = item[:room]
            else:
                queue.popleft()
            size = len(item)
            self.delivered += size
            self._queued -= size
            if self._rate is not None:
                self._credit -= size
            sink.write(item)
        if self._queued < self._buffer:
            self._source.read(True)

    def _allowance(self, now: float) -> int:
        """Bytes that the rate allows now."""
        rate = self._rate
        if rate is None:
            return sys.maxsize
        self._credit = min(max(1.0, rate * BURST), self._credit + (now - self._filled) * rate)
        self._filled = now
        return int(self._credit)

    # Faults

    def set_rate(self, rate: float | None) -> None:
        """For what is under way as well."""
        self._rate = rate
        self._credit = 0.0
        self._filled = self._loop.time()
        self.wake()

    def set_silent(self, silent: bool) -> None:
        """Delivers nothing, or goes on where it stopped."""
        self._silent = silent
        self.wake()

    def set_order(self, order: CutOrder | None) -> None:
        """Counts from here."""
        self._order = order
        self._cut_at = sys.maxsize if order is None else self.delivered + order.count
        self.wake()

    def _cut_is_due(self) -> bool:
        if self.delivered < self._cut_at:
            return False
        assert self._order is not None
        if self._order.spent:
            self._order = None
            self._cut_at = sys.maxsize
            return False
        if self._sink.unacknowledged():
            # Resetting now would destroy bytes that were counted as delivered.
            self._timer = self._loop.call_later(TICK, self._deliver)
        else:
            self._order.spent = True
            self._on_cut()
        return True

    def close(self) -> None:
        """Drops what is under way and what still comes; the source is read on, so that its end is noticed."""
        self._closed = True
        self._queue.clear()
        self._queued = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._source.read(True)


class Socket(asyncio.BufferedProtocol):
    """One of the two sockets of a connection, or the place of one that is not there (yet).

    Args:
        on_lost: called once, when the socket is closed.

    Attributes:
        outgoing: takes what this socket's peer sends.
        incoming: brings what is to be sent to it.
        lost: the socket is closed.
        writable: it takes more.
    """

    __slots__ = ("_dialing", "_eof_received", "_eof_sent", "_on_lost", "_transport", "incoming", "lost", "outgoing",
                 "writable")  # fmt: skip

    outgoing: Link
    incoming: Link

    def __init__(self, on_lost: Callable[[], object]) -> None:
        self._on_lost = on_lost
        self._transport: SocketTransport | None = None
        self._dialing: socket.socket | None = None
        self._eof_received = False
        self._eof_sent = False
        self.lost = False
        self.writable = False

    # Its life

    def attach(self, sock: socket.socket) -> None:
        """A connected one; belongs to this object from now on."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        SocketTransport(sock, self)

    def dial(self, family: int, address: Any) -> None:
        """Connects, without a task; failing is a reset for the other side."""
        try:
            self._dialing = sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:  # out of descriptors
            self.connection_lost(error)
            return
        asyncio.get_running_loop().add_writer(sock.fileno(), self._dialed)
        if (code := sock.connect_ex(address)) not in (0, errno.EINPROGRESS):
            self._undial()
            sock.close()
            self.connection_lost(OSError(code, os.strerror(code)))

    def _dialed(self) -> None:
        sock = self._undial()
        # Not asked for its error: reading tells that too, and before it what came ahead of an early reset.
        if sock is not None:
            self.attach(sock)

    def _undial(self) -> socket.socket | None:
        sock, self._dialing = self._dialing, None
        if sock is not None:
            asyncio.get_running_loop().remove_writer(sock.fileno())
        return sock

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = own = cast(SocketTransport, transport)
        self.writable = True
        if self._eof_sent:
            own.write_eof()
        self.incoming.wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.lost = True
        self.writable = False
        self.incoming.close()
        if exc is not None:
            self.outgoing.push(Mark.RESET)
        self._on_lost()

    # Reading

    def get_buffer(self, sizehint: int) -> memoryview:
        # Paused before there is no room at all.
        return scratch().view[: self.outgoing.room]

    def buffer_updated(self, nbytes: int) -> None:
        self.outgoing.push(bytes(scratch().view[:nbytes]))

    def eof_received(self) -> bool:
        self._eof_received = True
        self.outgoing.push(Mark.EOF)
        self._close_if_ended()
        return True

    def read(self, go_on: bool) -> None:
        """Reads, or leaves what comes to the kernel."""
        transport = self._transport
        if transport is not None and not self._eof_received and transport.is_reading() is not go_on:
            if go_on:
                transport.resume_reading()
            else:
                transport.pause_reading()

    # Writing

    def write(self, data: bytes | memoryview) -> None:
        """Only while ``writable``."""
        assert self._transport is not None
        self._transport.write(data)

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        self.incoming.wake()

    def unacknowledged(self) -> int:
        """Bytes written to it that its peer's kernel does not have yet."""
        return 0 if self._transport is None else self._transport.unacknowledged()

    # Its end

    def end(self, mark: Mark) -> None:
        """Passes on how the other side ended."""
        if mark is Mark.RESET:
            self.reset()
        else:
            self._eof_sent = True
            if self._transport is not None:
                self._transport.write_eof()
                self._close_if_ended()

    def _close_if_ended(self) -> None:
        # Not before both: who closes over unread bytes sends a reset.
        if self._eof_received and self._eof_sent and self._transport is not None:
            self._transport.close()

    def finish(self) -> None:
        """FIN, if there was none, and as soon as it is connected; closed when the peer has ended as well."""
        if self._transport is None and self._dialing is None:
            self.reset()
        elif not self._eof_sent:
            self.end(Mark.EOF)

    def reset(self) -> None:
        """RST; closed within this turn of the loop."""
        if self._transport is not None:
            _reset_on_close(self._transport.get_extra_info("socket"))
            self._transport.abort()
        elif not self.lost:
            if (sock := self._undial()) is not None:
                _reset_on_close(sock)  # the kernel may have connected it already
                sock.close()
            self.connection_lost(None)


def _reset_on_close(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
