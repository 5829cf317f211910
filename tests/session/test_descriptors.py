"""Whoever closes a descriptor closes it once: a number that is closed again belongs to somebody else by then.

A connection is reset, given up or cancelled at every step of its making. Its Python socket must not be left with a
number that the loop has closed: when it is collected, it closes that number, whoever has it then.
"""

import asyncio
import contextlib
import gc
import os
import select
import socket

import pytest

import konnektor as kk
from konnektor.connecting import reset_on_close
from konnektor.handshake import with_alerts
from konnektor.session import Session
from konnektor.udp_relay import UdpSocket
from tests.session.pairs import tcp_socketpair

STEPS = 12
"""More turns of the loop than a connection needs to be there, without the peer's answer."""


def stale(sock, descriptor):
    """Whether a socket has a number that is not its any more."""
    if sock.fileno() < 0:
        return False
    try:
        return not os.path.samestat(os.fstat(sock.fileno()), descriptor)
    except OSError:
        return True


async def turns(count):
    for _ in range(count):
        await asyncio.sleep(0)


async def connecting(sock, tls):
    """A client's session on a socket; its task, and the session."""
    session = Session("client")
    args = (with_alerts(tls, sock), "cp") if tls else ()
    return asyncio.create_task(session.connect(sock, *args)), session


async def over(task, session):
    await asyncio.wait([task])
    if not task.cancelled() and (error := task.exception()) is not None:
        assert isinstance(error, kk.HandshakeError), repr(error)
    session.abort()
    await session.wait_closed()


def reset(peer, task, session):
    reset_on_close(peer)
    peer.close()


def abort(peer, task, session):
    session.abort()
    peer.close()  # before there is a transport, only the peer can end the handshake


def cancel(peer, task, session):
    task.cancel()


@pytest.mark.parametrize("end", [reset, abort, cancel])
@pytest.mark.parametrize("tls", [False, True])
async def test_a_connection_that_ends_while_it_is_made_leaves_no_number_behind(tls, end, authority):
    for steps in range(1, STEPS):
        mine, peer = tcp_socketpair()
        descriptor = os.fstat(mine.fileno())
        task, session = await connecting(mine, authority.client if tls else None)
        await turns(steps)
        end(peer, task, session)
        await over(task, session)
        peer.close()
        assert not stale(mine, descriptor), f"ended after {steps} steps"
        await turns(3)
        assert mine.fileno() < 0, f"ended after {steps} steps, and still open"


async def test_a_reset_before_the_hello_closes_no_strangers_descriptor(authority):
    """As it was found: uvloop reported "File descriptor 12 is used by transport", for another connection's dial."""
    mine, peer = tcp_socketpair()
    number = mine.fileno()
    reset(peer, None, None)
    poll = select.poll()
    poll.register(mine, select.POLLIN)
    assert poll.poll(10_000), "the reset has arrived"
    task, session = await connecting(mine, authority.client)
    await over(task, session)
    await turns(3)
    del mine, task, session
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(socket.socket()) for _ in range(number)]
        assert number in [other.fileno() for other in others]
        gc.collect()
        for other in others:
            os.fstat(other.fileno())


async def test_a_udp_socket_given_up_while_it_opens_is_closed():
    for steps in range(1, STEPS):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", 0))
        closed = []
        ours = UdpSocket(sock, lambda *_: None, lambda closed=closed: closed.append(True))
        task = asyncio.create_task(ours.open())
        await turns(steps)
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            ours.close()
        await turns(3)
        assert sock.fileno() < 0, f"cancelled after {steps} steps"
        assert len(closed) == 1
