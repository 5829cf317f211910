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
import select
import socket
import struct
import termios
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, cast

from konnektor.poller import EDGES, FAILED, READ, WRITE, Watcher, poller_of

__all__ = ["DirectProtocol", "SocketTransport", "unacknowledged"]

READ_SIZE: Final = 256 * 1024
"""Bytes read at once from a socket that has as many, if the protocol brings no buffer of its own."""

PATIENCE: Final = 10.0
"""Seconds that what came before a reset is kept for a protocol that has paused reading."""

UNWATCHED: Final = -1
"""The poller does not know the socket any more."""
ENDED: Final = select.EPOLLRDHUP
READING: Final = READ | ENDED | select.EPOLLPRI
"""What is watched for from first to last, read or not: an edge that nobody wants is told once."""
_NOT_ALL: Final = select.EPOLLPRI | FAILED
"""Where there is one of these, more may be to come behind a read that got less than it had room for: TCP reads up to urgent data."""

_TCP: Final = (int(socket.AF_INET), int(socket.AF_INET6))
"""Families whose stream sockets a read empties, but for what is in ``_NOT_ALL``, if it got less than it had room for. A Unix socket
reads up to the next message that has descriptors with it, whatever there is behind that."""
_family: Final = cast(Callable[[socket.SocketType], int], socket.SocketType.family.__get__)
"""Without the enumeration that ``socket.socket`` makes of it, which takes longer than watching the socket."""


class _Protocol(Protocol):
    """What a transport calls; of the methods for data only those of its kind are there."""

    def get_buffer(self, sizehint: int) -> memoryview: ...

    def buffer_updated(self, nbytes: int) -> None: ...

    def data_received(self, data: bytes) -> None: ...

    def eof_received(self) -> bool | None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...

    def connection_lost(self, exc: Exception | None) -> None: ...


class DirectProtocol:
    """For protocols that are compiled, too: the method is called directly then, and not looked up by its name."""

    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        raise NotImplementedError


class SocketTransport(Watcher):
    """A connected, non-blocking stream socket, with the methods of an asyncio transport.

    It is none by inheritance: the base class would make a dict for each, and keep mypyc from making it a native class.
    Differs from the loops' own in that ``write`` does not keep ``data``, and ``pause_writing`` is called as soon
    as the socket does not take everything: its buffer in the kernel is the only one that is meant to be used.

    Args:
        sock: belongs to the transport from now on.
        protocol: gets ``connection_made`` before the constructor returns.

    Raises:
        OSError: the socket cannot be watched; the protocol has heard nothing.

    Attributes:
        read_size: bytes to read at most at a time, for a protocol without a buffer of its own.
    """

    __slots__ = (
        "_buffer",
        "_buffered",
        "_closing",
        "_due",
        "_ended",
        "_eof",
        "_error",
        "_fd",
        "_is_tcp",
        "_lost",
        "_poller",
        "_protocol",
        "_reading",
        "_sock",
        "_timer",
        "_watched",
        "read_size",
    )

    def __init__(self, sock: socket.SocketType, protocol: asyncio.BaseProtocol) -> None:
        self._poller = poller_of(asyncio.get_running_loop())
        self._sock = sock
        self._fd = sock.fileno()
        self.set_protocol(protocol)
        self._buffer: bytearray | None = None
        self.read_size = READ_SIZE
        self._reading = True
        self._due = False  # there may be something to read, of which the poller has told already
        self._is_tcp = _family(sock) in _TCP
        self._watched = UNWATCHED
        self._closing = False
        self._eof = False
        self._ended = False
        self._error: OSError | None = None
        self._lost = False
        self._timer: asyncio.TimerHandle | None = None
        self._poller.add(self._fd, self, READING | EDGES)
        self._watched = READING
        try:
            protocol.connection_made(cast(asyncio.Transport, self))
        except BaseException:
            if self._watched != UNWATCHED:
                self._watched = UNWATCHED
                self._poller.remove(self._fd)
            raise

    # What the poller says, and what it is asked

    def ready(self, events: int, /) -> None:
        """The socket can be read or written, or has failed (poller.Pollable)."""
        if self._watched == UNWATCHED:
            return
        # Reading first: what came before a reset is lost as soon as writing finds it.
        if self._reading:
            if events != WRITE:
                self._readable(events)
        elif events & READ:
            self._due = True
        if events & FAILED and not self._reading and not self._closing:
            self._failed(events)
        if self._buffer is not None and events & (WRITE | FAILED) and (self._closing or not events & FAILED):
            self._writable()

    def _failed(self, events: int) -> None:
        """Reset, or closed by both ends, while nobody reads. What came before is still to be read, when somebody does.

        Behind a reset not for ever: a pause may never end, as that for a target that hangs, whose clients give up one by one.
        Where both ends have closed, what is unread is whole, and worth as much as its reader's patience.
        """
        if events & select.EPOLLERR and self._error is None:
            code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            self._error = OSError(code, os.strerror(code)) if code else None
        if self._buffer is not None:
            self._writable()  # which says why nobody takes it
            return
        try:
            unread = self._sock.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._break(error)
            return
        if unread or self._error is None:
            self._due = True
            if self._error is not None:
                self._stop_timer()
                self._timer = self._poller.loop.call_later(PATIENCE, self._give_up, self._error)
        elif self._ended:
            self._break(self._error)
        else:
            self._readable(0)  # an end takes no room

    def _give_up(self, error: OSError) -> None:
        self._timer = None
        if not self._reading and not self._closing:
            self._break(error)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch(self, events: int) -> None:
        """Watches for these; if they are watched for already, those that there are now are told once more."""
        try:
            self._poller.change(self._fd, events | EDGES)
        except OSError as error:
            # No memory to be had: this socket's misfortune, and not that of whoever resumed it.
            self._break(error)
        else:
            self._watched = events

    def _unwatch(self) -> None:
        if self._watched != UNWATCHED:
            self._watched = UNWATCHED
            self._poller.forget(self._fd)

    # Reading

    def _readable(self, events: int) -> None:
        sock, protocol = self._sock, self._protocol
        try:
            if self._buffered:
                data = b""
                room = protocol.get_buffer(-1)
                size = len(room)
                count = sock.recv_into(room)
            else:
                size = self.read_size
                # As ``recv``, and ``os.write`` below as ``send``: of those CPython takes longer to take the arguments apart.
                data = os.read(self._fd, size)
                count = len(data)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._break(error)
            return
        if not count:
            self._end()
            return
        self._due = count == size or not self._is_tcp or events & _NOT_ALL != 0
        try:
            if data:
                direct: object = protocol
                if isinstance(direct, DirectProtocol):  # the same call, but where mypyc knows what it calls
                    direct.data_received(data)
                else:
                    protocol.data_received(data)
            else:
                protocol.buffer_updated(count)
        finally:
            if not self._reading:
                self._due = self._due or events & ENDED != 0
            elif self._due:
                self._due = False
                self._watch(self._watched)
            elif events & ENDED:
                self._readable(0)  # asked for: the number may have been another socket's, whose end it was

    def _end(self) -> None:
        error = self._error
        if error is not None and not isinstance(error, BrokenPipeError):
            # No end: the reset has been told already, and the kernel tells it once. EPIPE is one that came behind a FIN.
            self._break(error)
            return
        self._reading = False
        self._ended = True
        if not self._protocol.eof_received():
            self.close()
        elif error is not None:
            self._break(error)

    def is_reading(self) -> bool:
        return self._reading

    def pause_reading(self) -> None:
        if not self._closing:
            self._reading = False

    def resume_reading(self) -> None:
        if not self._reading and not self._closing:
            self._reading = True
            if self._due:
                self._due = False
                self._watch(self._watched)

    # Writing

    def write(self, data: bytes | bytearray | memoryview, more: bool = False) -> None:
        """Sends at once; with ``more`` not what would make a short segment, since ``write_eof`` or more data is next.

        A FIN that finds data not sent yet goes with it: a segment less, and the other end wakes up once, not twice. Until then an
        ``abort`` would take that data along.
        """
        if self._closing or self._eof or self._lost:
            return
        if self._buffer is not None:
            self._buffer += data
            return
        try:
            count = self._sock.send(data, socket.MSG_MORE) if more else os.write(self._fd, data)
        except (BlockingIOError, InterruptedError):
            count = 0
        except OSError as error:
            self._refused(error)
            return
        if count < len(data):
            self._keep(bytearray(memoryview(data)[count:]))

    def writelines(self, chunks: Sequence[bytes | bytearray | memoryview], more: bool = False) -> int:
        """``write`` of them with one system call: a few, since a kernel takes no more than IOV_MAX.

        Returns:
            How many bytes of them wait in the transport's buffer.
        """
        if self._closing or self._eof or self._lost:
            return 0
        if self._buffer is not None:
            before = len(self._buffer)
            for chunk in chunks:
                self._buffer += chunk
            return len(self._buffer) - before
        try:
            count = self._sock.sendmsg(chunks, (), socket.MSG_MORE) if more else self._sock.sendmsg(chunks)
        except (BlockingIOError, InterruptedError):
            count = 0
        except OSError as error:
            self._refused(error)
            return 0
        rest = bytearray()
        for chunk in chunks:
            if count < len(chunk):
                rest += memoryview(chunk)[count:]
                count = 0
            else:
                count -= len(chunk)
        if rest:
            self._keep(rest)
        return len(rest)

    def _keep(self, rest: bytearray) -> None:
        """What the kernel did not take."""
        self._buffer = rest
        self._watch(self._watched | WRITE)
        self._protocol.pause_writing()

    def _writable(self) -> None:
        buffer = self._buffer
        assert buffer is not None
        try:
            count = self._sock.send(buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._refused(error)
            return
        del buffer[:count]
        if buffer:
            return
        self._buffer = None
        if self._closing:
            self._unwatch()
            self._lose(None)
            return
        self._watch(self._watched & ~WRITE)
        if self._eof:
            self._shut_down()
        self._protocol.resume_writing()

    def _refused(self, error: OSError) -> None:
        """The other end takes no more. What it said before that is often why: it is read, and the end of that tells."""
        if self._closing or self._ended or not isinstance(error, (ConnectionError, TimeoutError)):
            self._break(error)
            return
        self._error = self._error or error.with_traceback(None)  # no cycle for the collector
        self._eof = True  # drops what is written from now on
        paused, self._buffer = self._buffer is not None, None
        self._watch(READING)  # so that it is told once more that it has failed
        if paused:
            self._protocol.resume_writing()

    def is_whole(self, deliver: Callable[[bytes], object]) -> bool:
        """Whether the other end has sent all that it meant to: what the kernel calls the end is it. ``deliver`` gets nothing."""
        return True

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if not self._closing and not self._eof:
            self._eof = True
            if self._buffer is None:
                self._shut_down()

    def _shut_down(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            return  # a peer that reset the connection is noticed by reading

    def get_write_buffer_size(self) -> int:
        return len(self._buffer or b"")

    def unacknowledged(self) -> int:
        """Bytes written that the other end's kernel (of a Unix socket: its program) has not taken yet; a FIN counts as one."""
        return self.get_write_buffer_size() + unacknowledged(self._sock.fileno())

    # The end

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._reading = False
        if self._buffer is None:
            self._unwatch()
            self._lose(None)
        else:
            self._watch(WRITE)

    def abort(self) -> None:
        self._break(None)

    def _break(self, error: Exception | None) -> None:
        self._closing = True
        self._reading = False
        self._unwatch()
        self._buffer = None
        self._lose(error)

    def _lose(self, error: Exception | None) -> None:
        """``connection_lost``, once, and never inside the protocol's own call."""
        if not self._lost:
            self._lost = True
            self._stop_timer()
            self._poller.loop.call_soon(self._finish, error)

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
        return cast(asyncio.BaseProtocol, self._protocol)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = cast(_Protocol, protocol)
        self._buffered = isinstance(protocol, asyncio.BufferedProtocol)


def unacknowledged(fd: int) -> int:
    """Bytes of a socket's that its kernel has, and the other end's does not."""
    return cast(int, struct.unpack("i", fcntl.ioctl(fd, termios.TIOCOUTQ, bytes(4)))[0])  # SIOCOUTQ, tcp(7)
