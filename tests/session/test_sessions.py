"""Sessions over real sockets: opening streams and answering, refusing and giving up."""

import asyncio
import functools
import logging
from unittest.mock import AsyncMock

import anyio
import pytest

import konnektor as kk
from konnektor import errors
from konnektor.errors import ConfigurationError, LocalProtocolError, StreamClosedError
from konnektor.handlers import Handlers
from konnektor.stream_types import StreamType, Tcp
from tests.session.check_stream import until_end
from tests.session.pairs import Echo, Exchange, at_rest, echo, memory_session_pair, socket_session_pair, until


class Exec(StreamType):
    """As the documentation shows it: nothing but a name and fields."""

    name = "exec@acme.example"
    argv: list[str]
    tty: bool = False


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


def plain(stream, request):
    raise AssertionError


async def generates(stream, request):
    yield stream


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


class Service:
    def plain(self, stream, request):
        raise AssertionError

    async def serve(self, stream, request):
        await echo(stream, request)

    async def __call__(self, stream, request):
        await echo(stream, request)


@pytest.mark.parametrize(
    "handler",
    [
        plain,
        generates,
        functools.partial(plain),
        decorated(plain),
        Service().plain,
        None,
    ],
)
def test_a_handler_that_gives_nothing_to_wait_for_is_refused(handler):
    with pytest.raises(ConfigurationError, match="handler of Echo is not a coroutine function: write async def"):
        Handlers().add(Echo, handler)


@pytest.mark.parametrize(
    "handler",
    [
        functools.partial(echo),
        decorated(echo),
        lambda stream, _request: echo(stream, None),
        Service().serve,
        Service(),
        AsyncMock(side_effect=echo),
    ],
)
async def test_handlers_of_every_kind(handler):
    async with memory_session_pair() as (client, server):
        server.handlers.add(Echo, handler)
        async with await client.open(Echo()) as stream:
            await stream.send(b"hello")
            assert await stream.receive() == b"hello"


async def test_the_class_in_the_place_of_a_request():
    async with memory_session_pair() as (client, _):
        with pytest.raises(ConfigurationError, match=r"not the class Echo: write Echo\("):
            await client.open(Echo)
        with pytest.raises(ConfigurationError, match="not an instance of Echo"):
            client.listen(Echo())
        assert at_rest(client)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 99999), ("a", "80"), ("", 80), ("127.1", 80), ("a b", 80)])
async def test_a_malformed_request_does_not_travel(host, port):
    async with memory_session_pair() as (client, server):
        server.handlers.add(Tcp, echo)
        for opening in (
            client.open_tcp(host, port),
            client.open_tcp(host, port, early=True),
            client.open_udp(host, port),
            client.create_connection(asyncio.Protocol, host, port),
            client.open(Echo(text=port if isinstance(port, int) else 5)),
        ):
            with pytest.raises(ConfigurationError):
                await opening
        assert at_rest(client)
        assert server._mux.admission.retired == 0
        async with await client.open_tcp("a", 80) as stream:
            await stream.send_eof()


async def test_handlers_are_checked_when_added():
    class Nameless(StreamType):
        pass

    handlers = Handlers()
    for no_type in (Nameless, Echo(), str):
        with pytest.raises(ConfigurationError):
            handlers.add(no_type, echo)
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
