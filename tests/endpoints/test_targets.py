"""Targets that are addresses: dialed without a task, at once or by callbacks."""

import asyncio
import contextlib
import socket

import pytest

import konnektor as kk
import konnektor.targets
from konnektor.stream_types import StreamType
from konnektor.targets import DIALS_A_TURN, KEPT_ALIVE_A_TURN, OLD, Targets, begin_dial
from tests.endpoints.parts import Goodbye, target, tunnel, until, unused_port
from tests.session.pairs import assert_options
from tests.session.test_dial import silent


@pytest.fixture(params=["at once", pytest.param("later", marks=pytest.mark.replaces_methods)])
def connecting(request, monkeypatch):
    """Connections on loopback are there at once; ``later`` has them awaited all the same."""
    if request.param == "later":
        monkeypatch.setattr("konnektor.connecting._is_connected", lambda _sock: False)
    return request.param


def at_rest(t):
    """Nothing is left of any stream, at the worker."""
    mux = t.worker.sessions[0]._mux
    targets = t.worker._targets
    return not mux.streams and not targets._new and not targets._open and mux.admission.retired == mux.admission.taken


async def test_no_stream_to_an_address_needs_a_task(certs, connecting):
    async with target() as echo, target(Goodbye) as polite, tunnel(certs) as t:
        stream = await t.session.open_tcp("127.0.0.1", echo.port, early=True)
        await stream.send(b"early")  # with the OPEN
        await stream.opened()
        assert not t.worker.sessions[0]._tasks
        assert await stream.receive() == b"early"
        await stream.send_eof()
        await echo.made[0].eof.wait()
        await stream.aclose()
        async with await t.session.open_tcp("127.0.0.1", polite.port) as stream:
            await stream.send(b"x")
            assert await stream.receive() == b"bye"
            await stream.send(b"y")
            await stream.send_eof()
            await polite.made[0].eof.wait()
            assert polite.made[0].data == b"xy"
        await until(lambda: at_rest(t))


@pytest.fixture
def held(monkeypatch):
    """Streams are opened, and not dialed for before this is called with their worker's targets."""
    dial = Targets._connect_new
    monkeypatch.setattr(Targets, "_connect_new", lambda _targets: None)
    return dial


@pytest.mark.replaces_methods
async def test_a_target_has_its_first_bytes_before_the_next_is_dialed(certs, held, monkeypatch):
    first = []

    def watching(address):
        if dialed:
            with dialed[0].accept()[0] as reached:
                reached.settimeout(10)
                first.append(reached.recv(99))
        dialed.append(listening)
        return begin_dial(address)

    monkeypatch.setattr("konnektor.targets.begin_dial", watching)
    dialed = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(10)
        port = listening.getsockname()[1]
        async with tunnel(certs) as t:
            streams = [await t.session.open_tcp("127.0.0.1", port, early=True) for _ in range(2)]
            for number, stream in enumerate(streams):
                await stream.send(b"early %d" % number)
            inboxes = t.worker.sessions[0]._mux.streams.values
            await until(lambda: len(inboxes()) == 2 and all(stream.sink.chunks for stream in inboxes()))
            held(t.worker._targets)
            assert first == [b"early 0"]
            for stream in streams:
                stream.close()


@pytest.mark.replaces_methods
async def test_of_many_new_streams_a_few_are_dialed_for_in_each_turn(certs, held, monkeypatch):
    """The next ones are asked for last: what there is to be sent by then goes out first."""

    def dial(address):
        assert not targets._scheduled
        return begin_dial(address)

    async with target() as echo, tunnel(certs) as t:
        targets = t.worker._targets
        monkeypatch.setattr("konnektor.targets.begin_dial", dial)
        opened = 2 * DIALS_A_TURN + 1
        streams = [await t.session.open_tcp("127.0.0.1", echo.port, early=True) for _ in range(opened)]
        await until(lambda: len(targets._new) == opened)
        for left in (DIALS_A_TURN + 1, 1, 0):
            held(targets)
            assert len(targets._new) == left
            assert targets._scheduled == (left > 0)
        for stream in streams:
            await stream.opened()
            stream.close()
        await until(lambda: at_rest(t))


async def test_none_of_many_new_streams_waits_for_another_to_be_opened(certs):
    async with target() as echo, tunnel(certs) as t:
        streams = [await t.session.open_tcp("127.0.0.1", echo.port, early=True) for _ in range(3 * DIALS_A_TURN)]
        for number, stream in enumerate(streams):
            await stream.send(b"%d" % number)
        for number, stream in enumerate(streams):
            assert await stream.receive() == b"%d" % number
            stream.close()
        await until(lambda: at_rest(t))


@pytest.mark.replaces_methods
@pytest.mark.parametrize("how", ["cancel", "close", "abort"])
async def test_who_gives_up_before_the_dial_leaves_nothing(certs, held, how):
    async with target() as echo, tunnel(certs, limits=kk.Limits(resume_grace=0)) as t:
        client, targets = t.worker.sessions[0], t.worker._targets
        opening = asyncio.create_task(t.session.open_tcp("127.0.0.1", echo.port))
        await until(lambda: targets._new)
        getattr(opening if how == "cancel" else client, how)()
        await until(lambda: not targets._new)
        held(targets)
        with pytest.raises(asyncio.CancelledError if how == "cancel" else kk.PeerError):
            await opening
        if how == "cancel":
            await until(lambda: at_rest(t))
        assert not echo.made and not targets._open


@pytest.mark.replaces_methods
async def test_the_session_ends_while_the_first_of_two_is_dialed(certs, held, monkeypatch):
    async with target() as echo, tunnel(certs, limits=kk.Limits(resume_grace=0)) as t:
        client, targets = t.worker.sessions[0], t.worker._targets

        def ending(address):
            client.abort()
            return begin_dial(address)

        monkeypatch.setattr("konnektor.targets.begin_dial", ending)
        opening = [asyncio.create_task(t.session.open_tcp("127.0.0.1", echo.port)) for _ in range(2)]
        await until(lambda: len(targets._new) == 2)
        held(targets)
        assert not targets._new
        for task in opening:
            with pytest.raises(kk.PeerError):
                await task
        await until(lambda: not targets._open and len(echo.made) == 1 and echo.made[0].lost.done())


async def test_a_target_that_refuses(certs, log):
    async with tunnel(certs) as t:
        stream = await t.session.open_tcp("127.0.0.1", port := unused_port(), early=True)
        await stream.send(b"for nobody")
        with pytest.raises(kk.ConnectRefusedError) as refused:
            await stream.opened()
        assert refused.value.refused
        await stream.aclose()
        await until(lambda: at_rest(t))
    assert any(f"refused cp a stream to 127.0.0.1:{port}: 127.0.0.1:{port}: ECONNREFUSED" in line for line in log())


@pytest.mark.parametrize("early", [b"", b"data"])
async def test_the_opener_gives_up_while_the_target_is_dialed(certs, early):
    with silent("127.0.0.1") as port:
        async with tunnel(certs) as t:
            mux = t.worker.sessions[0]._mux
            stream = await t.session.open_tcp("127.0.0.1", port, early=True)
            await stream.send(early)
            await until(lambda: mux.streams)
            await asyncio.sleep(0.01)
            assert not t.worker.sessions[0]._tasks
            stream.reset()
            await until(lambda: mux.admission.taken == 1 and at_rest(t))


async def test_the_opener_gives_up_with_its_open(certs, connecting):
    """OPEN and STOP in one reading."""
    async with target() as echo, tunnel(certs) as t:
        for _ in range(50):
            stream = await t.session.open_tcp("127.0.0.1", echo.port, early=True)
            await asyncio.sleep(0)
            stream.reset()
        await until(lambda: not t.session.stream_count and at_rest(t))


async def test_the_deadline_ends_a_dial(certs):
    with silent("127.0.0.1") as port:
        async with tunnel(certs) as t:
            with pytest.raises(kk.DialTimeoutError):
                await t.session.open_tcp("127.0.0.1", port, deadline=0.05)
            await until(lambda: at_rest(t))


@pytest.mark.parametrize("host", ["evil\rINFO forged", "\x1b[2Jred", "a\u2028b", "a\nb:c", "127.1"])
async def test_what_a_peer_calls_a_host_is_quoted_in_the_log(certs, log, monkeypatch, host):
    # An honest peer would not send it.
    monkeypatch.setattr("konnektor.stream_types._header", lambda kind, host, port: StreamType.encode(kind(host, port)))
    async with tunnel(certs) as t:
        for open_stream in (t.session.open_tcp, t.session.open_udp):
            with pytest.raises(kk.StreamError):
                await open_stream(host, 80)
        await until(lambda: sum("refused cp a stream to" in line for line in log()) == 2)
    assert all(line.isprintable() for line in log())
    assert any(f"refused cp a stream to {host!a}:80: " in line or f"[{host!a}]:80: " in line for line in log())


@pytest.mark.parametrize("end", ["close", "abort", "drain"])
async def test_the_session_ends_while_a_target_is_dialed(certs, end):
    with silent("127.0.0.1") as port:
        async with tunnel(certs, limits=kk.Limits(resume_grace=0)) as t:
            client = t.worker.sessions[0]
            opening = asyncio.create_task(t.session.open_tcp("127.0.0.1", port))
            await until(lambda: client._mux.streams)
            if end == "drain":
                client.start_drain(0.05)
            else:
                getattr(client, end)()
            with pytest.raises(kk.PeerError):
                await opening
            await client.wait_closed()


@pytest.mark.replaces_methods
async def test_the_rules_change_while_an_address_is_dialed(certs, monkeypatch, connecting):
    async with target() as echo, tunnel(certs) as t:

        def meanwhile(address):
            sock, _ = begin_dial(address)
            t.worker.set_allow([])
            return sock, False

        monkeypatch.setattr("konnektor.targets.begin_dial", meanwhile)
        with pytest.raises(kk.DeniedError) as refused:
            await t.session.open_tcp("127.0.0.1", echo.port)
        assert refused.value.refused
        await until(lambda: echo.made and echo.made[0].lost.done())
        assert at_rest(t)


@pytest.mark.replaces_methods
async def test_a_target_whose_connection_cannot_be_joined(certs, monkeypatch, connecting, log):
    """A defect ends its own stream alone."""
    join = konnektor.targets.join

    def fail(_stream, sock, **_):
        sock.close()
        raise RuntimeError("a bug")

    async with target() as echo, tunnel(certs) as t:
        monkeypatch.setattr("konnektor.targets.join", fail)
        with pytest.raises(kk.StreamError) as refused:
            await t.session.open_tcp("127.0.0.1", echo.port)
        assert refused.value.code == kk.Code.INTERNAL
        await until(lambda: echo.made and at_rest(t))
        monkeypatch.setattr("konnektor.targets.join", join)
        async with await t.session.open_tcp("127.0.0.1", echo.port) as stream:
            await stream.send(b"on")
            assert await stream.receive() == b"on"
    assert any("the handler of a tcp stream failed" in line for line in log())


async def test_connections_that_last_are_kept_alive(certs):
    """However their targets were dialed, and however many there are; those that are over by then are not looked at."""
    loop = asyncio.get_running_loop()
    async with target() as echo, tunnel(certs, allow=["localhost:*", "127.0.0.1:*"]) as t:
        targets, streams = t.worker._targets, []
        assert targets._ageing is None
        for hosts in (["127.0.0.1", "localhost", "127.0.0.1"], ["127.0.0.1", "localhost"]):
            before = loop.time()
            streams += [await t.session.open_tcp(host, echo.port) for host in hosts]
            (await t.session.open_tcp("127.0.0.1", echo.port)).close()
            opened = len(streams)
            await until(lambda opened=opened: len(targets._open) == opened)
            young = list(targets._young)
            assert {sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for sock in young} == {0}
            assert before < targets._ageing.when() <= loop.time() + OLD
            targets._ageing.cancel()
            targets._keep_alive()
            assert targets._ageing is None
            for sock in targets._open:
                assert_options(sock)
        targets._keep_alive()  # nobody has come of age
        for stream in streams:
            stream.close()


async def test_those_that_come_of_age_together_take_turns(certs):
    async with target() as echo, tunnel(certs) as t:
        targets = t.worker._targets
        async with await t.session.open_tcp("127.0.0.1", echo.port):
            (last,) = targets._young
            with contextlib.ExitStack() as stack:
                others = [stack.enter_context(socket.socket()) for _ in range(KEPT_ALIVE_A_TURN)]
                targets._young = {**dict.fromkeys(others), last: None}
                targets._ageing.cancel()
                targets._keep_alive()
                for sock in others:
                    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                assert last.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
                await until(lambda: not targets._young)
                assert_options(last)
        await until(lambda: at_rest(t))


async def test_nothing_is_left_of_those_that_were_to_be_kept_alive(certs):
    async with target() as echo, tunnel(certs) as t:
        targets = t.worker._targets
        async with await t.session.open_tcp("127.0.0.1", echo.port):
            ageing = targets._ageing
        await until(lambda: at_rest(t))
        assert not targets._young
    assert ageing.cancelled()
    assert targets._ageing is None


async def test_clients_have_the_options_of_their_listener(certs):
    async with target() as echo, tunnel(certs) as t:
        at = await t.plane.add_forward(f"127.0.0.1:0=node-1/127.0.0.1:{echo.port}")
        host, _, port = at.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        await until(lambda: echo.made)
        (transport,) = t.plane._clients._here
        client = transport.get_extra_info("socket")
        assert_options(client)
        writer.close()
        await writer.wait_closed()
