"""Cancelled at every await, cut at every moment, failing at every operation: a clean end each time.

Each test drives an operation and breaks into it after k steps, for every k until it completes by itself. The leak
check of ``conftest`` sees to tasks, descriptors and unhandled errors; here streams and credit are counted.
"""

import asyncio
import contextlib

import anyio
import pytest

import konnektor as kk
from konnektor import testing
from konnektor.session import Session
from konnektor.stream_types import StreamType
from tests.session.check_stream import exactly
from tests.session.pairs import Exchange, memory_session_pair, tcp_socketpair

STEPS = 400
EXPECTED = (anyio.ClosedResourceError, anyio.EndOfStream, kk.KonnektorError)


class Echo(StreamType):
    name = "echo@test"


async def echo(stream, _request):
    await anyio.sleep(0)
    await stream.accept()
    async for chunk in stream:
        await stream.send(chunk)
    await stream.aclose()


async def until(condition):
    with anyio.fail_after(10):
        while not condition():
            await anyio.sleep(0.001)


def at_rest(session):
    mux = session._mux
    books = mux.pool.slots == session.limits.initial_streams and mux.admission.retired == mux.admission.taken
    return not mux.streams and not mux.opens and not session._tasks and mux.pool.extra == 0 and books


async def cancelled_after(steps, operation):
    """Runs a coroutine and cancels it after so many turns of the loop; whether it was over before."""
    task = asyncio.create_task(operation)
    for _ in range(steps):
        await asyncio.sleep(0)
        if task.done():
            break
    finished = task.done()
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error
    return finished


async def at_every_step(run):
    """Calls ``run(steps)`` with 0, 1, 2, ... until it says that the operation was over."""
    for steps in range(STEPS):
        if await run(steps):
            return
    raise AssertionError(f"not over after {STEPS} steps")


async def opening(client):
    stream = await client.open(Echo())
    stream.reset()


async def whole_life(client):
    async with await client.open(Echo()) as stream:
        await stream.send(b"x" * 100_000)
        await exactly(stream, 100_000)
        await stream.send_eof()
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()


async def early(client):
    async with await client.open(Echo(), early=True) as stream:
        await stream.send(b"x" * 1000)
        await stream.opened()
        await exactly(stream, 1000)


async def viewed(client):
    stream = await client.open(Echo())
    reader, writer = stream.as_asyncio()
    try:
        writer.write(b"x" * 100_000)
        await writer.drain()
        await reader.readexactly(100_000)
        writer.close()
        await writer.wait_closed()
    finally:
        writer.close()


async def pinging(client):
    await client.ping()


@pytest.mark.parametrize("operation", [opening, whole_life, early, viewed, pinging])
async def test_cancelled_at_every_await(operation):
    async with memory_session_pair() as (client, server):
        server.handlers.add(Echo, echo)
        await client.ping()

        async def run(steps):
            finished = await cancelled_after(steps, operation(client))
            await until(lambda: at_rest(client) and at_rest(server))
            return finished

        await at_every_step(run)
        await whole_life(client)


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("role", ["client", "server"])
async def test_connecting_cancelled_at_every_await(role, tls, authority):
    async def run(steps):
        a, b = tcp_socketpair()
        client = Session.client(a, tls=authority.client if tls else None, server_name="cp" if tls else None)
        server = Session.server(b, tls=authority.server if tls else None)
        mine, other = (client, server) if role == "client" else (server, client)

        async def connect():
            async with await mine:
                pass

        peer = asyncio.create_task(other)
        finished = await cancelled_after(steps + 1, connect())  # in its first step it takes the socket over
        await asyncio.wait([peer])
        if peer.exception() is None:
            await peer.result().wait_closed()
        else:
            assert isinstance(peer.exception(), kk.HandshakeError)
        return finished

    await at_every_step(run)


async def test_a_memory_pair_cancelled_at_every_await():
    made = []
    in_use = 0

    async def use():
        nonlocal in_use
        async with testing.memory_session_pair() as pair:
            made.extend(pair)
            await pair[0].ping()
            in_use += 1

    await at_every_step(lambda steps: cancelled_after(steps, use()))
    assert 0 < in_use < len(made) / 2, "cancelled in its use, and after it"
    assert all(session.closed and session._driver.transport is None for session in made)


@pytest.mark.parametrize("end", ["aclose", "drain"])
async def test_ending_cancelled_at_every_await(end):
    # A drain waits for timers, not for turns of the loop: from the 30th on it is the same await.
    for steps in range(1, 30):
        async with memory_session_pair() as (client, server):
            exchange = Exchange(client, server)
            stream, _held = await exchange.pair()
            exchange.release()
            await stream.aclose()
            # In its first step it says so to the session.
            await cancelled_after(steps, client.aclose() if end == "aclose" else client.drain(0.05))
            await client.wait_closed()
            await server.wait_closed()
            for session in (client, server):
                assert session.error.code == (kk.Code.NO_ERROR if end == "aclose" else kk.Code.SHUTDOWN)
                assert not session.stream_count and not session._tasks and session._driver.transport is None


@pytest.mark.parametrize("cut", [Session.abort, Session.close, lambda session: session.start_drain(0)])
@pytest.mark.parametrize("operation", [whole_life, early, viewed])
async def test_the_session_ended_at_every_step(operation, cut):
    async def run(steps):
        async with memory_session_pair() as (client, server):
            server.handlers.add(Echo, echo)
            task = asyncio.create_task(operation(client))
            for _ in range(steps):
                await asyncio.sleep(0)
                if task.done():
                    break
            finished = task.done()
            cut(server)
            await asyncio.wait([task], timeout=10)
            assert task.done()
            if (error := task.exception()) is not None:
                assert isinstance(error, (*EXPECTED, ConnectionError, asyncio.IncompleteReadError)), repr(error)
            await client.wait_closed()
            await server.wait_closed()
            assert not client.stream_count and not server.stream_count
            return finished and error is None

    await at_every_step(run)


# The Nth operation of a transport fails


class Failing:
    """A session's transport, of which one operation fails."""

    def __init__(self, driver, operation, count):
        self._transport = driver.transport
        self._driver = driver
        self._operation = operation
        self._left = count
        self.failed = False
        driver.transport = self
        self._buffer_updated = None

    def _count(self, operation):
        if operation == self._operation:
            self._left -= 1
            if self._left == 0:
                self.failed = True
                return True
        return False

    def write(self, data):
        if self._count("write"):
            raise RuntimeError("the transport failed")
        if self._count("half a write"):
            self._transport.write(data[: len(data) // 2])
            self._transport.abort()
            return
        self._transport.write(data)

    def __getattr__(self, name):
        return getattr(self._transport, name)


@pytest.mark.parametrize("operation", ["write", "half a write"])
async def test_every_write_fails_once(operation, caplog):
    for count in range(1, 100):
        async with memory_session_pair() as (client, server):
            server.handlers.add(Echo, echo)
            failing = Failing(client._driver, operation, count)
            try:
                for _ in range(3):
                    await whole_life(client)
                await client.aclose()
            except EXPECTED:
                await client.wait_closed()
            assert client.closed
            await server.wait_closed()
            assert not client.stream_count and not server.stream_count
        if not failing.failed:
            assert count > 5
            return
    raise AssertionError("it never got to its end")


@pytest.mark.replaces_methods
@pytest.mark.parametrize("side", ["client", "server"])
async def test_every_read_fails_once(side, monkeypatch, caplog):
    for count in range(1, 200):
        async with memory_session_pair() as (client, server):
            server.handlers.add(Echo, echo)
            mux = (client if side == "client" else server)._mux
            left = [count]
            receive = mux.receive

            def failing(data, now, left=left, receive=receive):
                left[0] -= 1
                if left[0] == 0:
                    raise RuntimeError("a defect while reading")
                return receive(data, now)

            mux.receive = failing
            with contextlib.suppress(*EXPECTED):
                for _ in range(3):
                    await whole_life(client)
                await client.aclose()
            if left[0] <= 0:
                await client.wait_closed()
            await client.aclose()
            await server.wait_closed()
            assert not client.stream_count and not server.stream_count
        if left[0] > 0:
            assert count > 5
            return
    raise AssertionError("it never got to its end")


async def test_the_connection_cut_after_every_few_bytes():
    """A relay of bytes between two sessions that breaks after N of them, for many N."""
    loop = asyncio.get_running_loop()

    async def carry(source, sink, budget):
        try:
            while budget[0] > 0:
                data = await loop.sock_recv(source, min(4096, budget[0]))
                if not data:
                    return
                budget[0] -= len(data)
                await loop.sock_sendall(sink, data)
        except OSError:
            return

    for limit in (*range(1, 260, 7), 500, 1000, 5000, 20_000, 100_000):
        a, a_far = tcp_socketpair()
        b, b_far = tcp_socketpair()
        budget = [limit]
        carriers = [asyncio.create_task(carry(a_far, b_far, budget)), asyncio.create_task(carry(b_far, a_far, budget))]

        async def cut(carriers=carriers, sockets=(a_far, b_far)):
            await asyncio.wait(carriers, return_when=asyncio.FIRST_COMPLETED)
            for task in carriers:
                task.cancel()
            await asyncio.wait(carriers)
            for sock in sockets:
                sock.close()

        cutting = asyncio.create_task(cut())
        client, server = await asyncio.gather(Session.client(a), Session.server(b), return_exceptions=True)
        for session in (client, server):
            if isinstance(session, Exception):
                assert isinstance(session, kk.HandshakeError)
        if isinstance(server, Session):
            server.handlers.add(Echo, echo)
        if isinstance(client, Session):
            with pytest.raises(EXPECTED):
                while True:
                    await whole_life(client)
        await cutting
        for session in (client, server):
            if isinstance(session, Session):
                await session.wait_closed()
                assert not session.stream_count
