"""How sessions end: asked, drained, by either side, and by a defect, which ends one session only."""

import asyncio

import anyio
import pytest

import konnektor as kk
from konnektor import errors
from konnektor.handlers import Handlers
from konnektor.limits import MIB
from konnektor.session import Session
from tests.session.check_stream import exactly
from tests.session.pairs import (
    Echo,
    Exchange,
    Hold,
    echo,
    memory_session_pair,
    socket_session_pair,
    tcp_socketpair,
    until,
)

# Asking and ending


async def test_pings_that_wait_together_and_pings_that_are_given_up():
    async with memory_session_pair() as (client, server):
        assert all(rtt > 0 for rtt in await asyncio.gather(*(client.ping() for _ in range(10))))
        with anyio.move_on_after(0):
            await client.ping()
        assert await client.ping() > 0
        server._driver.transport.pause_reading()
        waiting = asyncio.create_task(client.ping())
        given_up = asyncio.create_task(client.ping())
        await anyio.sleep(0)
        given_up.cancel()
        await anyio.sleep(0)
        client.abort()
        server._driver.transport.resume_reading()
        with pytest.raises(kk.SessionLost):
            await waiting
        with pytest.raises(kk.SessionClosedError):
            await client.ping()
        with pytest.raises(kk.SessionClosedError):
            await client.open(Echo())


@pytest.mark.parametrize("code", [code for code in kk.Code if code < 32] + [31])
async def test_each_close_has_its_class(code):
    async with memory_session_pair() as (client, server):
        exchange = Exchange(client, server)
        stream, _held = await exchange.pair()
        server.close(code, "so be it")
        await client.wait_closed()
        assert type(client.error) is type(errors.session_error(code))
        assert str(client.error) == "so be it"
        with pytest.raises(kk.SessionLost, match="so be it"):
            await stream.receive()
        assert client.closed
        assert "closed" in repr(client)


async def test_on_ended_is_called_once_however_it_ends():
    for end in ("aclose", "abort", "peer aclose", "peer abort"):
        calls = []
        async with memory_session_pair() as (client, server):
            client.on_ended = calls.append
            ender = server if "peer" in end else client
            if "aclose" in end:
                await ender.aclose()
            else:
                ender.abort()
            await client.wait_closed()
            await client.aclose()
            await client.aclose()
        assert calls == [client], end


async def test_leaving_the_session_closes_it():
    a, b = tcp_socketpair()
    server = asyncio.create_task(Session.server(b))
    async with await Session.client(a) as client:
        pass
    assert client.closed
    await (await server).wait_closed()
    assert (await server).error.code == kk.Code.NO_ERROR


async def test_drain_waits_for_streams():
    told = []
    async with memory_session_pair() as (client, server):
        client.on_goaway = told.append
        exchange = Exchange(client, server)
        stream, held = await exchange.pair()
        drained = asyncio.create_task(server.drain(30))
        await until(lambda: client.draining)
        assert "draining" in repr(client)
        with pytest.raises(kk.SessionClosedError, match="draining"):
            await client.open(Echo())
        await stream.send(b"still works")
        assert await exactly(held, 11) == b"still works"
        assert not drained.done()
        await stream.aclose()
        exchange.release()
        await drained
        await client.wait_closed()
        assert isinstance(client.error, kk.ShutdownError)
    assert told == [client]


async def test_drain_resets_what_is_left_after_the_grace():
    async with memory_session_pair() as (client, server):
        exchange = Exchange(client, server)
        stream, _held = await exchange.pair()
        await server.drain(0.05)
        with pytest.raises(kk.PeerError):
            await stream.receive()
        await stream.aclose()


async def test_a_drain_that_is_cancelled_goes_on():
    async with memory_session_pair() as (client, server):
        exchange = Exchange(client, server)
        stream, _held = await exchange.pair()
        with anyio.move_on_after(0.02) as scope:
            await server.drain(30)
        assert scope.cancelled_caught
        exchange.release()
        await stream.aclose()
        await server.wait_closed()


async def test_a_handler_may_end_its_own_session():
    ended = []

    async def handler(stream, request):
        await stream.accept()
        try:
            match request.text:
                case "aclose":
                    await stream.session.aclose()
                case "wait":
                    stream.session.close(kk.Code.SHUTDOWN, "from a handler")
                    await stream.session.wait_closed()
                case "shielded":
                    stream.session.close(kk.Code.SHUTDOWN, "from a handler")
                    try:
                        await stream.session.wait_closed()
                    except asyncio.CancelledError:
                        await stream.session.wait_closed()
        finally:
            ended.append(request.text)

    for how in ("aclose", "wait", "shielded"):
        async with memory_session_pair() as (client, server):
            server.handlers.add(Echo, handler)
            stream = await client.open(Echo(how), early=True)
            await client.wait_closed()
            await server.wait_closed()
            assert client.error.code in (kk.Code.NO_ERROR, kk.Code.SHUTDOWN)
            assert "word" not in str(client.error), "CLOSE was lost"
            await stream.aclose()
    assert ended == ["aclose", "wait", "shielded"]


async def test_a_task_spawned_after_the_end_is_cancelled():
    async with memory_session_pair() as (client, _server):
        client.close()
        task = client.spawn(anyio.sleep_forever())
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_peer_that_never_reads_does_not_hold_up_the_end(short_close):
    async with memory_session_pair() as (client, server):
        exchange = Exchange(client, server)
        stream, _held = await exchange.pair()
        server._driver.transport.pause_reading()
        with anyio.move_on_after(0.2):
            while True:
                await stream.send(bytes(100_000))
        await client.aclose()
        assert client._driver.transport is None
        server._driver.transport.resume_reading()
        await stream.aclose()


# Defects


class Defective:
    """A sink that raises where it is told to."""

    def __init__(self, where):
        self._where = where

    def __getattr__(self, name):
        def event(*_args, **_kwargs):
            if name == self._where:
                raise RuntimeError(f"defect in {name}")

        return event


@pytest.mark.parametrize("where", ["accepted", "data_received", "eof_received", "writable", "failed", "closed"])
async def test_a_defect_in_a_sink_ends_one_session_only(where, caplog):
    async def handler(stream, _request):
        await stream.accept()
        await stream.send(b"data")
        if where == "failed":
            stream.reset()
        else:
            await stream.aclose()

    handlers = Handlers()
    handlers.add(Echo, handler)
    handlers.add(Hold, echo)
    async with (
        memory_session_pair(server_handlers=handlers) as (client, server),
        memory_session_pair(server_handlers=handlers) as (bystander, _),
    ):
        other = await client.open(Hold())
        own = await bystander.open(Hold())
        mux_stream = client.open_sink(Echo(), Defective(where))
        mux_stream.write(bytes(10_000))
        mux_stream.want_room(0)
        await anyio.sleep(0.02)
        mux_stream.finish()
        if where == "closed":
            await anyio.sleep(0.02)
        await client.wait_closed()
        assert client.error.code == kk.Code.INTERNAL
        await server.wait_closed()
        assert server.error.code == kk.Code.INTERNAL
        with pytest.raises(kk.SessionLost):
            await other.receive()
        await own.send(b"alive")
        assert await exactly(own, 5) == b"alive"
        await own.aclose()
    assert f"defect in {where}" in caplog.text


@pytest.mark.parametrize("where", ["failed", "closed"])
@pytest.mark.parametrize("how", ["close", "peer", "lost"])
async def test_a_defect_while_the_session_ends_keeps_nobody_from_its_end(where, how, caplog):
    handlers = Handlers()
    handlers.add(Echo, echo)
    async with memory_session_pair(server_handlers=handlers) as (client, server):
        first = await client.open(Echo())
        client.open_sink(Echo(), Defective(where))
        last = await client.open(Echo())
        waiting = [asyncio.create_task(stream.receive()) for stream in (first, last)]
        ping = None
        await anyio.sleep(0)
        if how == "close":
            with pytest.raises(RuntimeError, match="defect"):
                client.close()
        else:
            ping = asyncio.create_task(client.ping())
            await anyio.sleep(0)
            server.close() if how == "peer" else server.abort()
        for task in waiting:
            with pytest.raises(kk.SessionLost):
                await task
        if ping is not None:
            await asyncio.wait([ping])
            ping.exception()
        await client.wait_closed()
        await first.aclose()
        await last.aclose()
    if how != "close":
        assert "defect in" in caplog.text


@pytest.mark.replaces_methods
async def test_a_defect_in_a_timer_ends_the_session(monkeypatch, caplog):
    async with memory_session_pair() as (client, _server):

        def fail(now):
            raise RuntimeError("defect in a timer")

        monkeypatch.setattr(client._mux, "handle_timeout", fail)
        client._alarm.set(asyncio.get_running_loop().time())
        await client.wait_closed()
        assert client.error.code == kk.Code.INTERNAL
    assert "defect in a timer" in caplog.text


@pytest.mark.replaces_methods
async def test_a_defect_in_closing_drops_the_connection(monkeypatch, caplog):
    async with memory_session_pair() as (client, server):

        def fail(*_args):
            raise RuntimeError("defect")

        with monkeypatch.context() as patch:
            patch.setattr(client._mux, "receive", fail)
            patch.setattr(client._mux, "close", fail)
            server.start_drain(10)
            await client.wait_closed()
        await server.wait_closed()
        assert client.closed
    assert "internal error while closing" in caplog.text


# Peers that take nothing


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("talking", [False, True])
async def test_a_peer_that_stops_reading_is_given_up(encrypted, talking, authority):
    """Also one that goes on sending, which no silence gives away."""
    tls = (authority.client, authority.server) if encrypted else ()
    limits = kk.Limits(initial_window=8 * MIB, initial_streams=8, receive_pool=256 * MIB, flight_floor=8 * MIB)
    async with socket_session_pair(*tls, limits=limits) as (client, server):
        stream, _held = await Exchange(client, server).pair()
        client._mux.liveness.stuck = 0.2
        server._driver.transport.pause_reading()
        sending = asyncio.create_task(stream.send(bytes(8 * MIB)))
        while not client.closed:
            if talking:
                server._mux.liveness.ping_due = True
                server._mux.liveness._ping_sent_at = None
                server._mux.wake()
            await anyio.sleep(0.01)
        assert isinstance(client.error, errors.PeerTimeoutError)
        assert "the peer has" in str(client.error) and "nothing for" in str(client.error)
        with pytest.raises(kk.SessionLost):
            await sending
        server.abort()
        await client.wait_closed()
