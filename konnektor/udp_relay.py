"""Relay between a stream's datagrams and a UDP socket by callbacks alone.

No task per datagram or per stream, and no timer per datagram: one timer per stream looks now and then whether
anything has moved. A packet that the socket does not take at once is dropped, as the network would; what waits in
the other direction waits in the stream's queue, which is bounded. An ICMP error is no reason to give up: whoever is
not there now may come back.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, Final, cast

from konnektor.errors import PeerError
from konnektor.inbox import Inbox
from konnektor.mux import MuxStream
from konnektor.states import Sending
from konnektor.stream import Stream

__all__ = ["IDLE", "LEAVING", "UdpRelay", "UdpSocket", "relay_udp"]

IDLE: Final = 60.0
"""Seconds without a datagram either way after which a stream ends: UDP itself has no end."""

LEAVING: Final = 2.0
"""The same while this end shuts down: nobody should wait the whole grace for what may never come."""

_CARRIES: Final = (Sending.OPEN, Sending.UNSENT)


class UdpSocket(asyncio.DatagramProtocol):
    """A non-blocking UDP socket, connected or bound, read by callbacks; made by ``open``.

    The loop's transport reads. Sending goes past it: what the kernel does not take must not queue, and asyncio's
    transports send no empty packets.

    Args:
        sock: belongs to this object from now on.
        received: called with each packet and where it came from.
        on_closed: called once, when the socket is closed.

    Attributes:
        dropped: packets that the kernel did not take.
    """

    __slots__ = ("_on_closed", "_received", "_sock", "_transport", "dropped")

    def __init__(
        self, sock: socket.socket, received: Callable[[bytes, Any], None], on_closed: Callable[[], object]
    ) -> None:
        self._sock = sock
        self._received = received
        self._on_closed: Callable[[], object] | None = on_closed
        self._transport: asyncio.DatagramTransport | None = None
        self.dropped = 0

    async def open(self) -> None:
        """Begins to read. Cancelled or failed, the socket is closed."""
        try:
            await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, sock=self._sock)
        except BaseException:
            if self._transport is not None:
                self._transport.abort()  # uvloop would leave it, and the descriptor with it
            self._sock.close()
            self.connection_lost(None)
            raise

    def send(self, data: bytes | memoryview, address: Any = None) -> None:
        """One packet, now or never: to ``address``, or where the socket is connected to."""
        for _ in range(2):
            try:
                if address is None:
                    self._sock.send(data)
                else:
                    self._sock.sendto(data, address)
                return
            except ConnectionRefusedError:
                # An earlier packet's: the kernel tells at the next call, and does nothing else in it.
                continue
            except OSError:  # its buffer is full, the packet too large, no way there now, or closed
                break
        self.dropped += 1

    def close(self) -> None:
        """Reads no more."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not derive from asyncio's.
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self._received(data, addr)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._on_closed is not None:
            on_closed, self._on_closed = self._on_closed, None
            on_closed()


class UdpRelay:
    """The sink of a stream whose datagrams become packets, and the way back.

    Bytes of the stream mean nothing here and are discarded. The end of either direction is the end of both.

    Args:
        send: takes a packet out.
        on_ended: called once, when the stream is done with or failed (then with the error): nothing goes either way.
        idle: seconds without a datagram after which it ends.
    """

    __slots__ = ("_idle", "_loop", "_on_ended", "_send", "_stream", "_timer", "_used_at")

    def __init__(
        self,
        send: Callable[[bytes | memoryview], object],
        on_ended: Callable[[PeerError | None], object],
        idle: float = IDLE,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._send = send
        self._on_ended: Callable[[PeerError | None], object] | None = on_ended
        self._idle = idle
        self._stream: MuxStream | None = None
        self._used_at = self._loop.time()
        self._timer = self._loop.call_later(idle, self._check)

    def attach(self, stream: MuxStream) -> None:
        """Takes the stream over, with what it received before."""
        inbox = stream.sink
        self._stream = stream
        stream.sink = self
        if isinstance(inbox, Inbox):
            stream.consumed(stream.receive_window.unread)
            while inbox.datagrams:
                self._send(inbox.datagrams.take())
            inbox.clear()
            error = inbox.receive_error or inbox.send_error
            if error is not None or inbox.eof or inbox.forgotten:
                self._end(error)

    def packet_received(self, data: bytes) -> None:
        """A packet for the stream. One that is too large for the peer is dropped."""
        stream = self._stream
        if stream is None or stream.datagrams is None or stream.sending not in _CARRIES or self._on_ended is None:
            return
        self._used_at = self._loop.time()
        if len(data) <= stream.max_datagram:
            stream.send_datagram(data)
        else:
            stream.datagrams.discard()

    def close(self) -> None:
        """Ends the stream, both ways and cleanly."""
        self._end(None)

    def leave(self) -> None:
        """This end shuts down: less silence is the end."""
        if self._on_ended is not None:
            self._idle = min(self._idle, LEAVING)
            self._timer.cancel()
            self._check()

    def _check(self) -> None:
        quiet = self._loop.time() - self._used_at
        if quiet >= self._idle:
            self.close()
        else:
            self._timer = self._loop.call_later(self._idle - quiet, self._check)

    def _end(self, error: PeerError | None) -> None:
        if self._on_ended is None:
            return
        on_ended, self._on_ended = self._on_ended, None
        self._timer.cancel()
        stream = self._stream
        if stream is not None:
            stream.finish()
            stream.stop()
            stream.release()
        on_ended(error)

    # The stream's side

    def datagram_received(self, data: memoryview, /) -> None:
        self._used_at = self._loop.time()
        self._send(data)

    def accepted(self) -> None:
        """Nothing to do: what came meanwhile waits in the stream's queue."""

    def data_received(self, data: bytes | memoryview, /) -> None:
        assert self._stream is not None
        self._stream.consumed(len(data))

    def eof_received(self) -> None:
        self._end(None)

    def writable(self) -> None:
        """Never asked for."""

    def failed(self, error: PeerError, /, *, receiving: bool, sending: bool) -> None:
        self._end(error)

    def closed(self) -> None:
        self._end(None)


async def relay_udp(
    stream: Stream, sock: socket.socket, *, idle: float = IDLE, on_closed: Callable[[], object]
) -> UdpRelay:
    """Joins the peer's stream, which it accepts, to a connected UDP socket; they look after themselves from then on.

    The socket and the stream belong to the relay. Cancelled or failed, the socket is closed and the stream as it was.

    Args:
        stream: not accepted yet; its type has datagrams.
        sock: connected and non-blocking.
        idle: seconds without a datagram after which the stream ends.
        on_closed: called once, when the socket is closed.

    Returns:
        The relay; it may have ended already.

    Raises:
        PeerError: the peer gave up meanwhile.
        StreamClosedError: the stream was closed here.
    """
    relay: UdpRelay | None = None

    def received(data: bytes, _address: Any) -> None:
        if relay is not None:
            relay.packet_received(data)

    local = UdpSocket(sock, received, on_closed)
    await local.open()
    try:
        stream.accept_now()
        mux_stream = stream.detach()
    except BaseException:
        local.close()
        raise
    relay = UdpRelay(local.send, lambda _error: local.close(), idle)
    relay.attach(mux_stream)
    return relay
