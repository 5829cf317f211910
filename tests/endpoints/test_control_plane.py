"""The control plane: who gets in, under which name and with which routes, and what becomes of their streams."""

import asyncio
import contextlib
import dataclasses
import socket
import ssl
import struct

import pytest

import konnektor as kk
import konnektor.control_plane
import konnektor.frontends.clients
import konnektor.worker
from konnektor.addresses import parse_forward, parse_hostport
from konnektor.dial import dial
from konnektor.frames import HEADER
from konnektor.frontends.udp_forward import UdpForward
from konnektor.policy import AllowList
from konnektor.router import parse_route
from konnektor.settings import Settings
from konnektor.testing import FaultProxy
from tests.endpoints.parts import (
    Certificates,
    Goodbye,
    Resetting,
    black_hole,
    connection,
    reset,
    target,
    tunnel,
    until,
    unused_port,
)

BEGUN = b"\x16\x03\x01\x02"
"""The first bytes of a TLS handshake."""


@contextlib.asynccontextmanager
async def another_process(plane, files, monkeypatch, **kwargs):
    """A worker that looks to the control plane like one of another process."""
    with monkeypatch.context() as patch:
        patch.setattr("konnektor.worker.INSTANCE", bytes(16))
        worker = kk.Worker([plane.address], tls=files, **kwargs)
    async with worker:
        yield worker


@contextlib.asynccontextmanager
async def connection_to(plane):
    async with connection(plane.address) as pair:
        yield pair


# Who gets in


async def refused(plane, files, **kwargs):
    """The one sentence that a worker gets."""
    async with kk.Worker([plane.address], tls=files, once=True, **kwargs) as worker:
        with pytest.raises(kk.HandshakeError) as caught:
            await worker.wait_connected()
    text = str(caught.value)
    assert "\n" not in text
    return text


async def test_a_foreign_certificate(certs, foreign, log):
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane:
        theirs = foreign.worker()
        # Of the CA that the control plane is checked by, but not issued by it: an own file that cannot be used.
        with pytest.raises(kk.CertificateError, match="was not issued by a CA in"):
            kk.Worker([plane.address], tls=dataclasses.replace(theirs, ca=certs.ca))
        text = await refused(plane, theirs)
        assert f"the certificate of the control plane at {plane.address} was not issued by a CA that we trust" in text
    assert any("refused our certificate: unknown ca" in line for line in log())


async def test_another_trust_domain_of_the_same_ca(certs, tmp_path, log):
    # One CA file may hold several CAs, each with its domain.
    other = Certificates(tmp_path / "other", "elsewhere.example")
    both = tmp_path / "both.pem"
    both.write_bytes(certs.ca.read_bytes() + other.ca.read_bytes())
    theirs = dataclasses.replace(other.worker(), ca=both)
    async with kk.ControlPlane("127.0.0.1:0", tls=dataclasses.replace(certs.plane, ca=both)) as plane:
        sentence = "belongs to trust domain"
        assert sentence in await refused(plane, theirs)
        await until(lambda: any(sentence in line for line in log()))


@pytest.mark.parametrize("role", ["client", "control-plane"])
async def test_another_role(certs, role, log, monkeypatch):
    files = certs(role, f"other-{role}")
    # Our own worker refuses to start with it; somebody else's would not.
    monkeypatch.setattr(kk.TLSFiles, "client_context", lambda self, *_: lenient_context(self))
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane:
        text = await refused(plane, files)
    assert "refused" in text
    (line,) = [line for line in log() if line.startswith("refused")]
    assert line.startswith("refused a connection: the certificate of the client at 127.0.0.1:")


def lenient_context(files):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["konnektor/1"])
    context.load_cert_chain(files.cert, files.key)
    return context


async def test_a_worker_that_poses_as_a_control_plane(certs, log, monkeypatch):
    monkeypatch.setattr(kk.TLSFiles, "server_context", lenient_server)
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.worker("evil")) as plane:
        text = await refused(plane, certs.worker(), server_name="evil")
        assert "is for another role" in text or "not for the name" in text
        await until(log)


def lenient_server(files):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["konnektor/1"])
    context.load_cert_chain(files.cert, files.key)
    return context


async def test_the_wrong_server_name(certs, log):
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane:
        text = await refused(plane, certs.worker(), server_name="other.example")
        assert "is not for the name other.example; use --server-name with one of its names: cp" in text
        await until(lambda: any("refused our certificate" in line for line in log()))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "speaks plain HTTP"),
        (b"\x00garbage" * 20, "speaks something other than TLS"),
    ],
)
async def test_a_client_that_speaks_something_else(certs, log, data, sentence):
    plane = kk.ControlPlane("127.0.0.1:0", tls=certs.plane)
    async with plane, connection_to(plane) as (reader, writer):
        writer.write(data)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        await until(lambda: any(line.startswith("refused") for line in log()))
    (line,) = [line for line in log() if line.startswith("refused")]
    assert line.startswith("refused a connection: the client at 127.0.0.1:") and sentence in line


@pytest.mark.parametrize("https", [False, True])
@pytest.mark.parametrize(
    ("data", "resets", "level"), [(b"", False, "DEBUG"), (b"", True, "DEBUG"), (b"\x16", False, "WARNING")]
)
async def test_a_look_at_whether_the_port_is_open_is_no_warning(certs, log, caplog, https, data, resets, level):
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane:
        files, where = certs.plane, plane.address
        if https:
            url = f"https://127.0.0.1:0?cert={files.cert}&key={files.key}&client-ca={files.ca}"
            where = await plane.add_frontend(url)
        with socket.create_connection(("127.0.0.1", int(where.rpartition(":")[2]))) as client:
            client.sendall(data)
            if resets:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await until(lambda: any("the client at 127.0.0.1:" in line for line in log()))
    assert [record.levelname for record in caplog.records if "the client at" in record.getMessage()] == [level]


async def test_a_client_that_says_nothing(certs, log, monkeypatch):
    monkeypatch.setattr("konnektor.newcomers.FIRST_BYTE", 0.1)
    plane = kk.ControlPlane("127.0.0.1:0", tls=certs.plane)
    async with plane, connection_to(plane) as (reader, _):
        assert await reader.read() == b""
    assert any(
        "refused a connection: the client at 127.0.0.1:" in line and "nothing for 0.1 s" in line for line in log()
    )


async def test_a_client_that_begins_a_handshake_and_no_more(certs, log):
    limits = kk.Limits(hello_timeout=0.2)
    plane = kk.ControlPlane("127.0.0.1:0", tls=certs.plane, limits=limits)
    async with plane, connection_to(plane) as (reader, writer):
        writer.write(BEGUN)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        await until(log)
    assert any("did not finish the TLS handshake in time" in line for line in log())


async def test_a_worker_that_never_says_hello(certs, log):
    limits = kk.Limits(hello_timeout=0.3)
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane, limits=limits) as plane:
        context = certs.worker().client_context()
        async with connection(plane.address, ssl=context, server_hostname="cp") as (reader, _):
            frame = await reader.read(1000)
            assert frame[0] == 0x47  # CLOSE comes first, and no HELLO
            await until(log)
        assert len(plane) == 0
    assert any("no session with the client at" in line and "no HELLO within 0.3 s" in line for line in log())


async def test_a_control_plane_that_never_says_hello(certs):
    async def silent(reader, writer):
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0, ssl=certs.plane.server_context())
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with kk.Worker([address], tls=certs.worker(), once=True, limits=kk.Limits(hello_timeout=0.3)) as worker:
        with pytest.raises(kk.HandshakeError, match=f"no session with the control plane at {address}: no HELLO within"):
            await worker.wait_connected()
    server.close()
    await server.wait_closed()


async def test_a_worker_that_speaks_garbage_after_tls(certs, log):
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane:
        context = certs.worker().client_context()
        async with connection(plane.address, ssl=context, server_hostname="cp") as (reader, writer):
            writer.write(HEADER.pack(0x30, 0, 0, 0))
            with contextlib.suppress(ConnectionError):
                await reader.read()
            await until(log)
    assert any("no session with the client at" in line and "0x30" in line for line in log())


async def test_more_handshakes_than_may_be_at_once_wait(certs, monkeypatch):
    monkeypatch.setattr("konnektor.newcomers.PLACES", 2)
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane, contextlib.AsyncExitStack() as stack:
        idle = [await stack.enter_async_context(connection(plane.address)) for _ in range(2)]
        for _, writer in idle:
            writer.write(BEGUN)
        await until(lambda: len(plane._handshakes) == 2)
        async with kk.Worker([plane.address], tls=certs.worker()) as worker:
            await asyncio.sleep(0.02)
            assert len(plane._handshakes) == 2 and not worker.sessions
            idle[0][1].close()
            await worker.wait_connected()


async def test_workers_get_in_while_silent_strangers_fill_all_places(certs, monkeypatch, log):
    monkeypatch.setattr("konnektor.newcomers.PLACES", 8)
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane, contextlib.AsyncExitStack() as stack:

        async def stranger():
            while True:
                async with connection(plane.address) as (reader, _):
                    await reader.read()

        strangers = [asyncio.create_task(stranger()) for _ in range(12)]
        stack.push_async_callback(give_up, strangers)
        await until(lambda: any("of those that are silent the oldest go" in line for line in log()))
        async with kk.Worker([plane.address], tls=certs.worker()) as worker:
            assert await worker.wait_connected()


async def give_up(tasks):
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_closing_while_handshakes_are_under_way(certs):
    plane = kk.ControlPlane("127.0.0.1:0", tls=certs.plane)
    async with plane, connection_to(plane), connection_to(plane) as (reader, writer):
        writer.write(BEGUN)
        await until(lambda: len(plane._handshakes) == 1 and len(plane._newcomers) == 2)
        with socket.create_connection(plane.address.split(":")):  # perhaps not accepted yet
            await plane.aclose()
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""


async def test_use_before_the_start(certs):
    plane = kk.ControlPlane("127.0.0.1:0", tls=certs.plane)
    for use in (
        plane.wait_for("node-1"),
        plane.open_tcp("127.0.0.1", 80),
        plane.open_tcp("127.0.0.1", 80, worker="node-1"),
        plane.add_forward("127.0.0.1:0=node-1/127.0.0.1:80"),
        plane.add_frontend("http://127.0.0.1:0"),
        plane.events().__aenter__(),
    ):
        with pytest.raises(kk.ConfigurationError, match="the control plane was not started: enter it with async with"):
            await use
    with pytest.raises(kk.ConfigurationError, match="the control plane was not started"):
        _ = plane.address
    assert not list(plane) and not plane.snapshot() and plane.get("node-1") is None
    await plane.aclose()
    with pytest.raises(kk.SessionClosedError, match="the control plane is closed"):
        await plane.wait_for("node-1")
    with pytest.raises(kk.SessionClosedError, match="the control plane is closed"):
        _ = plane.address


async def test_life(certs):
    plane = kk.ControlPlane("127.0.0.1:0", tls=certs.plane)
    async with plane:
        with pytest.raises(kk.ConfigurationError, match="started before"):
            await plane.start()
        waiting = asyncio.create_task(plane.wait_for("node-1"))
        with pytest.raises(kk.ListenError, match="the address is in use"):
            await kk.ControlPlane(plane.address, tls=certs.plane).start()
    with pytest.raises(kk.SessionClosedError):
        await waiting
    assert plane.address.startswith("127.0.0.1:")
    with pytest.raises(kk.ConfigurationError, match="started before"):
        await plane.start()


# Names


async def test_another_process_under_a_live_name_is_refused(certs, monkeypatch, log):
    async with tunnel(certs) as t, another_process(t.plane, certs.worker(), monkeypatch, once=True) as second:
        with pytest.raises(kk.HandshakeError) as caught:
            await second.wait_connected()
        assert str(caught.value) == (
            f"the control plane at {t.plane.address} refused us: another process is connected as node-1"
        )
        assert t.plane.get("node-1") is t.session and not t.session.closed
        assert isinstance(caught.value.__cause__.__cause__, kk.IdentityError)
        await until(lambda: any(line.startswith("refused worker") for line in log()))
    (line,) = [line for line in log() if line.startswith("refused")]
    assert line.startswith("refused worker node-1 at 127.0.0.1:")
    assert "another process of that name is connected from 127.0.0.1:" in line
    assert sum(line.startswith("connected to cp") for line in log()) == 1


async def test_another_process_takes_over_after_silence(certs, monkeypatch, log):
    async with tunnel(certs) as t:
        t.session._mux.liveness.heard_at -= 15 + 10  # seconds: silence until a PING is due, and for its answer
        async with another_process(t.plane, certs.worker(), monkeypatch, once=True) as second:
            await second.wait_connected()
            await until(lambda: t.session.closed)
            new = await t.plane.wait_for("node-1")
            assert new is not t.session
            await t.worker.aclose()
    assert any("replaces 127.0.0.1:" in line and line.endswith("which is silent") for line in log())


async def test_a_second_connection_of_the_same_process_replaces_the_first(certs, log):
    async with target() as echo, tunnel(certs) as t, t.plane.events() as events:
        stream = await t.session.open_tcp("127.0.0.1", echo.port)
        files = certs.worker()
        async with kk.Worker([t.plane.address], tls=files, allow=[kk.tcp("127.0.0.1", "*")], once=True):
            assert await anext(events) == kk.WorkerDisconnected("node-1", t.session)
            connected = await anext(events)
            assert isinstance(connected, kk.WorkerConnected) and connected.session is t.plane.get("node-1")
            assert t.session.draining and not t.session.closed
            async with stream:  # goes on
                await stream.send(b"on")
                assert await stream.receive() == b"on"
            await t.session.wait_closed()
            assert len(t.plane) == 1
            await t.worker.aclose()
    assert any("reconnected from 127.0.0.1:" in line and line.endswith("drains") for line in log())


async def test_a_session_that_ends_in_the_moment_it_begins(certs, monkeypatch, log):
    original = kk.ControlPlane._add

    def add(self, session):
        original(self, session)
        session.close(kk.Code.SHUTDOWN, "at once")

    monkeypatch.setattr(kk.ControlPlane, "_add", add)
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane:
        assert "at once" in await refused(plane, certs.worker())
        await until(lambda: not plane._tasks)
        assert len(plane) == 0
    assert not any(line.startswith("refused") for line in log())


# Routes


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"allow_from": kk.tcp("127.0.0.1", 80)}, "allow_from takes a list, not '127.0.0.1:80': write"),
        ({"allow_from": "node-1=127.0.0.1:80"}, "allow_from takes a list"),
        ({"allow_from": [kk.tcp("127.0.0.1", 80)]}, "neither text nor .NAME, HOST:PORTS.: write"),
        ({"allow_from": [("node-1", 80)]}, "rule 80 is neither text nor an AllowRule"),
        ({"allow_from": [("node-1", "127.0.0.1")]}, "not HOST:PORTS"),
        ({"allow_from": [("Node_1", "127.0.0.1:80")]}, "name 'Node_1' is not usable"),
        ({"allow_from": [(1, "127.0.0.1:80")]}, "neither text nor .NAME, HOST:PORTS.: write"),
        ({"grant_routes": "node-1=default"}, "grant_routes takes a list"),
        ({"grant_routes": [("node-1", "everything")]}, "write host=NAME"),
        ({"grant_routes": [("node-1", 5)]}, "route 5 is neither text nor a Route"),
        ({"grant_routes": ["node-1"]}, "names no worker"),
        ({"grant_routes": [5]}, "grant 5 is neither text nor .NAME, ROUTE.: write"),
    ],
)
async def test_bad_grants(certs, kwargs, text):
    with pytest.raises(kk.ConfigurationError, match=text):
        kk.ControlPlane("127.0.0.1:0", tls=certs.plane, **kwargs)
    control_plane = kk.ControlPlane("127.0.0.1:0", tls=certs.plane)
    with pytest.raises(kk.ConfigurationError, match=text):
        control_plane.set_grants(**kwargs)


async def test_rules_and_routes_of_grants_may_be_text(certs):
    grants = {"allow_from": [("node-1", "127.0.0.1:*")], "grant_routes": [("node-1", "cidr=127.0.0.0/8")]}
    async with target() as echo, tunnel(certs, plane=grants, routes=[parse_route("cidr=127.0.0.0/8")]) as t:
        for opener in (t.worker.sessions[0], t.plane):
            async with await opener.open_tcp("127.0.0.1", echo.port) as stream:
                await stream.send(b"there and back")
                assert await stream.receive() == b"there and back"


async def test_routes_are_claims(certs, log):
    grants = ["node-1=cidr=10.1.0.0/16", ("node-1", parse_route("default"))]
    routes = ["cidr=10.1.2.0/24", "cidr=10.2.0.0/16", "default"]
    async with tunnel(certs, plane={"grant_routes": grants}, routes=routes) as t:
        (snapshot,) = t.plane.snapshot()
        assert snapshot.name == "node-1" and snapshot.address.startswith("127.0.0.1:")
        assert snapshot.routes == ("host=node-1", "cidr=10.1.2.0/24", "default")
        assert snapshot.software.startswith("konnektor/") and snapshot.stats.streams == 0
    assert "worker node-1: ignored route cidr=10.2.0.0/16, which no --grant-route grants" in log()


async def test_a_claim_that_is_no_route(certs, log, monkeypatch):
    monkeypatch.setattr("konnektor.worker.as_routes", lambda routes: routes)
    async with tunnel(certs, routes=["nonsense\r\x1b"]) as t:
        assert [session.peer_name for session in t.plane] == ["node-1"]
    (line,) = [line for line in log() if "ignored a claimed route" in line]
    assert line.isprintable()


async def test_a_shared_route_is_tried_elsewhere(certs):
    """The first worker's target refuses: nothing was processed, so the second one gets the request."""
    grants = ["node-1=default", "node-2=default"]
    async with target() as echo, tunnel(certs, plane={"grant_routes": grants}, routes=["default"]) as t:
        second = kk.Worker([t.plane.address], tls=certs.worker("node-2"), routes=["default"], allow=[])
        async with second:
            await t.plane.wait_for("node-2")

            async def busy(stream, request):
                await stream.reject(kk.Code.LIMIT)

            second.handlers.remove(kk.Tcp)
            second.handlers.add(kk.Tcp, busy)
            for _ in range(4):  # whoever is asked first
                async with await t.plane.open_tcp("127.0.0.1", echo.port) as stream:
                    await stream.send(b"x")
                    assert await stream.receive() == b"x"
            with pytest.raises(kk.LimitError):
                await t.plane.open_tcp("127.0.0.1", echo.port, worker="node-2")
            t.worker.allow = AllowList()  # a denial is final
            with pytest.raises((kk.DeniedError, kk.LimitError)):
                await t.plane.open_tcp("127.0.0.1", echo.port, worker="node-1")
        with pytest.raises(kk.NoRouteError):
            await t.plane.open_tcp("127.0.0.1", echo.port, worker="node-2")


async def test_no_worker_for_the_destination(certs):
    async with tunnel(certs) as t:
        with pytest.raises(kk.NoRouteError):
            await t.plane.open_tcp("10.9.9.9", 80)


@pytest.mark.parametrize(
    ("host", "port", "text"),
    [
        ("127.0.0.1", 99999, "Tcp.port takes"),
        ("10.9.9.9", "80", "Tcp.port takes"),
        ("", 80, "Tcp.host takes"),
        (None, 80, "Tcp.host takes"),
        ("127.1", 80, "neither an IP address nor a DNS name"),
    ],
)
async def test_a_destination_that_is_none(certs, host, port, text):
    async with tunnel(certs) as t:
        for kwargs in ({}, {"worker": "node-1"}):
            with pytest.raises(kk.ConfigurationError, match=text):
                await t.plane.open_tcp(host, port, **kwargs)


async def test_a_name_that_is_for_a_worker_that_has_not_connected_yet(certs):
    """Whom a grant or a forward names there is: nobody else gets what is meant for it."""
    async with target() as echo, tunnel(certs, plane={"grant_routes": ["a.node-1=default"]}) as t:
        t.plane.set_grants(grant_routes=[], allow_from=["b.node-1=127.0.0.1:1"])
        await t.plane.add_forward("127.0.0.1:0=c.node-1/127.0.0.1:1")
        for name in ("a", "b", "c"):
            with pytest.raises(kk.NoRouteError, match=f"names worker {name}.node-1, which is not connected"):
                await t.plane.open_tcp(f"localhost.{name}.node-1.konnektor.internal", echo.port)
        async with await t.plane.open_tcp("127.0.0.1.node-1.konnektor.internal", echo.port):
            pass


async def test_a_candidate_that_goes_while_another_is_asked(certs, monkeypatch):
    async with tunnel(certs) as t:
        choices = t.plane._router.candidates("node-1")
        monkeypatch.setattr(t.plane._router, "candidates", lambda *_: [choices[0]._replace(worker="gone")])
        with pytest.raises(kk.NoRouteError, match="no worker serves node-1:80"):
            await t.plane.open_tcp("node-1", 80)


async def test_the_worker_goes_while_it_dials(certs):
    with black_hole() as port:
        async with tunnel(certs) as t:
            opening = asyncio.create_task(t.plane.open_tcp("127.0.0.1", port, worker="node-1"))
            await until(lambda: t.session.stream_count)
            t.session.abort()
            with pytest.raises(kk.SessionLost):
                await opening


class Hold(kk.StreamType):
    """Keeps a session that drains from ending."""

    name = "hold@test.example"


async def test_at_most_eight_sessions_of_a_worker(certs, log):
    """Draining ones included, as one that connects without end would have them. Another worker is let in meanwhile."""

    async def hold(stream, _request):
        await stream.accept()
        await stream.receive()

    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane, contextlib.AsyncExitStack() as stack:

        async def connect(name="node-1"):
            handlers = kk.Handlers()
            handlers.add(Hold, hold)
            sock = await dial(*parse_hostport(plane.address))
            settings = Settings.of(kk.Limits(), instance=b"one process, not")
            context = certs.worker(name).client_context()
            session = await kk.Session.client(
                sock, tls=context, server_name="127.0.0.1", handlers=handlers, settings=settings
            )
            return await stack.enter_async_context(session)

        mine, streams = [], []
        for n in range(8):
            mine.append(await connect())
            await until(lambda: len(plane._live) == n + 1)  # noqa: B023 - awaited here
            streams.append(await (await plane.wait_for("node-1")).open(Hold()))
        assert [session.draining for session in plane._live].count(False) == 1
        for _ in range(2):
            with pytest.raises(kk.HandshakeError) as caught:
                await connect()
            assert isinstance(caught.value.__cause__, kk.CalmError)
            assert str(caught.value) == "node-1 has 8 sessions already"
        await until(lambda: len([line for line in log() if line.startswith("refused ")]) == 2)
        line, again = [line for line in log() if line.startswith("refused ")]
        assert line.startswith("refused worker node-1 at 127.0.0.1:")
        assert line.endswith(": it has 8 sessions already, as many as one worker may have")
        assert again.endswith("as many as one worker may have")
        # What is there is not disturbed: new streams still go to the eighth.
        async with await plane.get("node-1").open(Hold()):
            assert mine[-1].stream_count == 2
        await connect("node-2")
        await streams[0].aclose()
        await until(lambda: mine[0].closed)
        await connect()
        for stream in streams:
            stream.reset()


async def test_a_bound_on_the_memory_of_all_sessions(certs, log):
    """Whoever there is no room for waits outside, and gets in when there is; nobody inside notices."""
    limits = kk.Limits(initial_streams=8, receive_pool=2**20, replay_buffer=2**20)
    assert limits.session_memory == 2 * 2**20
    assert dataclasses.replace(limits, resume_grace=0).session_memory == 2**20
    with pytest.raises(kk.ConfigurationError, match="memory 1MiB is less than one session may be granted, 2MiB"):
        kk.ControlPlane("127.0.0.1:0", tls=certs.plane, limits=limits, memory=2**20)
    async with (
        target() as echo,
        kk.ControlPlane("127.0.0.1:0", tls=certs.plane, limits=limits, memory="5MiB") as plane,
        kk.Worker([plane.address], tls=certs.worker("a"), allow=[kk.tcp("127.0.0.1", echo.port)]),
        FaultProxy(plane.address) as proxy,
    ):
        async with kk.Worker([proxy.address], tls=certs.worker("b"), allow=[kk.tcp("127.0.0.1", echo.port)]):
            streams = [await (await plane.wait_for(name)).open_tcp("127.0.0.1", echo.port) for name in ("a", "b")]
            text = await refused(plane, certs.worker("c"))
            assert text.endswith("no memory is left for another session")
            assert plane.get("c") is None
            # What is there goes on: also over another connection.
            proxy.cut()
            await until(lambda: plane.get("b").stats().resumed == 1)
            for stream in streams:
                await stream.send(b"x")
                assert await stream.receive() == b"x"
            await streams[1].aclose()
        async with kk.Worker([plane.address], tls=certs.worker("c")):
            await plane.wait_for("c")
            await streams[0].aclose()
    (line,) = [line for line in log() if line.startswith("refused worker")]
    assert line.startswith("refused worker c at 127.0.0.1:")
    assert line.endswith(": its session would exceed the memory of 5MiB for all")


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"memory": "1MiB"}, "memory 1MiB is less than one session"),
        ({"memory": "much"}, "'much' is not a size; write"),
        ({"memory": 1.5}, "memory takes bytes or a size, not 1.5: write"),
        ({"memory": True}, "memory takes bytes or a size, not True: write"),
        ({"tls": "pki"}, r"tls takes TLSFiles\(...\), not 'pki'"),
        ({"limits": {"idle_timeout": 60}}, r"limits takes Limits\(...\), not "),
    ],
)
async def test_arguments_of_the_wrong_kind(certs, kwargs, text):
    with pytest.raises(kk.ConfigurationError, match=text):
        kk.ControlPlane("127.0.0.1:0", **{"tls": certs.plane, **kwargs})


async def test_what_this_side_ends_is_not_told_as_the_peers_doing(certs, log):
    async with tunnel(certs) as t:
        client = t.worker.sessions[0]
        t.session.close(kk.Code.CALM, "enough")
        await until(lambda: client.closed)
    told = [line for line in log() if "ended the session, because this side exceeded a limit: enough" in line]
    assert len(told) == 1 and "cp at" in told[0]


# Events


async def test_a_subscriber_that_falls_behind_misses_the_oldest(certs, monkeypatch):
    monkeypatch.setattr("konnektor.control_plane.EVENTS", 1)
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane, plane.events() as events:
        async with kk.Worker([plane.address], tls=certs.worker(), once=True) as worker:
            session = await plane.wait_for("node-1")
            await worker.wait_connected()
        await session.wait_closed()
        assert await anext(events) == kk.WorkerDisconnected("node-1", session)


async def test_a_subscriber_that_waits_for_so_long_only(certs):
    """A timeout around one event takes none of those that come later."""
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane, plane.events() as events:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await anext(events)
        waiting = asyncio.create_task(anext(events))
        await asyncio.sleep(0)
        async with kk.Worker([plane.address], tls=certs.worker()):
            session = await plane.wait_for("node-1")
            assert await waiting == kk.WorkerConnected("node-1", session)
            waiting = asyncio.create_task(anext(events))
            await asyncio.sleep(0)
            session.close(kk.Code.SHUTDOWN, "")
            waiting.cancel()  # just as there is an event
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert await anext(events) == kk.WorkerDisconnected("node-1", session)


async def seen(events):
    return [type(event) async for event in events]


async def test_events_end_with_their_context(certs):
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane:
        async with plane.events() as events:
            iterating = [asyncio.create_task(seen(events)) for _ in range(2)]
            await asyncio.sleep(0)
        assert await asyncio.gather(*iterating) == [[], []]


@pytest.mark.parametrize("drain", [False, True])
async def test_events_end_with_the_control_plane(certs, drain):
    """After the last worker, whose going is an event, too; also for who asks later."""
    async with tunnel(certs) as t, t.plane.events() as events:
        iterating = asyncio.create_task(seen(events))
        await asyncio.sleep(0)
        await (t.plane.drain(1) if drain else t.plane.aclose())
        assert await iterating == [kk.WorkerDisconnected]
        async with t.plane.events() as late:
            assert await seen(late) == []


async def test_events_end_though_closing_is_cancelled(certs):
    async with tunnel(certs) as t, t.plane.events() as events:
        closing = asyncio.create_task(t.plane.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        assert await seen(events) == [kk.WorkerDisconnected]


# Forwards


async def test_a_forward(certs, log):
    async with target() as echo, tunnel(certs, allow=[f"127.0.0.1:{echo.port}"]) as t:
        where = await t.plane.add_forward(f"127.0.0.1:0=node-1/127.0.0.1:{echo.port}")
        async with connection(where) as (reader, writer):
            writer.write(b"x" * 300_000)
            writer.write_eof()
            assert len(await reader.read()) == 300_000
        denied = await t.plane.add_forward(parse_forward(f"127.0.0.1:0=node-1/127.0.0.1:{unused_port()}"))
        nobody = await t.plane.add_forward(f"127.0.0.1:0=node-9/127.0.0.1:{echo.port}")
        for where in (denied, nobody):
            async with connection(where) as (reader, _):
                with pytest.raises(ConnectionResetError):
                    await reader.read()
    assert any(line.startswith("forward 127.0.0.1:0=node-1/") and "denied" in line for line in log())
    assert any("worker node-9 is not connected" in line for line in log())


async def test_half_close_and_reset_through_a_forward(certs):
    async with target(Goodbye) as polite, target(Resetting) as rude, tunnel(certs) as t:
        where = await t.plane.add_forward(f"127.0.0.1:0=node-1/127.0.0.1:{polite.port}")
        async with connection(where) as (reader, writer):
            writer.write(b"1")
            assert await reader.read() == b"bye"
            writer.write(b"2")  # the other way is still open
            writer.write_eof()
            await polite.made[0].eof.wait()
            assert bytes(polite.made[0].data) == b"12"
        where = await t.plane.add_forward(f"127.0.0.1:0=node-1/127.0.0.1:{rude.port}")
        async with connection(where) as (reader, writer):
            writer.write(b"1")
            assert await reader.readexactly(4) == b"half"
            with pytest.raises(ConnectionResetError):
                await reader.read()


async def test_a_client_that_resets(certs):
    async with target() as echo, tunnel(certs) as t:
        where = await t.plane.add_forward(f"127.0.0.1:0=node-1/127.0.0.1:{echo.port}")
        async with connection(where) as (reader, writer):
            writer.write(b"x")
            await reader.readexactly(1)
            reset(writer.transport)
        assert isinstance(await echo.made[0].lost, ConnectionResetError)
        await until(lambda: t.session.stream_count == 0)
        assert not t.worker._targets._open


async def test_listening_fails_and_nothing_stays_behind(certs, tmp_path):
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane:
        with pytest.raises(kk.ListenError):
            await plane.add_forward(f"{plane.address}=node-1/127.0.0.1:1")
        with pytest.raises(kk.ListenError):
            await plane.add_frontend(f"http://{plane.address}")
        with pytest.raises(kk.ListenError, match=r"its directory does not exist; make it first"):
            await plane.add_frontend(f"http+unix://{tmp_path}/missing/x.sock")
        with pytest.raises(kk.CertificateError):
            await plane.add_frontend("https://127.0.0.1:0?cert=a&key=b&client-ca=c")
        with pytest.raises(kk.ConfigurationError):
            await plane.add_frontend("ftp://x")
        with pytest.raises(kk.ConfigurationError):
            await plane.add_forward("x")


def add(plane, kind, folder):
    match kind:
        case "forward":
            return plane.add_forward("127.0.0.1:0=node-1/127.0.0.1:1")
        case "udp":
            return plane.add_forward("udp:127.0.0.1:0=node-1/127.0.0.1:1")
        case "http":
            return plane.add_frontend("http://127.0.0.1:0")
        case _:
            return plane.add_frontend(f"http+unix://{folder}/x.sock")


@pytest.mark.parametrize("kind", ["forward", "udp", "http", "http+unix"])
async def test_nothing_listens_after_the_end(certs, tmp_path, kind):
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane:
        pass
    with pytest.raises(kk.SessionClosedError, match="the control plane is closed"):
        await add(plane, kind, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "bind"), [("forward", "bind_tcp"), ("udp", "bind_udp"), ("http", "bind_tcp")])
async def test_the_end_comes_while_an_address_is_looked_up(certs, tmp_path, monkeypatch, kind, bind):
    bind_now = getattr(konnektor.frontends.clients, bind)
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane:

        async def bind_late(*where):
            await plane.aclose()
            return await bind_now(*where)

        monkeypatch.setattr(f"konnektor.frontends.clients.{bind}", bind_late)
        with pytest.raises(kk.SessionClosedError):
            await add(plane, kind, tmp_path)


async def test_the_end_comes_while_a_udp_socket_is_opened(certs, tmp_path, monkeypatch):
    """It cannot be closed before it is open, and then nobody else closes it: closing waited for ever."""
    open_ = UdpForward.open
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane:

        async def opened_late(forward):
            nonlocal closing
            closing = asyncio.create_task(plane.aclose())
            await asyncio.sleep(0)
            await open_(forward)

        monkeypatch.setattr(UdpForward, "open", opened_late)
        closing = None
        with pytest.raises(kk.SessionClosedError):
            await add(plane, "udp", tmp_path)
        await closing


# The end


async def test_drain_waits_for_clients_and_takes_no_more(certs):
    async with target() as echo, tunnel(certs) as t:
        where = await t.plane.add_forward(f"127.0.0.1:0=node-1/127.0.0.1:{echo.port}")
        async with connection(where) as (reader, writer):
            writer.write(b"x")
            await reader.readexactly(1)
            draining = asyncio.create_task(t.plane.drain(30))
            await until(lambda: t.session.draining)
            for address in (where, t.plane.address):
                with pytest.raises(ConnectionRefusedError):
                    async with connection(address):
                        pass
            writer.write(b"y")
            assert await reader.readexactly(1) == b"y"
            assert not draining.done()
            writer.write_eof()
            assert await reader.read() == b""
            await draining


async def test_drain_resets_clients_at_the_grace(certs):
    async with target() as echo, tunnel(certs) as t:
        where = await t.plane.add_forward(f"127.0.0.1:0=node-1/127.0.0.1:{echo.port}")
        async with connection(where) as (reader, writer):
            writer.write(b"x")
            await reader.readexactly(1)
            await t.plane.drain(0.05)
            with pytest.raises(ConnectionResetError):
                await reader.read()


async def test_aclose_drops_clients(certs):
    async with target() as echo, tunnel(certs) as t:
        where = await t.plane.add_forward(f"127.0.0.1:0=node-1/127.0.0.1:{echo.port}")
        async with connection(where) as (reader, writer):
            writer.write(b"x")
            await reader.readexactly(1)
            await t.plane.aclose()
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
