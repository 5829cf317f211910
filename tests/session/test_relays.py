"""The proxy for tests: what passes passes whole and in order, and every fault is the one that was asked for."""

import asyncio
import contextlib
import errno
import random
import socket
import struct
from contextlib import asynccontextmanager

import anyio
import pytest

import konnektor as kk
from konnektor.testing import FaultProxy, delaying_relay
from tests.endpoints.parts import Certificates

RST = struct.pack("ii", 1, 0)
FOREVER = 86_400.0
OTHER = {"client": "target", "target": "client"}


async def until(condition):
    while not condition():
        await anyio.sleep(0.001)


async def recv(sock, size=65_536):
    return await asyncio.get_running_loop().sock_recv(sock, size)


async def sendall(sock, data):
    await asyncio.get_running_loop().sock_sendall(sock, data)


async def recv_all(sock):
    """All up to the end, and what that was: None for EOF, or an errno."""
    received = bytearray()
    try:
        while chunk := await recv(sock):
            received += chunk
    except OSError as error:
        return bytes(received), error.errno
    return bytes(received), None


async def exactly(sock, count):
    received = b""
    while len(received) < count:
        chunk = await recv(sock, count - len(received))
        assert chunk
        received += chunk
    return received


async def passes(source, sink):
    """A round trip from one to the other and back: whatever was to come before has come."""
    for a, b in ((source, sink), (sink, source)):
        await sendall(a, b"ping")
        assert await exactly(b, 4) == b"ping"


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
    sock.close()


class Rig:
    """A proxy before a listening socket, and both ends of the connections through it."""

    def __init__(self, proxy, listener, stack):
        self.proxy = proxy
        self.listener = listener
        self._stack = stack

    async def dial(self):
        client = self._stack.enter_context(socket.socket())
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", self.proxy.port))
        return client

    async def connect(self):
        """The sockets of both sides, and the connection between them."""
        client = await self.dial()
        target, _ = await asyncio.get_running_loop().sock_accept(self.listener)
        target.setblocking(False)
        self._stack.enter_context(target)
        (connection,) = [each for each in self.proxy if each.peername == client.getsockname()]
        return {"client": client, "target": target}, connection


@asynccontextmanager
async def rig(**kwargs):
    with anyio.fail_after(30), contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.setblocking(False)
        async with FaultProxy(f"127.0.0.1:{listener.getsockname()[1]}", **kwargs) as proxy:
            yield Rig(proxy, listener, stack)
            stack.pop_all().close()


@pytest.fixture(params=["client", "target"])
def to(request):
    """The side that the direction in question leads to."""
    return request.param


# Without faults


@pytest.mark.parametrize("delay", [0.0, 0.005])
async def test_bytes_and_half_closes_pass(delay):
    async with rig(delay=delay) as r:
        ends, connection = await r.connect()
        await sendall(ends["client"], b"request")
        ends["client"].shutdown(socket.SHUT_WR)
        assert await recv_all(ends["target"]) == (b"request", None)
        await sendall(ends["target"], b"an answer")
        assert await exactly(ends["client"], 9) == b"an answer"
        ends["target"].shutdown(socket.SHUT_WR)
        assert await recv_all(ends["client"]) == (b"", None)
        await until(lambda: not len(r.proxy))
        assert (connection.delivered("target"), connection.delivered("client")) == (7, 9)
        stats = r.proxy.stats()
        assert (stats.connections, stats.to_target, stats.to_client, stats.faults) == (1, 7, 9, {})


async def test_a_reset_passes_as_a_reset(to):
    async with rig() as r:
        ends, _ = await r.connect()
        await passes(ends["client"], ends["target"])
        reset(ends[OTHER[to]])
        assert await recv_all(ends[to]) == (b"", errno.ECONNRESET)
        await until(lambda: not len(r.proxy))


async def test_a_reset_reaches_who_does_not_read(to):
    async with rig() as r:
        ends, connection = await r.connect()
        sender = asyncio.create_task(sendall(ends[OTHER[to]], bytes(64 << 20)))
        await until(lambda: not connection._links[to]._sink.writable)
        sender.cancel()
        reset(ends[OTHER[to]])
        await until(lambda: not len(r.proxy))
        assert (await recv_all(ends[to]))[1] == errno.ECONNRESET


@pytest.mark.parametrize("host", ["127.0.0.1", "224.0.0.1"], ids=["answers no", "is no host"])
async def test_a_target_that_is_not_there_resets(host):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nowhere = f"{host}:{listener.getsockname()[1]}"
    async with FaultProxy(nowhere) as proxy:
        with socket.socket() as client:
            client.setblocking(False)
            await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", proxy.port))
            assert await recv_all(client) == (b"", errno.ECONNRESET)
        assert not len(proxy)


async def test_leaving_resets_what_is_connected(to):
    async with rig() as r:
        ends, connection = await r.connect()
        connection.silence()
        await sendall(ends["client"], b"x")
        await r.proxy.__aexit__(None, None, None)
        assert await recv_all(ends[to]) == (b"", errno.ECONNRESET)
        await r.proxy.__aenter__()  # and it can be used again
        ends, _ = await r.connect()
        await passes(ends["client"], ends["target"])


async def test_many_come_and_go():
    async with rig(delay=0.001) as r:
        for step in range(30):
            ends, _ = await r.connect()
            await sendall(ends["client"], b"x")
            assert await recv(ends["target"]) == b"x"
            for end in ends.values():
                reset(end) if step % 2 else end.close()
        await until(lambda: not len(r.proxy))
        assert r.proxy.stats().connections == r.proxy.stats().to_target == 30


# Everything that only takes time leaves the bytes as they were


@pytest.mark.parametrize("buffer", [1, 1000, 300_000, 64 << 20])
async def test_integrity(buffer):
    rng = random.Random(buffer)
    size = 100 if buffer == 1 else 200_000 if buffer == 1000 else 4_000_000
    data = {side: rng.randbytes(size) for side in OTHER}
    async with rig(delay=0.002, buffer=buffer) as r:
        ends, connection = await r.connect()

        async def send(side):
            await sendall(ends[side], data[side])
            ends[side].shutdown(socket.SHUT_WR)

        async def disturb():
            for step in range(12):
                await anyio.sleep(0.003)
                to = rng.choice(["client", "target", None])
                match step % 4:
                    case 0:
                        connection.silence(to=to)
                    case 1:
                        connection.drip(rng.choice([10_000, 1_000_000]), to=to)
                    case 2:
                        connection.delay(rng.choice([0, 0.001, 0.01]), to=to)
                    case 3:
                        connection.resume()
            connection.drip(None)

        async with asyncio.TaskGroup() as group:
            group.create_task(disturb())
            group.create_task(send("client"))
            group.create_task(send("target"))
            received = {side: group.create_task(recv_all(ends[side])) for side in OTHER}
        for side, task in received.items():
            assert task.result() == (data[OTHER[side]], None)


async def test_delay_is_of_one_direction_and_later_bytes_do_not_overtake(to):
    async with rig() as r:
        ends, connection = await r.connect()
        connection.delay(FOREVER, to=to)
        await sendall(ends[OTHER[to]], b"first")
        await until(lambda: connection._links[to].room < 64 << 20)
        connection.delay(0)
        await sendall(ends[OTHER[to]], b"second")
        await sendall(ends[to], b"the other way")
        assert await recv(ends[OTHER[to]]) == b"the other way"
        await until(lambda: connection._links[to].room == (64 << 20) - 11)
        assert connection.delivered(to) == 0


async def test_a_relay_with_a_round_trip_is_a_proxy_with_half_of_it_each_way():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = f"127.0.0.1:{listener.getsockname()[1]}"
    relay = delaying_relay(target, 0.05, rate=1e6, buffer=1000)
    assert relay._delays == {"client": 0.025, "target": 0.025}
    assert relay._rates == {"client": 1e6, "target": 1e6}
    assert relay._buffer == 1000


async def test_settings_are_for_new_connections_too(to):
    async with rig() as r:
        r.proxy.delay(FOREVER, to=to)
        r.proxy.drip(1, to=OTHER[to])
        _, connection = await r.connect()
        assert [connection._links[side].delay for side in (to, OTHER[to])] == [FOREVER, 0]
        assert [connection._links[side]._rate for side in (to, OTHER[to])] == [None, 1]


async def test_a_drip_comes_byte_by_byte_and_can_be_lifted(to):
    async with rig() as r:
        ends, connection = await r.connect()
        connection.drip(40, to=to)
        await sendall(ends[OTHER[to]], b"drip" * 1000)
        assert await recv(ends[to], 100_000) == b"d"  # 20 ms' worth is less than one, so never two at once
        connection.drip(1 / FOREVER, to=to)
        so_far = connection.delivered(to)
        await sendall(ends[to], b"the other way")
        assert await recv(ends[OTHER[to]]) == b"the other way"
        assert connection.delivered(to) == so_far
        connection.drip(None)
        assert await exactly(ends[to], 3999) == (b"drip" * 1000)[1:]


async def test_the_buffer_is_bounded_and_the_sender_waits(to):
    async with rig(buffer=100_000) as r:
        ends, connection = await r.connect()
        connection.silence(to=to)
        data = random.Random(1).randbytes(8_000_000)
        sender = asyncio.create_task(sendall(ends[OTHER[to]], data))
        await until(lambda: connection._links[to].room == 0)
        await anyio.sleep(0.01)
        assert connection._links[to].room == 0 and not sender.done()
        connection.resume(to=to)
        assert await exactly(ends[to], len(data)) == data
        await sender


# Silence


async def test_silence_keeps_data_and_ends_until_it_is_over(to):
    async with rig() as r:
        ends, connection = await r.connect()
        r.proxy.silence(to=to)
        await sendall(ends[OTHER[to]], b"kept")
        ends[OTHER[to]].shutdown(socket.SHUT_WR)
        await sendall(ends[to], b"the other way")
        assert await recv(ends[OTHER[to]]) == b"the other way"
        await until(lambda: connection._links[to]._source._eof_received)
        assert connection.delivered(to) == 0
        r.proxy.resume()
        assert await recv_all(ends[to]) == (b"kept", None)


async def test_a_silent_reset_is_not_noticed(to):
    async with rig() as r:
        ends, connection = await r.connect()
        connection.silence(to=to)
        await sendall(ends[OTHER[to]], b"last")
        reset(ends[OTHER[to]])
        await until(lambda: connection._links[to]._source.lost)
        await sendall(ends[to], b"to nobody")  # goes on
        with pytest.raises(BlockingIOError):
            ends[to].recv(1)
        connection.resume()
        assert await recv_all(ends[to]) == (b"last", errno.ECONNRESET)


async def test_new_connections_pass_a_silence():
    async with rig() as r:
        ends, _ = await r.connect()
        r.proxy.silence()
        later, _ = await r.connect()
        await passes(later["client"], later["target"])
        with pytest.raises(BlockingIOError):
            ends["client"].recv(1)


# Ends


async def test_a_cut_resets_both_sides():
    async with rig() as r:
        ends, _ = await r.connect()
        await passes(ends["client"], ends["target"])
        r.proxy.cut()
        assert [await recv_all(end) for end in ends.values()] == [(b"", errno.ECONNRESET)] * 2
        assert not len(r.proxy)


async def test_one_connection_of_two():
    async with rig() as r:
        hit, connection = await r.connect()
        spared, _ = await r.connect()
        connection.cut()
        assert await recv_all(hit["target"]) == (b"", errno.ECONNRESET)
        await passes(spared["client"], spared["target"])
        assert len(r.proxy) == 1 and r.proxy.stats().faults == {"cut": 1}


async def test_both_sides_notice_a_cut_in_the_order_asked_for(to):
    async with rig() as r:
        ends, connection = await r.connect()
        r.proxy.cut(OTHER[to])
        assert await recv_all(ends[OTHER[to]]) == (b"", errno.ECONNRESET)
        await sendall(ends[to], b"to nobody")
        with pytest.raises(BlockingIOError):
            ends[to].recv(1)
        assert list(r.proxy) == [connection]
        r.proxy.cut()
        assert await recv_all(ends[to]) == (b"", errno.ECONNRESET)
        await until(lambda: not len(r.proxy))


async def test_the_other_side_notices_after_a_time(to):
    async with rig() as r:
        ends, _ = await r.connect()
        r.proxy.cut(OTHER[to], other_after=0.01)
        assert await recv_all(ends[OTHER[to]]) == (b"", errno.ECONNRESET)
        assert await recv_all(ends[to]) == (b"", errno.ECONNRESET)


async def test_leaving_before_the_other_side_has_noticed():
    async with rig() as r:
        ends, _ = await r.connect()
        r.proxy.cut("client", other_after=FOREVER)
        assert await recv_all(ends["client"]) == (b"", errno.ECONNRESET)


async def test_close_ends_both_directions_without_a_reset():
    async with rig() as r:
        ends, _ = await r.connect()
        r.proxy.silence()
        await sendall(ends["client"], b"lost")
        r.proxy.close()
        for end in ends.values():
            assert await recv_all(end) == (b"", None)
            await sendall(end, b"into nothing")  # and no reset for it
        for end in ends.values():
            assert await recv_all(end) == (b"", None)
            end.close()
        await until(lambda: not len(r.proxy))


@pytest.mark.parametrize("count", [1, 1000, 50_000])
async def test_cut_after_is_exact(to, count):
    async with rig(delay=0.001) as r:
        r.proxy.cut_after(count, to=to)
        ends, _ = await r.connect()
        data = random.Random(count).randbytes(300_000)
        with contextlib.suppress(ConnectionError):
            await sendall(ends[OTHER[to]], data)
        await until(lambda: not len(r.proxy))  # before anything is read
        assert await recv_all(ends[to]) == (data[:count], errno.ECONNRESET)
        assert (await recv_all(ends[OTHER[to]]))[1] == errno.ECONNRESET
        assert r.proxy.stats().faults == {"cut_after": 1}
        ends, _ = await r.connect()  # done once
        await sendall(ends[OTHER[to]], data)
        assert await exactly(ends[to], len(data)) == data


async def test_cut_after_nothing(to):
    async with rig() as r:
        r.proxy.cut_after(0, to=to)
        assert await recv_all(await r.dial()) == (b"", errno.ECONNRESET)
        r.proxy.cut_after(0, to=to)
        assert r.proxy.stats().faults == {"cut_after": 1}


async def test_cut_after_counts_from_the_call_and_each_connection_by_itself(to):
    async with rig() as r:
        slow, _ = await r.connect()
        fast, _ = await r.connect()
        await sendall(fast[OTHER[to]], b"before")
        assert await exactly(fast[to], 6) == b"before"
        r.proxy.cut_after(5, to=to)
        await sendall(slow[OTHER[to]], b"four")
        assert await exactly(slow[to], 4) == b"four"
        await sendall(fast[OTHER[to]], b"fives")
        assert await recv_all(fast[to]) == (b"fives", errno.ECONNRESET)
        await sendall(slow[OTHER[to]], b"and on")
        assert await exactly(slow[to], 6) == b"and on"


async def test_cut_after_can_be_called_off(to):
    async with rig() as r:
        ends, connection = await r.connect()
        connection.cut_after(3, to=to)
        r.proxy.cut_after(4, to=to)
        r.proxy.cut_after(None, to=to)
        await passes(ends["client"], ends["target"])


async def test_cut_after_waits_for_a_receiver_that_does_not_read_yet(to):
    count = 16_000_000  # more than the kernel's buffers hold
    async with rig() as r:
        ends, connection = await r.connect()
        connection.cut_after(count, to=to)
        sender = asyncio.create_task(sendall(ends[OTHER[to]], bytes(count)))
        await until(lambda: not connection._links[to]._sink.writable)
        received, how = await recv_all(ends[to])
        assert (len(received), how) == (count, errno.ECONNRESET)
        await sender


# New connections


async def test_refuse_and_admit():
    async with rig() as r:
        ends, _ = await r.connect()
        port = r.proxy.port
        r.proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await r.dial()
        await passes(ends["client"], ends["target"])
        r.proxy.admit()
        assert r.proxy.port == port
        ends, _ = await r.connect()
        await passes(ends["client"], ends["target"])


async def test_swallowed_connections_lead_nowhere():
    async with rig() as r:
        r.proxy.swallow()
        clients = [await r.dial() for _ in range(3)]
        await until(lambda: len(r.proxy) == 3)
        for client in clients:
            await sendall(client, b"hello?")
        r.proxy.admit()
        ends, connection = await r.connect()  # the listener's first
        await passes(ends["client"], ends["target"])
        for client in clients:
            with pytest.raises(BlockingIOError):
                client.recv(1)
        assert r.proxy.stats().faults == {"swallow": 3}
        first, second, _, passing = r.proxy
        assert passing is connection
        first.cut()
        assert await recv_all(clients[0]) == (b"", errno.ECONNRESET)
        second.close()
        assert await recv_all(clients[1]) == (b"", None)
        clients[1].close()
        reset(clients[2])
        await until(lambda: list(r.proxy) == [passing])


# With konnektor itself


async def test_a_worker_comes_back(tmp_path):
    certs = Certificates(tmp_path)
    async with (
        asyncio.timeout(30),
        kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane,
        FaultProxy(plane.address) as proxy,
    ):
        proxy.cut_after(500, to="target")  # within the TLS handshake
        async with kk.Worker([proxy.address], tls=certs.worker(), allow=[]) as worker:
            await worker.wait_connected()
            session = await plane.wait_for("node-1")
            proxy.delay(0.005)
            await session.ping()
            proxy.silence()
            ping = asyncio.create_task(session.ping())
            await anyio.sleep(0.01)
            assert not ping.done()
            proxy.resume()
            await ping
            (connection,) = proxy
            connection.cut("client")
            await until(lambda: len(proxy) == 2)
            connection.cut("target")
            await until(lambda: session.stats().resumed)
            await session.ping()
            assert plane.get("node-1") is session
        assert proxy.stats().connections == 3


# Arguments


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: p.delay(-1), "seconds must be a number of seconds of at least 0, not -1"),
        (lambda p: p.delay(float("nan")), "of at least 0, not nan"),
        (lambda p: p.drip(0), "rate must be bytes a second, above 0, or None"),
        (lambda p: p.drip("1"), "not '1'"),
        (lambda p: p.delay(1, to="up"), "'up' is not a side"),
        (lambda p: p.silence(to="up"), "'up' is not a side"),
        (lambda p: p.resume(to="up"), "'up' is not a side"),
        (lambda p: p.cut("worker"), "'worker' is not a side"),
        (lambda p: p.cut(other_after=1), "other_after needs first"),
        (lambda p: p.cut("client", other_after=-1), "other_after must be a number of seconds"),
        (lambda p: p.cut_after(-1, to="client"), "count must be a number of bytes of at least 0, not -1"),
        (lambda p: p.cut_after(1.5, to="client"), "not 1.5"),
        (lambda p: p.cut_after(1, to="up"), "'up' is not a side"),
        (lambda p: p.address, "the proxy was not started"),
        (lambda p: p.port, "the proxy was not started"),
        (lambda _: FaultProxy("127.0.0.1"), "port"),
        (lambda _: FaultProxy("127.0.0.1:1", delay=-1), "delay must be a number of seconds"),
        (lambda _: FaultProxy("127.0.0.1:1", rate=0), "rate must be"),
        (lambda _: FaultProxy("127.0.0.1:1", buffer=0), "buffer must be a number of bytes of at least 1, not 0"),
        (lambda _: delaying_relay("127.0.0.1:1", -1), "round_trip must be"),
    ],
)
async def test_bad_arguments(call, words):
    with pytest.raises(kk.ConfigurationError) as caught:
        call(FaultProxy("127.0.0.1:1"))
    assert words in str(caught.value)


async def test_an_address_in_use():
    async with rig() as r:
        with pytest.raises(kk.ListenError, match=r"cannot listen on 127\.0\.0\.1:\d+: Address already in use"):
            await FaultProxy("127.0.0.1:1", listen=r.proxy.address).__aenter__()


async def test_a_target_that_does_not_resolve():
    with pytest.raises(kk.ConfigurationError, match=r"target nowhere\.invalid:1 does not resolve"):
        await FaultProxy("nowhere.invalid:1").__aenter__()
