"""The asyncio driver: one connection, one multiplexer, and nothing else.

Reading: the transport fills a shared buffer, the multiplexer parses it in place, and only the beginning
of a frame that is not all there is kept. Writing: what one turn of the loop produces goes into one
write (a batch of the multiplexer's), and nothing is pulled while the transport is full: data waits where
the scheduler can still choose. One timer serves every deadline; it belongs to the session, which may outlive its
connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any, Final, Protocol, cast

from konnektor.errors import Code, SessionError
from konnektor.frames import Buffer
from konnektor.scratch import Scratch, scratch

__all__ = ["Alarm", "Driver", "Machine", "clock"]

clock: Final = time.monotonic
"""The time for the multiplexer. The same scale as the loop's own, but uvloop's moves once a turn, by milliseconds:
too coarse to measure a round trip."""

WRITE_HIGH: Final = 64 * 1024
"""Bytes that may wait below the multiplexer, out of the scheduler's reach, before no more is pulled."""
NOTSENT_LOWAT: Final = 128 * 1024
CLOSE_TIMEOUT: Final = 5.0

logger: Final = logging.getLogger("konnektor.driver")


class Machine(Protocol):
    """What a driver drives: a ``Mux``, or a ``Rejoin`` on the way to one."""

    @property
    def awake(self) -> bool:
        """Whether ``chunks_to_send`` has something."""

    @property
    def error(self) -> SessionError | None:
        """Why it is over."""

    @property
    def hello_received(self) -> bool:
        """Whether the peer has spoken."""

    @property
    def pause_reading_until(self) -> float:
        """When to read again."""

    def receive(self, data: memoryview, now: float, /) -> int:
        """Takes in whole frames; returns how many bytes that were."""

    def chunks_to_send(self, now: float, /) -> list[Buffer]:
        """What to write next, in as many buffers as is cheap."""

    def write_blocked(self, now: float, /) -> None:
        """The transport takes no more."""

    def write_resumed(self) -> None:
        """It does again."""

    def close(self, code: int, reason: str, /) -> None:
        """Ends it, with a CLOSE."""


class Alarm:
    """One timer, for the earliest of a session's deadlines.

    Args:
        ring: called at the time; what it raises is a defect, and goes to ``fail``.
    """

    __slots__ = ("_fail", "_loop", "_ring", "_timer")

    def __init__(self, ring: Callable[[float], None], fail: Callable[[Exception], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._ring = ring
        self._fail = fail
        self._timer: asyncio.TimerHandle | None = None

    def set(self, when: float) -> None:
        """Rings at ``when`` instead of whenever it would have."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._now)

    def stop(self) -> None:
        """Does not ring."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _now(self) -> None:
        self._timer = None
        try:
            self._ring(clock())
        except Exception as error:  # noqa: BLE001
            self._fail(error)


class Driver(asyncio.BufferedProtocol):
    """Moves bytes between a transport and a multiplexer.

    Args:
        on_connected: the transport is there (after TLS).
        on_lost: the transport is gone; its exception, if it had one.

    Attributes:
        mux: set by the session, which is its handler and forwards ``output_pending``. It may be exchanged for another
            while it receives: the rest of what came is then the other's.
        transport: the connection (after TLS), None before and after.
    """

    __slots__ = (
        "_close_timer",
        "_flush_scheduled",
        "_loop",
        "_on_connected",
        "_on_lost",
        "_paused",
        "_reading_timer",
        "_rest",
        "_scratch",
        "mux",
        "transport",
    )

    def __init__(
        self,
        on_connected: Callable[[asyncio.Transport], None],
        on_lost: Callable[[Exception | None], None],
    ) -> None:
        self.mux: Machine
        self._loop = asyncio.get_running_loop()
        self._on_connected = on_connected
        self._on_lost = on_lost
        self.transport: asyncio.Transport | None = None
        self._scratch: Scratch | None = None
        self._rest = b""
        self._paused = False
        self._flush_scheduled = False
        self._close_timer: asyncio.TimerHandle | None = None
        self._reading_timer: asyncio.TimerHandle | None = None

    async def connect(
        self, role: str, sock: socket.socket, tls: ssl.SSLContext | None, server_name: str | None, *, within: float
    ) -> None:
        """Gets its transport, on a connected socket, which it closes if it cannot; ``within`` bounds the TLS handshake."""
        tls_args: dict[str, Any] = {}
        if tls is not None:
            tls_args = {"ssl": tls, "ssl_handshake_timeout": within, "ssl_shutdown_timeout": 5.0}
        descriptor = os.fstat(sock.fileno())
        try:
            sock.setblocking(False)
            if role == "client":
                if tls is not None:
                    tls_args["server_hostname"] = server_name
                await self._loop.create_connection(lambda: self, sock=sock, **tls_args)
            else:
                await self._loop.connect_accepted_socket(lambda: self, sock, **tls_args)
        except BaseException:
            _forget_if_closed(sock, descriptor)
            sock.close()
            raise
        _forget_if_closed(sock, descriptor)

    # What the multiplexer says

    def output_pending(self) -> None:
        """Writes at the end of this turn of the loop."""
        if not self._flush_scheduled and self.transport is not None:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        mux, transport = self.mux, self.transport
        if transport is None:
            return
        try:
            while mux.awake and not self._paused:
                chunks = mux.chunks_to_send(clock())
                if not chunks:
                    break
                if len(chunks) == 1:
                    transport.write(chunks[0])
                else:
                    transport.writelines(chunks)
        except Exception as error:  # noqa: BLE001
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """A defect, in the multiplexer or in a sink: this session ends, others do not."""
        logger.error("internal error", exc_info=error)
        try:
            self.mux.close(Code.INTERNAL, "internal error")
        except Exception:
            logger.exception("internal error while closing")
        if self._close_timer is None:
            # The end itself failed: nothing else would end the connection.
            self.abort()

    def close(self) -> None:
        """Writes what is left (the CLOSE frame), then ends the connection; a peer that never reads is cut off.

        What the peer still sends is read and discarded until its EOF: a socket that is closed over unread bytes resets
        the connection, and that may destroy the CLOSE on its way. Under TLS the exchange of close_notify does this.
        """
        transport = self.transport
        if transport is None or self._close_timer is not None:
            return
        self._close_timer = self._loop.call_later(CLOSE_TIMEOUT, transport.abort)
        self._resume_reading()
        self._paused = False
        self._flush()
        if transport.is_closing():
            # Not again: after a second close() asyncio's TLS transports ignore abort().
            return
        if self.mux.hello_received and transport.can_write_eof():
            with contextlib.suppress(OSError):
                transport.write_eof()
        else:
            transport.close()

    def _pause_reading(self, until: float) -> None:
        """Leaves what comes in the kernel, so that other sessions have their turn and the peer slows down."""
        transport = self.transport
        if transport is not None and self._reading_timer is None and not transport.is_closing():
            transport.pause_reading()
            self._reading_timer = self._loop.call_at(until, self._resume_reading)

    def _resume_reading(self) -> None:
        if self._reading_timer is not None:
            self._reading_timer.cancel()
            self._reading_timer = None
            if self.transport is not None and not self.transport.is_closing():
                self.transport.resume_reading()

    def abort(self) -> None:
        """Drops the connection."""
        if self.transport is not None:
            self.transport.abort()

    def detach(self) -> None:
        """Drops the connection, of which nothing more will be heard: the session goes on without it."""
        transport, self.transport = self.transport, None
        self._on_lost = _nobody
        for timer in (self._close_timer, self._reading_timer):
            if timer is not None:
                timer.cancel()
        self._close_timer = self._reading_timer = None
        if transport is not None:
            transport.abort()

    def hand_over(
        self,
        on_connected: Callable[[asyncio.Transport], None],
        on_lost: Callable[[Exception | None], None],
        mux: Machine,
    ) -> None:
        """The connection is another session's from now on."""
        self._on_connected, self._on_lost, self.mux = on_connected, on_lost, mux

    # What the transport says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not derive from asyncio's.
        transport = cast("asyncio.Transport", transport)
        self.transport = transport
        transport.set_write_buffer_limits(WRITE_HIGH)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                # What is not sent yet should wait in the scheduler, not in the kernel.
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, "TCP_NOTSENT_LOWAT", 25), NOTSENT_LOWAT)
        if self.mux.error is not None:
            # Given up while connecting.
            transport.abort()
            return
        try:
            self._on_connected(transport)
        except Exception as error:  # noqa: BLE001
            self.fail(error)
        if self.mux.awake:
            self.output_pending()

    def get_buffer(self, sizehint: int) -> memoryview:
        shared = self._scratch = scratch()
        rest = self._rest
        size = len(rest)
        if size:
            shared.view[:size] = rest
            return shared.view[size:]
        return shared.view

    def buffer_updated(self, nbytes: int) -> None:
        shared = self._scratch
        assert shared is not None
        if self.transport is None:
            # Detached between the two calls: what came now was never taken in, and the peer will send it again.
            self._scratch = None
            return
        size = len(self._rest) + nbytes
        shared.busy = True
        now = clock()
        try:
            mux = self.mux
            used = mux.receive(shared.view[:size], now)
            if self.mux is not mux:
                used += self.mux.receive(shared.view[used:size], now)
            self._rest = bytes(shared.view[used:size]) if used < size else b""
        except Exception as error:  # noqa: BLE001
            self.fail(error)
        finally:
            shared.busy = False
            self._scratch = None
        if self.mux.pause_reading_until > now and self.mux.error is None:
            self._pause_reading(self.mux.pause_reading_until)

    def eof_received(self) -> bool:
        # A TCP EOF is never a stream's EOF; without CLOSE it is a broken connection.
        return False

    def pause_writing(self) -> None:
        self._paused = True
        self.mux.write_blocked(clock())

    def resume_writing(self) -> None:
        self._paused = False
        self.mux.write_resumed()
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        for timer in (self._close_timer, self._reading_timer):
            if timer is not None:
                timer.cancel()
        try:
            self._on_lost(exc)
        except Exception:
            logger.exception("internal error while closing")


def _forget_if_closed(sock: socket.socket, descriptor: os.stat_result) -> None:
    """Keeps a socket whose descriptor the loop has closed from closing the same number again.

    uvloop (0.23) closes the number, not the Python socket, and its ``create_connection`` ties the one to the other only when
    its transport has been up for a turn. If the connection was lost before that (a peer that resets it ahead of the
    ClientHello is enough) the socket would keep a number that is another connection's by the time of its collection.
    """
    try:
        ours = os.path.samestat(os.fstat(sock.fileno()), descriptor)
    except OSError:
        ours = False
    if not ours:
        sock.detach()


def _nobody(_exc: Exception | None) -> None:
    """Whom the loss of a connection concerns that the session has left."""
