"""Sessions outlive their connections: worker and control plane with a path between them that breaks."""

import asyncio
import contextlib
import hashlib
import random
import shutil
import socket
from contextlib import asynccontextmanager

import anyio
import pytest

import konnektor as kk
from konnektor import pki
from konnektor.addresses import parse_hostport
from konnektor.dial import dial
from konnektor.driver import clock
from konnektor.frames import Feature
from konnektor.handshake import with_alerts
from konnektor.session import Session
from konnektor.settings import Settings
from konnektor.testing import memory_session_pair
from konnektor.worker import Backoff, Worker
from tests.endpoints.parts import PATIENCE, black_hole, connection, proxied, target, until

BLOB = random.Random(0).randbytes(1_000_000)
STEP = 50_000


class Hold(kk.StreamType):
    """The test decides when it is answered."""

    name = "hold@test.example"


def hold(endpoint):
    """``answer`` lets the endpoint's handlers accept; the streams that they have."""
    answer, streams = asyncio.Event(), []

    @endpoint.handle(Hold)
    async def handler(stream, _request):
        streams.append(stream)
        await answer.wait()
        await stream.accept()
        await stream.receive()

    return answer, streams


def resumed(t):
    """How often each end has gone on."""
    return t.session.stats().resumed, t.client.stats().resumed


async def going_on(t, times=1):
    """Both ends have resumed so often."""
    await until(lambda: resumed(t) == (times, times) and not t.session.suspended and not t.client.suspended)


async def suspended(t):
    """The connection is gone, both ends know, and none can be had."""
    t.proxy.refuse()
    t.proxy.cut()
    await until(lambda: t.session.suspended and t.client.suspended)


def lead(t, plane):
    """Connections can be had again, and lead to another control plane."""
    t.proxy._dial_to = socket.AF_INET, parse_hostport(plane.address)
    t.proxy.admit()


def judge(session):
    """Its time to hear from the peer is over."""
    now = clock()
    session._mux.liveness.heard_at = now - 30
    session._mux.liveness.due = now
    session._mux.handle_timeout(now)


async def transfer(write, read, *, at=(), do=lambda: None):
    """Sends and receives the blob, and does something when so many bytes have gone; the checksums must agree."""

    async def send():
        for offset in range(0, len(BLOB), STEP):
            if offset in at:
                do()
            await write(BLOB[offset : offset + STEP])

    async def receive():
        digest, count = hashlib.sha256(), 0
        while count < len(BLOB):
            data = await read()
            digest.update(data)
            count += len(data)
        return digest.digest()

    async with asyncio.timeout(PATIENCE):
        _, digest = await asyncio.gather(send(), receive())
    assert digest == hashlib.sha256(BLOB).digest()


async def echoes(stream, text=b"still here"):
    await stream.send(text)
    got = b""
    while len(got) < len(text):
        got += await stream.receive()
    assert got == text


# Data


def silence_then_verdict(t):
    """Nothing passes any more; after a long while the worker notices."""
    t.proxy.silence()
    judge(t.client)


FAULTS = {
    "cut": lambda t: t.proxy.cut(),
    "close": lambda t: t.proxy.close(),
    "the worker notices first": lambda t: t.proxy.cut("client", other_after=0.1),
    "the worker alone notices": lambda t: t.proxy.cut("client"),
    "the control plane notices first": lambda t: t.proxy.cut("target", other_after=0.1),
    "silence": silence_then_verdict,
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_transfers_through_a_forward_and_both_ways_between_the_ends(certs, fault):
    async with target() as echo, proxied(certs, plane={"allow_from": [f"node-1=127.0.0.1:{echo.port}"]}) as t:
        where = await t.plane.add_forward(f"127.0.0.1:0=node-1/127.0.0.1:{echo.port}")

        def break_it():
            FAULTS[fault](t)

        async with (
            connection(where) as (reader, writer),
            await t.plane.open_tcp("127.0.0.1", echo.port, worker="node-1") as down,
            await t.client.open_tcp("127.0.0.1", echo.port) as up,
        ):

            async def write(data):
                writer.write(data)
                await writer.drain()

            for times, at in enumerate((STEP * 3, STEP * 10), 1):
                await asyncio.gather(
                    transfer(write, lambda: reader.read(100_000), at=(at,), do=break_it),
                    transfer(down.send, down.receive),
                    transfer(up.send, up.receive),
                )
                await going_on(t, times)
            writer.write_eof()
            assert await reader.read() == b""
            for stream in (down, up):
                await stream.send_eof()
                with pytest.raises(anyio.EndOfStream):
                    await stream.receive()
        await until(lambda: not t.session.stream_count and not t.client.stream_count)


@pytest.mark.parametrize("delay", [0, 0.1])
async def test_the_old_connection_still_delivers(certs, delay):
    """The worker gave it up, but what it sent there has arrived, or is yet to: it must not be taken in twice."""
    async with (
        target() as echo,
        proxied(certs, plane={"allow_from": [f"node-1=127.0.0.1:{echo.port}"]}) as t,
        await t.client.open_tcp("127.0.0.1", echo.port) as stream,
    ):
        await echoes(stream)
        (old,) = t.proxy
        old.silence(to="client")
        old.delay(delay, to="target")
        await stream.send(BLOB[:20_000])
        await until(lambda: t.client.stats().in_flight >= 20_000)
        judge(t.client)
        await going_on(t)
        old.resume()
        await until(lambda: len(t.proxy) == 1)
        got = b""
        while len(got) < 20_000:
            got += await stream.receive()
        assert got == BLOB[:20_000]
        await transfer(stream.send, stream.receive)


async def test_the_control_plane_finds_silence(certs):
    async with target() as echo, proxied(certs) as t, await t.session.open_tcp("127.0.0.1", echo.port) as stream:
        t.proxy.silence()
        judge(t.session)
        await until(lambda: t.session.suspended)
        t.proxy.resume()  # and the worker hears of the end
        await going_on(t)
        await echoes(stream)


async def test_what_sessions_log_names_their_peer(certs, log):
    async with proxied(certs) as t:
        await suspended(t)
        t.proxy.admit()
        await going_on(t)
        for session in (t.session, t.client):
            lines = [line for line in log() if line.startswith(f"[{session.number} {session.peer_name}] ")]
            assert [line.partition("] ")[2][:9] for line in lines] == ["suspended", "resumed"]


async def test_half_closed_streams(certs):
    async with target() as echo, proxied(certs) as t:
        ended = await t.session.open_tcp("127.0.0.1", echo.port)
        await echoes(ended)
        await ended.send_eof()
        with pytest.raises(anyio.EndOfStream):
            await ended.receive()
        async with connection(await t.plane.add_forward(f"127.0.0.1:0=node-1/127.0.0.1:{echo.port}")) as (reader, _):
            open_end = await t.session.open_tcp("127.0.0.1", echo.port)
            await suspended(t)
            await open_end.send(b"last")
            await open_end.send_eof()
            for connected in echo.made[1:]:
                connected.transport.write(b"said while broken")
            t.proxy.admit()
            await going_on(t)
            assert await reader.read(100) == b"said while broken"
            got = b""
            with contextlib.suppress(anyio.EndOfStream):
                while True:
                    got += await open_end.receive()
            assert got == b"said while brokenlast"
            await open_end.aclose()
        await ended.aclose()


async def test_cut_again_and_again_before_it_has_caught_up(certs):
    async with target() as echo, proxied(certs) as t, await t.session.open_tcp("127.0.0.1", echo.port) as stream:
        await suspended(t)
        sending = asyncio.create_task(transfer(stream.send, stream.receive))
        t.proxy.drip(2_000_000)
        t.proxy.admit()
        for times, count in enumerate((1, 700, 40_000), 1):
            t.proxy.cut_after(count, to="client")
            await until(lambda times=times: t.proxy.stats().faults.get("cut_after", 0) == times)
        t.proxy.drip(None)
        await sending
        await until(lambda: not t.session.suspended and not t.client.suspended)


# The new connection breaks, too


@pytest.mark.parametrize("to", ["client", "target"])
@pytest.mark.parametrize("count", [1, 1_000])
async def test_cut_inside_the_tls_handshake(certs, count, to, log):
    async with target() as echo, proxied(certs) as t, await t.session.open_tcp("127.0.0.1", echo.port) as stream:
        await suspended(t)
        t.proxy.cut_after(count, to=to)
        t.proxy.admit()
        await going_on(t)
        assert t.proxy.stats().faults["cut_after"] == 1
        await echoes(stream)
    assert any("cannot resume the session: the control plane at" in line for line in log())


@pytest.mark.parametrize("heard", [True, False])
async def test_cut_between_resume_and_resumed(certs, monkeypatch, heard):
    """Whether the control plane has heard the RESUME or not: the next attempt is granted."""
    honest = Session.resume_requested
    cuts = []

    def resume_requested(session, frame, nonces):
        if not cuts:
            cuts.append(frame.attempt)
            t.proxy.cut()
            if not heard:
                session.abort()
                return
        honest(session, frame, nonces)

    monkeypatch.setattr(Session, "resume_requested", resume_requested)
    async with target() as echo, proxied(certs) as t, await t.session.open_tcp("127.0.0.1", echo.port) as stream:
        t.proxy.cut()
        await until(lambda: cuts and t.client.stats().resumed == 1 and not t.client.suspended)
        assert t.session.stats().resumed == 1 + heard
        await echoes(stream)


async def test_attempts_that_fail_are_not_repeated_at_once(certs, monkeypatch):
    """However long the session was up before: a control plane that is down must not make the worker spin."""
    monkeypatch.setattr("konnektor.worker.CALM", 0.0)
    waits = []
    honest = Backoff.next

    def next_(backoff):
        waits.append(honest(backoff))
        return waits[-1]

    monkeypatch.setattr(Backoff, "next", next_)
    async with target() as echo, proxied(certs) as t, await t.session.open_tcp("127.0.0.1", echo.port) as stream:
        await suspended(t)
        await until(lambda: len(waits) >= 3)
        assert waits == sorted(waits)  # ever longer
        t.proxy.admit()
        await going_on(t)
        await echoes(stream)


async def test_nobody_answers_at_the_new_connection(certs, log):
    limits = kk.Limits(hello_timeout=0.2)
    async with (
        target() as echo,
        proxied(certs, limits=limits) as t,
        await t.session.open_tcp("127.0.0.1", echo.port) as stream,
    ):
        t.proxy.swallow()
        t.proxy.cut()
        await until(lambda: any("did not finish the TLS handshake in time" in line for line in log()))
        t.proxy.admit()
        await going_on(t)
        await echoes(stream)


# It cannot be resumed


async def test_another_control_plane_has_taken_over(certs, log):
    """A restart: streams end, and say how far they got; the worker is connected afresh."""
    async with (
        target() as echo,
        kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as heir,
        proxied(certs, plane={"allow_from": [f"node-1=127.0.0.1:{echo.port}"]}) as t,
    ):
        stream = await t.client.open_tcp("127.0.0.1", echo.port)
        await echoes(stream, b"12345")
        await suspended(t)
        lead(t, heir)
        with pytest.raises(kk.SessionLost, match=r"connection lost: .*, and the peer says: no such session") as lost:
            await stream.receive()
        assert (lost.value.sent, lost.value.received) == (5, 5)
        assert isinstance(t.client.error, kk.ResumeRefusedError)
        session = await heir.wait_for("node-1")
        await stream.aclose()
        # On the connection that was to resume the old one: there was no other.
        assert not any(line.startswith("refused a connection") for line in log())
        await until(lambda: t.worker.sessions and t.worker.sessions[0] is not t.client)
        assert await t.worker.sessions[0].ping() > 0
        assert sum("starting afresh" in line for line in log()) == 1
        # And it can be resumed as the old one could.
        client = t.worker.sessions[0]
        t.proxy.cut()
        await until(lambda: session._continuity.resumed and client._continuity.resumed)
        assert await client.ping() > 0


@pytest.mark.parametrize("turns", range(4))
async def test_a_worker_that_is_closed_while_a_session_begins_afresh_leaves_none_behind(certs, turns, monkeypatch):
    begin = Worker._begin
    begun, closing = [], []

    async def close(worker):
        for _ in range(turns):
            await asyncio.sleep(0)
        await worker.aclose()

    def and_close(worker, address, session):
        begin(worker, address, session)
        begun.append(session)
        closing.append(asyncio.create_task(close(worker)))

    monkeypatch.setattr(Worker, "_begin", and_close)
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as heir, proxied(certs) as t:
        await suspended(t)
        lead(t, heir)
        await until(lambda: closing)
        await closing[0]
        assert begun[0].closed and t.client.closed
        await until(lambda: heir.get("node-1") is None)


async def test_a_worker_that_drains_while_a_session_begins_afresh_takes_it_along(certs, monkeypatch):
    """It is asked before whether it may begin; the drain comes when the attempt is on its way."""
    make, begin = Worker._session, Worker._begin
    begun, draining = [], []

    def and_drain(worker, peer, check_hello=None):
        if check_hello is not None and not draining:
            draining.append(asyncio.create_task(worker.drain(5)))
        return make(worker, peer, check_hello)

    def and_note(worker, address, session):
        begun.append(session)
        begin(worker, address, session)

    monkeypatch.setattr(Worker, "_session", and_drain)
    monkeypatch.setattr(Worker, "_begin", and_note)
    async with target() as echo, kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as heir, proxied(certs) as t:
        stream = await t.session.open_tcp("127.0.0.1", echo.port)
        await suspended(t)
        lead(t, heir)
        await until(lambda: draining)
        await draining[0]
        assert begun[0].closed and t.client.closed
        await until(lambda: heir.get("node-1") is None)
        await stream.aclose()


async def test_connections_that_only_lead_to_other_sessions_are_made_ever_more_seldom(certs, monkeypatch):
    """Two control planes in turn behind one address, and connections that break at once."""
    waits = []
    following = Backoff.next
    monkeypatch.setattr(Backoff, "next", lambda self: waits.append(following(self)) or 0.001)
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as heir, proxied(certs) as t:
        planes = [heir, t.plane]
        for n in range(6):
            before = t.worker.sessions[0]
            t.proxy._dial_to = socket.AF_INET, parse_hostport(planes[n % 2].address)
            await until(lambda n=n: planes[n % 2].get("node-1") is not None or n == 0)
            t.proxy.cut()
            await until(lambda before=before: t.worker.sessions and t.worker.sessions[0] is not before)
        assert len(waits) == 5 and waits[-1] > 4 * waits[0]


async def test_a_worker_that_may_not_begin_afresh_hears_why_on_a_connection_of_its_own(certs, log):
    async with kk.ControlPlane("127.0.0.1:0", tls=certs.plane) as heir, proxied(certs) as t:
        # Another process has the name by then.
        sock = await dial(*parse_hostport(heir.address), within=PATIENCE)
        settings = Settings.of(kk.Limits(), instance=b"another process.")
        tls = with_alerts(certs.worker().client_context(), sock)
        async with await Session.client(sock, tls=tls, server_name="127.0.0.1", settings=settings):
            await heir.wait_for("node-1")
            await suspended(t)
            lead(t, heir)
            await t.client.wait_closed()
            assert isinstance(t.client.error, kk.ResumeRefusedError)
            await until(lambda: any("another process is connected as node-1; trying again" in line for line in log()))


async def test_the_grace_is_over_at_the_control_plane(certs):
    async with target() as echo, proxied(certs, plane={"limits": kk.Limits(resume_grace=0.5)}) as t:
        stream = await t.session.open_tcp("127.0.0.1", echo.port)
        await echoes(stream, b"123")
        await suspended(t)
        with pytest.raises(kk.SessionLost, match=r"connection lost: .*, and was not resumed within 0.5 s") as lost:
            await stream.receive()
        assert (lost.value.sent, lost.value.received) == (3, 3)
        assert t.plane.get("node-1") is None
        t.proxy.admit()
        assert await t.plane.wait_for("node-1") is not t.session
        await t.client.wait_closed()
        assert isinstance(t.client.error, kk.ResumeRefusedError)
        await stream.aclose()


async def test_the_grace_is_over_at_the_worker(certs, log):
    async with target() as echo, proxied(certs, limits=kk.Limits(resume_grace=0.5)) as t:
        stream = await t.session.open_tcp("127.0.0.1", echo.port)
        await suspended(t)
        await t.client.wait_closed()
        assert "not resumed within 0.5 s" in str(t.client.error)
        assert t.session.suspended  # which waits for longer, but not once the worker starts afresh
        t.proxy.admit()
        with pytest.raises(kk.SessionLost, match="replaced by a newer session"):
            await stream.receive()
        assert await t.plane.wait_for("node-1") is not t.session
        await stream.aclose()
    assert any("worker node-1 starts afresh" in line for line in log())


@pytest.mark.parametrize("end", ["worker", "control plane"])
async def test_no_grace_no_resuming(certs, end):
    none = kk.Limits(resume_grace=0)
    kwargs = {"limits": none} if end == "worker" else {"plane": {"limits": none}}
    async with target() as echo, proxied(certs, **kwargs) as t:
        assert t.session.session_id == t.client.session_id == b""
        declared = (t.session if end == "worker" else t.client).peer_settings.features
        assert not declared & Feature.RESUME
        assert t.session._mux.resumption.replay is t.client._mux.resumption.replay is None
        stream = await t.session.open_tcp("127.0.0.1", echo.port)
        t.proxy.cut()
        with pytest.raises(kk.SessionLost):
            await stream.receive()
        await t.client.wait_closed()
        assert resumed(t) == (0, 0)
        await stream.aclose()


async def test_a_restarted_worker_ends_what_its_predecessor_left(certs, monkeypatch):
    async with target() as echo, proxied(certs) as t:
        stream = await t.session.open_tcp("127.0.0.1", echo.port)
        await suspended(t)
        await t.worker.aclose()  # nobody hears of it
        assert t.session.suspended
        monkeypatch.setattr("konnektor.worker.INSTANCE", bytes(16))
        async with kk.Worker([t.plane.address], tls=certs.worker()):
            with pytest.raises(kk.SessionLost, match="replaced by a newer session"):
                await stream.receive()
            assert t.plane.get("node-1") is not t.session
        await stream.aclose()


async def test_at_most_two_sessions_of_a_worker_wait(certs):
    """Suspended ones that are not the worker's last, because they were draining."""
    async with target() as echo, proxied(certs) as t:
        sessions, streams = [], []
        for _ in range(4):
            session = t.plane.get("node-1")
            sessions.append(session)
            streams.append(await session.open_tcp("127.0.0.1", echo.port))
            session.start_drain(60)
            await until(lambda session=session: t.plane.get("node-1") not in (None, session))
        t.proxy.refuse()
        t.proxy.cut()
        await until(lambda: sum(session.suspended for session in sessions) <= 2)
        await until(lambda: t.plane.get("node-1").suspended)
        assert [isinstance(session.error, kk.CalmError) for session in sessions] == [True, True, True, False]
        t.proxy.admit()
        await until(lambda: not sessions[3].suspended)
        await echoes(streams[3])
        for stream in streams:
            await stream.aclose()


# Who may


@asynccontextmanager
async def by_hand(certs, monkeypatch, **kwargs):
    """Suspended, and the worker does nothing about it: ``attempt`` does."""

    async def idle(*_):
        await asyncio.Event().wait()

    monkeypatch.setattr(Worker, "_follow", idle)
    async with target() as echo, proxied(certs, **kwargs) as t:

        async def attempt(files=None, where=None):
            sock = await dial(*parse_hostport(where or t.proxy.address), within=PATIENCE)
            context = (files or certs.worker()).client_context()
            await t.client.resume(sock, with_alerts(context, sock), "127.0.0.1")

        t.attempt = attempt
        t.stream = await t.session.open_tcp("127.0.0.1", echo.port)
        await echoes(t.stream)
        t.proxy.cut()
        await until(lambda: t.session.suspended and t.client.suspended)
        yield t
        await t.stream.aclose()


async def test_another_workers_certificate_does_not_resume(certs, monkeypatch, log):
    async with by_hand(certs, monkeypatch) as t:
        with pytest.raises(kk.ResumeRefusedError, match="no such session"):
            await t.attempt(certs.worker("node-2"))
        assert t.client.closed and t.session.suspended  # for whom it belongs to
        assert t.session._mux.resumption.ticket.attempt == 0
        with pytest.raises(kk.SessionClosedError):
            await t.attempt()
    assert any("no such session" in line for line in log() if line.startswith("refused a connection"))


async def test_another_control_planes_certificate_is_not_resumed_with(certs, monkeypatch):
    other = certs("control-plane", "other", "127.0.0.1")
    async with by_hand(certs, monkeypatch) as t, kk.ControlPlane("127.0.0.1:0", tls=other) as stranger:
        with pytest.raises(kk.HandshakeError, match="the peer is now other, and was cp") as refused:
            await t.attempt(where=stranger.address)
        assert isinstance(refused.value.__cause__, kk.IdentityError)
        assert t.client.suspended and t.client.peer_name == "cp"
        await t.attempt()
        await echoes(t.stream)


async def test_a_renewed_certificate_of_the_same_name_resumes(certs, monkeypatch, tmp_path):
    for name in ("ca.pem", "ca.key"):
        shutil.copy(certs.folder / name, tmp_path)
    issued = pki.issue(tmp_path, "worker", "node-1")
    async with by_hand(certs, monkeypatch) as t:
        await t.attempt(kk.TLSFiles(certs.ca, issued.cert, issued.key))
        await echoes(t.stream)
        assert t.session.peer_name == "node-1"


async def test_resuming_is_cancelled_or_asked_for_wrongly(certs, monkeypatch):
    async with by_hand(certs, monkeypatch) as t:
        t.proxy.swallow()
        first = asyncio.create_task(t.attempt())
        await until(lambda: len(t.proxy) == 1)
        with pytest.raises(kk.LocalProtocolError, match="being resumed already"):
            await t.attempt()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert t.client.suspended
        t.proxy.admit()
        await t.attempt()
        await echoes(t.stream)
        with pytest.raises(kk.LocalProtocolError, match="not suspended"):
            await t.attempt()
        assert resumed(t) == (1, 1)


@pytest.mark.parametrize("when", ["HELLO", "RESUME", "RESUMED"])
async def test_the_session_ends_while_it_is_being_resumed(certs, monkeypatch, when):
    """Whatever the control plane has granted by then, it hears that there is nothing to go on with."""
    honest = Session.resume_requested

    def resume_requested(session, frame, nonces):
        if when == "RESUME":
            t.client.close(kk.Code.SHUTDOWN, "changed our mind")
        honest(session, frame, nonces)
        if when == "RESUMED":
            t.client.close(kk.Code.SHUTDOWN, "changed our mind")

    monkeypatch.setattr(Session, "resume_requested", resume_requested)
    async with by_hand(certs, monkeypatch) as t:
        if when == "HELLO":
            t.proxy.swallow()
        attempt = asyncio.create_task(t.attempt())
        if when == "HELLO":
            await until(lambda: len(t.proxy) == 1)
            t.client.close(kk.Code.SHUTDOWN, "changed our mind")
        with pytest.raises(kk.SessionClosedError, match="ended meanwhile"):
            await attempt
        await t.client.wait_closed()
        if when == "HELLO":
            assert t.session.suspended  # it cannot know
        else:
            await t.session.wait_closed()
            assert str(t.session.error) == "changed our mind"


# Streams that were not accepted


async def test_pending_streams_are_accepted_when_the_connection_is_back_soon(certs):
    async with proxied(certs) as t:
        answer, streams = hold(t.worker)
        before = asyncio.create_task(t.session.open(Hold()))
        await until(lambda: len(streams) == 1)
        await suspended(t)
        during = asyncio.create_task(t.session.open(Hold()))
        answer.set()
        t.proxy.admit()
        for opening in (before, during):
            async with await opening as stream:
                await stream.send(b"x")
        await going_on(t)
        assert len(streams) == 2
        assert t.session.stats().resumed == 1


async def test_pending_streams_fail_when_it_is_not_so_that_they_can_be_tried_elsewhere(certs):
    async with target() as echo, proxied(certs) as t:
        with black_hole() as nowhere:
            dialing = asyncio.create_task(t.session.open_tcp("127.0.0.1", nowhere))
            await until(lambda: t.client.stream_count)
            accepted = await t.session.open_tcp("127.0.0.1", echo.port)
            await suspended(t)
            during = asyncio.create_task(t.plane.open_tcp("127.0.0.1", echo.port, worker="node-1"))
            for opening in (dialing, during):
                with pytest.raises(kk.UnreachableError, match="connection is broken") as failed:
                    await opening
                assert failed.value.retryable
            with pytest.raises(kk.UnreachableError):  # at once
                await t.session.open_tcp("127.0.0.1", echo.port)
            t.proxy.admit()
            await going_on(t)
            await until(lambda: t.client.stream_count == 1)
            await echoes(accepted)
            await accepted.aclose()
            async with await t.session.open_tcp("127.0.0.1", echo.port) as stream:
                await echoes(stream)


# Ends


@pytest.mark.parametrize("end", ["worker", "control plane"])
@pytest.mark.parametrize("open_streams", [True, False])
async def test_a_drain_begun_while_suspended_returns_in_time(certs, monkeypatch, end, open_streams):
    monkeypatch.setattr("konnektor.endpoint.LAST_WORDS", 0.05)
    async with target() as echo, proxied(certs) as t:
        stream = await t.session.open_tcp("127.0.0.1", echo.port) if open_streams else None
        await suspended(t)
        endpoint = t.worker if end == "worker" else t.plane
        async with asyncio.timeout(PATIENCE):
            await endpoint.drain(0.05 if open_streams else PATIENCE * 2)
        assert (t.client if end == "worker" else t.session).closed
        if stream is not None:
            await stream.aclose()


async def test_a_draining_worker_resumes(certs):
    """Whether the drain began before the connection broke or after."""
    async with target() as echo, proxied(certs) as t:
        stream = await t.session.open_tcp("127.0.0.1", echo.port)
        await suspended(t)
        draining = asyncio.create_task(t.worker.drain(PATIENCE))
        await until(lambda: t.client.draining)
        t.proxy.admit()
        await going_on(t)
        await echoes(stream)
        await until(lambda: t.session.draining)
        t.proxy.cut()
        await going_on(t, 2)
        await echoes(stream)
        await stream.aclose()
        await draining
        await t.session.wait_closed()
        assert t.session.error.code in (kk.Code.SHUTDOWN, kk.Code.NO_ERROR)


@pytest.mark.parametrize("grace", [0, PATIENCE])
async def test_a_draining_worker_resumes_for_what_has_ended_at_its_end(certs, grace, log):
    """The last bytes of a stream that it has forgotten were lost with the connection."""
    async with target() as echo, proxied(certs) as t, await t.session.open_tcp("127.0.0.1", echo.port) as stream:
        await echoes(stream)
        (old,) = t.proxy
        old.silence(to="target")
        await stream.send(BLOB[:5000])
        await stream.send_eof()
        await until(lambda: not t.client.stream_count)
        draining = asyncio.create_task(t.worker.drain(grace))
        await until(lambda: t.client.draining)
        t.proxy.cut()
        got = b""
        with contextlib.suppress(anyio.EndOfStream, kk.SessionLost):
            while True:
                got += await stream.receive()
        assert BLOB.startswith(got) and (len(got) == 5000 or not grace)
        await draining
        await t.session.wait_closed()
        assert not [line for line in log() if "error" in line]


@pytest.mark.parametrize("how", ["aclose", "close", "abort", "endpoint"])
@pytest.mark.parametrize("end", ["worker", "control plane"])
@pytest.mark.parametrize("trying", [True, False])
async def test_ended_while_suspended(certs, how, end, trying):
    async with target() as echo, proxied(certs, plane={"allow_from": [f"node-1=127.0.0.1:{echo.port}"]}) as t:
        session, endpoint = (t.client, t.worker) if end == "worker" else (t.session, t.plane)
        stream = await session.open_tcp("127.0.0.1", echo.port)
        await suspended(t)
        if trying:
            t.proxy.swallow()
            await until(lambda: len(t.proxy) == 1)
        async with asyncio.timeout(PATIENCE):
            match how:
                case "endpoint":
                    await endpoint.aclose()
                case "aclose":
                    await session.aclose()
                case "close":
                    session.close(kk.Code.SHUTDOWN, "enough")
                    await session.wait_closed()
                case _:
                    session.abort()
                    await session.wait_closed()
        assert session.closed and not session.suspended
        with pytest.raises(kk.SessionLost):
            await stream.receive()
        await stream.aclose()


async def test_a_worker_that_connects_once_resumes(certs):
    async with target() as echo, proxied(certs, once=True) as t:
        async with await t.session.open_tcp("127.0.0.1", echo.port) as stream:
            t.proxy.cut()
            await going_on(t)
            await echoes(stream)
        t.proxy.refuse()
        t.proxy.cut()
        await until(lambda: t.session.suspended and t.client.suspended)
        t.session.close(kk.Code.SHUTDOWN)
        t.proxy.admit()
        with pytest.raises(kk.HandshakeError, match=r"broke: connection lost: .* no such session"):
            await t.worker.wait_closed()


# Asking


async def test_pings_across_a_cut(certs):
    async with proxied(certs) as t:
        t.proxy.silence()
        pings = [asyncio.create_task(session.ping()) for session in (t.session, t.client) for _ in range(3)]
        await until(lambda: t.session._mux.liveness._ping_sent_at and t.client._mux.liveness._ping_sent_at)
        await suspended(t)
        pings += [asyncio.create_task(session.ping()) for session in (t.session, t.client)]
        await anyio.sleep(0)
        t.proxy.resume()
        t.proxy.admit()
        assert all(rtt > 0 for rtt in await asyncio.gather(*pings))
        assert resumed(t) == (1, 1)


async def test_a_suspended_session_can_be_looked_at(certs, log):
    async with target() as echo, proxied(certs) as t, await t.session.open_tcp("127.0.0.1", echo.port) as stream:
        await suspended(t)
        for session in (t.session, t.client):
            assert " suspended>" in repr(session)
            assert session.silent_for >= 0
            assert not session.closed and not session.draining and session.error is None
            assert session.session_id == t.session.session_id != b""
        (snapshot,) = t.plane.snapshot()
        assert snapshot.name == "node-1" and snapshot.stats.streams == 1
        assert len(t.plane) == 1 and t.plane.get("node-1") is t.session
        before = t.client.remote_address, t.client.ssl_object
        t.proxy.admit()
        await going_on(t)
        assert " up>" in repr(t.session)
        assert t.client.ssl_object is not before[1]
        await echoes(stream)
        assert t.plane.snapshot()[0].stats.resumed == 1
    lines = log()
    assert sum(line.startswith("worker node-1 resumed its session from 127.0.0.1:") for line in lines) == 1
    assert sum(line.startswith("resumed the session with cp at 127.0.0.1:") for line in lines) == 1


async def test_sessions_without_an_endpoint_end_with_their_connection():
    async with memory_session_pair() as (client, server):
        assert client.session_id == server.session_id == b""
        client._driver.transport.abort()
        await server.wait_closed()
        await client.wait_closed()
        assert not client.suspended
        with pytest.raises(kk.SessionClosedError):
            await client.resume(socket.socket())
