"""A transport for plain sockets that never copies: system calls straight from and into the caller's buffers.

The event loops' own transports keep what is written to them, so each payload must be copied for them out of the
buffer it was decrypted into; they also cost a kilobyte each and, on uvloop, a task to set up. A splice needs
none of that: ``write`` sends at once, and keeps a copy only of what the kernel would not take.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
import termios
import threading
from typing import Any, Final, Protocol, cast

__all__ = ["READ_SIZE", "SocketTransport"]

READ_SIZE: Final = 256 * 1024
"""Bytes read at once from a socket that has as many, if the protocol brings no buffer of its own."""

ASK_AFTER: Final = 0.25
"""Seconds after which a socket that was read is asked whether it has been reset since."""


class _Protocol(Protocol):
    """What a transport calls; of the methods for data only those of its kind are there."""

    def get_buffer(self, sizehint: int) -> memoryview: ...

    def buffer_updated(self, nbytes: int) -> None: ...

    def data_received(self, data: bytes) -> None: ...

    def eof_received(self) -> bool | None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...

    def connection_lost(self, exc: Exception | None) -> None: ...


class SocketTransport:
    """A connected, non-blocking stream socket, with the methods of an asyncio transport.

    It is none by inheritance: the base class would make a dict for each, and keep mypyc from making it a native class.
    Differs from the loops' own in that ``write`` does not keep ``data``, and ``pause_writing`` is called as soon
    as the socket does not take everything: its buffer in the kernel is the only one that is meant to be used.

    Args:
        sock: belongs to the transport from now on.
        protocol: gets ``connection_made`` before the constructor returns.

    Attributes:
        read_size: bytes to read at most at a time, for a protocol without a buffer of its own.
    """

    __slots__ = (
        "_buffer",
        "_buffered",
        "_closing",
        "_eof",
        "_loop",
        "_lost",
        "_protocol",
        "_reading",
        "_resets",
        "_sock",
        "_watched",
        "read_size",
    )

    def __init__(self, sock: socket.socket, protocol: asyncio.BaseProtocol) -> None:
        self._loop = asyncio.get_running_loop()
        self._resets = _resets_of(self._loop)
        self._sock = sock
        self.set_protocol(protocol)
        self._buffer: bytearray | None = None
        self.read_size = READ_SIZE
        self._reading = True
        self._watched = False
        self._closing = False
        self._eof = False
        self._lost = False
        protocol.connection_made(cast(asyncio.Transport, self))
        if self._reading and not self._closing:
            self._watch()

    # Reading

    def _readable(self) -> None:
        if not self._reading:
            # Paused, and not resumed before the loop came back: only now is it worth telling the kernel.
            self._unwatch()
            return
        sock, protocol = self._sock, self._protocol
        try:
            if self._buffered:
                data = b""
                count = sock.recv_into(protocol.get_buffer(-1))
            else:
                data = sock.recv(self.read_size)
                count = len(data)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._break(error)
            return
        if not count:
            self._reading = False
            self._unwatch()
            if not protocol.eof_received():
                self.close()
            return
        resets = self._resets
        if not resets.suspects:
            resets.ask_soon()
        resets.suspects.add(self)
        if data:
            protocol.data_received(data)
        else:
            protocol.buffer_updated(count)

    def ask(self) -> None:
        """Looks whether the socket has been reset."""
        if not self._closing and (code := self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
            self._break(OSError(code, os.strerror(code)))

    def _watch(self) -> None:
        if not self._watched:
            self._watched = True
            self._loop.add_reader(self._sock.fileno(), self._readable)

    def _unwatch(self) -> None:
        if self._watched:
            self._watched = False
            self._loop.remove_reader(self._sock.fileno())

    def is_reading(self) -> bool:
        return self._reading

    def pause_reading(self) -> None:
        if not self._closing:
            self._reading = False

    def resume_reading(self) -> None:
        if not self._reading and not self._closing:
            self._reading = True
            self._watch()

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

    def unacknowledged(self) -> int:
        """Bytes written that the other end's kernel (of a Unix socket: its program) has not taken yet; a FIN counts as one."""
        queued = struct.unpack("i", fcntl.ioctl(self._sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0]  # SIOCOUTQ, tcp(7)
        return self.get_write_buffer_size() + cast(int, queued)

    # The end

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._reading = False
        self._unwatch()
        if self._buffer is None:
            self._lose(None)

    def abort(self) -> None:
        self._break(None)

    def _break(self, error: Exception | None) -> None:
        self._closing = True
        self._reading = False
        self._unwatch()
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
            self._resets.suspects.discard(self)
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
        return cast(asyncio.BaseProtocol, self._protocol)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = cast(_Protocol, protocol)
        self._buffered = isinstance(protocol, asyncio.BufferedProtocol)


class _Resets:
    """The sockets of a loop that were read of late: asked, a moment later, whether they have been reset since.

    uvloop tells of a reset once, and never again: if that was in the same breath as data, nothing more is heard of the
    socket. To ask each time would cost a system call for each read.
    """

    __slots__ = ("loop", "suspects")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.suspects: set[SocketTransport] = set()

    def ask_soon(self) -> None:
        self.loop.call_later(ASK_AFTER, self._ask)

    def _ask(self) -> None:
        suspects, self.suspects = self.suspects, set()
        for transport in suspects:
            transport.ask()


class _Local(threading.local):
    resets: _Resets | None = None


_local = _Local()


def _resets_of(loop: asyncio.AbstractEventLoop) -> _Resets:
    """A thread has one loop at a time."""
    resets = _local.resets
    if resets is None or resets.loop is not loop:
        resets = _local.resets = _Resets(loop)
    return resets
