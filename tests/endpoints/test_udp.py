"""UDP through the tunnel: targets at the worker and at the control plane, and forwards, with real sockets."""

import asyncio
import contextlib
import socket
import sys
from pathlib import Path

import anyio
import pytest

import konnektor as kk
from konnektor import udp_relay, udp_wildcard
from konnektor.errors import DeniedError, DNSError, ListenError, UnreachableError, UnsupportedError
from konnektor.frontends.udp_forward import UdpForward
from tests.endpoints.parts import PATIENCE, Process, flags, tunnel, until
from tests.pair import Pair

LARGEST = 65_507
"""Bytes of the largest UDP packet over IPv4."""


class Server(asyncio.DatagramProtocol):
    """Answers each packet with ``answer(packet)``, if that is not None; keeps what came."""

    def __init__(self, answer):
        self._answer = answer
        self.seen = []
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, addr):
        self.seen.append((data, addr))
        answer = self._answer(data)
        if answer is not None:
            # asyncio's own sends nothing for an empty packet.
            self.sock.sendto(answer, addr)

    def connection_lost(self, exc):
        self.lost.set_result(None)

    @property
    def clients(self):
        return {addr for _, addr in self.seen}


@contextlib.asynccontextmanager
async def udp_server(answer=lambda data: data, port=0):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.bind(("127.0.0.1", port))
    _, server = await asyncio.get_running_loop().create_datagram_endpoint(lambda: Server(answer), sock=sock)
    server.sock = sock
    server.port = sock.getsockname()[1]
    try:
        yield server
    finally:
        server.transport.close()
        await server.lost


class Client:
    """A UDP socket of somebody who uses a forward."""

    def __init__(self, where):
        host, port = where.rsplit(":", 1)
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setblocking(False)
        self.sock.connect((host, int(port)))

    def send(self, data):
        self.sock.send(data)

    async def receive(self):
        """The next packet, looked for now and then: uvloop reads no connected sockets of others."""
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    return self.sock.recv(65_536)
                except BlockingIOError:
                    await asyncio.sleep(0.002)

    async def ask(self, data, *, every=PATIENCE):
        """The answer; asked again now and then, where it may get lost."""
        async with asyncio.timeout(PATIENCE):
            while True:
                self.send(data)
                with contextlib.suppress(TimeoutError):
                    return await asyncio.wait_for(self.receive(), every)


@contextlib.contextmanager
def clients(where, count=1):
    made = [Client(where) for _ in range(count)]
    try:
        yield made
    finally:
        for client in made:
            client.sock.close()


def unused_udp_port():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture
def quick_idle(monkeypatch):
    """Endpoints whose UDP streams end after a moment of silence."""

    def shorten(t, seconds=0.05):
        t.worker._targets.udp_idle = t.plane._targets.udp_idle = seconds

    return shorten


# Targets


async def test_echo_at_the_worker(certs):
    async with udp_server() as server, tunnel(certs, allow=["udp:127.0.0.1:*"]) as t:
        async with await t.session.open_udp("127.0.0.1", server.port) as stream:
            for data in (b"a", b"", b"x" * LARGEST):
                stream.send_datagram(data)
                assert await stream.receive_datagram() == data
        assert len(server.clients) == 1
        await until(lambda: not t.worker._targets._open)


async def test_at_the_control_plane(certs):
    async with udp_server() as server:
        grants = {"allow_from": [f"node-1=udp:127.0.0.1:{server.port}"]}
        async with tunnel(certs, plane=grants) as t:
            session = t.worker.sessions[0]
            async with await session.open_udp("127.0.0.1", server.port) as stream:
                stream.send_datagram(b"to the control plane")
                assert await stream.receive_datagram() == b"to the control plane"
            with pytest.raises(DeniedError):
                await session.open_udp("127.0.0.1", server.port + 1 if server.port < 65535 else 1)
            with pytest.raises(DeniedError):
                await session.open_tcp("127.0.0.1", server.port)


async def test_a_tcp_rule_opens_no_udp(certs, caplog):
    async with udp_server() as server, tunnel(certs, allow=["127.0.0.1:*", "0.0.0.0/0:*"]) as t:
        with pytest.raises(DeniedError):
            await t.session.open_udp("127.0.0.1", server.port)
        assert f"no rule inside 127.0.0.0/8 allows udp:127.0.0.1:{server.port}" in caplog.text
        assert not server.seen and not t.worker._targets._open


async def test_a_udp_rule_opens_no_tcp(certs):
    async with tunnel(certs, allow=[kk.udp("127.0.0.1", "*")]) as t:
        with pytest.raises(DeniedError):
            await t.session.open_tcp("127.0.0.1", 80)


async def test_by_name(certs):
    async with udp_server() as server, tunnel(certs, allow=["udp:127.0.0.1:*", "udp:*.invalid:*"]) as t:
        async with await t.session.open_udp("localhost", server.port) as stream:
            stream.send_datagram(b"x")
            assert await stream.receive_datagram() == b"x"
        with pytest.raises(DNSError):
            await t.session.open_udp("nobody.invalid", 53)


async def test_nobody_there_is_not_fatal(certs):
    """ICMP says that nobody listens; then somebody does."""
    port = unused_udp_port()
    async with tunnel(certs, allow=["udp:127.0.0.1:*"]) as t, await t.session.open_udp("127.0.0.1", port) as stream:
        for _ in range(5):
            stream.send_datagram(b"anybody?")
            await asyncio.sleep(0.01)
        async with udp_server(port=port):
            stream.send_datagram(b"and now?")
            assert await stream.receive_datagram() == b"and now?"


async def test_no_way_there(certs):
    # Allowed here, but not by the kernel, which gives broadcasts to those alone who ask for them.
    async with tunnel(certs, allow=["udp:255.255.255.255:*"]) as t:
        with pytest.raises(UnreachableError):
            await t.session.open_udp("255.255.255.255", 53)


async def test_packets_from_elsewhere_do_not_get_in(certs):
    async with (
        udp_server() as server,
        tunnel(certs, allow=["udp:127.0.0.1:*"]) as t,
        await t.session.open_udp("127.0.0.1", server.port) as stream,
    ):
        stream.send_datagram(b"first")
        assert await stream.receive_datagram() == b"first"
        (client,) = server.clients
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(b"forged", client)
        stream.send_datagram(b"second")
        assert await stream.receive_datagram() == b"second"


async def test_larger_than_udp_is_dropped(certs):
    async with udp_server() as server, tunnel(certs, allow=["udp:127.0.0.1:*"]) as t:
        async with await t.session.open_udp("127.0.0.1", server.port) as stream:
            stream.send_datagram(b"x" * (LARGEST + 1))
            stream.send_datagram(b"fits")
            assert await stream.receive_datagram() == b"fits"
        assert [data for data, _ in server.seen] == [b"fits"]


async def test_larger_than_the_peer_takes_is_dropped(certs):
    answers = iter([b"x" * 30_000, b"small"])
    limits = {"limits": kk.Limits(max_frame=20_000)}
    async with (
        udp_server(lambda _: next(answers)) as server,
        tunnel(certs, allow=["udp:127.0.0.1:*"], plane=limits) as t,
    ):
        async with await t.session.open_udp("127.0.0.1", server.port) as stream:
            stream.send_datagram(b"1")
            stream.send_datagram(b"2")
            assert await stream.receive_datagram() == b"small"
        assert t.worker.sessions[0].stats().datagrams_dropped == 1


async def test_idle_target_ends_the_stream(certs, quick_idle):
    async with udp_server() as server, tunnel(certs, allow=["udp:127.0.0.1:*"]) as t:
        quick_idle(t)
        stream = await t.session.open_udp("127.0.0.1", server.port)
        with pytest.raises(anyio.EndOfStream):
            await stream.receive_datagram()
        assert not t.worker._targets._open
        await stream.aclose()


class Clock:
    """Stands in for the loop: time moves when told, and the one timer is due when asked."""

    def __init__(self):
        self.now = 1000.0
        self.due = None
        self.loop = asyncio.get_running_loop()

    def time(self):
        return self.now

    def call_later(self, delay, call):
        self.due = self.now + delay
        return self.loop.call_later(3600, call)


async def test_traffic_keeps_it_open(monkeypatch):
    clock = Clock()
    ended = []
    stream = Pair().open(name="udp", datagrams=True)[0]
    with monkeypatch.context() as patch:
        patch.setattr(udp_relay.asyncio, "get_running_loop", lambda: clock)
        relay = udp_relay.UdpRelay(lambda _: None, ended.append, 60.0)
        patch.undo()
        relay.attach(stream)
        assert clock.due == 1060
        for used_at, received in ((1030, True), (1080, False)):
            clock.now = used_at
            if received:
                relay.datagram_received(memoryview(b"x"))
            else:
                relay.packet_received(b"x")
            clock.now, before = clock.due, relay._timer
            relay._check()
            before.cancel()
            assert clock.due == used_at + 60 and not ended
        clock.now = clock.due
        relay._check()
    assert ended == [None]
    # Nothing comes of what is late.
    relay.packet_received(b"late")
    relay.close()
    assert ended == [None]


async def test_bytes_of_a_udp_stream_are_discarded(certs):
    async with udp_server() as server, tunnel(certs, allow=["udp:127.0.0.1:*"]) as t:
        async with await t.session.open_udp("127.0.0.1", server.port) as stream:
            await stream.send(b"x" * 200_000)
            stream.send_datagram(b"datagram")
            assert await stream.receive_datagram() == b"datagram"
        assert [data for data, _ in server.seen] == [b"datagram"]


async def test_the_end_of_the_session_closes_the_socket(certs):
    async with udp_server() as server, tunnel(certs, allow=["udp:127.0.0.1:*"]) as t:
        stream = await t.session.open_udp("127.0.0.1", server.port)
        assert t.worker._targets._open
        t.session.abort()
        await until(lambda: not t.worker._targets._open)
        stream.close()


async def test_given_up_while_its_socket_is_made(certs, monkeypatch):
    made = asyncio.Event()
    never = asyncio.Event()

    async def create(*_args, **_kwargs):
        made.set()
        await never.wait()

    async with udp_server() as server, tunnel(certs, allow=["udp:127.0.0.1:*"]) as t:
        with monkeypatch.context() as patch:
            patch.setattr(asyncio.get_running_loop(), "create_datagram_endpoint", create, raising=False)
            opening = asyncio.create_task(t.session.open_udp("127.0.0.1", server.port))
            await made.wait()
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            await until(lambda: not t.worker._targets._open)


async def test_a_peer_without_datagrams(certs):
    async with tunnel(certs, allow=["udp:127.0.0.1:*"]) as t:
        t.session._mux.datagrams.agreed = False
        with pytest.raises(UnsupportedError):
            await t.session.open_udp("127.0.0.1", 53)


# Forwards


@contextlib.asynccontextmanager
async def forwarded(certs, server, **kwargs):
    async with tunnel(certs, allow=["udp:127.0.0.1:*"], **kwargs) as t:
        t.where = await t.plane.add_forward(f"udp:127.0.0.1:0=node-1/127.0.0.1:{server.port}")
        (t.forward,) = t.plane._clients._udp
        yield t


async def test_forward(certs):
    async with udp_server(lambda data: b"answer to " + data) as server, forwarded(certs, server) as t:
        with clients(t.where, 3) as several:
            for client in several:
                client.send(b"early, before the stream is open")
                client.send(b"")
                assert await client.receive() == b"answer to early, before the stream is open"
                assert await client.receive() == b"answer to "
            assert len(t.forward) == len(server.clients) == 3
            assert await several[0].ask(b"again") == b"answer to again"
        assert len(server.clients) == 3


async def test_largest_packet_through_a_forward(certs):
    async with udp_server() as server, forwarded(certs, server) as t:
        with clients(t.where) as (client,):
            assert await client.ask(b"x" * LARGEST) == b"x" * LARGEST


def own_addresses(family):
    """Addresses of this machine to be asked at, as sockets take them, without a port."""
    if family == socket.AF_INET:
        return [("127.0.0.1",), ("127.0.0.2",), ("127.0.0.3",)]
    found = []
    table = Path("/proc/net/if_inet6")
    for line in table.read_text(encoding="ascii").splitlines() if table.exists() else ():
        address, interface, _, scope, flags, _ = line.split()
        if not int(flags, 16) & 0x48:  # neither tentative nor a duplicate
            host = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address))
            found.append((host, 0, int(interface, 16) if scope == "20" else 0))
    return found


def at(address, port):
    return address[0], port, *address[1:]


linux = pytest.mark.skipif(sys.platform != "linux", reason="no other system tells where a packet was sent to")
families = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["v4", "v6"])


@linux
@families
async def test_a_forward_on_all_addresses_answers_from_the_one_that_was_asked(certs, family):
    """The kernel chose one by its routes, and connected clients took no answer from it."""
    addresses = own_addresses(family)
    if not addresses:
        pytest.skip("this machine has no IPv6")
    every = "0.0.0.0" if family == socket.AF_INET else "[::]"
    async with udp_server() as server, tunnel(certs, allow=["udp:127.0.0.1:*"]) as t:
        where = await t.plane.add_forward(f"udp:{every}:0=node-1/127.0.0.1:{server.port}")
        (forward,) = t.plane._clients._udp
        port = int(where.rsplit(":", 1)[1])
        asked = 0
        for source in addresses:
            for address in addresses:
                if source[1:] != address[1:]:
                    continue  # link-local ones know those of their interface
                client = Client.__new__(Client)
                with socket.socket(family, socket.SOCK_DGRAM) as client.sock:
                    client.sock.setblocking(False)
                    client.sock.bind(at(source, 0))
                    client.sock.connect(at(address, port))
                    for data in (b"query", b"", b"x" * LARGEST):
                        assert await client.ask(data) == data
                asked += 1
        assert len(forward) == len(server.clients) == asked


@linux
async def test_one_socket_that_asks_two_addresses_of_a_forward(certs):
    async with udp_server() as server, tunnel(certs, allow=["udp:127.0.0.1:*"]) as t:
        where = await t.plane.add_forward(f"udp:0.0.0.0:0=node-1/127.0.0.1:{server.port}")
        (forward,) = t.plane._clients._udp
        port = int(where.rsplit(":", 1)[1])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            answers = []

            def answered():
                with contextlib.suppress(BlockingIOError):
                    answers.append(sock.recvfrom(100))
                return len(answers) == 4

            for host in ("127.0.0.1", "127.0.0.2") * 2:
                sock.sendto(host.encode(), (host, port))
            await until(answered)
        assert sorted(answers) == sorted([(b"127.0.0.1", ("127.0.0.1", port)), (b"127.0.0.2", ("127.0.0.2", port))] * 2)
        assert len(forward) == len(server.clients) == 2


@linux
def test_where_an_answer_leaves_from():
    def answer_from(kind, info):
        level = socket.IPPROTO_IP if kind == udp_wildcard.IP_PKTINFO else socket.IPPROTO_IPV6
        (found,) = udp_wildcard._answer_from([(socket.SOL_SOCKET, 29, b"a time"), (level, kind, info)]) or [None]
        assert found is None or found[:2] == (level, kind)
        return found and found[2]

    def v6(address, interface):
        return socket.inet_pton(socket.AF_INET6, address) + interface.to_bytes(4, sys.byteorder)

    ours, broadcast = socket.inet_aton("192.0.2.7"), socket.inet_aton("192.0.2.255")
    three = (3).to_bytes(4, sys.byteorder)
    assert answer_from(udp_wildcard.IP_PKTINFO, three + ours + broadcast) == bytes(4) + ours + bytes(4)
    kind = udp_wildcard.IPV6_PKTINFO
    assert answer_from(kind, v6("2001:db8::7", 3)) == v6("2001:db8::7", 0)
    assert answer_from(kind, v6("fe80::7", 3)) == v6("fe80::7", 3)
    assert answer_from(kind, v6("ff02::fb", 3)) is None
    assert udp_wildcard._answer_from([]) == ()


@linux
async def test_a_socket_on_all_addresses(monkeypatch):
    closed = []

    def bound():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setblocking(False)
        sock.bind(("0.0.0.0", 0))
        assert udp_wildcard.is_wildcard(sock)
        return sock, udp_wildcard.WildcardSocket(sock, lambda *_: None, lambda: closed.append(sock))

    sock, local = bound()
    await local.open()
    gone = bytes(4) + socket.inet_aton("192.0.2.77") + bytes(4)  # not an address of this machine
    local.send(b"x", (("127.0.0.1", 9), ((socket.IPPROTO_IP, udp_wildcard.IP_PKTINFO, gone),)))
    assert local.dropped == 1
    local.close()
    local.close()
    local.send(b"x", (("127.0.0.1", 9), ()))
    assert local.dropped == 2 and sock.fileno() < 0
    await until(lambda: closed == [sock])

    def no_more(*_):
        raise OSError(28, "No space left on device")

    sock, local = bound()
    with monkeypatch.context() as patch:
        patch.setattr(asyncio.get_running_loop(), "add_reader", no_more, raising=False)
        with pytest.raises(OSError, match="No space left"):
            await local.open()
    assert sock.fileno() < 0 and closed[1:] == [sock]


async def test_a_thousand_senders_are_bounded(certs, monkeypatch):
    monkeypatch.setattr(UdpForward.__init__, "__kwdefaults__", {"idle": 60.0, "max_flows": 50})
    async with udp_server() as server, forwarded(certs, server) as t:
        most = 0
        with clients(t.where) as (regular,):
            assert await regular.ask(b"regular") == b"regular"
            host, port = t.where.rsplit(":", 1)
            for number in range(1000):
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                    sock.sendto(b"%d" % number, (host, int(port)))
                if number % 10 == 9:
                    await regular.ask(b"regular")  # used of late: it stays
                most = max(most, len(t.forward), t.session.stream_count)
            assert most <= 50 + 10  # those that are being closed, too
            assert len(t.forward) == 50
            regulars = {addr for data, addr in server.seen if data == b"regular"}
            assert len(regulars) == 1
        await until(lambda: t.session.stream_count == len(t.worker._targets._open) == 50)


async def test_idle_flows_end(certs, monkeypatch):
    monkeypatch.setattr(UdpForward.__init__, "__kwdefaults__", {"idle": 0.05, "max_flows": 50})
    async with udp_server() as server, forwarded(certs, server) as t:
        with clients(t.where) as (client,):
            assert await client.ask(b"one", every=0.2) == b"one"
            await until(lambda: not len(t.forward) and not t.worker._targets._open)
            assert await client.ask(b"two", every=0.2) == b"two"
        assert len(server.clients) >= 2


async def test_idle_at_the_target_ends_the_flow(certs, quick_idle):
    async with udp_server() as server, forwarded(certs, server) as t:
        quick_idle(t)
        with clients(t.where) as (client,):
            assert await client.ask(b"one", every=0.2) == b"one"
            await until(lambda: not len(t.forward))
            assert await client.ask(b"two", every=0.2) == b"two"


def refusals(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "konnektor.clients"]


async def test_denied_target(certs, caplog, monkeypatch):
    """One line and one question a second, whoever sends how much."""
    monkeypatch.setattr("konnektor.frontends.udp_forward.HOLD", 3600.0)
    async with tunnel(certs, allow=["127.0.0.1:*"]) as t:
        where = await t.plane.add_forward("udp:127.0.0.1:0=node-1/127.0.0.1:53")
        (forward,) = t.plane._clients._udp
        with clients(where, 5) as several:
            for client in several:
                client.send(b"x")  # all of them are asked for, before the first answer
            await until(lambda: refusals(caplog) and not len(forward))
            for client in several:
                client.send(b"x")
            await t.session.ping()
        assert len(refusals(caplog)) == 1
        assert "forward udp:127.0.0.1:0=node-1/127.0.0.1:53" in refusals(caplog)[0]


async def test_a_refused_target_is_asked_again(certs, caplog, monkeypatch):
    monkeypatch.setattr("konnektor.frontends.udp_forward.HOLD", 0.0)
    async with tunnel(certs, allow=["127.0.0.1:*"]) as t:
        where = await t.plane.add_forward("udp:127.0.0.1:0=node-1/127.0.0.1:53")
        with clients(where) as (client,):
            for count in (1, 2):
                client.send(b"x")
                await until(lambda: len(refusals(caplog)) == count)  # noqa: B023 - awaited here
        assert all("node-1/127.0.0.1:53" in line for line in refusals(caplog))


async def test_no_such_worker(certs, caplog):
    async with tunnel(certs) as t:
        where = await t.plane.add_forward("udp:127.0.0.1:0=node-2/127.0.0.1:53")
        with clients(where) as (client,):
            client.send(b"x")
            await until(lambda: "worker node-2 is not connected" in caplog.text)
            client.send(b"x")
            await t.session.ping()
        assert t.session.stats().datagrams_sent == 0 and t.session.stream_count == 0


async def test_the_session_breaks_and_the_next_packet_finds_the_new_one(certs):
    async with udp_server() as server, forwarded(certs, server) as t:
        with clients(t.where) as (client,):
            assert await client.ask(b"one") == b"one"
            t.session.abort()
            await until(lambda: not len(t.forward) and len(t.plane) == 0)
            await t.plane.wait_for("node-1")
            assert await client.ask(b"two") == b"two"


async def test_a_flow_outlives_its_connection(certs):
    async with udp_server() as server, forwarded(certs, server) as t:
        with clients(t.where) as (client,):
            assert await client.ask(b"one") == b"one"
            t.session._driver.abort()
            await until(lambda: t.session.stats().resumed == 1)
            assert await client.ask(b"two", every=1.0) == b"two"
        assert len(server.clients) == 1


async def test_drain_ends_flows(certs):
    async with udp_server() as server, forwarded(certs, server) as t:
        with clients(t.where, 2) as (client, other):
            assert await client.ask(b"one") == b"one"
            drain = asyncio.create_task(t.plane.drain(0.2))
            await until(lambda: t.plane._leaving)
            other.send(b"too late")
            await drain
            assert not t.plane._clients._udp


@pytest.mark.parametrize("who", ["worker", "plane"])
async def test_what_is_silent_ends_soon_in_a_drain(certs, monkeypatch, who):
    monkeypatch.setattr(udp_relay, "LEAVING", 0.05)
    async with udp_server() as server, forwarded(certs, server) as t:
        with clients(t.where) as (client,):
            assert await client.ask(b"one") == b"one"
            await getattr(t, who).drain(3600)
            assert not len(t.forward)


async def test_accepted_while_leaving(certs, monkeypatch):
    monkeypatch.setattr(udp_relay, "LEAVING", 0.05)
    async with udp_server() as server, tunnel(certs, allow=["udp:127.0.0.1:*"]) as t:
        t.worker._targets.leave()
        async with await t.session.open_udp("127.0.0.1", server.port) as stream:
            with pytest.raises(anyio.EndOfStream):
                await stream.receive_datagram()


async def test_address_in_use(certs):
    async with udp_server() as server, tunnel(certs) as t:
        with pytest.raises(ListenError, match="the address is in use"):
            await t.plane.add_forward(f"udp:127.0.0.1:{server.port}=node-1/127.0.0.1:53")


async def test_every_address_of_a_name(certs):
    async with udp_server() as server, tunnel(certs, allow=["udp:127.0.0.1:*"]) as t:
        where = await t.plane.add_forward(f"udp:localhost:0=node-1/127.0.0.1:{server.port}")
        with clients("127.0.0.1:" + where.rsplit(":", 1)[1]) as (client,):
            assert await client.ask(b"x") == b"x"


async def test_a_listener_that_cannot_read(certs, monkeypatch):
    async def create(*_args, **_kwargs):
        raise OSError(24, "Too many open files")

    async with tunnel(certs) as t:
        with monkeypatch.context() as patch:
            patch.setattr(asyncio.get_running_loop(), "create_datagram_endpoint", create, raising=False)
            with pytest.raises(OSError, match="Too many open files"):
                await t.plane.add_forward("udp:localhost:0=node-1/127.0.0.1:53")
        assert not t.plane._clients._udp


async def test_the_kernel_takes_no_more(certs):
    """What does not fit into the socket's buffer is dropped and counted, not queued."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        ours.setblocking(False)
        local = udp_relay.UdpSocket(ours, lambda *_: None, lambda: None)
        for _ in range(2000):
            local.send(b"x" * 1000)
        assert 0 < local.dropped < 2000


async def test_refused_is_an_answer_to_an_earlier_packet():
    sent = []

    class Refusing:
        def send(self, data):
            sent.append(bytes(data))
            if len(sent) != 2:
                raise ConnectionRefusedError

    local = udp_relay.UdpSocket(Refusing(), lambda *_: None, lambda: None)
    local.send(b"once more")
    assert sent == [b"once more"] * 2 and local.dropped == 0
    local.send(b"in vain")
    assert len(sent) == 4 and local.dropped == 1


async def test_the_command_line(certs, tmp_path):
    async with udp_server() as server:
        plane = ["control-plane", "--listen", "127.0.0.1:0", *flags(certs.plane)]
        plane += ["--grace", "100ms", "--forward", f"udp:127.0.0.1:0=node-1/127.0.0.1:{server.port}"]
        with Process(tmp_path / "plane", *plane) as control_plane:
            ready = await asyncio.to_thread(control_plane.ready)
            (where,) = ready["forward"]
            assert where.startswith("udp:127.0.0.1:") and where.endswith(f"->node-1/127.0.0.1:{server.port}")
            worker = ["worker", "--connect", ready["tunnel"][0], *flags(certs.worker()), "--grace", "100ms", "--allow"]
            with Process(tmp_path / "worker", *worker, f"udp:127.0.0.1:{server.port}") as process:
                await asyncio.to_thread(process.ready)
                with clients(where.removeprefix("udp:").partition("->")[0]) as (client,):
                    assert await client.ask(b"query") == b"query"
                await asyncio.to_thread(process.stop)
            await asyncio.to_thread(control_plane.stop)
