"""HTTP CONNECT through a whole tunnel: on TCP, on a Unix socket, and over TLS with client certificates."""

import asyncio
import contextlib
import socket
import ssl
import stat
from types import SimpleNamespace

import pytest

import konnektor as kk
from konnektor.frontends.http_connect import MAX_HEAD
from konnektor.frontends.http_server import EARLY, HttpConnect
from tests.endpoints.parts import (
    ESTABLISHED,
    PATIENCE,
    Banner,
    Goodbye,
    Resetting,
    ask,
    black_hole,
    connect_head,
    connection,
    reset,
    target,
    tunnel,
    until,
)
from tests.session.tls_parts import CLIENT_AUTH, SERVER_AUTH, Issuer


@pytest.fixture(params=["http", "unix", "https"])
def frontend(request, certs, tmp_path):
    """Each kind of frontend: its URL, and what a client needs to connect to it."""
    match request.param:
        case "http":
            return SimpleNamespace(url="http://127.0.0.1:0", client={}, tls=False)
        case "unix":
            return SimpleNamespace(url=f"http+unix://{tmp_path}/c.sock", client={}, tls=False)
        case _:
            return SimpleNamespace(url=https_url(certs), client=https_client(certs), tls=True)


def https_url(certs):
    files = certs.plane
    return f"https://127.0.0.1:0?cert={files.cert}&key={files.key}&client-ca={files.ca}"


def https_client(certs, version=None):
    """As kube-apiserver: a certificate, no ALPN, SNI by the host."""
    return https_client_of(certs("client", "apiserver"), version)


def https_client_of(files, version=None):
    context = ssl.create_default_context(cafile=files.ca)
    context.load_cert_chain(files.cert, files.key)
    if version:
        context.maximum_version = version
    return {"ssl": context, "server_hostname": "127.0.0.1"}


@contextlib.asynccontextmanager
async def connected(where, to, early=b"", **client):
    """Reader and writer once the 200 is there, which is exactly that."""
    async with connection(where, **client) as (reader, writer):
        writer.write(connect_head(to) + early)
        assert await reader.readuntil(b"\r\n\r\n") == ESTABLISHED
        yield reader, writer


async def test_a_tunnel(certs, frontend):
    async with target() as echo, tunnel(certs) as t:
        where = await t.plane.add_frontend(frontend.url)
        to = f"127.0.0.1.node-1.konnektor.internal:{echo.port}"
        async with connected(where, to, **frontend.client) as (reader, writer):
            for size in (1, 1000, 300_000):
                data = bytes(size)
                writer.write(data)
                assert await reader.readexactly(size) == data
            if writer.can_write_eof():
                writer.write_eof()
                assert await reader.read() == b""
        await until(lambda: t.session.stream_count == 0)


async def test_routing(certs):
    grants = ["node-1=cidr=127.0.0.0/8", "node-1=default"]
    async with (
        target() as echo,
        tunnel(certs, plane={"grant_routes": grants}, routes=["cidr=127.0.0.0/8"], allow=["127.0.0.1:*"]) as t,
    ):
        where = await t.plane.add_frontend("http://127.0.0.1:0")
        ok, port = "HTTP/1.1 200 Connection Established", echo.port
        assert await ask(where, f"127.0.0.1.node-1.konnektor.internal:{port}") == ok
        assert await ask(where, f"127.0.0.1:{port}", "Konnektor-Worker: node-1") == ok
        assert await ask(where, f"127.0.0.1:{port}") == ok  # by the longest prefix
        nobody = "HTTP/1.1 503 No Worker for Target"
        assert await ask(where, f"10.0.0.1:{port}") == nobody  # granted, and yet not claimed
        assert await ask(where, f"127.0.0.1:{port}", "Konnektor-Worker: node-9") == nobody
        assert await ask(where, f"127.0.0.1.node-9.konnektor.internal:{port}") == nobody


async def test_what_a_client_is_told(certs, frontend, log, caplog):
    with black_hole() as hole:
        limits = kk.Limits(open_deadline=0.3)
        async with tunnel(certs, allow=[f"127.0.0.1:{hole}", "127.0.0.1:1-9"], plane={"limits": limits}) as t:
            where = await t.plane.add_frontend(frontend.url)
            header = "Konnektor-Worker: node-1"
            for to, status in [
                ("127.0.0.1:80", "403 Destination Denied by Policy"),
                ("127.0.0.1:9", "502 Connection Refused by Target"),
                (f"127.0.0.1:{hole}", "504 Target Timed Out"),
                ("localhost:99999", "400 Malformed Target"),
            ]:
                assert await ask(where, to, header, **frontend.client) == f"HTTP/1.1 {status}"
            assert await ask(where, "x:1", "Content-Length: 1", **frontend.client) == "HTTP/1.1 400 CONNECT Has No Body"
            assert t.session.stream_count == 0
    refusals = [line for line in log() if line.startswith("refused") and "CONNECT 127." in line]
    denied = "CONNECT 127.0.0.1:80: 403 Destination Denied by Policy (worker node-1: denied)"
    assert any(line.endswith(denied) for line in refusals)
    assert len(refusals) == 3 and all("worker node-1: " in line for line in refusals)
    fields = {record.worker for record in caplog.records if record.getMessage() in refusals}
    assert fields == {"node-1"}


async def test_not_connect(certs):
    async with tunnel(certs) as t:
        where = await t.plane.add_frontend("http://127.0.0.1:0")
        async with connection(where) as (reader, writer):
            writer.write(b"GET http://127.0.0.1/ HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 405 Only CONNECT Is Served Here\r\nAllow: CONNECT\r\n")


async def test_an_oversize_head_gets_its_answer(certs, frontend):
    """Unread bytes would make the kernel reset the connection, and destroy the answer."""
    async with tunnel(certs) as t:
        where = await t.plane.add_frontend(frontend.url)
        async with connection(where, **frontend.client) as (reader, writer):
            writer.write(b"CONNECT x:1 HTTP/1.1\r\nX: " + b"y" * (4 * MAX_HEAD))
            await writer.drain()
            assert await reader.readline() == b"HTTP/1.1 431 Request Head Too Large\r\n"


async def test_a_refused_client_that_never_closes_is_dropped(certs, monkeypatch):
    monkeypatch.setattr("konnektor.frontends.http_server.LINGER", 0.05)
    async with tunnel(certs) as t:
        where = await t.plane.add_frontend("http://127.0.0.1:0")
        async with connection(where) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 4")
            await until(lambda: not t.plane._clients._here)


async def test_a_client_that_says_nothing(certs, frontend, monkeypatch):
    monkeypatch.setattr("konnektor.frontends.http_server.HEAD_TIMEOUT", 0.1)
    async with tunnel(certs) as t:
        where = await t.plane.add_frontend(frontend.url)
        async with connection(where, **frontend.client) as (reader, writer):
            writer.write(b"CONNECT 127")
            assert await reader.readline() == b"HTTP/1.1 408 Request Timeout\r\n"


async def test_clients_that_have_not_asked_are_bounded(certs, frontend, monkeypatch):
    """Beyond as many as may be at once others wait until one has asked, or is gone; who has asked counts no more."""
    monkeypatch.setattr("konnektor.newcomers.PLACES", 2)
    async with target() as echo, tunnel(certs) as t, contextlib.AsyncExitStack() as stack:
        where = await t.plane.add_frontend(frontend.url)
        to = f"127.0.0.1.node-1.konnektor.internal:{echo.port}"
        for _ in range(3):
            await stack.enter_async_context(connected(where, to, **frontend.client))
        slow = []
        for _ in range(2):
            slow.append(await stack.enter_async_context(connection(where, **frontend.client)))
            slow[-1][1].write(b"CONNECT 127")
        await until(lambda: len(t.plane._clients._here) == 5)
        asking = asyncio.create_task(ask(where, to, **frontend.client))
        await asyncio.sleep(0.02)
        assert len(t.plane._clients._here) == 5 and not asking.done()
        slow[0][1].write(connect_head(to).removeprefix(b"CONNECT 127"))
        assert await asking == "HTTP/1.1 200 Connection Established"
        asking = asyncio.create_task(ask(where, to, **frontend.client))
        assert await slow[0][0].readuntil(b"\r\n\r\n") == ESTABLISHED
        assert await asking == "HTTP/1.1 200 Connection Established"


async def test_silent_clients_keep_no_other_out(certs, frontend, monkeypatch):
    monkeypatch.setattr("konnektor.newcomers.PLACES", 2)
    async with target() as echo, tunnel(certs) as t, contextlib.AsyncExitStack() as stack:
        where = await t.plane.add_frontend(frontend.url)
        silent = [await stack.enter_async_context(connection(where)) for _ in range(10)]
        to = f"127.0.0.1.node-1.konnektor.internal:{echo.port}"
        assert await ask(where, to, **frontend.client) == "HTTP/1.1 200 Connection Established"
        assert await silent[0][0].read() == b""


async def test_failed_handshakes_take_no_place(certs, monkeypatch):
    monkeypatch.setattr("konnektor.newcomers.PLACES", 1)
    async with target() as echo, tunnel(certs) as t:
        where = await t.plane.add_frontend(https_url(certs))
        for _ in range(3):
            async with connection(where) as (reader, writer):
                writer.write(b"GET / HTTP/1.1\r\n\r\n")
                await reader.read()
        to = f"127.0.0.1.node-1.konnektor.internal:{echo.port}"
        assert await ask(where, to, **https_client(certs)) == "HTTP/1.1 200 Connection Established"


async def test_early_data(certs, frontend):
    """Sent with the request, and more than is read ahead of the 200."""
    async with target() as echo, tunnel(certs) as t:
        where = await t.plane.add_frontend(frontend.url)
        for size in (1, 3 * EARLY):
            early = bytes(range(256)) * (size // 256 + 1)
            to = f"127.0.0.1.node-1.konnektor.internal:{echo.port}"
            async with connected(where, to, early, **frontend.client) as (reader, _):
                assert await reader.readexactly(len(early)) == early


@pytest.mark.parametrize("target_ends", [False, True])
async def test_a_client_that_ends_between_the_200_and_the_tunnel(certs, monkeypatch, target_ends):
    """It half-closes in that moment; what it asked for still comes."""
    async with target() as echo, tunnel(certs) as t:

        class InBetween(HttpConnect):
            async def _establish(self, stream):
                establishing = asyncio.ensure_future(super()._establish(stream))
                await asyncio.sleep(0)  # the 200 is written
                if target_ends:
                    await until(lambda: echo.made)
                    echo.made[0].transport.write_eof()
                    await until(lambda: stream._inbox.eof)
                self.transport.pause_reading()
                assert self.eof_received()
                await establishing

        monkeypatch.setattr("konnektor.frontends.clients.HttpConnect", InBetween)
        where = await t.plane.add_frontend("http://127.0.0.1:0")
        to = f"127.0.0.1.node-1.konnektor.internal:{echo.port}"
        early = b"" if target_ends else b"question"
        async with connected(where, to, early) as (reader, _):
            assert await reader.read() == early
        await until(lambda: t.session.stream_count == 0)


async def test_the_client_goes_while_its_target_is_dialed(certs, frontend):
    """The dial is cancelled: the worker is told to stop, and forgets the stream."""
    with black_hole() as hole:
        async with tunnel(certs) as t:
            where = await t.plane.add_frontend(frontend.url)
            async with connection(where, **frontend.client) as (_, writer):
                writer.write(connect_head(f"127.0.0.1.node-1.konnektor.internal:{hole}"))
                await until(lambda: t.worker.sessions[0].stream_count == 1)
            await until(lambda: t.worker.sessions[0].stream_count == 0)
            await until(lambda: t.session.stream_count == 0 and not t.plane._clients._tasks)


async def test_the_worker_goes_while_its_target_is_dialed(certs, frontend):
    with black_hole() as hole:
        async with tunnel(certs) as t:
            where = await t.plane.add_frontend(frontend.url)
            to = f"127.0.0.1.node-1.konnektor.internal:{hole}"
            answer = asyncio.create_task(ask(where, to, **frontend.client))
            await until(lambda: t.session.stream_count == 1)
            t.session.abort()
            assert await answer == "HTTP/1.1 503 Worker Connection Lost"


async def test_a_name_that_the_worker_cannot_resolve(certs, frontend):
    async with tunnel(certs, allow=["*.invalid:80"]) as t:
        where = await t.plane.add_frontend(frontend.url)
        answer = await ask(where, "no-such-host.invalid.node-1.konnektor.internal:80", **frontend.client)
        assert answer == "HTTP/1.1 502 Target Name Not Resolved"


async def test_localhost_that_is_no_loopback_address_here(certs, monkeypatch):
    everywhere = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("0.0.0.0", 0))]
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane:
        monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: everywhere)
        with pytest.raises(kk.ConfigurationError) as caught:
            await plane.add_frontend("http://localhost:0")
    assert str(caught.value) == (
        "frontend http://localhost:0 would serve anyone in plaintext, because localhost is 0.0.0.0 here: write "
        "127.0.0.1 or [::1]"
    )


async def test_the_worker_goes_while_a_tunnel_is_open(certs, frontend):
    async with target() as echo, tunnel(certs) as t:
        where = await t.plane.add_frontend(frontend.url)
        to = f"127.0.0.1.node-1.konnektor.internal:{echo.port}"
        async with connected(where, to, **frontend.client) as (reader, writer):
            writer.write(b"x")
            await reader.readexactly(1)
            t.session.abort()
            # No clean end, where the client can tell: a Unix socket knows no reset.
            with contextlib.suppress(ConnectionResetError, ssl.SSLError):
                assert await reader.read() == b""
                assert not where.startswith("127.")


@pytest.mark.parametrize("kind", [Resetting, Goodbye])
async def test_how_targets_end(certs, frontend, kind):
    async with target(kind) as server, tunnel(certs) as t:
        where = await t.plane.add_frontend(frontend.url)
        to = f"127.0.0.1.node-1.konnektor.internal:{server.port}"
        async with connected(where, to, **frontend.client) as (reader, writer):
            writer.write(b"x")
            if kind is Goodbye:
                assert await reader.read() == b"bye"  # an end, over TLS too
            else:
                assert await reader.readexactly(4) == b"half"
                with contextlib.suppress(ConnectionResetError, ssl.SSLError):
                    assert await reader.read() == b""
                    assert not where.startswith("127.")


async def test_a_client_that_resets(certs, frontend):
    async with target() as echo, tunnel(certs) as t:
        where = await t.plane.add_frontend(frontend.url)
        to = f"127.0.0.1.node-1.konnektor.internal:{echo.port}"
        async with connected(where, to, **frontend.client) as (reader, writer):
            writer.write(b"x")
            await reader.readexactly(1)
            if where.startswith("/"):
                writer.transport.abort()
            else:
                reset(writer.transport)
            await echo.made[0].lost
        await until(lambda: t.session.stream_count == 0)


def cut(writer):
    """A FIN at once: by a client that was killed, or by anyone on the path."""
    with socket.fromfd(writer.get_extra_info("socket").fileno(), socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.shutdown(socket.SHUT_WR)


async def test_an_upload_over_tls_that_is_cut_short_resets_the_target(certs):
    async with target() as echo, tunnel(certs) as t:
        where = await t.plane.add_frontend(https_url(certs))
        to = f"127.0.0.1.node-1.konnektor.internal:{echo.port}"
        async with connected(where, to, **https_client(certs)) as (reader, writer):
            writer.write(b"half")
            await reader.readexactly(4)
            cut(writer)
            assert isinstance(await echo.made[0].lost, ConnectionResetError)
            assert not echo.made[0].eof.is_set()
        await until(lambda: t.session.stream_count == 0)


async def test_an_upload_over_tls_that_is_cut_short_between_the_200_and_the_tunnel(certs, monkeypatch, caplog):
    async with target() as echo, tunnel(certs) as t:

        class InBetween(HttpConnect):
            steps = done = None

            async def _establish(self, stream):
                self.done = asyncio.get_running_loop().create_future()
                self.steps = super()._establish(stream)
                try:
                    self.steps.send(None)  # the 200 is written
                    await self.done
                finally:
                    self.steps.close()

            def eof_received(self):  # by asyncio; uvloop only says that the connection is lost
                keep = super().eof_received()
                with contextlib.suppress(StopIteration):
                    self.steps.send(None)
                self.done.set_result(None)
                return keep

        monkeypatch.setattr("konnektor.frontends.clients.HttpConnect", InBetween)
        where = await t.plane.add_frontend(https_url(certs))
        to = f"127.0.0.1.node-1.konnektor.internal:{echo.port}"
        async with connected(where, to, b"half", **https_client(certs)) as (_, writer):
            cut(writer)
            await until(lambda: echo.made)
            assert isinstance(await echo.made[0].lost, ConnectionResetError)
            assert not echo.made[0].eof.is_set()
        await until(lambda: t.session.stream_count == 0)
    assert not [record.getMessage() for record in caplog.records if record.name == "asyncio"]


# One call at a time


class FakeTransport:
    """As TLS: no half-close, and a buffer."""

    def __init__(self):
        self.written = []
        self.buffered = 0
        self.closing = False

    def get_extra_info(self, _name):
        return None

    def can_write_eof(self):
        return False

    def is_closing(self):
        return self.closing

    def get_write_buffer_size(self):
        return self.buffered

    def write(self, data):
        self.written.append(data)

    def close(self):
        self.closing = True


class FakeStream:
    resets = 0

    def reset(self):
        self.resets += 1


def fake_client():
    protocol = HttpConnect(None, None)
    protocol.connection_made(FakeTransport())
    return protocol, protocol.transport


async def test_an_error_for_a_client_that_is_gone():
    protocol, transport = fake_client()
    transport.close()
    protocol._refuse(kk.DeniedError(), "x:1")
    protocol.connection_lost(None)
    protocol._refuse(kk.DeniedError(), "x:1")
    assert transport.written == []


async def test_the_tunnel_waits_until_the_200_is_out():
    protocol, transport = fake_client()
    stream = FakeStream()
    transport.buffered = 1
    establishing = asyncio.create_task(protocol._establish(stream))
    await asyncio.sleep(0.005)
    assert transport.written == [ESTABLISHED] and not establishing.done()
    protocol.pause_writing()
    protocol.resume_writing()
    transport.close()  # and now it never will be
    await establishing
    assert stream.resets == 1
    protocol.connection_lost(None)


async def test_cancelled_between_the_200_and_the_tunnel(monkeypatch):
    protocol, _ = fake_client()
    stream = FakeStream()

    async def opener(_request):
        return stream

    protocol._opener = opener
    serving = asyncio.create_task(protocol._serve(SimpleNamespace(host="x", port=1)))
    await asyncio.sleep(0)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert stream.resets == 1
    protocol.connection_lost(None)


# The order of the first bytes


async def test_a_target_that_speaks_first(certs, frontend):
    async with target(Banner) as banner, tunnel(certs) as t:
        where = await t.plane.add_frontend(frontend.url)
        to = f"127.0.0.1.node-1.konnektor.internal:{banner.port}"
        for _ in range(10):
            async with connected(where, to, **frontend.client) as (reader, _):
                assert await reader.readline() == b"220 ready\r\n"


async def test_the_200_is_a_write_of_its_own(certs, monkeypatch):
    """Though the target's banner is there before: kube-apiserver gives up when it reads both at once."""
    writes = []

    class Recorded(HttpConnect):
        def connection_made(self, transport):
            super().connection_made(Recording(transport))

    class Recording:
        def __init__(self, transport):
            self._transport = transport

        def __getattr__(self, name):
            return getattr(self._transport, name)

        def write(self, data):
            writes.append(bytes(data))
            self._transport.write(data)

    async def with_banner(opener, request):
        stream = await opener(request)
        await until(lambda: stream._inbox.chunks)
        return stream

    async with target(Banner) as banner, tunnel(certs) as t:
        clients = t.plane._clients
        opener = clients._opener
        monkeypatch.setattr(clients, "_opener", lambda request: with_banner(opener, request))
        monkeypatch.setattr("konnektor.frontends.clients.HttpConnect", Recorded)
        where = await t.plane.add_frontend("http://127.0.0.1:0")
        to = f"127.0.0.1.node-1.konnektor.internal:{banner.port}"
        async with connected(where, to) as (reader, _):
            assert await reader.readline() == b"220 ready\r\n"
    assert writes == [ESTABLISHED, b"220 ready\r\n"]


# Defects


async def test_a_defect_is_a_500(certs, monkeypatch, log):
    async with tunnel(certs) as t:

        async def opener(request):
            raise RuntimeError("secret")

        monkeypatch.setattr(t.plane._clients, "_opener", opener)
        where = await t.plane.add_frontend("http://127.0.0.1:0")
        assert await ask(where, "x:1") == "HTTP/1.1 500 Internal Error"
    assert "internal error" in log()


# The end


async def test_drain(certs, frontend):
    """Who has not asked yet is told; who is being connected still gets its tunnel."""
    async with target() as echo, tunnel(certs) as t:
        where = await t.plane.add_frontend(frontend.url)
        to = f"127.0.0.1.node-1.konnektor.internal:{echo.port}"
        async with (
            connection(where, **frontend.client) as (idle, idle_writer),
            connected(where, to, **frontend.client) as (reader, writer),
        ):
            await until(lambda: len(t.plane._clients._here) == 1 + frontend.tls)
            draining = asyncio.create_task(t.plane.drain(30))
            assert await idle.readline() == b"HTTP/1.1 503 Shutting Down\r\n"
            idle_writer.close()
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            writer.close()
            await draining


async def test_aclose_while_dialing(certs, frontend):
    with black_hole() as hole:
        async with tunnel(certs) as t:
            where = await t.plane.add_frontend(frontend.url)
            async with connection(where, **frontend.client) as (reader, writer):
                writer.write(connect_head(f"127.0.0.1.node-1.konnektor.internal:{hole}"))
                await until(lambda: t.session.stream_count == 1)
                await t.plane.aclose()
                with contextlib.suppress(ConnectionError, ssl.SSLError):
                    assert b"200" not in await reader.read()


# Unix sockets


async def test_the_unix_socket_is_ours_alone(certs, tmp_path):
    path = tmp_path / "c.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane:
        assert await plane.add_frontend(f"http+unix://{path}") == str(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with pytest.raises(kk.ListenError, match="another program is listening there"):
            await plane.add_frontend(f"http+unix://{path}")
    assert not path.exists()


async def test_what_another_program_put_there_stays(certs, tmp_path):
    path = tmp_path / "c.sock"
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane:
        await plane.add_frontend(f"http+unix://{path}")
        path.unlink()
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane:
        await plane.add_frontend(f"http+unix://{path}")
        path.unlink()
        path.write_text("mine")
    assert path.read_text() == "mine"
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane:
        with pytest.raises(kk.ListenError, match="something that is not a socket is there"):
            await plane.add_frontend(f"http+unix://{path}")


# https


async def test_tls_1_2_is_enough_and_there_is_no_alpn(certs):
    async with tunnel(certs) as t:
        where = await t.plane.add_frontend(https_url(certs))
        client = https_client(certs, ssl.TLSVersion.TLSv1_2)
        client["ssl"].set_alpn_protocols(["h2", "http/1.1"])
        async with connection(where, **client) as (_, writer):
            ssl_object = writer.get_extra_info("ssl_object")
            assert ssl_object.version() == "TLSv1.2" and ssl_object.selected_alpn_protocol() is None
        assert await ask(where, "x:1", **https_client(certs)) == "HTTP/1.1 503 No Worker for Target"


async def test_https_wants_a_certificate_of_its_ca(certs, foreign, log):
    async with tunnel(certs) as t:
        where = await t.plane.add_frontend(https_url(certs))
        strangers = foreign("client", "stranger")
        context = ssl.create_default_context(cafile=certs.ca)
        for sentence in ("sent no certificate", "was not issued by a CA that we trust"):
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                async with connection(where, ssl=context, server_hostname="127.0.0.1") as (reader, writer):
                    writer.write(connect_head("x:1"))
                    assert await reader.read() == b""
            await until(lambda sentence=sentence: any(sentence in line for line in log()))
            context.load_cert_chain(strangers.cert, strangers.key)
        async with connection(where) as (reader, writer):
            writer.write(connect_head("x:1"))
            with contextlib.suppress(ConnectionError):
                await reader.read()
        await until(lambda: any("speaks plain HTTP" in line for line in log()))
    assert len([line for line in log() if line.startswith("refused a connection: ")]) == 3


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("early", [True, False])
async def test_a_stolen_key_of_a_worker_opens_no_way_to_the_others(certs, log, version, early):
    async with target() as echo, tunnel(certs) as t:
        where = await t.plane.add_frontend(https_url(certs))
        async with connection(where, **https_client_of(certs.worker("node-2"), version)) as (reader, writer):
            if early:
                writer.write(connect_head(f"127.0.0.1.node-1.konnektor.internal:{echo.port}"))
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 403 Certificate Is Not for a Client Here\r\n")
        assert not echo.made and not t.session.stream_count
    (line,) = [line for line in log() if " 403 " in line]
    assert line.endswith(
        " a request: 403 Certificate Is Not for a Client Here (its certificate is for a worker, "
        "spiffe://konnektor.local/worker/node-2; issue one with konnektor pki issue --role client --name NAME)"
    )


NO_WORKER = "HTTP/1.1 503 No Worker for Target"
NO_CLIENT = "HTTP/1.1 403 Certificate Is Not for a Client Here"


@pytest.mark.parametrize(
    ("uris", "status"),
    [
        ([], NO_WORKER),
        (["spiffe://konnektor.local/client/api"], NO_WORKER),
        (["spiffe://cluster.local/ns/kube-system/sa/api", "https://example.com/worker/x"], NO_WORKER),
        (["spiffe://elsewhere.example/client/api"], NO_CLIENT),
        (["spiffe://elsewhere.example/worker/node-1"], NO_CLIENT),
        (["spiffe://konnektor.local/control-plane/cp"], NO_CLIENT),
        (["spiffe://konnektor.local/client/api", "spiffe://konnektor.local/worker/node-1"], NO_CLIENT),
    ],
)
async def test_which_certificates_are_for_clients(tmp_path, uris, status):
    ca = Issuer(tmp_path / "pki")
    own = ca.issue("control-plane", "cp")
    files = ca.forge("odd", uris, [CLIENT_AUTH])
    async with kk.ControlPlane("127.0.0.1:0", tls=own) as plane:
        where = await plane.add_frontend(f"https://127.0.0.1:0?cert={own.cert}&key={own.key}&client-ca={own.ca}")
        assert await ask(where, "x:1", **https_client_of(files)) == status


async def test_a_frontend_whose_own_certificate_has_no_trust_domain(tmp_path):
    ca = Issuer(tmp_path / "pki")
    own, front = ca.issue("control-plane", "cp"), ca.forge("front", [], [SERVER_AUTH], hosts=("localhost",))
    async with kk.ControlPlane("127.0.0.1:0", tls=own) as plane:
        where = await plane.add_frontend(f"https://127.0.0.1:0?cert={front.cert}&key={front.key}&client-ca={own.ca}")
        for role, status in (("client", NO_WORKER), ("worker", NO_CLIENT)):
            files = ca.forge(role, [f"spiffe://elsewhere.example/{role}/x"], [CLIENT_AUTH])
            client = https_client_of(files) | {"server_hostname": "localhost"}
            assert await ask(where, "x:1", **client) == status


class Handshaking:
    """A client in the midst of its TLS handshake: its first bytes are there, and it goes on when told to."""

    def __init__(self, where, certs):
        tls = https_client(certs)
        self._outgoing = ssl.MemoryBIO()
        self._incoming = ssl.MemoryBIO()
        self._object = tls["ssl"].wrap_bio(self._incoming, self._outgoing, server_hostname=tls["server_hostname"])
        self._sock = socket.create_connection(("127.0.0.1", int(where.rpartition(":")[2])))
        self._sock.setblocking(False)
        self._try(self._object.do_handshake)
        self._hello = self._outgoing.read()
        self._sock.send(self._hello[:10])

    def _try(self, do):
        with contextlib.suppress(ssl.SSLWantReadError):
            return do()

    async def ask(self, to):
        """The rest of the handshake, with the request behind it in one piece; returns what comes of it."""
        loop = asyncio.get_running_loop()
        self._sock.send(self._hello[10:])
        while True:
            self._incoming.write(await loop.sock_recv(self._sock, 65536))
            try:
                self._object.do_handshake()
            except ssl.SSLWantReadError:
                continue
            break
        self._object.write(connect_head(to))
        self._sock.send(self._outgoing.read())
        while True:
            if (answer := self._try(lambda: self._object.read(1000))) is not None:
                return answer
            self._incoming.write(await loop.sock_recv(self._sock, 65536))

    def close(self):
        self._sock.close()


async def test_a_client_in_its_handshake_does_not_hold_up_the_end(certs, monkeypatch):
    monkeypatch.setattr("konnektor.frontends.clients.TLS_TIMEOUT", 1000.0)
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane:
        where = await plane.add_frontend(https_url(certs))
        with contextlib.closing(Handshaking(where, certs)):
            await until(lambda: plane._clients._handshakes)
            async with asyncio.timeout(PATIENCE):
                await plane.drain(1000)
            assert not plane._clients._handshakes


async def test_a_client_that_finishes_its_handshake_while_the_frontend_leaves_is_told(certs):
    async with target() as echo, tunnel(certs) as t:
        where = await t.plane.add_frontend(https_url(certs))
        to = f"127.0.0.1.node-1.konnektor.internal:{echo.port}"
        async with connected(where, to, **https_client(certs)) as (_, writer):
            with contextlib.closing(Handshaking(where, certs)) as late:
                await until(lambda: t.plane._clients._handshakes)
                draining = asyncio.create_task(t.plane.drain(30))
                await asyncio.sleep(0)
                assert (await late.ask(to)).startswith(b"HTTP/1.1 503 Shutting Down\r\n")
                assert len(echo.made) == 1
            writer.close()
            await draining


async def test_cancelled_as_its_handshake_is_done(certs):
    """In the very turn of the loop: nothing is left of the client."""
    async with tunnel(certs) as t:
        where = await t.plane.add_frontend(https_url(certs))
        clients = t.plane._clients
        made = []

        class Client(HttpConnect):
            def connection_made(self, transport):
                super().connection_made(transport)
                made.append(self)
                for task in clients._handshakes:
                    task.cancel()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("konnektor.frontends.clients.HttpConnect", Client)
            with contextlib.suppress(OSError):
                async with connection(where, **https_client(certs)) as (reader, _):
                    assert await reader.read() == b""
        await until(lambda: made and made[0].transport is None)
        assert not clients._handshakes and not clients._here


async def test_closing_during_a_handshake(certs):
    async with tunnel(certs) as t:
        where = await t.plane.add_frontend(https_url(certs))
        async with connection(where) as (reader, writer):
            writer.write(b"\x16\x03\x01\x02")
            await until(lambda: t.plane._clients._tasks)
            await t.plane.aclose()
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""


class Leaving(asyncio.Transport):
    """As asyncio's of TLS in the turn of the loop before its protocol hears that the connection is lost."""

    on_closed = None

    def get_protocol(self):
        return self

    def abort(self):
        asyncio.get_running_loop().call_soon(self.on_closed)


async def test_closing_in_the_turn_in_which_a_client_of_tls_is_gone(certs):
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as plane:
        client = Leaving()
        plane._clients._add(client, client)
        await plane.aclose()
        assert not plane._clients._here
