"""Stream, and all that is made of it: one conformance suite for everything that claims to be a two-way stream."""

import asyncio
import gc
import socket
import sys
import threading
import warnings
from contextlib import asynccontextmanager

import anyio
import anyio.abc
import pytest
from anyio.streams.stapled import StapledByteStream

import konnektor as kk
from konnektor.errors import LocalProtocolError, StreamClosedError
from konnektor.relay import relay
from konnektor.splice import splice
from konnektor.stream import StreamAttribute
from tests.session.check_stream import check_two_way_stream, exactly, fill, until_end
from tests.session.pairs import (
    AsyncioStream,
    Exchange,
    Hold,
    memory_stream_pair,
    socket_session_pair,
    stream_pair_over,
    tcp_socketpair,
)

# Conformance


async def test_stream_in_memory():
    await check_two_way_stream(memory_stream_pair)


async def test_stream_over_tls(authority):
    await check_two_way_stream(lambda: stream_pair_over(socket_session_pair(authority.client, authority.server)))


async def test_asyncio_views():
    @asynccontextmanager
    async def views():
        async with memory_stream_pair() as (a, b):
            yield AsyncioStream(*a.as_asyncio()), AsyncioStream(*b.as_asyncio())

    await check_two_way_stream(views, busy=False)


async def test_relay():
    @asynccontextmanager
    async def relayed():
        async with memory_stream_pair() as (a, b), memory_stream_pair() as (c, d):

            async def middle():
                try:
                    async with b, c:
                        await relay(b, c)
                except anyio.BrokenResourceError:
                    pass

            async with anyio.create_task_group() as group:
                group.start_soon(middle)
                yield a, d

    await check_two_way_stream(relayed)


@asynccontextmanager
async def spliced(sockets):
    """Client socket, splice, stream, splice, server socket."""
    async with memory_stream_pair() as (a, b):
        outer_a, inner_a = sockets()
        outer_b, inner_b = sockets()
        await splice(a, inner_a)
        await splice(b, inner_b)
        yield await socket_stream(outer_a), await socket_stream(outer_b)


class GuardedStream(AsyncioStream):
    """One that turns a second reader or writer away."""

    def __init__(self, reader, writer):
        super().__init__(reader, writer)
        self._receiving = anyio.ResourceGuard("receiving from")
        self._sending = anyio.ResourceGuard("sending to")

    async def receive(self, max_bytes=65_536):
        with self._receiving:
            return await super().receive(max_bytes)

    async def send(self, item):
        with self._sending:
            await super().send(item)

    async def send_eof(self):
        with self._sending:
            await super().send_eof()


async def socket_stream(sock):
    if sock.family == socket.AF_UNIX:
        # Not anyio's own: it has the loop call a bare ``future.set_result``, which busy loops do twice.
        return GuardedStream(*await asyncio.open_unix_connection(sock=sock, limit=1))
    stream = await anyio.abc.SocketStream.from_socket(sock)
    stream._transport.pause_reading()  # as anyio's own connect_tcp does; without, it reads ahead of everybody
    return stream


def unix_socketpair():
    a, b = socket.socketpair()
    a.setblocking(False)
    b.setblocking(False)
    return a, b


@pytest.mark.parametrize("sockets", [tcp_socketpair, unix_socketpair])
async def test_splice(sockets):
    await check_two_way_stream(lambda: spliced(sockets))


# What only a Stream does


async def test_max_bytes_must_be_positive():
    async with memory_stream_pair() as (a, _b):
        for size in (0, -1):
            with pytest.raises(ValueError, match="at least 1"):
                await a.receive(size)


async def test_byte_by_byte():
    async with memory_stream_pair() as (a, b):
        data = bytes(range(256)) * 8
        await a.send(data)
        assert b"".join([await b.receive(1) for _ in data]) == data


async def test_small_pieces_are_joined():
    async with memory_stream_pair() as (a, b):
        for number in range(200):
            await a.send(b"%03d" % number)
            await anyio.sleep(0)
        await exactly(b, 1)
        await anyio.sleep(0.05)
        assert len(b._inbox.chunks) < 10
        assert await exactly(b, 599) == b"".join(b"%03d" % number for number in range(200))[1:]


async def test_what_a_stream_says_of_itself():
    async with memory_stream_pair() as (a, b):
        assert a.id == b.id == 1
        assert a.extra(StreamAttribute.stream_id) == 1
        assert b.extra(StreamAttribute.session) is b.session
        assert b.extra(StreamAttribute.request) == Hold()
        assert b.extra(StreamAttribute.peer) == ""
        assert repr(a).startswith("<Stream 1 hold@test of <Session ")
        assert a.decided
        assert not a.detached
        assert b.deadline > 0


async def test_eof_leaves_what_was_read_before_it():
    async with memory_stream_pair() as (a, b):
        await a.send(b"x" * 5000)
        await a.aclose()
        await anyio.sleep(0.05)
        assert await b.receive(10) == b"x" * 10
        assert len(await until_end(b)) == 4990


async def test_reset_drops_what_was_not_read():
    async with memory_stream_pair() as (a, b):
        await a.send(b"half of it")
        await anyio.sleep(0.05)
        a.reset(kk.Code.DENIED, "no more")
        a.reset()
        await anyio.sleep(0.05)
        for _ in range(2):
            with pytest.raises(kk.DeniedError, match="no more"):
                await b.receive()
        with pytest.raises(kk.DeniedError):
            await b.send(b"x")
        await b.send_eof()


async def test_leaving_by_an_exception_resets():
    async with memory_stream_pair() as (a, b):
        with pytest.raises(KeyError):
            async with a:
                await a.send(b"a part")
                raise KeyError
        with pytest.raises(kk.CancelledStreamError):
            await until_end(b)


async def test_closing_under_cancellation_resets():
    async with memory_stream_pair() as (a, b):
        task = asyncio.create_task(a.aclose())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(kk.CancelledStreamError):
            await b.receive()


async def test_close_twice_at_once():
    async with memory_stream_pair() as (a, b):
        await asyncio.gather(a.aclose(), a.aclose())
        a.close()
        assert await until_end(b) == b""


async def test_close_wakes_a_sender():
    async with memory_stream_pair() as (a, _b):
        task = asyncio.create_task(a.send(bytes(1_000_000)))
        await asyncio.sleep(0.05)
        a.close()
        with pytest.raises(StreamClosedError):
            await task


async def test_no_eof_while_sending():
    async with memory_stream_pair() as (a, _b):
        task = asyncio.create_task(a.send(bytes(1_000_000)))
        await asyncio.sleep(0.05)
        with pytest.raises(anyio.BusyResourceError):
            await a.send_eof()
        task.cancel()
        await asyncio.wait([task])
        a.reset()
        with pytest.raises(StreamClosedError):
            await a.send_eof()


async def test_what_arrived_is_readable_after_the_session_ended():
    async with memory_stream_pair() as (a, b):
        await a.send(b"arrived")
        await anyio.sleep(0.05)
        a.session.abort()
        await b.session.wait_closed()
        # The handler that held the stream is cancelled, and with it the stream closed; the opener's stays.
    async with memory_stream_pair() as (a, b):
        await b.send(b"arr")
        await b.send(b"ived")
        await anyio.sleep(0.05)
        b.session.abort()
        await a.session.wait_closed()
        assert await exactly(a, 7) == b"arrived"
        for _ in range(2):
            with pytest.raises(kk.SessionLost) as lost:
                await a.receive()
        assert lost.value.received == 7
        with pytest.raises(kk.SessionLost):
            await a.send(b"x")
        await a.aclose()
        with pytest.raises(StreamClosedError):
            await a.receive()


async def test_an_end_that_arrived_stays_an_end_after_the_session_ended():
    async with memory_stream_pair() as (a, b):
        await b.send(b"all of it")
        await b.send_eof()
        await anyio.sleep(0.05)
        b.session.abort()
        await a.session.wait_closed()
        assert await until_end(a) == b"all of it"


async def test_a_dropped_stream_is_reset_with_a_warning():
    async with memory_stream_pair() as (a, b):
        exchange = Exchange(a.session, b.session)
        dropped = await a.session.open(Hold())
        held = await asyncio.wait_for(_newest(b.session), 5)
        with pytest.warns(ResourceWarning, match="dropped without aclose"):
            del dropped
            gc.collect()
        await anyio.sleep(0.05)
        assert held.receiving.name == "ENDED"
        assert exchange.opener.stream_count == 1


async def _newest(session):
    while session.stream_count < 2:
        await asyncio.sleep(0.01)
    return list(session._mux.streams.values())[-1]


async def test_a_stream_dropped_in_another_thread():
    # As the collector may: it runs in whichever thread allocates.
    async with memory_stream_pair() as (a, _b):
        cycle = [await a.session.open(Hold())]
        cycle.append(cycle)
        gc.collect()
        del cycle
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            thread = threading.Thread(target=gc.collect)
            thread.start()
            thread.join()
        assert any("dropped" in str(warning.message) for warning in caught)
        while a.session.stream_count > 1:
            await anyio.sleep(0.01)


async def test_a_dropped_stream_that_had_ended_gives_its_place_back():
    async with memory_stream_pair() as (a, b):
        stream = await a.session.open(Hold())
        await _newest(b.session)
        list(b.session._mux.streams.values())[-1].write(b"unread")
        await anyio.sleep(0.05)
        mux_stream = stream._mux
        mux_stream.finish()
        list(b.session._mux.streams.values())[-1].finish()
        while not stream._inbox.forgotten:
            await anyio.sleep(0.01)
        assert not mux_stream.retired
        del stream
        gc.collect()
        while not mux_stream.retired:
            await anyio.sleep(0.01)


def test_a_stream_dropped_after_its_loop_was_closed():
    async def main():
        async with memory_stream_pair() as (a, b):
            stream = await a.session.open(Hold())
            await _newest(b.session)
            return stream

    stream = asyncio.run(main())
    stream._inbox.forgotten = False  # as if the loop had been closed under the session
    with pytest.warns(ResourceWarning, match="dropped"):
        del stream
        gc.collect()


def test_a_stream_that_was_never_made_is_dropped_quietly(monkeypatch):
    said = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: said.append(repr(unraisable)))
    stream = kk.Stream.__new__(kk.Stream)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del stream
        gc.collect()
    assert not said and not caught


async def test_a_relay_raises_the_error_itself():
    async with memory_stream_pair() as (a, b), memory_stream_pair() as (c, d):
        task = asyncio.create_task(relay(b, c))
        await d.send(b"x")
        assert await exactly(a, 1) == b"x"
        d.reset(kk.Code.TARGET_RESET)
        with pytest.raises(kk.TargetResetError):
            await task


async def test_a_relay_of_a_side_without_half_close_ends_both():
    class NoHalfClose(StapledByteStream):
        async def send_eof(self):
            raise NotImplementedError

    async with memory_stream_pair() as (a, b), memory_stream_pair() as (c, d):
        task = asyncio.create_task(relay(b, NoHalfClose(c, c)))
        await a.send(b"last")
        await a.send_eof()
        await task
        await c.aclose()
        assert await until_end(d) == b"last"


async def test_a_cancelled_relay_leaves_both_streams():
    async with memory_stream_pair() as (a, b), memory_stream_pair() as (c, d):
        task = asyncio.create_task(relay(b, c))
        await a.send(b"x")
        assert await exactly(d, 1) == b"x"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await b.send(b"b")
        await c.send(b"c")
        assert await exactly(a, 1) + await exactly(d, 1) == b"bc"


async def test_a_stream_cannot_be_taken_over_twice_or_in_use():
    async with memory_stream_pair() as (a, b):
        task = asyncio.create_task(a.receive())
        await asyncio.sleep(0)
        with pytest.raises(anyio.BusyResourceError):
            a.detach()
        await b.send(b"x")
        await task
        mux_stream = a.detach()
        assert a.detached
        with pytest.raises(StreamClosedError):
            a.detach()
        with pytest.raises(StreamClosedError):
            a.as_asyncio()
        mux_stream.cancel()


async def test_filling_a_stream_holds_what_its_windows_say():
    async with memory_stream_pair() as (a, b):
        sent = await fill(a)
        assert sent <= b.session.limits.initial_window + a.session.limits.send_queue
        assert a._mux.queued <= a.session.limits.send_queue


class _Batches:
    """A multiplexer whose batches are measured."""

    def __init__(self, mux):
        self._mux = mux
        self.sizes = []

    def __getattr__(self, name):
        return getattr(self._mux, name)

    def chunks_to_send(self, now):
        chunks = self._mux.chunks_to_send(now)
        self.sizes.append(sum(map(len, chunks)))
        return chunks


@pytest.mark.replaces_methods
async def test_a_large_send_fills_batches_through_a_small_queue():
    limits = kk.Limits(initial_window=2**20, initial_streams=8)
    async with memory_stream_pair(client_limits=limits, server_limits=limits) as (a, b):
        driver = a.session._driver
        batches = driver.mux = _Batches(driver.mux)
        data = bytes(range(256)) * 2048
        async with anyio.create_task_group() as group:
            group.start_soon(a.send, data)
            assert await exactly(b, len(data)) == data
        assert max(batches.sizes) > 2 * a.session.limits.send_queue
        driver.mux = batches._mux


async def test_what_a_send_had_not_queued_when_the_stream_was_closed_is_not_sent():
    async with memory_stream_pair() as (a, b):
        limits = a.session.limits
        sending = asyncio.create_task(a.send(bytes(2**20)))
        while a._mux.queued < limits.send_queue or a._mux.send_window.sent < limits.initial_window:
            await asyncio.sleep(0)
        await a.aclose()
        with pytest.raises(StreamClosedError):
            await sending
        assert len(await until_end(b)) == limits.initial_window + limits.send_queue


async def test_calls_before_the_answer():
    async with memory_stream_pair() as (a, b):
        results = []

        class Shy(kk.StreamType):
            name = "shy@test"

        async def shy(stream, _request):
            assert not stream.decided
            for call in (stream.receive, lambda: stream.send(b"x"), stream.send_eof):
                with pytest.raises(LocalProtocolError):
                    await call()
            with pytest.raises(LocalProtocolError):
                stream.as_asyncio()
            await stream.accept(b"header")
            with pytest.raises(LocalProtocolError):
                await stream.accept()
            with pytest.raises(LocalProtocolError):
                await stream.reject()
            results.append(await stream.receive())
            stream.reset()
            with pytest.raises(StreamClosedError):
                stream.accept_now()

        b.session.handlers.add(Shy, shy)
        async with await a.session.open(Shy()) as stream:
            assert stream.header == b"header"
            with pytest.raises(LocalProtocolError):
                await stream.reject()
            await stream.send(b"data")
            with pytest.raises(kk.CancelledStreamError):
                await stream.receive()
        assert results == [b"data"]
