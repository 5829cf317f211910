"""Sessions over real sockets: opening, answering, asking, ending, and peers that do not play by the rules."""

import asyncio
import logging
import re
import socket
import ssl

import anyio
import pytest

import konnektor as kk
from konnektor import driver, errors
from konnektor.errors import ConfigurationError, LocalProtocolError, StreamClosedError
from konnektor.frames import Close
from konnektor.session import Handlers, Session
from konnektor.stream_types import StreamType, Tcp
from tests.pair import Pair
from tests.session.check_stream import exactly, until_end
from tests.session.pairs import (
    Authority,
    Exchange,
    Hold,
    memory_session_pair,
    socket_session_pair,
    tcp_socketpair,
)

FAST = kk.Limits(hello_timeout=0.1)


class Echo(StreamType):
    name = "echo@test"
    text: str = ""


class Exec(StreamType):
    """As the documentation shows it: nothing but a name and fields."""

    name = "exec@acme.example"
    argv: list[str]
    tty: bool = False


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def short_close(monkeypatch):
    monkeypatch.setattr(driver, "CLOSE_TIMEOUT", 0.1)


async def echo(stream, request):
    await stream.accept()
    async for chunk in stream:
        await stream.send(chunk)
    await stream.aclose()


async def until(condition):
    while not condition():
        await anyio.sleep(0.005)


def at_rest(session):
    """Nothing is left of any stream."""
    mux = session._mux
    return not mux.streams and not mux.opens and mux.pool.extra == 0 and not session._tasks


# Opening and answering


async def test_a_stream_type_of_ones_own():
    ran = []

    async def run(stream, request):
        ran.append(request)
        assert stream.request is request
        await stream.accept(b"pid 1")
        await stream.send(" ".join(request.argv).encode())

    async with memory_session_pair() as (client, server):
        server.handlers.add(Exec, run)
        stream = await client.open(Exec(["uptime", "-p"], tty=True))
        assert stream.header == b"pid 1"
        assert await until_end(stream) == b"uptime -p"
        await stream.aclose()
        client.handlers.add(Exec, run)
        async with await server.open(Exec(["ls"])) as stream:
            assert await until_end(stream) == b"ls"
        await until(lambda: at_rest(client) and at_rest(server))
    assert ran == [Exec(["uptime", "-p"], tty=True), Exec(["ls"])]
    with pytest.raises(AttributeError):
        ran[0].tty = False


async def test_over_tls(authority):
    async with socket_session_pair(authority.client, authority.server) as (client, server):
        assert client.ssl_object.version() == "TLSv1.3"
        assert "up" in repr(client)
        server.handlers.add(Echo, echo)
        async with await client.open(Echo()) as stream:
            await stream.send(b"hello")
            await stream.send_eof()
            assert await until_end(stream) == b"hello"
        assert client.stats().streams == client.stream_count == 0
        assert client.stats().bytes_sent > 0
        assert client.silent_for >= 0
        assert await client.ping() > 0
        assert client.stats().rtt > 0


@pytest.mark.parametrize("code", [code for code in kk.Code if code >= 32] + [2**31 + 7, 8])
async def test_each_refusal_has_its_class(code):
    async def refuse(stream, _request):
        await stream.reject(code, "not today")
        await stream.reject(code, "not today")

    async with memory_session_pair() as (client, server):
        server.handlers.add(Echo, refuse)
        with pytest.raises(kk.StreamError, match="not today") as refusal:
            await client.open(Echo())
        assert type(refusal.value) is type(errors.stream_error(code))
        assert (refusal.value.code, refusal.value.refused) == (code, True)
        await until(lambda: at_rest(client) and at_rest(server))


async def test_tcp_is_a_stream_type_like_any_other():
    async def refuse(stream, request):
        assert (request.host, request.port) == ("db", 5432)
        await stream.reject(kk.Code.CONNECT_REFUSED)

    async with memory_session_pair() as (client, server):
        server.handlers.add(Tcp, refuse)
        with pytest.raises(kk.ConnectRefusedError) as refusal:
            await client.open_tcp("db", 5432)
        assert refusal.value.retryable
        with pytest.raises(kk.ConnectRefusedError):
            await client.create_connection(asyncio.Protocol, "db", 5432)


async def test_an_unknown_type_and_a_malformed_header_are_refused(caplog):
    class Odd(StreamType):
        name = Echo.name
        text: int

    async with memory_session_pair() as (client, server):
        with pytest.raises(kk.UnsupportedError, match="no such stream type"):
            await client.open(Echo())
        server.handlers.add(Echo, echo)
        with pytest.raises(kk.UnsupportedError, match="malformed"):
            await client.open(Odd(3))
        server.handlers.remove(Echo)
        with pytest.raises(kk.UnsupportedError):
            await client.open(Echo())
        await until(lambda: at_rest(client) and at_rest(server))
        assert server._mux.admission.retired == 3
    assert "refused a echo@test stream" in caplog.text


async def test_handlers_are_checked_when_added():
    class Nameless(StreamType):
        pass

    handlers = Handlers()
    with pytest.raises(ConfigurationError):
        handlers.add(Nameless, echo)
    handlers.add(Echo, echo)
    with pytest.raises(LocalProtocolError):
        handlers.add(Echo, echo)


@pytest.mark.parametrize(
    ("failure", "code", "logged"),
    [
        (None, 8, "neither accepted nor rejected"),
        (RuntimeError("secret"), 8, "secret"),
        (errors.DeniedError("secret"), 32, "secret"),
        (errors.SessionLost("secret"), 40, "secret"),
        (asyncio.CancelledError(), 40, ""),
    ],
)
async def test_a_handler_that_decides_nothing(failure, code, logged, caplog):
    caplog.set_level(logging.INFO)

    async def handler(stream, _request):
        if failure is not None:
            raise failure

    async with memory_session_pair() as (client, server):
        server.handlers.add(Echo, handler)
        with pytest.raises(kk.StreamError) as refusal:
            await client.open(Echo())
        assert refusal.value.code == code
        assert refusal.value.refused
        assert "secret" not in str(refusal.value)
        await until(lambda: at_rest(client) and at_rest(server))
        assert server._mux.admission.retired == 1
    assert logged in caplog.text


async def test_a_handler_that_fails_after_accepting_resets():
    async def handler(stream, _request):
        await stream.accept()
        await stream.send(b"a part")
        raise KeyError

    async with memory_session_pair() as (client, server):
        server.handlers.add(Echo, handler)
        async with await client.open(Echo()) as stream:
            with pytest.raises(kk.StreamError) as broken:
                await until_end(stream)
            assert broken.value.code == kk.Code.INTERNAL


async def test_a_handler_that_returns_closes():
    async def handler(stream, _request):
        await stream.accept()
        await stream.send(b"all")

    async with memory_session_pair() as (client, server):
        server.handlers.add(Echo, handler)
        async with await client.open(Echo()) as stream:
            assert await until_end(stream) == b"all"


class Dial:
    """A handler that waits for ever, and remembers whether it was cancelled."""

    def __init__(self):
        self.started = self.cancelled = 0

    async def __call__(self, stream, _request):
        self.started += 1
        try:
            await anyio.sleep_forever()
        except asyncio.CancelledError:
            self.cancelled += 1
            with pytest.raises(kk.PeerError):
                stream.accept_now()
            raise


@pytest.mark.parametrize("early", [b"", b"data", b"data and eof"])
async def test_who_gives_up_an_open_cancels_its_handler(early):
    dial = Dial()
    async with memory_session_pair() as (client, server):
        server.handlers.add(Echo, dial)
        stream = await client.open(Echo(), early=True)
        if early:
            await stream.send(early)
        if b"eof" in early:
            await stream.send_eof()
        waiting = asyncio.create_task(stream.opened())
        await until(lambda: dial.started)
        with pytest.raises(anyio.BusyResourceError):
            await stream.opened()
        stream.reset()
        with pytest.raises(StreamClosedError):
            await waiting
        await until(lambda: dial.cancelled)
        await until(lambda: at_rest(client) and at_rest(server))
        assert server._mux.admission.retired == 1


async def test_an_open_that_is_cancelled_before_its_handler_ran():
    # OPEN and STOP in one reading: the handler's task is cancelled, or never runs, and its place comes back.
    dial = Dial()
    async with memory_session_pair() as (client, server):
        server.handlers.add(Echo, dial)
        for _ in range(2000):
            stream = await client.open(Echo(), early=True)
            await anyio.sleep(0)
            stream.reset()
        await until(lambda: at_rest(client) and at_rest(server))
        mux = server._mux
        assert mux.admission.retired == mux.admission.taken
        assert dial.started == dial.cancelled


async def test_an_opener_that_closes_early_is_served_all_the_same():
    got = []

    async def handler(stream, _request):
        await anyio.sleep(0.05)
        await stream.accept()
        got.append(await until_end(stream))
        with pytest.raises(kk.PeerError):
            for _ in range(1000):
                await stream.send(b"nobody listens")
                await anyio.sleep(0.001)

    async with memory_session_pair() as (client, server):
        server.handlers.add(Echo, handler)
        stream = await client.open(Echo(), early=True)
        await stream.send(b"fire and forget")
        await stream.aclose()
        with pytest.raises(StreamClosedError):
            await stream.opened()
        await until(lambda: got)
        await until(lambda: at_rest(client) and at_rest(server))
    assert got == [b"fire and forget"]


async def test_early_data_is_read_after_accepting_and_refused_data_is_gone():
    async def handler(stream, request):
        await anyio.sleep(0.02)
        if request.text:
            await stream.reject(kk.Code.DENIED, request.text)
        else:
            await echo(stream, request)

    async with memory_session_pair() as (client, server):
        server.handlers.add(Echo, handler)
        async with await client.open(Echo(), early=True) as stream:
            await stream.send(b"early")
            await stream.send_eof()
            await stream.opened()
            assert await until_end(stream) == b"early"
        stream = await client.open(Echo("no"), early=True)
        await stream.send(b"early")
        for _ in range(2):
            with pytest.raises(kk.DeniedError, match="no"):
                await stream.opened()
        with pytest.raises(kk.DeniedError):
            await stream.receive()
        with pytest.raises(kk.DeniedError):
            await stream.send(b"x")
        await stream.aclose()
        stream = await client.open(Echo("no"), early=True)
        await stream.aclose()
        await until(lambda: at_rest(client) and at_rest(server))


async def test_a_deadline_ends_the_opening_at_both_ends():
    dial = Dial()
    async with memory_session_pair() as (client, server):
        server.handlers.add(Echo, dial)
        with pytest.raises(kk.DialTimeoutError):
            await client.open(Echo(), deadline=0.05)
        await until(lambda: dial.cancelled)
        await until(lambda: at_rest(client) and at_rest(server))


async def test_opens_beyond_what_the_peer_allows_wait():
    limits = kk.Limits(initial_streams=8)
    async with memory_session_pair(server_limits=limits) as (client, server):
        exchange = Exchange(client, server)
        streams = [await exchange.pair() for _ in range(8)]
        with pytest.raises(kk.LimitError):
            await exchange.pair(deadline=0.05)
        waiting = asyncio.create_task(exchange.pair())
        await anyio.sleep(0.02)
        exchange.release()
        for stream, _ in streams:
            await stream.aclose()
        stream, _ = await waiting
        await stream.aclose()
        exchange.release()


async def test_a_create_connection_without_protocol_leaves_no_stream():
    async with memory_session_pair() as (client, server):
        server.handlers.add(Tcp, echo)

        def factory():
            raise KeyError

        with pytest.raises(KeyError):
            await client.create_connection(factory, "x", 1)
        await until(lambda: at_rest(client) and at_rest(server))


# Listeners


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
        taken = await listener._get.receive()
        stream.reset()
        await until(lambda: at_rest(client))
        queue, listener._get = listener._get, _One(taken)
        served = []
        await listener.serve(served.append)
        assert not served
        await until(lambda: at_rest(server))
        assert server._mux.admission.retired == 1
        await listener.aclose()
        queue.close()


class _One:
    """A source of one item."""

    def __init__(self, item):
        self._items = [item]

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self._items:
            raise StopAsyncIteration
        return self._items.pop()

    def close(self):
        pass


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


# Peers that are none


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


async def test_a_defect_in_a_timer_ends_the_session(monkeypatch, caplog):
    async with memory_session_pair() as (client, _server):

        def fail(now):
            raise RuntimeError("defect in a timer")

        monkeypatch.setattr(client._mux, "handle_timeout", fail)
        client._driver.deadline_moved(asyncio.get_running_loop().time())
        await client.wait_closed()
        assert client.error.code == kk.Code.INTERNAL
    assert "defect in a timer" in caplog.text


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
