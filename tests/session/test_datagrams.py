"""Datagrams of streams: sending never waits, receiving does; what is lost is counted."""

import asyncio
import gc

import anyio
import pytest

from konnektor import Code, Handlers, Limits, StreamType, Udp
from konnektor.errors import LocalProtocolError, SessionLost, StreamClosedError, StreamError, UnsupportedError
from konnektor.settings import Settings
from tests.session.pairs import Exchange, Hold, at_rest, memory_session_pair, socket_session_pair, until


class Lossy(StreamType):
    name = "lossy@test"
    datagrams = True


class Held(Lossy):
    """Its accepting end is the test's."""

    name = "held@test"


class LossyExchange(Exchange):
    """As ``Exchange``, of streams that carry datagrams."""

    def __init__(self, opener, accepter):
        super().__init__(opener, accepter)
        accepter.handlers.add(Held, accepter.handlers.get(Hold.name)[1])

    async def pair(self, **kwargs):
        opened = await self.opener.open(Held(), **kwargs)
        return opened, await self._accepted.get()


async def echo(stream, _request):
    await stream.accept()
    while True:
        try:
            stream.send_datagram(await stream.receive_datagram())
        except anyio.EndOfStream:
            return


async def test_there_and_back():
    handlers = Handlers()
    handlers.add(Lossy, echo)
    async with memory_session_pair(server_handlers=handlers) as (client, server):
        async with await client.open(Lossy()) as stream:
            for data in (b"a", b"", b"x" * stream.max_datagram):
                stream.send_datagram(data)
                assert await stream.receive_datagram() == data
            assert stream.max_datagram == 65_534 and stream.datagrams_dropped == 0
        stats = client.stats()
        assert (stats.datagrams_sent, stats.datagrams_received, stats.datagrams_dropped) == (3, 3, 0)
        assert server.stats().datagrams_received == 3
        await until(lambda: at_rest(client) and at_rest(server))


async def test_open_udp_and_its_handler():
    async with memory_session_pair() as (client, server):
        server.handlers.add(Udp, echo)
        async with await client.open_udp("db", 53) as stream:
            assert stream.request == Udp("db", 53)
            stream.send_datagram(b"q")
            assert await stream.receive_datagram() == b"q"


async def test_bytes_go_beside_them():
    async with memory_session_pair() as (client, server):
        exchange = LossyExchange(client, server)
        ours, theirs = await exchange.pair()
        ours.send_datagram(b"datagram")
        await ours.send(b"bytes")
        assert await theirs.receive() == b"bytes"
        assert await theirs.receive_datagram() == b"datagram"
        exchange.release()
        await ours.aclose()


async def test_early_ones_wait_for_the_answer():
    async with memory_session_pair() as (client, server):
        server.handlers.add(Lossy, echo)
        async with await client.open(Lossy(), early=True) as stream:
            stream.send_datagram(b"early")
            assert await stream.receive_datagram() == b"early"


async def test_too_large_names_the_maximum():
    async with memory_session_pair(server_limits=Limits(max_frame=20_000)) as (client, server):
        exchange = LossyExchange(client, server)
        ours, theirs = await exchange.pair()
        assert (ours.max_datagram, theirs.max_datagram) == (19_999, 65_534)
        with pytest.raises(LocalProtocolError, match="at most 19999 bytes, not 20000"):
            ours.send_datagram(b"x" * 20_000)
        with pytest.raises(LocalProtocolError, match="at most 65534 bytes, not 65535"):
            theirs.send_datagram(b"x" * 65_535)
        exchange.release()
        await ours.aclose()


async def test_unread_ones_push_out_the_oldest():
    async with memory_session_pair() as (client, server):
        exchange = LossyExchange(client, server)
        ours, theirs = await exchange.pair()
        for number in range(100):
            ours.send_datagram(bytes([number]) * 1024)
            if number % 50 == 49:
                await until(lambda: server.stats().datagrams_received == number + 1)  # noqa: B023 - awaited here
        assert ours.datagrams_dropped == 0 and theirs.datagrams_dropped == 36
        assert server.stats().datagrams_dropped == 36
        assert [(await theirs.receive_datagram())[0] for _ in range(64)] == list(range(36, 100))
        exchange.release()
        await ours.aclose()


async def test_sending_pushes_out_the_oldest():
    async with memory_session_pair() as (client, server):
        exchange = LossyExchange(client, server)
        ours, theirs = await exchange.pair()
        for number in range(100):  # in one turn of the loop: nothing is written meanwhile
            ours.send_datagram(bytes([number]) * 1024)
        assert ours.datagrams_dropped == client.stats().datagrams_dropped == 36
        assert (await theirs.receive_datagram())[0] == 36
        exchange.release()
        await ours.aclose()


async def test_a_peer_without_datagrams():
    limits = Limits()
    async with socket_session_pair(settings=Settings.of(limits, features=0)) as (client, server):
        server.handlers.add(Lossy, echo)
        with pytest.raises(UnsupportedError, match="no datagrams"):
            await client.open(Lossy())
        with pytest.raises(UnsupportedError, match="no datagrams"):
            await client.open_udp("db", 53)


async def test_a_stream_of_them_from_a_peer_without():
    """A peer that does not know the rule is refused, and the session lives."""
    async with memory_session_pair() as (client, server):
        server.handlers.add(Lossy, echo)
        server._mux.datagrams.agreed = False
        with pytest.raises(UnsupportedError, match="this session has no datagrams"):
            await client.open(Lossy())
        assert not client.closed and not server.closed


async def test_streams_of_a_type_without():
    async with memory_session_pair() as (client, server):
        exchange = Exchange(client, server)
        ours, _theirs = await exchange.pair()
        with pytest.raises(LocalProtocolError, match="'hold@test' have no datagrams"):
            ours.send_datagram(b"x")
        with pytest.raises(LocalProtocolError, match="'hold@test' have no datagrams"):
            await ours.receive_datagram()
        assert ours.datagrams_dropped == 0
        exchange.release()
        await ours.aclose()


async def test_before_accept():
    seen = []

    async def handler(stream, _request):
        with pytest.raises(LocalProtocolError, match="accept the stream before receiving"):
            await stream.receive_datagram()
        with pytest.raises(LocalProtocolError, match="accept the stream before sending"):
            stream.send_datagram(b"x")
        seen.append(1)
        await stream.reject(Code.DENIED)

    async with memory_session_pair() as (client, server):
        server.handlers.add(Lossy, handler)
        with pytest.raises(StreamError):
            await client.open(Lossy())
        assert seen


async def test_the_end():
    async with memory_session_pair() as (client, server):
        exchange = LossyExchange(client, server)
        ours, theirs = await exchange.pair()
        ours.send_datagram(b"last")
        await ours.send_eof()
        with pytest.raises(StreamClosedError):
            ours.send_datagram(b"x")
        assert await theirs.receive_datagram() == b"last"
        with pytest.raises(anyio.EndOfStream):
            await theirs.receive_datagram()
        await ours.aclose()
        with pytest.raises(StreamClosedError):
            await ours.receive_datagram()
        exchange.release()


async def test_eof_wakes_a_receiver():
    async with memory_session_pair() as (client, server):
        exchange = LossyExchange(client, server)
        ours, theirs = await exchange.pair()
        async with anyio.create_task_group() as tasks:

            async def receive():
                with pytest.raises(anyio.EndOfStream):
                    await theirs.receive_datagram()

            tasks.start_soon(receive)
            await until(lambda: theirs._inbox.datagram_reader is not None)
            await ours.aclose()
        exchange.release()


async def test_one_receiver_at_a_time_and_cancelling_loses_nothing():
    async with memory_session_pair() as (client, server):
        exchange = LossyExchange(client, server)
        ours, theirs = await exchange.pair()
        first = asyncio.create_task(theirs.receive_datagram())
        await until(lambda: theirs._inbox.datagram_reader is not None)
        with pytest.raises(anyio.BusyResourceError):
            await theirs.receive_datagram()
        with pytest.raises(anyio.BusyResourceError):
            theirs.detach()
        first.cancel()
        ours.send_datagram(b"kept")
        with pytest.raises(asyncio.CancelledError):
            await first
        assert await theirs.receive_datagram() == b"kept"
        exchange.release()
        await ours.aclose()


async def test_reset_drops_the_unread():
    async with memory_session_pair() as (client, server):
        exchange = LossyExchange(client, server)
        ours, theirs = await exchange.pair()
        ours.send_datagram(b"unread")
        await until(lambda: server.stats().datagrams_received == 1)
        ours.reset()
        await until(lambda: theirs._inbox.receive_error is not None)
        with pytest.raises(StreamError):
            await theirs.receive_datagram()
        with pytest.raises(StreamError):
            theirs.send_datagram(b"x")
        assert theirs.datagrams_dropped == 1
        exchange.release()


async def test_a_lost_session_leaves_what_came():
    async with memory_session_pair() as (client, server):
        exchange = LossyExchange(server, client)
        ours, theirs = await exchange.pair()
        theirs.send_datagram(b"came")
        await until(lambda: server.stats().datagrams_received == 1)
        client.abort()
        await server.wait_closed()
        assert await ours.receive_datagram() == b"came"
        with pytest.raises(SessionLost):
            await ours.receive_datagram()
        exchange.release()
        ours.close()


async def test_a_dropped_stream_holds_nothing():
    async with memory_session_pair() as (client, server):
        exchange = LossyExchange(client, server)
        ours, theirs = await exchange.pair()
        theirs.send_datagram(b"unread")
        await until(lambda: client.stats().datagrams_received == 1)
        pool = client._mux.datagrams.incoming
        assert pool.held
        with pytest.warns(ResourceWarning, match="without aclose"):
            del ours
            gc.collect()
        await until(lambda: not pool.held)
        exchange.release()
