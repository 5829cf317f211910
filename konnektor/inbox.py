"""What came of a stream and was not read, and who waits for what: the sink of a stream that somebody reads."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from konnektor.datagrams import DatagramQueue
from konnektor.errors import PeerError, SessionLost
from konnektor.mux import MuxStream

__all__ = ["Chunks", "Inbox", "keep"]

Chunks = deque[bytes | bytearray | memoryview]

SMALL: Final = 1024
"""Payloads below this are joined: a one-byte ``bytes`` object takes 34 bytes and a place in a queue."""
JOINED: Final = 16 * 1024


def keep(chunks: Chunks, data: bytes | memoryview) -> None:
    """Copies ``data`` to the end of what was not read yet."""
    if len(data) < SMALL:
        last = chunks[-1] if chunks else None
        if isinstance(last, bytearray) and len(last) < JOINED:
            last += data
        else:
            chunks.append(bytearray(data))
    else:
        chunks.append(bytes(data))


class Inbox:
    """The sink behind a Stream, or ahead of a splice: keeps what came until it is read, and who waits for what.

    Attributes:
        mux: the stream.
        chunks: came and was not read.
        answered: the peer accepted.
        eof: the peer has finished.
        forgotten: both halves have ended.
        receive_error, send_error: what broke a half.
        datagrams: came and were not read; None if the type has none.
        unsent: what a ``send`` that waits for room has not queued yet.
        queue_limit: bytes that may be queued.
        opened, reader, datagram_reader, writer: who waits for the peer's answer, for bytes, for a datagram, for room.
        on_cancel: called when the peer gives its stream up before an answer.
    """

    __slots__ = (
        "answered",
        "chunks",
        "datagram_reader",
        "datagrams",
        "eof",
        "forgotten",
        "mux",
        "on_cancel",
        "opened",
        "queue_limit",
        "reader",
        "receive_error",
        "send_error",
        "unsent",
        "writer",
    )

    def __init__(self) -> None:
        self.mux: MuxStream | None = None
        self.chunks: Chunks = deque()
        self.datagrams: DatagramQueue | None = None
        self.answered = False
        self.eof = False
        self.forgotten = False
        self.receive_error: PeerError | None = None
        self.send_error: PeerError | None = None
        self.unsent: memoryview | None = None
        self.queue_limit = 0
        self.opened: asyncio.Future[None] | None = None
        self.reader: asyncio.Future[None] | None = None
        self.datagram_reader: asyncio.Future[None] | None = None
        self.writer: asyncio.Future[None] | None = None
        self.on_cancel: Callable[[], object] | None = None

    @staticmethod
    def _wake(waiter: asyncio.Future[None] | None) -> None:
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def accepted(self) -> None:
        self.answered = True
        self._wake(self.opened)

    def data_received(self, data: bytes | memoryview, /) -> None:
        keep(self.chunks, data)
        self._wake(self.reader)

    def datagram_received(self, data: memoryview, /) -> None:
        assert self.datagrams is not None
        self.datagrams.put(bytes(data))
        self._wake(self.datagram_reader)

    def eof_received(self) -> None:
        self.eof = True
        self._wake(self.reader)
        self._wake(self.datagram_reader)

    def writable(self) -> None:
        """Queues as much of ``unsent`` as there is room for, and wakes its sender after the last of it.

        The multiplexer calls it in the middle of a batch, which is filled by this: were each frame's bytes the sending
        task's to bring, every frame would take a turn of the loop, and a write of its own.
        """
        rest, stream = self.unsent, self.mux
        if rest is None or stream is None:
            return
        room = self.queue_limit - stream.queued
        if room > 0:
            stream.write(bytes(rest[:room]))
            rest = rest[room:]
        if rest:
            self.unsent = rest
            stream.want_room(self.queue_limit // 2)
        else:
            self.unsent = None
            self._wake(self.writer)

    def failed(self, error: PeerError, /, *, receiving: bool, sending: bool) -> None:
        if receiving:
            self.receive_error = self.receive_error or error
            if not isinstance(error, SessionLost):
                self.clear()
        if sending:
            self.send_error = self.send_error or error
        self.wake_all()
        if sending and self.on_cancel is not None:
            # Unanswered until now, and the answer is settled: nobody waits for a handler that still dials.
            self.on_cancel()

    def closed(self) -> None:
        self.forgotten = True

    def clear(self) -> None:
        """Nobody will read what came."""
        self.chunks.clear()
        if self.datagrams is not None:
            self.datagrams.clear()

    def wake_all(self) -> None:
        """Whoever waits looks again."""
        for waiter in (self.opened, self.reader, self.datagram_reader, self.writer):
            self._wake(waiter)
