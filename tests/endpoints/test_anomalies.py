"""One operation fails, for one operation after another, amid transfers on many streams over real TLS.

What the kernel, TLS or a transport can do wrong costs the connection at most: the session goes on over another with nothing
lost or doubled. A defect of our own ends the session, on both sides, and each stream with one error; the worker connects
anew. Either way nothing is left behind: no task, descriptor or unhandled error (tests/conftest.py), no stream, no slot.
"""

import asyncio
import contextlib
import errno
import hashlib
import random
import socket
import ssl
from contextlib import AsyncExitStack

import pytest

import konnektor as kk
from konnektor import driver as drivers
from konnektor.driver import Alarm, Driver
from konnektor.handshake import AlertingSSLObject
from konnektor.mux import Mux
from konnektor.worker import Backoff
from tests.endpoints.parts import PATIENCE, round_trip, target, tunnel, until

pytestmark = pytest.mark.replaces_methods

STREAMS = 8
ROUND = random.Random(1).randbytes(3000)
PAUSE = 0.03
"""Longer than an ACK waits: the timer rings."""
TIMED = ["timer", "handle_timeout"]
ENDS = ["worker", "control plane"]
ROLES = {"client": "worker", "server": "control plane"}


def each(step, span, every):
    """Every ``step``-th operation of the first ``span``, for every day; each of them, or of more, at night."""
    marks = [pytest.mark.slow, pytest.mark.timeout(1800)]
    return pytest.mark.parametrize(
        "which", [range(1, span, step), pytest.param(range(1, every), marks=marks)], ids=["some", "each"]
    )


class Nth:
    """Which operation of which end fails: after ``arm``, the n-th."""

    def __init__(self):
        self.operation = self.end = None
        self.left = 0
        self.fired = False

    def arm(self, operation, end, n):
        self.operation, self.end, self.left, self.fired = operation, end, n, False

    def hit(self, operation, end):
        if self.fired or not self.left or operation != self.operation or end != self.end:
            return False
        self.left -= 1
        self.fired = not self.left
        return self.fired


def end_of(driver):
    return ROLES[getattr(driver.mux, "role", "client")]  # a Rejoin is the client's


class FailingSocket(socket.socket):
    """What asyncio calls; uvloop makes its system calls itself."""

    def __init__(self, sock, nth, end):
        super().__init__(fileno=sock.detach())
        self.setblocking(False)
        self._nth, self._end = nth, end

    def recv_into(self, buffer, *args):
        if self._nth.hit("recv resets", self._end):
            raise ConnectionResetError(errno.ECONNRESET, "made up")
        if self._nth.hit("recv times out", self._end):
            raise TimeoutError(errno.ETIMEDOUT, "made up")
        if self._nth.hit("recv again", self._end):
            raise BlockingIOError(errno.EAGAIN, "made up")
        if self._nth.hit("recv of a byte", self._end):
            return super().recv_into(memoryview(buffer)[:1])
        return super().recv_into(buffer, *args)

    def send(self, data, *args):
        if self._nth.hit("send breaks", self._end):
            raise BrokenPipeError(errno.EPIPE, "made up")
        if self._nth.hit("send finds no memory", self._end):
            raise OSError(errno.ENOBUFS, "made up")
        if self._nth.hit("send again", self._end):
            raise BlockingIOError(errno.EAGAIN, "made up")
        if self._nth.hit("send of a byte", self._end):
            return super().send(memoryview(data)[:1])
        return super().send(data, *args)


class FailingTransport:
    def __init__(self, transport, nth, end):
        self._transport, self._nth, self._end = transport, nth, end

    def write(self, data):
        if self._nth.hit("write", self._end):
            self._transport.abort()
        elif self._nth.hit("half a write", self._end):
            self._transport.write(data[: len(data) // 2])
            self._transport.abort()
        else:
            self._transport.write(data)

    def writelines(self, chunks):
        self.write(b"".join(chunks))

    def __getattr__(self, name):
        return getattr(self._transport, name)


@pytest.fixture
def nth(monkeypatch):
    """Puts what can fail in place of what does not."""
    nth = Nth()
    connect, made, updated = Driver.connect, Driver.connection_made, Driver.buffer_updated

    async def failing_connect(self, role, sock, *args, **kwargs):
        if isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop):
            sock = FailingSocket(sock, nth, ROLES[role])
        await connect(self, role, sock, *args, **kwargs)

    def failing_made(self, transport):
        made(self, transport)
        if self.transport is not None:
            self.transport = FailingTransport(self.transport, nth, end_of(self))

    def failing_updated(self, nbytes):
        if nth.hit("read", end_of(self)):
            # What came is gone, and the connection with it.
            self.abort()
            self._scratch = None
            return
        updated(self, nbytes)

    class FailingSSLObject(AlertingSSLObject):
        def _failing(self, call, *args):
            if nth.hit("TLS", ROLES["server" if self.server_side else "client"]):
                raise ssl.SSLError(1, "made up")
            return call(*args)

        def do_handshake(self):
            return self._failing(super().do_handshake)

        def read(self, *args):
            return self._failing(super().read, *args)

        def write(self, *args):
            return self._failing(super().write, *args)

        def unwrap(self):
            return self._failing(super().unwrap)

    def failing(operation, call):
        def method(self, *args, **kwargs):
            if nth.hit(operation, ROLES[self.role]):
                raise RuntimeError("a defect, made up")
            return call(self, *args, **kwargs)

        return method

    monkeypatch.setattr(Driver, "connect", failing_connect)
    monkeypatch.setattr(Driver, "connection_made", failing_made)
    monkeypatch.setattr(Driver, "buffer_updated", failing_updated)
    monkeypatch.setattr("konnektor.tls.AlertingSSLObject", FailingSSLObject)
    for name in ("receive", "chunks_to_send", "handle_timeout"):
        monkeypatch.setattr(Mux, name, failing(name, getattr(Mux, name)))
    monkeypatch.setattr("konnektor.worker.Backoff", lambda **_: Backoff(0.001, 0.001))
    return nth


async def open_streams(t, port, stack):
    """Opened by both ends in turn, with what goes and comes."""
    ends = t.session, t.worker_session
    return [
        (
            await stack.enter_async_context(await ends[i % 2].open_tcp("127.0.0.1", port)),
            (hashlib.sha256(), hashlib.sha256()),
        )
        for i in range(STREAMS)
    ]


@contextlib.asynccontextmanager
async def connected(certs, **kwargs):
    """A tunnel whose two ends have each other's addresses; ``worker_session`` is the worker's end."""
    async with tunnel(certs, plane={"allow_from": ["node-1=127.0.0.1:*"]}, **kwargs) as t:
        t.worker_session = await t.worker.wait_connected()
        yield t


def nothing_left(session):
    """No stream, slot or byte is left."""
    mux = session._mux
    return not (mux.streams or mux.opens or session._tasks or mux.pool.extra or mux.owed or mux.control)


async def going_on(certs, nth, operation, end, which, *, anew):
    """For each n of ``which``: the n-th operation fails, of this connection or of the next, and no stream notices."""
    async with target() as echo, connected(certs) as t, AsyncExitStack() as stack:
        ends = t.session, t.worker_session
        streams = await open_streams(t, echo.port, stack)
        for n in which:
            async with asyncio.timeout(PATIENCE):
                nth.arm(operation, end, n)
                if anew:
                    t.worker_session._driver.abort()
                while not nth.fired:
                    await asyncio.gather(*(round_trip(stream, ROUND, digests) for stream, digests in streams))
                    await asyncio.sleep(PAUSE if operation in TIMED else 0)
                await asyncio.gather(*(round_trip(stream, ROUND, digests) for stream, digests in streams))
                await until(lambda: not any(session.suspended for session in ends))
            for session in ends:
                session._mux.assert_invariants()
                assert session.stream_count == STREAMS, f"after operation {n}"
        assert all(sent.digest() == received.digest() for _, (sent, received) in streams)
        assert not any(session.closed for session in ends)
        await until(lambda: not any(session.stats().in_flight for session in ends))
        await stack.aclose()
        await until(lambda: all(map(nothing_left, ends)))
        return [session.stats().resumed for session in ends]


BREAKING = ["TLS", "read", "write", "half a write"]
BREAKING_CALLS = ["recv resets", "recv times out", "send breaks", "send finds no memory"]
HARMLESS_CALLS = ["recv again", "recv of a byte", "send again", "send of a byte"]


def needs_asyncio(operation):
    if operation.startswith(("recv", "send")) and not isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop):
        pytest.skip("uvloop makes its system calls itself")


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("operation", BREAKING + BREAKING_CALLS)
@each(13, 40, 150)
async def test_an_operation_of_the_connection_fails(certs, nth, operation, end, which):
    needs_asyncio(operation)
    resumed = await going_on(certs, nth, operation, end, which, anew=False)
    assert min(resumed) >= len(which)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("operation", BREAKING + BREAKING_CALLS)
@each(5, 25, 80)
async def test_an_operation_of_the_next_connection_fails(certs, nth, operation, end, which):
    """Within its handshake, the HELLOs, RESUME and RESUMED, what is sent again, and what follows."""
    needs_asyncio(operation)
    await going_on(certs, nth, operation, end, which, anew=True)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("operation", HARMLESS_CALLS)
@each(7, 40, 150)
async def test_a_system_call_does_less_than_was_asked(certs, nth, operation, end, which):
    needs_asyncio(operation)
    assert await going_on(certs, nth, operation, end, which, anew=False) == [0, 0]


@pytest.mark.parametrize("delay", [-60.0, 0.3])
@each(3, 12, 30)
async def test_a_timer_rings_at_the_wrong_time(certs, nth, monkeypatch, delay, which):
    set_alarm = Alarm.set

    def failing_set(self, when):
        set_alarm(self, when + delay if nth.hit("timer", "any") else when)

    monkeypatch.setattr(Alarm, "set", failing_set)
    assert await going_on(certs, nth, "timer", "any", which, anew=False) == [0, 0]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("operation", BREAKING + BREAKING_CALLS)
@each(4, 14, 14)
async def test_an_operation_of_the_first_connection_fails(certs, nth, operation, end, which):
    """Before there is a session nothing can be resumed; the worker tries again.

    At most nine operations of a kind make it; what follows are PINGs, one like another, of which the eleventh waits.
    """
    needs_asyncio(operation)
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane:
        for n in which:
            worker = kk.Worker([plane.address], tls=certs.worker())  # judges its certificate in a handshake with itself
            nth.arm(operation, end, n)
            async with asyncio.timeout(PATIENCE), worker:
                while not nth.fired:
                    with contextlib.suppress(kk.KonnektorError):
                        await (await worker.wait_connected()).ping()
                with contextlib.suppress(kk.KonnektorError):
                    await (await worker.wait_connected()).ping()
                await until(lambda: any(not session.suspended for session in plane))
                await (await worker.wait_connected()).ping()
            await until(lambda: not len(plane))


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("operation", ["receive", "chunks_to_send", "handle_timeout"])
@each(7, 25, 80)
async def test_a_defect_of_our_own_ends_the_session_cleanly(certs, nth, monkeypatch, operation, end, which, caplog):
    monkeypatch.setattr(drivers, "CLOSE_TIMEOUT", 0.5)
    async with target() as echo, connected(certs) as t:
        for n in which[:3] if operation == "handle_timeout" else which:
            ends = t.session, t.worker_session
            async with asyncio.timeout(PATIENCE), AsyncExitStack() as stack:
                streams = await open_streams(t, echo.port, stack)
                nth.arm(operation, end, n)
                while not nth.fired:
                    await asyncio.gather(
                        *(round_trip(stream, ROUND, digests) for stream, digests in streams), return_exceptions=True
                    )
                    await asyncio.sleep(PAUSE if operation in TIMED else 0)
                await until(lambda ends=ends: all(session.closed for session in ends))
                for stream, _ in streams:
                    with pytest.raises(kk.SessionLost):
                        while True:
                            await stream.receive()
            for session in ends:
                await session.wait_closed()
                assert not session.suspended
                await until(lambda session=session: nothing_left(session))
            assert "a defect, made up" in caplog.text
            async with asyncio.timeout(PATIENCE):
                t.worker_session = await t.worker.wait_connected()
                t.session = await t.plane.wait_for("node-1")
                await t.session.ping()
