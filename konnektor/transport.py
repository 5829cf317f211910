"""asyncio views of a stream: a Transport for any Protocol, and a reader and writer."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

from konnektor.errors import Code, LocalProtocolError, PeerError
from konnektor.inbox import Chunks, keep
from konnektor.mux import MuxStream
from konnektor.states import Receiving
from konnektor.stream import Stream

__all__ = ["StreamTransport", "stream_pair"]

HIGH_WATER: Final = 64 * 1024

T = TypeVar("T")


class StreamTransport(asyncio.Transport):
    """A stream as an asyncio transport: what ``loop.create_connection`` gives for a socket.

    Works with ``Protocol`` and ``BufferedProtocol``; half-close, write limits, ``pause_reading`` and ``set_protocol``
    behave as a TCP transport's do, and so ``loop.start_tls`` (of asyncio's own loops) works inside a stream. When
    the peer takes no more but is still sending, what is written is dropped; only when it has sent everything, or broke
    the stream off, is the connection lost: so an answer arrives whole though its sender did not wait for the rest of
    the request. An exception out of the protocol resets this stream and goes to the loop's exception handler;
    the session and its other streams go on.

    Args:
        stream: belongs to the transport from now on.
        protocol: gets ``connection_made`` before the constructor returns.

    Raises:
        LocalProtocolError: the peer's stream was not accepted yet.
    """

    _start_tls_compatible = True
    """``loop.start_tls`` asks for it."""

    def __init__(self, stream: Stream, protocol: asyncio.BaseProtocol) -> None:
        super().__init__(extra={"peername": stream.session.remote_address, "konnektor_stream": stream})
        if not stream.decided:
            raise LocalProtocolError("accept the stream before making a transport of it")
        self._loop = asyncio.get_running_loop()
        self._protocol = protocol
        self._high = HIGH_WATER
        self._low = HIGH_WATER // 4
        self._write_paused = False
        self._read_paused = False
        self._closing = False
        self._lost = False
        self._stopped: PeerError | None = None
        """Why the peer takes no more."""
        inbox = stream._inbox
        self._mux: MuxStream = stream.detach()
        self._mux.sink = self
        self._chunks: Chunks = deque()
        """Came and was not delivered."""
        self._chunks, inbox.chunks = inbox.chunks, self._chunks
        self._eof_due = inbox.eof
        self._eof_delivered = False
        self._stopped = inbox.send_error
        self._call(protocol.connection_made, self)
        self._deliver()
        if inbox.receive_error is not None:
            self._lose(inbox.receive_error)

    # The stream's side

    def accepted(self) -> None:
        """Only a stream that was opened early can have a view before."""
        if self._closing:
            self._mux.stop()

    def data_received(self, data: bytes | memoryview, /) -> None:
        fed = 0 if self._chunks else self._feed(data)
        if fed < len(data):
            keep(self._chunks, data[fed:])

    def eof_received(self) -> None:
        self._eof_due = True
        self._deliver()

    def writable(self) -> None:
        if self._closing:
            self._lose(None)
        else:
            self._resume_writing()

    def failed(self, error: PeerError, /, *, receiving: bool, sending: bool) -> None:
        if receiving or self._closing:
            # TCP has one RST for both halves; a protocol knows no other way to hear of it.
            self._lose(error)
        else:
            self._stopped = error
            # A RESET may come next: then whoever waits in drain() must hear of the error instead.
            self._loop.call_soon(self._resume_writing)

    def closed(self) -> None:
        if self._closing:
            self._lose(None)
        else:
            # As with TCP, connection_lost waits for close(); but nothing more comes or goes.
            self._mux.release()

    def _deliver(self) -> None:
        chunks = self._chunks
        while chunks and self.is_reading():
            chunk = memoryview(chunks[0])
            fed = self._feed(chunk)
            if not chunks:
                break
            if fed == len(chunk):
                chunks.popleft()
            else:
                chunks[0] = chunk[fed:]
        if self._eof_due and not chunks and self.is_reading():
            self._eof_due = False
            self._eof_delivered = True
            if not self._call(cast("asyncio.Protocol", self._protocol).eof_received):
                self.close()

    def _feed(self, data: bytes | memoryview) -> int:
        """Gives the protocol what it takes now; returns how many bytes that were."""
        fed = 0
        while fed < len(data) and self.is_reading():
            fed += self._call(self._hand_over, data[fed:]) or 0
        self._mux.consumed(fed)
        return fed

    def _hand_over(self, data: memoryview) -> int:
        protocol = self._protocol
        if not isinstance(protocol, asyncio.BufferedProtocol):
            cast("asyncio.Protocol", protocol).data_received(bytes(data))
            return len(data)
        buffer = memoryview(protocol.get_buffer(len(data))).cast("B")
        count = min(len(buffer), len(data))
        if not count:
            raise RuntimeError("get_buffer() returned an empty buffer")
        buffer[:count] = data[:count]
        protocol.buffer_updated(count)
        return count

    def _call(self, function: Callable[..., T], *args: Any) -> T | None:
        """Calls the protocol; its mistake is not the session's."""
        try:
            return function(*args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001
            self._loop.call_exception_handler(
                {
                    "message": "Fatal error in a protocol on a konnektor stream",
                    "exception": error,
                    "transport": self,
                    "protocol": self._protocol,
                }
            )
            self._force_close(error if isinstance(error, Exception) else None)
            return None

    def _force_close(self, exc: Exception | None) -> None:
        """As ``abort``; asyncio's TLS calls it with the reason."""
        self._mux.cancel(Code.CANCELLED)
        self._lose(exc)

    def _lose(self, error: Exception | None) -> None:
        """``connection_lost``, once, and never from inside the protocol's own call."""
        if self._lost:
            return
        self._lost = self._closing = True
        self._chunks.clear()
        if error is not None:
            self._mux.cancel(Code.CANCELLED)
        self._mux.consumed(self._mux.receive_window.unread)
        self._mux.release()
        self._loop.call_soon(self._connection_lost, error)

    def _connection_lost(self, error: Exception | None) -> None:
        self._protocol.connection_lost(error)

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
        self._chunks.clear()
        stream = self._mux
        stream.finish()
        if stream.receiving is not Receiving.AWAITING:
            # Before the peer's answer it would cancel the peer's dial, and what was sent would be lost.
            stream.stop()
        if stream.queued:
            stream.want_room()
        else:
            self._lose(None)

    def abort(self) -> None:
        if not self._lost:
            self._force_close(None)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"data: expecting a bytes-like instance, got {type(data).__name__}")
        if self._closing or not data:
            return
        if self._mux.finish_wanted:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self._stopped is not None:
            if self._eof_delivered:
                self._lose(self._stopped)
            return
        self._mux.write(bytes(data))
        self._pause_writing()

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
        if not self._closing:
            self._pause_writing()

    def _pause_writing(self) -> None:
        if self._mux.queued > self._high and not self._write_paused:
            self._write_paused = True
            self._mux.want_room(self._low)
            self._call(self._protocol.pause_writing)

    def _resume_writing(self) -> None:
        if self._write_paused and not self._lost:
            self._write_paused = False
            self._call(self._protocol.resume_writing)

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
            if self._chunks or self._eof_due:
                self._loop.call_soon(self._deliver)


def stream_pair(stream: Stream) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A reader and a writer on the stream, as ``asyncio.open_connection`` gives them."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport = StreamTransport(stream, protocol)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)
