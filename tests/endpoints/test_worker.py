"""The worker: connecting, reconnecting, several control planes, and how it ends."""

import asyncio
import contextlib
import errno
import math
import re
import socket
import threading

import anyio
import pytest

import konnektor as kk
import konnektor.targets
import konnektor.worker
from konnektor.driver import Driver
from konnektor.endpoint import Endpoint
from konnektor.testing import FaultProxy
from konnektor.worker import Backoff
from tests.endpoints.parts import PATIENCE, Resetting, Target, black_hole, target, tunnel, until, unused_port


async def test_streams_both_ways_need_permission(certs, log):
    async with target() as echo, tunnel(certs, allow=[f"127.0.0.1:{echo.port}"]) as t:
        async with await t.session.open_tcp("127.0.0.1", echo.port) as stream:
            await stream.send(b"hello")
            assert await stream.receive() == b"hello"
        with pytest.raises(kk.DeniedError):
            await t.session.open_tcp("127.0.0.1", unused_port())
        # The other way nothing is allowed unless granted.
        with pytest.raises(kk.DeniedError):
            await t.worker.sessions[0].open_tcp("127.0.0.1", echo.port)
    assert any("refused cp a stream to 127.0.0.1:" in line and "no rule" in line for line in log())
    assert any(f"refused node-1 a stream to 127.0.0.1:{echo.port}" in line for line in log())


async def test_nothing_is_allowed_by_default(certs):
    async with target() as echo, tunnel(certs) as t:
        t.worker.allow = kk.Worker(["h:1"], tls=certs.worker()).allow
        with pytest.raises(kk.DeniedError):
            await t.session.open_tcp("127.0.0.1", echo.port)


async def test_streams_of_the_worker_that_are_granted(certs):
    async with target() as echo:
        grants = [f"node-1=127.0.0.1:{echo.port}", ("node-2", kk.tcp("127.0.0.1", "*"))]
        async with tunnel(certs, plane={"allow_from": grants}) as t:
            async with await t.worker.sessions[0].open_tcp("127.0.0.1", echo.port) as stream:
                await stream.send(b"up")
                assert await stream.receive() == b"up"
            with pytest.raises(kk.DeniedError):  # that is node-2's
                await t.worker.sessions[0].open_tcp("127.0.0.1", unused_port())


class Ask(kk.StreamType):
    name = "ask@test.example"
    question: str


async def test_a_stream_type_of_ones_own(certs):
    async with tunnel(certs) as t:

        async def answer(stream, request):
            await stream.accept()
            await stream.send(f"{stream.session.peer_name} asked {request.question}".encode())

        t.worker.handle(Ask)(answer)
        t.plane.handle(Ask)(answer)
        async with await t.session.open(Ask("why")) as stream:
            assert await stream.receive() == b"cp asked why"
        async with await t.worker.sessions[0].open(Ask("how")) as stream:
            assert await stream.receive() == b"node-1 asked how"


async def test_a_handler_is_looked_at_where_it_is_given(certs):
    worker = kk.Worker(["127.0.0.1:1"], tls=certs.worker())
    with pytest.raises(kk.ConfigurationError, match="a stream type is"):

        @worker.handle  # without its type
        async def serve(stream, request): ...

    with pytest.raises(kk.ConfigurationError, match="not a coroutine function"):

        @worker.handle(Ask)
        def answer(stream, request): ...


async def test_a_target_that_resets_in_the_middle(certs):
    async with (
        target(Resetting) as server,
        tunnel(certs) as t,
        await t.session.open_tcp("127.0.0.1", server.port) as stream,
    ):
        await stream.send(b"x")
        assert await stream.receive() == b"half"
        with pytest.raises(kk.TargetResetError) as caught:
            await stream.receive()
    assert str(caught.value) == "target reset"


async def test_what_targets_answer(certs, monkeypatch):
    async with tunnel(certs) as t:
        with pytest.raises(kk.ConnectRefusedError):
            await t.session.open_tcp("127.0.0.1", unused_port())
        t.worker.set_allow([*t.worker.allow.rules, "no-such-host.invalid:1"])
        with pytest.raises(kk.DNSError):
            await t.session.open_tcp("no-such-host.invalid", 1)

        def no_socket(*_):
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as patch, pytest.raises(kk.LimitError):
            patch.setattr("konnektor.connecting.socket.SocketType", no_socket)
            await t.session.open_tcp("127.0.0.1", 1)


async def test_the_opener_gives_up_in_the_last_moment(certs, monkeypatch):
    """The target is connected, and then the stream cannot be accepted any more: its socket is closed."""
    honest = konnektor.targets.dial

    async def dial(*args, **kwargs):
        sock = await honest(*args, **kwargs)
        mux_stream = next(iter(t.worker.sessions[0]._mux.streams.values()))
        mux_stream.sink.on_cancel = None  # the cancellation comes too late
        opening.cancel()
        await until(lambda: mux_stream.sink.send_error is not None)
        return sock

    monkeypatch.setattr("konnektor.targets.dial", dial)
    async with target() as echo, tunnel(certs) as t:
        opening = asyncio.create_task(t.session.open_tcp("localhost", echo.port))
        with pytest.raises(asyncio.CancelledError):
            await opening
        await until(lambda: echo.made)
        await echo.made[0].lost
        assert not t.worker._targets._open


@pytest.mark.replaces_methods
async def test_a_target_that_cannot_be_joined_is_forgotten(certs, monkeypatch, log):
    async def splice(_stream, sock, **_):
        sock.close()
        raise RuntimeError("a bug")

    monkeypatch.setattr("konnektor.targets.splice", splice)
    async with target() as echo, tunnel(certs) as t:
        with pytest.raises(kk.StreamError):
            await t.session.open_tcp("localhost", echo.port)
        assert not t.worker._targets._open
        await until(lambda: echo.made)


# Connecting


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"connect": []}, "needs a list of control planes"),
        ({"connect": "127.0.0.1:1"}, "needs a list of control planes"),
        ({"connect": ["127.0.0.1"]}, "lacks a host or a port"),
        ({"connect": ["127.0.0.1:1"], "routes": ["everything"]}, "write host=NAME"),
        ({"connect": ["127.0.0.1:1"], "routes": "default"}, "routes takes a list, not 'default'"),
        ({"connect": ["127.0.0.1:1"], "routes": [7]}, "neither text nor a Route"),
        ({"connect": ["127.0.0.1:1"], "allow": "127.0.0.1:80"}, "allow takes a list, not '127.0.0.1:80': write"),
        (
            {"connect": ["127.0.0.1:1"], "allow": kk.tcp("127.0.0.1", 80)},
            "allow takes a list, not '127.0.0.1:80': write",
        ),
        ({"connect": ["127.0.0.1:1"], "allow": ["127.0.0.1"]}, "not HOST:PORTS"),
        ({"connect": ["127.0.0.1:1"], "allow": [8000]}, "rule 8000 is neither text nor an AllowRule: write"),
        ({"connect": ["127.0.0.1:1"], "allow": [("127.0.0.1", 80)]}, "neither text nor an AllowRule: write"),
        ({"connect": ["127.0.0.1:1"], "tls": "pki"}, r"tls takes TLSFiles\(...\), not 'pki'"),
        ({"connect": ["127.0.0.1:1"], "limits": 60}, r"limits takes Limits\(...\), not 60"),
        ({"connect": ["127.0.0.1:1"], "priorities": "*:22=bulk"}, "priorities takes a list"),
        ({"connect": ["127.0.0.1:1"], "priorities": [22]}, "priority 22 is neither text nor a PriorityRule: write"),
        ({"connect": ["127.0.0.1:1"], "server_name": "a b"}, "neither an IP address nor a DNS name"),
    ],
)
async def test_bad_arguments(certs, kwargs, text):
    with pytest.raises(kk.ConfigurationError, match=text):
        kk.Worker(**{"tls": certs.worker(), **kwargs})


async def test_a_control_planes_certificate_is_no_workers(certs):
    with pytest.raises(kk.CertificateError, match="is for a control-plane"):
        kk.Worker(["127.0.0.1:1"], tls=certs.plane)


async def test_starts_once(certs):
    worker = kk.Worker([f"127.0.0.1:{unused_port()}"], tls=certs.worker())
    async with worker:
        with pytest.raises(kk.ConfigurationError, match="started before"):
            await worker.start()
    with pytest.raises(kk.ConfigurationError, match="started before"):
        await worker.start()
    with pytest.raises(kk.SessionClosedError):
        await worker.wait_connected()
    await worker.wait_closed()


async def test_never_started(certs):
    worker = kk.Worker(["127.0.0.1:1"], tls=certs.worker())
    for use in (worker.wait_connected, worker.wait_closed):
        with pytest.raises(kk.ConfigurationError, match="the worker was not started: enter it with async with"):
            await use()
    await worker.aclose()
    await worker.wait_closed()
    assert not worker.sessions and not worker.connected
    with pytest.raises(kk.ConfigurationError, match="started before"):
        await worker.start()


async def why_not(certs, where, **kwargs):
    """What a worker that connects once says of an address without a control plane."""
    async with kk.Worker([where], tls=certs.worker(), once=True, **kwargs) as worker:
        told = []
        for wait in (worker.wait_connected, worker.wait_closed):
            with pytest.raises(kk.HandshakeError) as error:
                await wait()
            told.append(str(error.value))
    assert told[0] == told[1]
    return told[0].removeprefix(f"cannot reach the control plane at {where}: ")


async def test_once_and_nobody_there(certs):
    where = f"127.0.0.1:{unused_port()}"
    assert await why_not(certs, where) == "connection refused; start it, or check the port"


async def test_what_cannot_be_reached_is_told_without_its_address_twice(certs, monkeypatch):
    with black_hole() as port:
        limits = kk.Limits(hello_timeout=0.1)
        told = await why_not(certs, f"127.0.0.1:{port}", limits=limits)
        assert told == "it did not answer within 0.1 s; check the address and the firewalls"

    async def unreachable(*_):
        raise OSError(errno.ENETUNREACH, "secret")

    monkeypatch.setattr("konnektor.dial._connect", unreachable)
    assert await why_not(certs, "192.0.2.1:1") == "Network is unreachable"


async def test_once_and_the_control_plane_says_goodbye(certs):
    async with tunnel(certs, once=True) as t:
        await t.plane.drain(5)
        await t.worker.wait_closed()
        assert not t.worker.sessions and not t.worker.connected


async def test_once_and_the_connection_breaks(certs):
    async with tunnel(certs, once=True) as t:
        t.session.abort()
        with pytest.raises(kk.HandshakeError, match=r"broke: connection .*, and the peer says: no such session"):
            await t.worker.wait_closed()


async def test_reconnects(certs, log):
    async with tunnel(certs) as t:
        first = t.session
        first.abort()
        await until(lambda: t.plane.get("node-1") not in (None, first))
        assert (await t.worker.wait_connected()).peer_name == "cp"
        assert t.worker.connected == [t.plane.address]
    lines = log()
    assert sum(line.startswith("worker node-1 connected from") for line in lines) == 2
    assert any(line.startswith("worker node-1 at 127.0.0.1:") and "disconnected: " in line for line in lines)
    assert any(line.startswith(f"disconnected from cp at {t.plane.address}: connection") for line in lines)


async def test_keeps_trying_until_the_control_plane_is_there(certs, log):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        async with kk.Worker([address], tls=certs.worker()) as worker:
            await until(
                lambda: (
                    sum("connection refused; start it, or check the port; trying again in" in line for line in log())
                    >= 2
                )
            )
            taken.close()
            async with kk.ControlPlane(address, tls=certs.plane) as plane:
                assert (await plane.wait_for("node-1")).peer_name == "node-1"
                await worker.wait_connected()
                assert worker.connected == [address]


async def test_several_control_planes(certs):
    async with (
        target() as echo,
        kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as a,
        kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as b,
    ):
        where = [a.address, b.address, a.address]
        async with kk.Worker(where, tls=certs.worker(), allow=[kk.tcp("127.0.0.1", echo.port)]) as worker:
            for plane in (a, b):
                session = await plane.wait_for("node-1")
                async with await session.open_tcp("127.0.0.1", echo.port) as stream:
                    await stream.send(b"x")
                    assert await stream.receive() == b"x"
            assert sorted(worker.connected) == sorted([a.address, b.address])
            await a.aclose()
            await until(lambda: worker.connected == [b.address])


async def test_a_replacement_before_the_drained_session_ends(certs):
    """The control plane behind an address drains; another one takes over there, and open streams go on."""
    async with target() as echo, tunnel(certs) as t:
        old_stream = await t.session.open_tcp("127.0.0.1", echo.port)
        t.session.start_drain(20, "moving")
        await until(lambda: t.plane.get("node-1") not in (None, t.session))
        new = t.plane.get("node-1")
        assert not t.session.closed and new is not t.session
        async with await new.open_tcp("127.0.0.1", echo.port) as stream, old_stream:
            for each in (old_stream, stream):
                await each.send(b"on")
                assert await each.receive() == b"on"
        await t.session.wait_closed()
        assert t.plane.get("node-1") is new


async def test_a_defect_in_an_attempt_is_survived(certs, monkeypatch, log):
    attempts = []
    honest = konnektor.worker.dial

    async def dial(*args, **kwargs):
        attempts.append(args)
        if len(attempts) == 1:
            raise RuntimeError("a bug")
        return await honest(*args, **kwargs)

    monkeypatch.setattr("konnektor.worker.dial", dial)
    async with tunnel(certs):
        assert len(attempts) == 2 and "internal error" in log()


def test_backoff():
    backoff = Backoff(1, 8)
    assert backoff.fresh
    for upper in (1, 2, 4, 8, 8):
        assert upper / 2 <= backoff.next() <= upper
    assert not backoff.fresh
    backoff.reset()
    assert backoff.fresh and backoff.next() <= 1


async def test_sessions_that_drain_at_once_do_not_spin(certs, monkeypatch):
    delays = []
    monkeypatch.setattr(Backoff, "next", lambda self: delays.append(self) or setattr(self, "fresh", False) or 0.01)
    async with tunnel(certs) as t:
        for _ in range(3):
            session = await t.plane.wait_for("node-1")
            session.start_drain(0)
            await until(lambda session=session: t.plane.get("node-1") not in (None, session))
        assert len(delays) >= 3


@pytest.mark.parametrize(("calm", "forgiven"), [(-1, True), (math.inf, False)])
async def test_a_long_session_is_forgiven(certs, monkeypatch, calm, forgiven):
    monkeypatch.setattr("konnektor.worker.CALM", calm)
    resets = []
    monkeypatch.setattr(Backoff, "reset", lambda self: resets.append(self))  # noqa: PLW0108 - bound
    async with tunnel(certs) as t:
        t.session.abort()
        await until(lambda: t.plane.get("node-1") not in (None, t.session))
        assert bool(resets) is forgiven


# Two ways to one control plane


def also(address):
    """Another name for the same place."""
    return address.replace("127.0.0.1", "localhost")


def twins(log):
    return [line for line in log() if "lead to one control plane, cp, which keeps one session of a worker" in line]


async def test_one_address_in_two_spellings(certs, log):
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane:
        name = also(plane.address)
        async with kk.Worker([name, name.upper(), name], tls=certs.worker()) as worker:
            await plane.wait_for("node-1")
            await worker.wait_connected()
            assert worker.connected == [name]
            await asyncio.sleep(0.3)  # for what must not come
            assert sum(line.startswith("worker node-1 connected from") for line in log()) == 1


async def test_two_names_of_one_control_plane(certs, log, monkeypatch):
    """Each session replaced the other for ever, and their streams were cut off."""
    monkeypatch.setattr("konnektor.control_plane.REPLACED_GRACE", 0.5)
    async with target() as echo, kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane:
        names = [plane.address, also(plane.address)]
        async with kk.Worker(names, tls=certs.worker(), allow=["127.0.0.1:*"]) as worker:
            await until(lambda: twins(log) and len(plane._of["node-1"]) == 1)
            (first,) = worker.connected
            before = len([line for line in log() if line.startswith("connected to cp at")])
            async with await plane.open_tcp("127.0.0.1", echo.port, worker="node-1") as stream:
                await asyncio.sleep(1.5)
                await stream.send(b"x")
                assert await stream.receive() == b"x"
            assert len([line for line in log() if line.startswith("connected to cp at")]) == before
            assert worker.connected == [first] and plane._of["node-1"] == [plane.get("node-1")]
            # The other way takes over, and the first stays away.
            plane.get("node-1").close()
            await until(lambda: worker.connected and worker.connected != [first])
            await asyncio.sleep(0.5)
            assert worker.connected == [next(name for name in names if name != first)]
            assert len(plane._of["node-1"]) == 1
    (line,) = twins(log)
    assert line.endswith(f"staying with {first}; connect to one of the two only")


async def test_the_way_found_last_is_a_second_one_to_a_control_plane(certs, log):
    """What is open has its grace, and what is new goes to the newer session; nothing replaces that."""
    async with (
        target() as echo,
        kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane,
        FaultProxy(plane.address) as proxy,
    ):
        proxy.refuse()
        async with kk.Worker([plane.address, proxy.address], tls=certs.worker(), allow=["127.0.0.1:*"]) as worker:
            old = await plane.wait_for("node-1")
            stream = await old.open_tcp("127.0.0.1", echo.port)
            # Its HELLO is late: the session that was replaced hears of that first.
            proxy.admit()
            proxy.delay(0.3, to="client")
            await until(lambda: worker.connected == [proxy.address])
            await asyncio.sleep(0.5)
            assert worker.connected == [proxy.address] and old.draining and not old.closed
            await stream.send(b"x")
            assert await stream.receive() == b"x"
            await stream.aclose()
            await old.wait_closed()
            # A broken connection is no end: who came now would cut off what waits for it.
            stream = await plane.open_tcp("127.0.0.1", echo.port, worker="node-1")
            proxy.delay(0)
            proxy.cut()
            await stream.send(b"y")
            assert await stream.receive() == b"y"
            await stream.aclose()
            assert worker.connected == [proxy.address] and worker.sessions[0].stats().resumed == 1
    assert len(twins(log)) == 1


async def test_two_ways_to_a_control_plane_that_is_restarted(certs, log):
    async with contextlib.AsyncExitStack() as stack:
        plane = await stack.enter_async_context(kk.ControlPlane("127.0.0.1:0", tls=certs.plane))
        address = plane.address
        names = [address, also(address)]
        worker = await stack.enter_async_context(kk.Worker(names, tls=certs.worker()))
        await until(lambda: twins(log))
        await plane.aclose()
        async with kk.ControlPlane(address, tls=certs.plane) as plane:
            await plane.wait_for("node-1")
            await until(lambda: len(worker.connected) == 1 and len(plane._of["node-1"]) == 1)
            await asyncio.sleep(0.7)
            session = plane.get("node-1")
            await asyncio.sleep(0.7)
            assert plane._of["node-1"] == [session] and len(worker.connected) == 1
        await worker.aclose()
    assert len(twins(log)) == 1  # told once


async def test_control_planes_of_one_process_are_not_taken_for_one(certs, log):
    async with (
        kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as a,
        kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as b,
        kk.Worker([a.address, b.address], tls=certs.worker()) as worker,
    ):
        await until(lambda: len(worker.connected) == 2)
        a.get("node-1").close()
        await until(lambda: len(worker.connected) == 1)
        await until(lambda: len(worker.connected) == 2)
    assert not twins(log)


async def test_a_second_way_that_breaks_at_once_holds_up_nobody(certs, log):
    """It has replaced the session of the first, and is gone before its HELLO has come."""
    async with (
        kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane,
        FaultProxy(plane.address) as proxy,
    ):
        proxy.refuse()
        async with kk.Worker([plane.address, proxy.address], tls=certs.worker()) as worker:
            old = await plane.wait_for("node-1")
            await worker.wait_connected()
            proxy.admit()
            proxy.delay(0.3, to="client")
            await until(lambda: plane.get("node-1") not in (None, old))
            proxy.refuse()
            proxy.cut()
            await until(lambda: worker.connected == [plane.address])
            assert plane.get("node-1") is not old
    assert not twins(log)


# The end


async def test_drain_lets_streams_finish(certs):
    async with target() as echo, tunnel(certs) as t:
        stream = await t.session.open_tcp("127.0.0.1", echo.port)
        draining = asyncio.create_task(t.worker.drain(30))
        await until(lambda: t.plane.get("node-1") is None)
        with pytest.raises(kk.SessionClosedError):
            await t.session.open_tcp("127.0.0.1", echo.port)
        await stream.send(b"last")
        assert await stream.receive() == b"last"
        await stream.send_eof()
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()
        await draining
        assert t.session.closed
        assert bytes(echo.made[0].data) == b"last"


async def test_drain_resets_at_the_grace(certs):
    async with target() as echo, tunnel(certs) as t:
        stream = await t.session.open_tcp("127.0.0.1", echo.port)
        await t.worker.drain(0.1)
        with pytest.raises(kk.PeerError):
            await stream.receive()
        await stream.aclose()
        await echo.made[0].lost


class HalfOpen(Target):
    """Goes on after its client's end."""

    def eof_received(self):
        self.eof.set()
        return True


@pytest.mark.parametrize("which", ["worker", "plane"])
@pytest.mark.parametrize("grace", [0.0, 0.2])
async def test_streams_that_the_end_of_a_grace_cuts_off_are_told(certs, log, which, grace):
    async with target(HalfOpen) as echo, tunnel(certs) as t:
        draining, other = (t.worker, t.session) if which == "worker" else (t.plane, t.worker.sessions[0])
        done = await t.session.open_tcp("127.0.0.1", echo.port)
        await done.aclose()
        streams = [await t.session.open_tcp("127.0.0.1", echo.port) for _ in range(3)]
        await streams[0].send_eof()  # only its other half is left to be cut off
        await until(lambda: any(connection.eof.is_set() for connection in echo.made[1:]))
        await draining.drain(grace)
        await other.wait_closed()
        for stream in streams:
            await stream.aclose()
    (line,) = [line for line in log() if "cut off" in line]
    assert re.search(r"the grace is over: cut off 3 streams with (cp|node-1) at 127\.0\.0\.1:\d+$", line)


async def test_no_stream_is_called_cut_off_that_ended_within_the_grace(certs, log):
    async with target() as echo, tunnel(certs) as t:
        stream = await t.session.open_tcp("127.0.0.1", echo.port)
        draining = [asyncio.create_task(t.worker.drain(grace)) for grace in (PATIENCE, PATIENCE / 2)]
        await until(lambda: t.session.draining)
        await stream.send(b"last")
        await stream.send_eof()
        assert await stream.receive() == b"last"
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()
        await asyncio.gather(*draining)
    assert not any("cut off" in line for line in log())


@pytest.mark.replaces_methods
async def test_drain_waits_for_a_slow_target(certs, monkeypatch):
    """The stream is over, and so is the session, but its last bytes have not left this process."""
    size = 32 * 1024  # as much as may be sent before the target takes any
    begin_dial = konnektor.targets.begin_dial

    def dial(address):
        sock, connected = begin_dial(address)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return sock, connected

    monkeypatch.setattr("konnektor.targets.begin_dial", dial)
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        async with tunnel(certs) as t:
            stream = await t.session.open_tcp("127.0.0.1", listener.getsockname()[1])
            slow, _ = await loop.sock_accept(listener)
            with slow:
                await stream.send(bytes(size))
                (goal,) = t.worker._targets._open.values()
                transport = goal.stream.sink.transport
                await until(transport.get_write_buffer_size)
                await stream.aclose()
                draining = asyncio.create_task(t.worker.drain(30))
                await t.session.wait_closed()
                await until(lambda: not t.worker._live)
                assert not draining.done()
                received = 0
                while chunk := await loop.sock_recv(slow, 65536):
                    received += len(chunk)
                assert received == size
                await draining


async def test_cancelled_drain_drops_everything(certs):
    async with target() as echo, tunnel(certs) as t:
        stream = await t.session.open_tcp("127.0.0.1", echo.port)
        draining = asyncio.create_task(t.worker.drain(60))
        await until(lambda: t.session.draining)
        draining.cancel()
        with pytest.raises(asyncio.CancelledError):
            await draining
        with pytest.raises(kk.PeerError):
            await stream.receive()
        await stream.aclose()


async def test_drain_gives_up_on_a_peer_that_is_gone(certs, monkeypatch):
    monkeypatch.setattr("konnektor.endpoint.LAST_WORDS", 0.05)
    async with target() as echo, tunnel(certs) as t:
        stream = await t.session.open_tcp("127.0.0.1", echo.port)
        t.session._driver.transport.pause_reading()  # as good as gone
        await t.worker.drain(0)
        assert not t.worker._tasks
        t.session.abort()
        await stream.aclose()


async def test_drain_when_the_control_plane_is_gone_meanwhile(certs):
    async with target() as echo, tunnel(certs) as t:
        stream = await t.session.open_tcp("127.0.0.1", echo.port)
        draining = asyncio.create_task(t.worker.drain(60))
        await until(lambda: t.session.draining)
        t.session.abort()
        await draining
        assert stream.session.closed and not t.worker.sessions and not t.worker._tasks
        await stream.aclose()


async def test_cancelled_aclose_drops_connections(certs, monkeypatch):
    async with tunnel(certs) as t:
        (session,) = t.worker.sessions
        with monkeypatch.context() as patch:
            patch.setattr(Driver, "close", lambda _: None)  # as with a peer that never says goodbye
            closing = asyncio.create_task(t.worker.aclose())
            await until(lambda: session.closed and t.session.closed)
            assert not closing.done() and session._driver.transport is not None
            closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing
            try:
                await until(lambda: session._driver.transport is None)
            finally:
                session.abort()


async def test_aclose_while_dialing(certs):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"127.0.0.1:{silent.getsockname()[1]}"
        async with kk.Worker([where], tls=certs.worker()) as worker:
            accepted, _ = await asyncio.get_running_loop().run_in_executor(None, silent.accept)
            assert not worker.sessions
        accepted.close()


def test_an_endpoint_is_abstract():
    with pytest.raises(TypeError):
        Endpoint()


async def test_names_that_peers_ask_for_do_not_stand_in_the_way_back(certs, monkeypatch):
    """Whose servers are dead; of other such names no more are taken than may wait, and the peer hears of it at once."""
    getaddrinfo, answer, asked = socket.getaddrinfo, threading.Event(), []

    def asking(host, port, **options):
        asked.append(host)
        if host.endswith(".example"):
            answer.wait()
        return getaddrinfo("127.0.0.1", port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", asking)
    monkeypatch.setattr("konnektor.resolver.THREADS", 1)
    monkeypatch.setattr("konnektor.resolver.WAITING", 1)
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane:
        where = plane.address.replace("127.0.0.1", "localhost")
        allow = [kk.parse_allow("*.example:80")]
        async with kk.Worker([where], tls=certs.worker(), allow=allow, server_name="127.0.0.1") as worker:
            session = await plane.wait_for("node-1")
            opening = [asyncio.create_task(session.open_tcp(f"{name}.example", 80)) for name in ("a", "b")]
            try:
                await until(lambda: asked[-1] == "a.example" and worker.sessions[0].stream_count == 2)
                with pytest.raises(kk.LimitError) as refused:
                    await session.open_tcp("c.example", 80)
                assert refused.value.refused
                before = session.stats().resumed
                session._driver.transport.abort()
                await until(lambda: session.stats().resumed > before)
            finally:
                for task in opening:
                    task.cancel()
                await asyncio.gather(*opening, return_exceptions=True)
                answer.set()
