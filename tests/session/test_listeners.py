"""Listeners: a session's streams of one type, served by anyio's interface."""

import asyncio

import anyio
import pytest

import konnektor as kk
from konnektor.errors import LocalProtocolError
from konnektor.handlers import Handlers
from tests.session.check_stream import exactly, until_end
from tests.session.pairs import Echo, at_rest, echo, memory_session_pair, until


async def test_listener():
    async def serve(stream):
        async with stream:
            async for chunk in stream:
                await stream.send(chunk.upper())

    async with memory_session_pair() as (client, server), anyio.create_task_group() as group:
        listener = server.listen(Echo)
        group.start_soon(listener.serve, serve)
        for _ in range(3):
            async with await client.open(Echo()) as stream:
                await stream.send(b"loud")
                assert await exactly(stream, 4) == b"LOUD"
        with pytest.raises(LocalProtocolError):
            server.listen(Echo)
        await listener.aclose()
        await listener.aclose()
        with pytest.raises(kk.UnsupportedError):
            await client.open(Echo())
        server.handlers.add(Echo, echo)
        with pytest.raises(LocalProtocolError):
            server.listen(Echo)


async def test_a_listener_takes_its_own_sessions_streams_only():
    handlers = Handlers()
    async with (
        memory_session_pair(server_handlers=handlers) as (one, listening),
        memory_session_pair(server_handlers=handlers) as (other, _),
    ):
        await stack_of_one(listening.listen(Echo), one)
        with pytest.raises(kk.UnsupportedError):
            await other.open(Echo())


async def stack_of_one(listener, client):
    async def serve(stream):
        async with stream:
            await stream.send(b"x")

    async with anyio.create_task_group() as group:
        group.start_soon(listener.serve, serve, group)
        async with await client.open(Echo()) as stream:
            assert await until_end(stream) == b"x"
        await listener.aclose()


async def test_an_opener_that_gives_up_does_not_end_the_listener():
    async with memory_session_pair() as (client, server):
        listener = server.listen(Echo)
        # Nobody serves yet: the stream waits in the listener until its opener has gone.
        for _ in range(3):
            stream = await client.open(Echo(), early=True)
            await until(lambda: server._tasks)
            stream.reset()
            await until(lambda: at_rest(server))
        await stack_of_one(listener, client)


async def test_a_stream_taken_by_a_listener_just_as_its_opener_gave_up():
    async with memory_session_pair() as (client, server):
        listener = server.listen(Echo)
        stream = await client.open(Echo(), early=True)
        await until(lambda: server._tasks)
        taken = listener._offers.popleft()
        taken.taken = True
        stream.reset()
        await until(lambda: at_rest(client))
        listener._offers.append(taken)
        served = []
        task = asyncio.create_task(listener.serve(served.append))
        await until(taken.done.is_set)
        assert not served
        await until(lambda: at_rest(server))
        assert server._mux.admission.retired == 1
        await listener.aclose()
        await task


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("turns", range(6))
async def test_a_stream_is_served_or_reset_whenever_its_listener_is_cancelled(turns, group):
    """And served by the next call, if the one that was cancelled had not begun with it."""

    async def serve_in_a_group():
        async with anyio.create_task_group() as tasks:
            await listener.serve(never, tasks)

    async def never(stream):
        await anyio.sleep_forever()

    async def served(stream):
        async with stream:
            await stream.send(b"x")

    async with memory_session_pair() as (client, server):
        listener = server.listen(Echo)
        cancelled = asyncio.create_task(serve_in_a_group() if group else listener.serve(never))
        await anyio.sleep(0.01)
        opening = asyncio.create_task(client.open(Echo()))
        while not server._tasks:
            await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        serving = asyncio.create_task(listener.serve(served))
        try:
            async with await opening as stream:
                assert await until_end(stream) == b"x"
        except kk.CancelledStreamError:
            pass
        await until(lambda: at_rest(server))
        await listener.aclose()
        await serving


async def test_a_stream_whose_handler_cannot_be_started_is_reset():
    async with anyio.create_task_group() as over:
        pass
    async with memory_session_pair() as (client, server):
        listener = server.listen(Echo)
        opening = asyncio.create_task(client.open(Echo()))
        with pytest.raises(RuntimeError, match="not active"):
            await listener.serve(echo, over)
        with pytest.raises(kk.CancelledStreamError):
            await opening
        await until(lambda: at_rest(server))
        await stack_of_one(listener, client)


async def test_a_listeners_handler_that_fails_resets_its_stream():
    async with memory_session_pair() as (client, server):
        listener = server.listen(Echo)

        async def fail(stream):
            await stream.send(b"a part")
            raise KeyError

        async def serve():
            with pytest.raises(ExceptionGroup):
                await listener.serve(fail)

        task = asyncio.create_task(serve())
        stream = await client.open(Echo())
        with pytest.raises(kk.CancelledStreamError):
            await until_end(stream)
        await stream.aclose()
        await task
        await listener.aclose()


async def test_closing_a_listener_refuses_who_waits():
    async with memory_session_pair() as (client, server):
        listener = server.listen(Echo)
        waiting = asyncio.create_task(client.open(Echo()))
        await until(lambda: server._tasks)
        await anyio.sleep(0.01)
        await listener.aclose()
        with pytest.raises(kk.UnsupportedError, match="no longer served"):
            await waiting


async def test_a_listener_ends_with_its_session():
    async with memory_session_pair() as (client, server):
        listener = server.listen(Echo)
        task = asyncio.create_task(listener.serve(lambda stream: stream.aclose()))
        await anyio.sleep(0)
        await client.aclose()
        await task
        await server.wait_closed()
        with pytest.raises(kk.SessionClosedError):
            server.listen(Echo)
