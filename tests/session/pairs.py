"""Connected pairs of sessions and streams, each an async context manager, and what tests of them share."""

import asyncio
import socket
import struct
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc

from konnektor import testing
from konnektor.session import Session
from konnektor.stream_types import StreamType

BUFFER = 128 * 1024
DEADLINE = 30.0


class Hold(StreamType):
    """A stream whose accepting end the test itself holds."""

    name = "hold@test"
    label: str = ""


class Echo(StreamType):
    name = "echo@test"
    text: str = ""


async def echo(stream, request):
    await stream.accept()
    async for chunk in stream:
        await stream.send(chunk)
    await stream.aclose()


async def until(condition):
    """For what announces itself nowhere; fails if it never comes."""
    with anyio.fail_after(DEADLINE):
        while not condition():
            await anyio.sleep(0.005)


def at_rest(session):
    """Nothing is left of any stream."""
    mux = session._mux
    return not mux.streams and not mux.opens and mux.pool.extra == 0 and not session._tasks


class Authority:
    """Contexts of a worker and a control plane that trust each other."""

    def __init__(self, folder):
        made = testing.certificates(folder, "w")
        self.client = made.workers["w"].client_context()
        self.server = made.control_plane.server_context()


def descriptors():
    """The open ones of this process, by number."""
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def assert_options(sock):
    """No delay for small writes, and a dead peer noticed after a minute."""
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    ):
        assert sock.getsockopt(level, option) == value


def segments_sent(sock):
    """By TCP_INFO (linux/tcp.h)."""
    return struct.unpack_from("I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160), 136)[0]


def tcp_socketpair():
    """Two connected TCP sockets on loopback, with buffers that a test can fill."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        a = socket.socket()
        a.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        a.connect(listener.getsockname())
        b, _ = listener.accept()
    for sock in (a, b):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        sock.setblocking(False)
    return a, b


@asynccontextmanager
async def memory_session_pair(**kwargs):
    """As ``konnektor.testing`` makes it; a test that hangs in it fails, under uvloop too, where no signal helps."""
    with anyio.fail_after(DEADLINE):
        async with testing.memory_session_pair(**kwargs) as pair:
            yield pair


@asynccontextmanager
async def socket_session_pair(client_tls=None, server_tls=None, *, sockets=tcp_socketpair, **kwargs):
    """Client and server on real sockets; ``kwargs`` go to both."""
    a, b = sockets()
    client, server = await asyncio.gather(
        Session.client(a, tls=client_tls, server_name="cp" if client_tls else None, **kwargs),
        Session.server(b, tls=server_tls, **kwargs),
    )
    try:
        yield client, server
    finally:
        with anyio.CancelScope(shield=True):
            await client.aclose()
            await server.aclose()


class Exchange:
    """Opens streams from one session to another, and hands out both ends."""

    def __init__(self, opener, accepter):
        self.opener = opener
        self._accepted = asyncio.Queue()
        self._done = {}

        async def hold(stream, _request):
            done = self._done[stream] = anyio.Event()
            await stream.accept()
            self._accepted.put_nowait(stream)
            await done.wait()

        if accepter.handlers.get(Hold.name) is None:
            accepter.handlers.add(Hold, hold)

    async def pair(self, **kwargs):
        opened = await self.opener.open(Hold(), **kwargs)
        return opened, await self._accepted.get()

    def release(self):
        """Lets the handlers return, which closes their streams."""
        for done in self._done.values():
            done.set()


@asynccontextmanager
async def stream_pair_over(sessions):
    """An opened stream and its accepted end, over the sessions of a context manager."""
    async with sessions as (client, server):
        exchange = Exchange(client, server)
        try:
            yield await exchange.pair()
        finally:
            exchange.release()


@asynccontextmanager
async def memory_stream_pair(**kwargs):
    async with stream_pair_over(memory_session_pair(**kwargs)) as pair:
        yield pair


class AsyncioStream(anyio.abc.ByteStream):
    """A reader and a writer of asyncio's as an anyio stream."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer
        self._eof_sent = False

    async def receive(self, max_bytes=65_536):
        await anyio.lowlevel.checkpoint_if_cancelled()
        if self.writer.is_closing() and self.reader.exception() is None:
            raise anyio.ClosedResourceError
        try:
            data = await self.reader.read(min(max_bytes, 65_536))
        except ConnectionError as error:
            raise anyio.BrokenResourceError from error
        if not data:
            raise anyio.ClosedResourceError if self.writer.is_closing() else anyio.EndOfStream
        return data

    async def send(self, item):
        await anyio.lowlevel.checkpoint_if_cancelled()
        if self.writer.is_closing() and self.reader.exception() is None:
            raise anyio.ClosedResourceError
        try:
            self.writer.write(item)
            await self.writer.drain()
        except ConnectionError as error:
            raise anyio.BrokenResourceError from error

    async def send_eof(self):
        self.writer.write_eof()

    async def aclose(self):
        try:
            await anyio.lowlevel.checkpoint()
        except BaseException:
            self.writer.transport.abort()
            raise
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except ConnectionError:
            pass
        except BaseException:
            self.writer.transport.abort()
            raise
