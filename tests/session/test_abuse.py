"""Sessions whose peer floods them: what is said, who is shown out, and how reading pauses."""

import logging

import anyio
import pytest

from konnektor.errors import CalmError, Code
from konnektor.frames import Datagram, Ping
from konnektor.handlers import Handlers
from tests.session.pairs import DEADLINE, Echo, echo, socket_session_pair

CRUMBS = Datagram(99, 0, b"").encode() * 30_000
"""Datagrams for a stream that is not there are dropped, and not acknowledged: the rest of the session goes on."""


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def tls(request, authority):
    return (authority.client, authority.server) if request.param else (None, None)


def pauses(session):
    """Whether the session does not read just now."""
    return session._driver._reading_timer is not None


async def paused(session):
    while not pauses(session):
        await anyio.sleep(0)


async def test_who_exceeds_a_limit_is_shown_out_and_named(tls, caplog):
    caplog.set_level(logging.WARNING, "konnektor")
    with anyio.fail_after(DEADLINE):
        async with socket_session_pair(*tls) as (client, server):
            client._driver.transport.write(Ping(7).encode() * 30)
            await server.wait_closed()
            await client.wait_closed()
            assert isinstance(server.error, CalmError)
            assert isinstance(client.error, CalmError)
            assert client.error.code == Code.CALM
            host, port = server.remote_address[:2]
    lines = [record.getMessage().partition("] ")[2] for record in caplog.records]
    reason = "PINGs beyond 20 at once and 4 a second"
    assert f"ended the session with the peer at {host}:{port}, which sent too many PINGs: {reason}" in lines
    assert any(line.endswith(f" ended the session, because this side exceeded a limit: {reason}") for line in lines)
    assert len(lines) == 2


async def test_reading_pauses_under_a_flood_and_goes_on(tls):
    handlers = Handlers()
    handlers.add(Echo, echo)
    with anyio.fail_after(DEADLINE):
        async with socket_session_pair(*tls, handlers=handlers) as (client, server):
            stream = await client.open(Echo())
            client._driver.transport.write(CRUMBS)
            await paused(server)
            await stream.send(b"behind it all")
            assert await stream.receive() == b"behind it all"
            await stream.aclose()
            assert server.error is None


@pytest.mark.parametrize("how", ["close", "abort", "peer closes", "peer aborts"])
async def test_the_end_does_not_wait_for_a_pause(tls, how):
    with anyio.fail_after(DEADLINE):
        async with socket_session_pair(*tls) as (client, server):
            client._driver.transport.write(CRUMBS)
            await paused(server)
            side = client if "peer" in how else server
            side.close() if "close" in how else side.abort()
            await server.wait_closed()
            await client.wait_closed()


async def test_ordinary_traffic_never_pauses(tls):
    handlers = Handlers()
    handlers.add(Echo, echo)
    with anyio.fail_after(DEADLINE):
        async with (
            socket_session_pair(*tls, handlers=handlers) as (client, server),
            await client.open(Echo()) as stream,
        ):
            for _ in range(50):
                await stream.send(b"k")
                assert await stream.receive() == b"k"
                assert not pauses(client)
                assert not pauses(server)
            assert all(rtt > 0 for rtt in [await client.ping() for _ in range(3)])
