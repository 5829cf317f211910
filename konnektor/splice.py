"""Relay between a stream and a TCP or Unix socket by callbacks alone.

No task, timer or future per chunk, and none per stream either: an idle splice is two small objects, and what is
read is not copied again before it is encrypted. Backpressure works both ways: the socket is
not read while the stream's queue is full, and the peer gets no credit while the socket does not
take what came. Half-close works both ways: EOF becomes FIN, FIN becomes a shutdown of the socket's writing
side. A reset on either side becomes a reset on the other. TLS has no half-close: the end of either direction ends
both, cleanly; but what was sent without the close_notify that belongs behind it ends like a reset.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from typing import Final, cast

from konnektor.errors import Code, PeerError
from konnektor.inbox import Inbox
from konnektor.loop_transport import LoopTransport
from konnektor.mux import PAYLOAD, DirectSink, MuxStream
from konnektor.socket_transport import DirectProtocol, SocketTransport
from konnektor.states import RECEIVING_ENDED, SENDING_OPEN, SENDING_UNSENT
from konnektor.stream import Stream

__all__ = ["Splice", "join", "splice"]

QUEUE_HIGH: Final = 4 * PAYLOAD
"""Bytes read ahead of what the session has sent: a few full frames, so that reading and writing overlap. As many are read at
once: a few bytes more, and every read would leave a crumb that goes as a frame of its own."""
QUEUE_LOW: Final = 2 * PAYLOAD
GATHERED: Final = 32 * 1024
"""Payloads from this size on are written together with those of the same stream that came in the same read: each write wakes
up whoever reads, who takes the processor."""
LINGER: Final = 2.0
"""Seconds that a client has to take the end of a stream whose other half the peer stopped."""
LOOK_AGAIN: Final = 0.02
"""Seconds after which it is looked again whether it has."""
STALLED: Final = 5.0
"""Seconds without progress after which nobody waits any longer for the peer to take what came before a reset."""
_RST_ON_CLOSE: Final = struct.pack("ii", 1, 0)


class Splice(DirectSink):
    """The stream's sink, joined to a socket's protocol (``local``).

    Args:
        code: what the peer is told when the socket breaks.
        on_closed: called once, when both sides are done.

    Attributes:
        on_connected: called when ``local`` gets its transport; it should ``attach`` a stream.
        transport: the socket's transport, None before and after.
    """

    __slots__ = (
        "_broken",
        "_code",
        "_done",
        "_gathered",
        "_held",
        "_lingering",
        "_paused",
        "_reset_due",
        "_stream",
        "on_closed",
        "on_connected",
        "transport",
    )

    def __init__(self, *, code: int = Code.TARGET_RESET, on_closed: Callable[[], object] | None = None) -> None:
        self._code = code
        self.on_closed = on_closed
        self.on_connected: Callable[[asyncio.Transport | SocketTransport], object] | None = None
        self._stream: MuxStream | None = None
        self.transport: SocketTransport | LoopTransport | None = None
        self._paused = False
        self._held = 0
        self._gathered: list[bytes | memoryview] | None = None
        self._broken = False
        self._done = False
        self._lingering = False
        self._reset_due = False

    @property
    def local(self) -> asyncio.Protocol:
        """The protocol for the socket's transport. Nothing but that keeps it: no cycle is left for the collector."""
        # What it is to an event loop, which asks for the methods alone.
        return cast(asyncio.Protocol, _Local(self))

    # The stream's side

    def attach(self, stream: MuxStream) -> None:
        """Takes the stream over, with what it received before."""
        inbox = stream.sink
        self._stream = stream
        stream.sink = self
        if self.transport is not None:
            self.transport.read_size = QUEUE_HIGH
        if isinstance(inbox, Inbox):
            chunks, inbox.chunks = inbox.chunks, type(inbox.chunks)()
            if chunks:
                self._gathered = [memoryview(b"".join(chunks))]
                self._deliver(inbox.eof and stream.sending is SENDING_OPEN)
            if inbox.send_error is not None:
                self.failed(inbox.send_error, receiving=False, sending=True)
            if inbox.receive_error is not None:
                self.failed(inbox.receive_error, receiving=True, sending=False)
            if inbox.eof:
                self.eof_received()
            if inbox.forgotten:
                self.closed()

    def accepted(self) -> None:
        """Nothing to do: data has been flowing since the OPEN."""

    def data_received(self, data: bytes | memoryview, /) -> None:
        transport, stream = self.transport, self._stream
        assert stream is not None
        size = len(data)
        if size >= GATHERED:
            if self._gathered is None:
                self._gathered = []
                stream.gather(self._deliver)
            self._gathered.append(data)
            return
        if self._gathered is not None:
            self._deliver()
        if transport is None or transport.is_closing():
            stream.consumed(size)
            return
        transport.write(data, stream.ending and stream.sending is SENDING_OPEN)
        if self._paused:
            self._held += size
        else:
            stream.consumed(size)

    def _deliver(self, ending: bool = False) -> None:
        """Writes what was gathered, if anything, in one go; ``ending`` if ``write_eof`` is next."""
        gathered, self._gathered = self._gathered, None
        transport, stream = self.transport, self._stream
        if gathered is None or stream is None:
            return
        size = sum(map(len, gathered))
        if transport is None or transport.is_closing():
            stream.consumed(size)
            return
        kept = transport.writelines(gathered, ending)
        if self._paused:
            self._held += kept
            size -= kept
        stream.consumed(size)

    def eof_received(self) -> None:
        stream = self._stream
        assert stream is not None
        self._deliver(stream.sending is SENDING_OPEN)
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        if stream.sending is SENDING_OPEN and transport.can_write_eof():
            transport.write_eof()
        else:
            self._close()

    def writable(self) -> None:
        transport = self.transport
        if transport is not None and not transport.is_closing():
            transport.resume_reading()
        elif self._reset_due and self._stream is not None:
            self._stream.reset(self._code)

    def failed(self, error: PeerError, /, *, receiving: bool, sending: bool) -> None:
        self._deliver()
        if receiving:
            # The other end broke off: whoever is at this end must not take it for a clean end.
            self.break_off()
        else:
            # Read on, into nothing: a socket that is closed over unread bytes resets the connection, and that may
            # destroy what is still on its way to whoever is at this end.
            self.writable()

    def closed(self) -> None:
        self._deliver()
        if self._done:
            self._stream = None
        else:
            self._close()

    # The socket's side

    def connected(self, transport: asyncio.Transport | SocketTransport) -> None:
        """The socket is there."""
        self.transport = (
            transport if isinstance(transport, SocketTransport) else LoopTransport(transport, self.break_off)
        )
        if self.on_connected is not None:
            on_connected, self.on_connected = self.on_connected, None
            on_connected(transport)

    def local_data(self, data: bytes) -> None:
        """The socket delivered."""
        stream = self._stream
        if stream is None or (stream.sending is not SENDING_OPEN and stream.sending is not SENDING_UNSENT):
            return
        stream.write(data)
        if len(data) >= PAYLOAD and self.transport is not None:
            # Bulk. Who is in a hurry waits for as long as it takes to read and to write what is read in one go.
            self.transport.read_size = PAYLOAD if stream.hurried else QUEUE_HIGH
        if stream.queued >= QUEUE_HIGH and self.transport is not None:
            self.transport.pause_reading()
            stream.want_room(QUEUE_LOW)

    def local_eof(self) -> bool:
        """The socket will deliver no more; it may still take."""
        stream, transport = self._stream, self.transport
        if stream is None or transport is None or stream.forgotten:
            return False
        if not transport.is_whole(self.local_data):
            return False  # what becomes of the stream is told once the connection is lost, which it is about to be
        stream.finish()
        # Where FIN has come already there is nothing more to take either: the transport closes after its buffer.
        return stream.receiving is not RECEIVING_ENDED and transport.can_write_eof()

    def local_paused(self, paused: bool) -> None:
        """The socket's buffer is full, or has room again."""
        self._paused = paused
        if not paused and self._held and self._stream is not None:
            held, self._held = self._held, 0
            self._stream.consumed(held)

    def local_lost(self, exc: Exception | None) -> None:
        """The socket is gone."""
        transport, self.transport = self.transport, None
        stream = self._stream
        if stream is not None and not stream.forgotten:
            sending = stream.sending in (SENDING_OPEN, SENDING_UNSENT)
            if (
                sending
                and exc is None
                and not (self._broken or transport is None or transport.is_whole(self.local_data))
            ):
                exc = ConnectionResetError("its end is not whole")
            broken = sending and exc is not None
            if self._broken or (broken and (stream.sending is SENDING_UNSENT or not stream.queued)):
                stream.cancel(self._code)
            elif broken:
                # What came before the reset is often why: it goes first.
                self._reset_due = True
                stream.stop(self._code)
                stream.want_room()
            else:
                # It came to its end, or was closed in both directions at once: what it delivered is whole.
                stream.finish()
                stream.stop(self._code if exc is not None else Code.CANCELLED)
            if exc is not None and stream.queued:
                asyncio.get_running_loop().call_later(STALLED, self._drain, stream.queued)
        self._paused = False
        if self._held and stream is not None:
            held, self._held = self._held, 0
            stream.consumed(held)
        self._finish()

    # The end

    def _close(self) -> None:
        """The stream has come to its end; the socket closes once that has reached whoever is at this end."""
        transport, stream = self.transport, self._stream
        if transport is None:
            self._finish()
        elif transport.is_closing() or self._lingering:
            pass
        elif stream is None or stream.finish_wanted or not transport.can_write_eof():
            transport.close()
        else:
            # Still sending, to a peer that wants no more. A socket that is closed over unread bytes resets the
            # connection, and what was sent last is lost if it is still on its way: until then, read on, into nothing.
            self._lingering = True
            transport.write_eof()
            transport.resume_reading()
            self._linger(asyncio.get_running_loop().time() + LINGER)

    def _linger(self, until: float) -> None:
        transport = self.transport
        if transport is not None and not transport.is_closing():
            loop = asyncio.get_running_loop()
            if transport.unacknowledged() and loop.time() < until:
                loop.call_later(LOOK_AGAIN, self._linger, until)
            else:
                transport.close()

    def _drain(self, before: int) -> None:
        """The socket is gone, and its last bytes go to a peer that may take none for ever."""
        stream = self._stream
        if stream is None or not stream.queued:
            return
        if stream.queued < before:
            asyncio.get_running_loop().call_later(STALLED, self._drain, stream.queued)
        else:
            stream.reset(self._code)

    def break_off(self) -> None:
        """Ends the socket with a RST (a Unix socket knows none and is closed) and the stream with RESET."""
        self._broken = True
        transport = self.transport
        if transport is not None and not transport.is_closing():
            sock = transport.get_extra_info("socket")
            if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
            transport.abort()

    def _finish(self) -> None:
        if self._done:
            return
        self._done = True
        stream = self._stream
        if stream is not None:
            stream.release()
            if stream.forgotten:
                # Else it still has to end, and tells. They would keep each other until the collector comes.
                self._stream = None
        if self.on_closed is not None:
            on_closed, self.on_closed = self.on_closed, None
            on_closed()


class _Local(DirectProtocol):
    """The socket's protocol; apart from the sink because both have an ``eof_received``."""

    __slots__ = ("_splice",)

    def __init__(self, owner: Splice) -> None:
        self._splice = owner

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Neither uvloop's nor ours derive from asyncio's.
        self._splice.connected(cast("asyncio.Transport", transport))

    def data_received(self, data: bytes) -> None:
        self._splice.local_data(data)

    def eof_received(self) -> bool:
        return self._splice.local_eof()

    def pause_writing(self) -> None:
        self._splice.local_paused(True)

    def resume_writing(self) -> None:
        self._splice.local_paused(False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._splice.local_lost(exc)


async def splice(
    stream: Stream,
    sock: socket.socket,
    *,
    code: int = Code.TARGET_RESET,
    on_closed: Callable[[], object] | None = None,
) -> None:
    """Joins a stream to a connected, non-blocking socket, and returns; they look after themselves from then on.

    A peer's stream that was not accepted yet is accepted; one that is broken already breaks the socket. The socket and
    the stream belong to the splice. Never waits. If it raises, the socket is closed and the stream as it was.

    Args:
        code: what the peer is told when the socket breaks.
        on_closed: called once, when both are closed.

    Raises:
        StreamClosedError: the stream was closed here.
        anyio.BusyResourceError: a task is receiving from the stream or sending to it.
    """

    def take() -> MuxStream:
        if not stream.decided:
            stream.accept_now()
        return stream.detach()

    try:
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    _join(take, sock, code, on_closed)


def join(stream: MuxStream, sock: socket.SocketType, *, on_closed: Callable[[], object]) -> None:
    """``splice`` for a peer's stream that has come no further than the multiplexer, which is accepted.

    Args:
        stream: its sink is an Inbox, with what came so far.
        sock: connected and non-blocking.
        on_closed: called once, when both are closed.

    Raises:
        LocalProtocolError: the stream's answer is settled.
    """

    def take() -> MuxStream:
        stream.accept()
        return stream

    _join(take, sock, Code.TARGET_RESET, on_closed)


def _join(
    take: Callable[[], MuxStream], sock: socket.SocketType, code: int, on_closed: Callable[[], object] | None
) -> None:
    joint = Splice(code=code)

    def connected(_transport: asyncio.Transport | SocketTransport) -> None:
        # In connection_made: before the socket's first byte.
        stream = take()
        joint.on_closed = on_closed
        joint.attach(stream)

    joint.on_connected = connected
    try:
        SocketTransport(sock, joint.local)
    except BaseException:
        sock.close()
        raise
