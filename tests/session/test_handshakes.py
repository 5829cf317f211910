"""What comes of a connection whose peer is none, or is not welcome, or leaves at once."""

import asyncio
import re
import socket
import ssl

import anyio
import pytest

import konnektor as kk
from konnektor.frames import Close
from konnektor.session import Session
from tests.pair import Pair
from tests.session.pairs import tcp_socketpair

FAST = kk.Limits(hello_timeout=0.1)


async def handshake_with(peer, role="server", **kwargs):
    """What a session says of a peer that is not one."""
    ours, theirs = tcp_socketpair()
    loop = asyncio.get_running_loop()
    make = Session.server if role == "server" else Session.client
    task = asyncio.create_task(make(ours, limits=FAST, **kwargs))
    try:
        for data in peer:
            await loop.sock_sendall(theirs, data)
            await anyio.sleep(0.01)
        if not peer or peer[-1] == b"":
            theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(kk.HandshakeError) as refusal:
            await task
    finally:
        theirs.close()
    return refusal.value


@pytest.mark.parametrize("role", ["server", "client"])
async def test_peers_that_are_none(role, short_close):
    http = await handshake_with([b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"], role)
    assert isinstance(http.__cause__, kk.ProtocolError)
    assert isinstance((await handshake_with([b"\xff" * 1000], role)).__cause__, kk.ProtocolError)
    assert isinstance((await handshake_with([b"\x40"], role)).__cause__, kk.PeerTimeoutError)
    gone = await handshake_with([], role)
    assert "before its HELLO" in str(gone)
    trickle = await handshake_with([b"\x40", b""], role)
    assert "before its HELLO" in str(trickle)


@pytest.mark.parametrize("role", ["server", "client"])
@pytest.mark.parametrize(("reason", "why"), [("", "it gave no reason, and its log may have one"), ("later", "later")])
@pytest.mark.parametrize("hello", [True, False])
async def test_a_hello_and_a_goodbye_in_one_reading(role, reason, why, hello, short_close):
    pair = Pair(hello=False)
    pair.client.flush()
    said = bytes(pair.client.wire)
    if role == "client":
        pair.client.deliver()
        pair.server.flush()
        said = bytes(pair.server.wire)
    goodbye = Close(kk.Code.NO_ERROR, reason).encode()
    refusal = await handshake_with([said + goodbye if hello else goodbye], role)
    assert re.fullmatch(rf"the peer at 127\.0\.0\.1:\d+ closed the session at its very beginning: {why}", str(refusal))
    assert isinstance(refusal.__cause__, kk.SessionError) and refusal.__cause__.code == kk.Code.NO_ERROR


async def test_a_session_closed_by_this_side_before_it_was_up(short_close):
    a, b = tcp_socketpair()
    session = Session("client")
    await session.connect(a)
    waiting = asyncio.create_task(session.wait_established())
    await anyio.sleep(0)
    session.close()
    with pytest.raises(kk.HandshakeError, match="this side closed the session before it was up"):
        await waiting
    b.close()
    await session.wait_closed()


async def test_tls_peers_that_are_none(authority, short_close):
    for role, context in (("server", authority.server), ("client", authority.client)):
        extra = {"server_name": "cp"} if role == "client" else {}
        refusal = await handshake_with([b"GET / HTTP/1.1\r\n\r\n"], role, tls=context, **extra)
        assert isinstance(refusal.__cause__, ssl.SSLError)
        assert isinstance(refusal, ConnectionError)
        await handshake_with([], role, tls=context, **extra)
        await handshake_with([b"\x16"], role, tls=context, **extra)


async def test_a_wrong_server_name(authority):
    a, b = tcp_socketpair()
    client, server = await asyncio.gather(
        Session.client(a, tls=authority.client, server_name="elsewhere"),
        Session.server(b, tls=authority.server),
        return_exceptions=True,
    )
    assert isinstance(client, kk.HandshakeError)
    assert isinstance(client.__cause__, ssl.SSLCertVerificationError)
    assert isinstance(server, kk.HandshakeError)


async def test_arguments_that_cannot_be_used_still_close_the_socket(authority):
    a, b = tcp_socketpair()
    with pytest.raises(ValueError, match="server_hostname"):
        await Session.client(a, tls=authority.client)
    await anyio.sleep(0.01)
    assert b.recv(1) == b""
    b.close()
    a, b = tcp_socketpair()
    a.close()
    with pytest.raises(kk.HandshakeError):
        await Session.client(a)
    b.close()


async def test_check_peer_and_check_hello(caplog, short_close):
    def refuse(session):
        raise kk.CertificateError("not one of us")

    def fail(session):
        raise KeyError("broken")

    def close(session):
        session.close(kk.Code.IDENTITY, "not you")

    for checks, expected in (
        ({"check_peer": refuse}, kk.CertificateError),
        ({"check_peer": fail}, kk.InternalError),
        ({"check_hello": fail}, kk.InternalError),
        ({"check_hello": close}, kk.IdentityError),
    ):
        a, b = tcp_socketpair()
        client, server = await asyncio.gather(Session.client(a), Session.server(b, **checks), return_exceptions=True)
        assert isinstance(server, kk.HandshakeError)
        assert isinstance(server.__cause__, expected)
        error = client.__cause__ if isinstance(client, Exception) else None
        if error is None:
            await client.wait_closed()
            error = client.error
        assert error.code in (kk.Code.IDENTITY, kk.Code.INTERNAL)
    assert "internal error" in caplog.text


async def test_a_session_given_up_before_its_connection_was_there():
    session = Session("server")
    session.abort()
    a, b = tcp_socketpair()
    await asyncio.get_running_loop().connect_accepted_socket(session.protocol, a)
    await session.wait_closed()
    await anyio.sleep(0.01)
    assert b.recv(1) == b""
    b.close()
    with pytest.raises(kk.HandshakeError):
        await session.wait_established()
