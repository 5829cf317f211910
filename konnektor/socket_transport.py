"""A transport for plain sockets that never copies: system calls straight from and into the caller's buffers.

The event loops' own transports keep what is written to them, so each payload must be copied for them out of the
buffer it was decrypted into; they also cost a kilobyte each and, on uvloop, a task to set up. A splice needs
none of that: ``write`` sends at once, and keeps a copy only of what the kernel would not take.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import Any, Final, cast

__all__ = ["SocketTransport"]

READS_A_TURN: Final = 1
"""Full buffers read before the loop sees to others."""


class SocketTransport(asyncio.Transport):
    """A connected, non-blocking stream socket as an asyncio transport for a ``BufferedProtocol``.

    Differs from the loops' own in that ``write`` does not keep ``data``, and ``pause_writing`` is called as soon
    as the socket does not take everything: its buffer in the kernel is the only one that is meant to be used.

    Args:
        sock: belongs to the transport from now on.
        protocol: gets ``connection_made`` before the constructor returns.
    """

    __slots__ = ("_buffer", "_closing", "_eof", "_loop", "_lost", "_protocol", "_reading", "_sock")

    def __init__(self, sock: socket.socket, protocol: asyncio.BufferedProtocol) -> None:
        # Not super().__init__(), which makes a dict for each.
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._protocol = protocol
        self._buffer: bytearray | None = None
        self._reading = True
        self._closing = False
        self._eof = False
        self._lost = False
        protocol.connection_made(self)
        if self._reading and not self._closing:
            self._loop.add_reader(sock.fileno(), self._readable)

    # Reading

    def _readable(self) -> None:
        sock = self._sock
        for _ in range(READS_A_TURN):
            protocol = self._protocol
            buffer = cast(memoryview, protocol.get_buffer(-1))
            try:
                count = sock.recv_into(buffer)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._break(error)
                return
            if not count:
                self._stop_reading()
                if not protocol.eof_received():
                    self.close()
                return
            protocol.buffer_updated(count)
            if not self._reading or self._closing:
                return
            if count < len(buffer):
                break
        # uvloop tells of a reset once, and never again: if it was in the same breath as data, that was now.
        if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._break(OSError(code, os.strerror(code)))

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._sock.fileno())

    def is_reading(self) -> bool:
        return self._reading

    def pause_reading(self) -> None:
        if not self._closing:
            self._stop_reading()

    def resume_reading(self) -> None:
        if not self._reading and not self._closing:
            self._reading = True
            self._loop.add_reader(self._sock.fileno(), self._readable)

    # Writing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing or self._eof or self._lost:
            return
        if self._buffer is not None:
            self._buffer += data
            return
        try:
            count = self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            count = 0
        except OSError as error:
            self._break(error)
            return
        if count < len(data):
            self._buffer = bytearray(memoryview(data)[count:])
            self._loop.add_writer(self._sock.fileno(), self._writable)
            self._protocol.pause_writing()

    def _writable(self) -> None:
        buffer = self._buffer
        assert buffer is not None
        try:
            count = self._sock.send(buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._break(error)
            return
        del buffer[:count]
        if buffer:
            return
        self._buffer = None
        self._loop.remove_writer(self._sock.fileno())
        if self._closing:
            self._lose(None)
            return
        if self._eof:
            self._shut_down()
        self._protocol.resume_writing()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if not self._closing and not self._eof:
            self._eof = True
            if self._buffer is None:
                self._shut_down()

    def _shut_down(self) -> None:
        # A peer that reset the connection is noticed by reading.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def get_write_buffer_size(self) -> int:
        return len(self._buffer or b"")

    # The end

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._stop_reading()
        if self._buffer is None:
            self._lose(None)

    def abort(self) -> None:
        self._break(None)

    def _break(self, error: Exception | None) -> None:
        self._closing = True
        self._stop_reading()
        if self._buffer is not None:
            self._buffer = None
            self._loop.remove_writer(self._sock.fileno())
        self._lose(error)

    def _lose(self, error: Exception | None) -> None:
        """``connection_lost``, once, and never inside the protocol's own call."""
        if not self._lost:
            self._lost = True
            self._loop.call_soon(self._finish, error)

    def _finish(self, error: Exception | None) -> None:
        try:
            self._protocol.connection_lost(error)
        finally:
            self._sock.close()

    # What it is

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "socket":
            return self._sock
        if name in ("peername", "sockname"):
            with contextlib.suppress(OSError):
                return self._sock.getpeername() if name == "peername" else self._sock.getsockname()
        return default

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.BufferedProtocol)
        self._protocol = protocol
