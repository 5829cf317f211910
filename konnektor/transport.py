"""asyncio views of a stream: a Transport for any Protocol, and a reader and writer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from konnektor.errors import Code, PeerError
from konnektor.mux import MuxStream
from konnektor.states import Receiving, Sending
from konnektor.stream import Inbox, Stream

__all__ = ["StreamTransport", "stream_pair"]

HIGH_WATER: Final = 64 * 1024


class StreamTransport(asyncio.Transport):
    """A stream as an asyncio transport: what ``loop.create_connection`` gives for a socket.

    Works with ``Protocol`` and ``BufferedProtocol``; half-close, write limits and ``pause_reading``
    behave as a TCP transport's do. An exception out of the protocol resets this stream and goes to the
    loop's exception handler; the session and its other streams go on.
    """

    def __init__(self, stream: Stream, protocol: asyncio.BaseProtocol) -> None:
        super().__init__(extra={"peername": stream.session.remote_address, "konnektor_stream": stream})
        self._loop = asyncio.get_running_loop()
        self._stream = stream
        self._protocol = protocol
        self._high = HIGH_WATER
        self._low = HIGH_WATER // 4
        self._write_paused = False
        self._read_paused = False
        self._backlog: list[bytes] = []
        self._eof_pending = False
        self._closing = False
        self._lost = False
        self._error: Exception | None = None
        inbox = stream._inbox
        self._mux: MuxStream = stream.detach()
        self._mux.sink = self
        self._loop.call_soon(self._start, inbox)

    def _start(self, inbox: Inbox) -> None:
        self._call(self._protocol.connection_made, self)
        # What arrived before the view was made comes first, and what arrived since the view was made behind it.
        early = [bytes(chunk) for chunk in inbox.chunks]
        self._backlog[:0] = early
        inbox.chunks.clear()
        self._started = True
        if inbox.eof:
            self._eof_pending = True
        if inbox.receive_error is not None:
            self._lose(inbox.receive_error)
        elif inbox.forgotten and not inbox.eof:
            self._lose(None)
        self._deliver()

    _started = False

    # The stream's side

    def accepted(self) -> None:
        """Opened streams are accepted before a view is made of them."""

    def data_received(self, data: memoryview, /) -> None:
        self._backlog.append(bytes(data))
        self._deliver()

    def eof_received(self) -> None:
        self._eof_pending = True
        self._deliver()

    def writable(self) -> None:
        if self._write_paused:
            self._write_paused = False
            self._call(self._protocol.resume_writing)

    def failed(self, error: PeerError, /, *, receiving: bool, sending: bool) -> None:
        # TCP has one RST for both halves; a protocol knows no other way to hear of either.
        self._lose(error)

    def closed(self) -> None:
        self._lose(None)

    def _deliver(self) -> None:
        while self._backlog and self._started and not self._read_paused and not self._lost:
            if self._closing:
                self._backlog.clear()
                break
            chunk = self._backlog.pop(0)
            protocol = self._protocol
            if isinstance(protocol, asyncio.BufferedProtocol):
                self._call(self._feed, protocol, chunk)
            elif isinstance(protocol, asyncio.Protocol):
                self._call(protocol.data_received, chunk)
            self._mux.consumed(len(chunk))
        if self._eof_pending and self._started and not self._backlog and not self._read_paused and not self._lost:
            self._eof_pending = False
            keep_open = isinstance(
                self._protocol, asyncio.Protocol | asyncio.BufferedProtocol
            ) and self._call(self._protocol.eof_received)
            if not keep_open:
                self.close()
            if self._mux.forgotten:
                self._lose(None)

    @staticmethod
    def _feed(protocol: asyncio.BufferedProtocol, data: bytes) -> None:
        view = memoryview(data)
        while view:
            buffer = memoryview(protocol.get_buffer(len(view)))
            count = min(len(buffer), len(view))
            if not count:
                raise RuntimeError("get_buffer() returned an empty buffer")
            buffer[:count] = view[:count]
            view = view[count:]
            protocol.buffer_updated(count)

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls the protocol; its mistake is not the session's."""
        try:
            return function(*args)
        except Exception as error:
            self._loop.call_exception_handler(
                {"message": "Fatal error in a protocol on a konnektor stream", "exception": error,
                 "transport": self, "protocol": self._protocol}
            )  # fmt: skip
            self._fail(error)
            return None

    def _fail(self, error: Exception) -> None:
        self._closing = True
        if not self._mux.forgotten:
            self._mux.cancel(Code.CANCELLED)
        self._lose(error)

    def _lose(self, error: Exception | None) -> None:
        """``connection_lost``, once, and never from inside the protocol's own call."""
        if self._lost:
            return
        if error is None and self._backlog and not self._closing:
            # Forgotten on the wire, but not everything is read yet.
            return
        self._lost = self._closing = True
        self._backlog.clear()
        if error is not None and not self._mux.forgotten and self._mux.sending is not Sending.ENDED:
            self._mux.cancel(Code.CANCELLED)
        self._mux.consumed(self._mux.receive_window.unread)
        self._mux.release()
        self._loop.call_soon(self._protocol.connection_lost, error)

    # The protocol's side: asyncio.Transport

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        if self._mux.forgotten:
            self._lose(None)
            return
        self._mux.finish()
        if self._mux.receiving is Receiving.ENDED:
            self._deliver()
        else:
            self._mux.stop()
        self._backlog.clear()

    def abort(self) -> None:
        if not self._lost:
            self._closing = True
            if not self._mux.forgotten:
                self._mux.cancel(Code.CANCELLED)
            self._lose(None)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._mux.finish_wanted and not self._closing:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self._closing or self._mux.sending is not Sending.OPEN:
            return
        self._mux.write(bytes(data))
        if self._mux.queued > self._high and not self._write_paused:
            self._write_paused = True
            self._mux.want_room(self._low)
            self._call(self._protocol.pause_writing)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if not self._closing:
            self._mux.finish()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if high is None:
            high = HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self._high, self._low = high, low

    def get_write_buffer_size(self) -> int:
        return self._mux.queued

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def is_reading(self) -> bool:
        return not self._read_paused and not self._closing

    def pause_reading(self) -> None:
        self._read_paused = True

    def resume_reading(self) -> None:
        if self._read_paused:
            self._read_paused = False
            self._loop.call_soon(self._deliver)


def stream_pair(stream: Stream) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A reader and a writer on the stream, as ``asyncio.open_connection`` gives them."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport = StreamTransport(stream, protocol)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)
