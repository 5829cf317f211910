"""The asyncio views of a stream: any Protocol, readers and writers, and TLS inside."""

import asyncio
import asyncio.sslproto
import hashlib
import random
import socket
from contextlib import asynccontextmanager

import anyio
import pytest
from anyio.streams.tls import TLSStream

import konnektor as kk
from konnektor.stream_types import Tcp
from konnektor.transport import HIGH_WATER, StreamTransport
from tests.session.check_stream import check_two_way_stream, exactly, until_end
from tests.session.pairs import Exchange, Hold, memory_session_pair, memory_stream_pair


async def until(condition):
    while not condition():
        await anyio.sleep(0.002)


class Recorder(asyncio.Protocol):
    def __init__(self, *, keep_open=True):
        self.data = bytearray()
        self.events = []
        self.keep_open = keep_open
        self.error = None
        self.lost = asyncio.Event()

    def connection_made(self, transport):
        self.transport = transport
        self.events.append("made")

    def data_received(self, data):
        assert isinstance(data, bytes)
        assert self.events[0] == "made"
        assert "eof" not in self.events
        self.data += data

    def eof_received(self):
        self.events.append("eof")
        return self.keep_open

    def pause_writing(self):
        self.events.append("pause")

    def resume_writing(self):
        self.events.append("resume")

    def connection_lost(self, exc):
        self.events.append("lost")
        self.error = exc
        self.lost.set()


class Buffered(Recorder, asyncio.BufferedProtocol):
    """Takes at most 7 bytes at a time."""

    buffer = None

    def get_buffer(self, sizehint):
        self.buffer = bytearray(7)
        return self.buffer

    def buffer_updated(self, nbytes):
        self.data += self.buffer[:nbytes]


class Duck:
    """A protocol by its methods alone."""

    def __init__(self):
        self.inner = Recorder()

    def __getattr__(self, name):
        return getattr(self.inner, name)


@asynccontextmanager
async def viewed(protocol=None, **kwargs):
    """A stream, a transport on its other end and that one's protocol."""
    async with memory_stream_pair(**kwargs) as (a, b):
        protocol = protocol or Recorder()
        yield a, StreamTransport(b, protocol), protocol
        await a.aclose()


@pytest.mark.parametrize("make", [Recorder, Buffered, Duck])
async def test_protocols_of_any_kind(make):
    async with viewed(make()) as (a, transport, protocol):
        assert transport.get_protocol() is protocol
        assert transport.get_extra_info("konnektor_stream").detached
        await a.send(b"0123456789" * 10)
        await a.send(b"x" * 5000)
        transport.write(b"answer")
        transport.write(bytearray(b","))
        transport.write(memoryview(b"answer"))
        transport.write(b"")
        assert await exactly(a, 13) == b"answer,answer"
        await a.send_eof()
        await until(lambda: "eof" in protocol.events)
        assert protocol.data == b"0123456789" * 10 + b"x" * 5000
        transport.writelines([b"after", b"eof"])
        assert transport.can_write_eof()
        transport.write_eof()
        transport.write_eof()
        with pytest.raises(RuntimeError):
            transport.write(b"x")
        assert await until_end(a) == b"aftereof"
        assert not transport.is_closing()
        transport.close()
        transport.close()
        transport.write(b"ignored")
        transport.write_eof()
        await protocol.lost.wait()
        assert protocol.error is None
        assert protocol.events == ["made", "eof", "lost"]


async def test_eof_that_does_not_keep_open_closes():
    async with viewed(Recorder(keep_open=False)) as (a, _transport, protocol):
        await a.send_eof()
        await protocol.lost.wait()
        assert await until_end(a) == b""
        assert protocol.error is None


async def test_what_came_before_the_view_comes_first():
    async with memory_stream_pair() as (a, b):
        await a.send(b"one")
        await anyio.sleep(0.02)
        await a.send(b"two" * 1000)
        await a.send_eof()
        await anyio.sleep(0.02)
        assert await b.receive(1) == b"o"
        protocol = Recorder()
        transport = StreamTransport(b, protocol)
        assert protocol.data == b"ne" + b"two" * 1000
        assert protocol.events == ["made", "eof"]
        transport.close()
        await protocol.lost.wait()


async def test_a_view_of_a_stream_that_broke_before():
    async with memory_stream_pair() as (a, b):
        a.reset()
        await anyio.sleep(0.02)
        protocol = Recorder()
        StreamTransport(b, protocol)
        await protocol.lost.wait()
        assert isinstance(protocol.error, kk.CancelledStreamError)
    async with memory_stream_pair() as (a, b):
        await b.send(b"arrived")
        await anyio.sleep(0.02)
        b.session.abort()
        await a.session.wait_closed()
        protocol = Recorder()
        StreamTransport(a, protocol)
        await protocol.lost.wait()
        assert protocol.data == b"arrived"
        assert isinstance(protocol.error, kk.SessionLost)


async def test_pause_reading_holds_the_peer_back():
    async with viewed() as (a, transport, protocol):
        assert transport.is_reading()
        transport.pause_reading()
        transport.pause_reading()
        assert not transport.is_reading()
        data = random.Random(1).randbytes(3_000_000)
        task = asyncio.create_task(a.send(data))
        await anyio.sleep(0.1)
        assert not task.done()
        assert protocol.data == b""
        transport.resume_reading()
        transport.resume_reading()
        await task
        await a.send_eof()
        await until(lambda: "eof" in protocol.events)
        assert protocol.data == data
        transport.pause_reading()
        transport.resume_reading()
        transport.close()
        assert not transport.is_reading()
        await protocol.lost.wait()


@pytest.mark.parametrize("make", [Recorder, Buffered])
async def test_a_protocol_that_pauses_or_closes_in_the_middle(make):
    class Fickle(make):
        def taken(self):
            if len(self.data) >= 5 and not self.transport.is_closing():
                self.transport.pause_reading()

        def data_received(self, data):
            super().data_received(data)
            self.taken()

        def buffer_updated(self, nbytes):
            super().buffer_updated(nbytes)
            self.taken()

    async with viewed(Fickle()) as (a, transport, protocol):
        await a.send(b"0123456789" * 3)
        await anyio.sleep(0.02)
        await a.send(b"abc" * 1000)
        await a.send_eof()
        while "eof" not in protocol.events:
            transport.resume_reading()
            await anyio.sleep(0)
        assert protocol.data == b"0123456789" * 3 + b"abc" * 1000
        transport.abort()
        await protocol.lost.wait()


@pytest.mark.parametrize("make", [Recorder, Buffered])
async def test_a_protocol_that_closes_while_it_is_fed(make):
    class Hasty(make):
        def data_received(self, data):
            self.data += data
            self.transport.close()

        def buffer_updated(self, nbytes):
            super().buffer_updated(nbytes)
            self.transport.close()

    async with memory_stream_pair() as (a, b):
        await a.send(b"one" * 10)
        await a.send(b"two" * 1000)
        await anyio.sleep(0.02)
        protocol = Hasty()
        StreamTransport(b, protocol)
        await protocol.lost.wait()
        assert len(protocol.data) in (7, 30, 3030)
        assert protocol.error is None
        assert "eof" not in protocol.events


async def test_write_limits():
    async with viewed() as (a, transport, protocol):
        assert transport.get_write_buffer_limits() == (HIGH_WATER // 4, HIGH_WATER)
        transport.set_write_buffer_limits(high=1000)
        assert transport.get_write_buffer_limits() == (250, 1000)
        transport.set_write_buffer_limits(low=1000)
        assert transport.get_write_buffer_limits() == (1000, 4000)
        transport.set_write_buffer_limits()
        with pytest.raises(ValueError, match="must be"):
            transport.set_write_buffer_limits(high=1, low=2)
        with pytest.raises(TypeError):
            transport.write("text")
        with pytest.raises(TypeError):
            transport.write(5)
        data = bytes(2_000_000)
        transport.write(data)
        assert transport.get_write_buffer_size() == len(data)
        assert protocol.events == ["made", "pause"]
        transport.write(b"x")
        assert await exactly(a, len(data) + 1) == data + b"x"
        assert protocol.events == ["made", "pause", "resume"]
        transport.write(b"12345")
        transport.set_write_buffer_limits(high=4, low=0)
        assert protocol.events[-1] == "pause"
        await until(lambda: protocol.events[-1] == "resume")
        transport.close()
        transport.set_write_buffer_limits(high=0)
        await protocol.lost.wait()


async def test_close_flushes_first():
    async with viewed() as (a, transport, protocol):
        data = random.Random(2).randbytes(2_000_000)
        transport.write(data)
        transport.close()
        await anyio.sleep(0.05)
        assert not protocol.lost.is_set()
        assert await until_end(a) == data
        await protocol.lost.wait()
        assert protocol.error is None


@pytest.mark.parametrize("closed_before", [False, True])
async def test_abort_drops_everything(closed_before):
    async with viewed() as (a, transport, protocol):
        transport.write(bytes(2_000_000))
        if closed_before:
            transport.close()
        transport.abort()
        transport.abort()
        await protocol.lost.wait()
        assert protocol.error is None
        with pytest.raises(kk.CancelledStreamError):
            await until_end(a)


@pytest.mark.parametrize("closing", [False, True])
async def test_a_reset_is_a_lost_connection(closing):
    async with viewed() as (a, transport, protocol):
        transport.write(bytes(2_000_000))
        await anyio.sleep(0.05)
        if closing:
            transport.close()
        a.reset(kk.Code.TARGET_RESET)
        await protocol.lost.wait()
        assert isinstance(protocol.error, ConnectionError)
        assert "eof" not in protocol.events


async def test_the_end_of_the_session_is_a_lost_connection():
    async with viewed() as (a, _transport, protocol):
        a.session.close(kk.Code.SHUTDOWN)
        await protocol.lost.wait()
        assert isinstance(protocol.error, kk.SessionLost)


async def test_an_answer_is_whole_though_its_sender_stops_the_request():
    # FIN and STOP: the STOP overtakes the answer.
    answer = random.Random(3).randbytes(1_000_000)
    async with viewed() as (a, transport, protocol):
        transport.write(bytes(2_000_000))
        assert protocol.events[-1] == "pause"
        task = asyncio.create_task(a.send(answer))
        await task
        await a.aclose()
        await until(lambda: "resume" in protocol.events)
        while "eof" not in protocol.events:
            transport.write(b"nobody wants it")
            await anyio.sleep(0)
        assert protocol.data == answer
        assert not transport.is_closing()
        transport.write(b"and now it is an error")
        await protocol.lost.wait()
        assert isinstance(protocol.error, kk.CancelledStreamError)


async def test_close_after_the_peer_closed_is_no_error():
    async with viewed() as (a, transport, protocol):
        await a.aclose()
        await until(lambda: "eof" in protocol.events)
        await anyio.sleep(0.02)
        transport.close()
        await protocol.lost.wait()
        assert protocol.error is None


@pytest.mark.parametrize(
    "event", ["connection_made", "data_received", "eof_received", "pause_writing", "resume_writing"]
)
@pytest.mark.parametrize("error", [KeyError("defect"), asyncio.CancelledError()])
async def test_a_protocols_mistake_is_not_the_sessions(event, error):
    class Mistaken(Recorder):
        def __getattribute__(self, name):
            if name == event:

                def fail(*_args):
                    raise error

                return fail
            return super().__getattribute__(name)

    unhandled = []
    loop = asyncio.get_running_loop()
    before = loop._exception_handler if hasattr(loop, "_exception_handler") else loop.get_exception_handler()
    loop.set_exception_handler(lambda _loop, context: unhandled.append(context))
    try:
        async with memory_stream_pair() as (a, b):
            protocol = Mistaken()
            transport = StreamTransport(b, protocol)
            with anyio.move_on_after(1):
                transport.write(bytes(500_000))
                await a.send(b"x")
                await a.send_eof()
                await until_end_or_reset(a)
            await protocol.lost.wait()
            assert protocol.error is (error if isinstance(error, Exception) else None)
            assert [context["exception"] for context in unhandled] == [error]
            assert await a.session.ping() > 0
            await a.aclose()
    finally:
        loop.set_exception_handler(before)


async def until_end_or_reset(stream):
    with pytest.raises(kk.CancelledStreamError):
        await until_end(stream)


async def test_an_empty_buffer_is_a_mistake():
    class Empty(Buffered):
        def get_buffer(self, sizehint):
            return bytearray()

    unhandled = []
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _loop, context: unhandled.append(context))
    async with viewed(Empty()) as (a, _transport, protocol):
        await a.send(b"x")
        await protocol.lost.wait()
        assert isinstance(protocol.error, RuntimeError)
        await until_end_or_reset(a)
    loop.set_exception_handler(before)
    assert len(unhandled) == 1


def test_an_exit_out_of_a_protocol_is_one():
    class Exiting(Recorder):
        def data_received(self, data):
            raise SystemExit(7)

    async def main():
        a, b = socket.socketpair()
        async with memory_session_pair() as (client, server):

            async def handler(stream, _request):
                await stream.accept()
                StreamTransport(stream, Exiting())

            server.handlers.add(Hold, handler)
            stream = await client.open(Hold())
            try:
                await stream.send(b"x")
                await anyio.sleep_forever()
            finally:
                stream.reset()
                a.close()
                b.close()

    with pytest.raises(SystemExit):
        asyncio.run(main())


async def test_create_connection():
    async def upper(stream, request):
        await stream.accept()
        async for chunk in stream:
            await stream.send(chunk.upper())
        await stream.aclose()

    async with memory_session_pair() as (client, server):
        server.handlers.add(Tcp, upper)
        transport, protocol = await client.create_connection(Recorder, "example", 80)
        assert protocol.events == ["made"]
        transport.write(b"loud")
        await until(lambda: protocol.data == b"LOUD")
        transport.write_eof()
        await until(lambda: "eof" in protocol.events)
        transport.close()
        await protocol.lost.wait()
        await until(lambda: not client.stream_count and not server.stream_count)


async def test_a_view_of_an_early_stream():
    async def late(stream, _request):
        await anyio.sleep(0.05)
        await stream.accept()
        got.append(await until_end(stream))

    got = []
    async with memory_session_pair() as (client, server):
        server.handlers.add(Hold, late)
        stream = await client.open(Hold(), early=True)
        _reader, writer = stream.as_asyncio()
        writer.write(b"early")
        writer.close()
        await writer.wait_closed()
        await until(lambda: got)
        await until(lambda: not client.stream_count and not server.stream_count)
    assert got == [b"early"]


async def test_a_handler_may_leave_its_stream_to_a_view():
    async def handler(stream, _request):
        await stream.accept()
        StreamTransport(stream, protocol)

    protocol = Recorder(keep_open=False)
    async with memory_session_pair(server_limits=kk.Limits(initial_streams=8)) as (client, server):
        server.handlers.add(Hold, handler)
        for _ in range(20):
            protocol = Recorder(keep_open=False)
            async with await client.open(Hold()) as stream:
                await stream.send(b"to the view")
            await protocol.lost.wait()
            assert protocol.data in (b"to the view", b"")
        await until(lambda: server._mux.admission.retired == 20)


# Readers and writers


async def test_reader_and_writer():
    async with memory_stream_pair() as (a, b):
        reader, writer = a.as_asyncio()
        other_reader, other_writer = b.as_asyncio()
        writer.write(b"line\n")
        await writer.drain()
        assert await other_reader.readline() == b"line\n"
        other_writer.write(b"12345")
        other_writer.write_eof()
        assert await reader.readexactly(5) == b"12345"
        assert await reader.read() == b""
        assert reader.at_eof()
        writer.close()
        other_writer.close()
        await writer.wait_closed()
        await other_writer.wait_closed()


async def test_drain_waits_and_wakes():
    async with memory_stream_pair() as (a, b):
        reader, writer = a.as_asyncio()

        async def write():
            for _ in range(100):
                writer.write(bytes(50_000))
                await writer.drain()
            writer.write_eof()

        task = asyncio.create_task(write())
        await anyio.sleep(0.05)
        assert not task.done()
        assert len(await until_end(b)) == 5_000_000
        await task
        await b.aclose()
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()


async def test_drain_raises_when_the_stream_is_reset():
    async with memory_stream_pair() as (a, b):
        reader, writer = a.as_asyncio()
        writer.write(bytes(1_000_000))
        task = asyncio.create_task(writer.drain())
        await anyio.sleep(0.05)
        assert not task.done()
        b.reset()
        with pytest.raises(ConnectionError):
            await task
        with pytest.raises(kk.CancelledStreamError):
            await reader.read()
        writer.close()
        with pytest.raises(kk.CancelledStreamError):
            await writer.wait_closed()


@pytest.mark.skipif(not hasattr(asyncio.StreamWriter, "__del__"), reason="asyncio's, since Python 3.11.3")
async def test_a_dropped_writer_closes():
    async with memory_stream_pair() as (a, b):
        reader, writer = a.as_asyncio()
        with pytest.warns(ResourceWarning, match="unclosed"):
            del writer
        assert await until_end(b) == b""
        assert await reader.read() == b""


# TLS inside


async def test_tls_of_anyio_inside_a_stream(authority):
    @asynccontextmanager
    async def wrapped():
        async with memory_stream_pair() as (a, b):
            yield await asyncio.gather(
                TLSStream.wrap(a, hostname="cp", ssl_context=authority.client, standard_compatible=False),
                TLSStream.wrap(b, server_side=True, ssl_context=authority.server, standard_compatible=False),
            )

    # As anyio's TLS behaves over a socket too, a second reader or writer passes, and closing wakes nobody.
    async with wrapped() as (a, b):
        data = random.Random(5).randbytes(1_000_000)

        async def send():
            await a.send(data)
            await a.aclose()

        task = asyncio.create_task(send())
        await b.send(b"the other way")
        assert await until_end(b) == data
        await task
        await b.aclose()


async def test_start_tls_inside_a_stream(authority):
    loop = asyncio.get_running_loop()
    async with memory_stream_pair() as (a, b):
        ours, theirs = Recorder(), Recorder()
        transports = StreamTransport(a, ours), StreamTransport(b, theirs)
        if isinstance(loop, asyncio.BaseEventLoop):
            tls_a, tls_b = await asyncio.gather(
                loop.start_tls(transports[0], ours, authority.client, server_hostname="cp"),
                loop.start_tls(transports[1], theirs, authority.server, server_side=True),
            )
        else:
            # uvloop refuses transports that are not its own.
            with pytest.raises(TypeError):
                await loop.start_tls(transports[0], ours, authority.client, server_hostname="cp")
            tls_a, tls_b = await start_tls(transports, (ours, theirs), authority)
        data = random.Random(6).randbytes(1_000_000)
        tls_a.write(data)
        await until(lambda: len(theirs.data) == len(data))
        assert hashlib.sha256(theirs.data).digest() == hashlib.sha256(data).digest()
        tls_b.write(b"answer")
        await until(lambda: ours.data == b"answer")
        tls_a.close()
        await ours.lost.wait()
        await theirs.lost.wait()
        assert (ours.error, theirs.error) == (None, None)
        await until(lambda: not a.session.stream_count)


async def start_tls(transports, protocols, authority):
    """What ``loop.start_tls`` does, for any loop."""
    loop = asyncio.get_running_loop()
    waiters = [loop.create_future(), loop.create_future()]
    layers = [
        asyncio.sslproto.SSLProtocol(loop, protocol, context, waiter, side, name, call_connection_made=False)
        for protocol, context, waiter, side, name in zip(
            protocols, (authority.client, authority.server), waiters, (False, True), ("cp", None), strict=True
        )
    ]
    for transport, layer in zip(transports, layers, strict=True):
        transport.set_protocol(layer)
        layer.connection_made(transport)
    await asyncio.gather(*waiters)
    return [layer._app_transport for layer in layers]


async def test_a_failed_handshake_inside_a_stream_ends_the_stream_only(authority):
    async with memory_stream_pair() as (a, b):
        loop = asyncio.get_running_loop()
        transport = StreamTransport(a, Recorder())
        waiter = loop.create_future()
        layer = asyncio.sslproto.SSLProtocol(loop, Recorder(), authority.client, waiter, False, "cp")
        transport.set_protocol(layer)
        layer.connection_made(transport)
        await b.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with pytest.raises(OSError, match=r"(?i)ssl"):
            await waiter
        with pytest.raises(kk.PeerError):
            await until_end(b)
        assert await b.session.ping() > 0


async def test_a_session_inside_a_stream():
    async with memory_stream_pair() as (a, b):
        client, server = kk.Session("client"), kk.Session("server")
        StreamTransport(a, client.protocol())
        StreamTransport(b, server.protocol())
        await client.wait_established()
        await server.wait_established()

        @asynccontextmanager
        async def inner():
            server.handlers.remove(Hold)
            exchange = Exchange(client, server)
            yield await exchange.pair()
            exchange.release()

        await check_two_way_stream(inner)
        await client.aclose()
        await server.wait_closed()
        assert server.error.code == kk.Code.NO_ERROR
        await until(lambda: not a.session.stream_count)
