"""Rules and certificates that change while streams are open, or while a session waits for another connection."""

import asyncio
import dataclasses
import socket

import anyio
import pytest

import konnektor as kk
import konnektor.control_plane
import konnektor.targets
from konnektor.router import granted_routes
from konnektor.targets import _peer_address
from konnektor.testing import FaultProxy
from tests.endpoints.parts import Goodbye, proxied, target, tunnel, until
from tests.endpoints.test_resume import echoes, going_on, suspended


async def test_rules_may_be_text(certs):
    async with target() as one, target() as two, tunnel(certs, allow=[f"127.0.0.1:{one.port}"]) as t:
        (await t.session.open_tcp("127.0.0.1", one.port)).reset()
        t.worker.set_allow([f"127.0.0.1:{two.port}", kk.udp("127.0.0.1", 53)])
        (await t.session.open_tcp("127.0.0.1", two.port)).reset()
        for rules in ("127.0.0.1:80", kk.tcp("127.0.0.1", 80), ["127.0.0.1"], [80]):
            with pytest.raises(kk.ConfigurationError):
                t.worker.set_allow(rules)
        (await t.session.open_tcp("127.0.0.1", two.port)).reset()


async def ended(stream, error=kk.DeniedError):
    with pytest.raises(error) as caught:
        while True:
            await stream.receive()
    await stream.aclose()
    return str(caught.value)


@pytest.fixture(params=[False, True], ids=["connected", "suspended"])
def change(request):
    """Makes a change while the session is as the parameter says, and sees to it that it goes on."""

    async def make(t, do):
        if not request.param:
            do()
            return
        await suspended(t)
        do()
        assert t.session.suspended and t.client.suspended
        t.proxy.admit()
        await going_on(t)

    return make


# What a worker allows


async def test_a_worker_allows_less(certs, change, log):
    async with target() as kept, target() as cut, proxied(certs) as t:
        keeps = await t.session.open_tcp("127.0.0.1", kept.port)
        ends = await t.session.open_tcp("127.0.0.1", cut.port)
        await echoes(ends)
        await change(t, lambda: t.worker.set_allow([kk.tcp("127.0.0.1", kept.port)]))
        assert "no longer allowed" in await ended(ends)
        assert isinstance(await cut.made[0].lost, ConnectionResetError)
        await echoes(keeps)
        with pytest.raises(kk.DeniedError):
            await t.session.open_tcp("127.0.0.1", cut.port)
        await keeps.aclose()
    (line,) = [line for line in log() if "ended a stream of " in line]
    assert f"ended a stream of cp to 127.0.0.1:{cut.port}: no rule inside 127.0.0.0/8 allows" in line


async def test_a_worker_allows_more(certs):
    async with target() as echo, tunnel(certs, allow=["127.0.0.1:1"]) as t:
        with pytest.raises(kk.DeniedError):
            await t.session.open_tcp("127.0.0.1", echo.port)
        t.worker.set_allow([kk.tcp("127.0.0.1", echo.port)])
        async with await t.session.open_tcp("127.0.0.1", echo.port) as stream:
            await echoes(stream)


async def test_udp_and_names_and_half_closed_streams_are_judged_too(certs, change):
    """By the rule's kind: a name that is allowed no more ends its streams, whatever address they have."""
    async with (
        target() as echo,
        target(Goodbye) as polite,
        proxied(certs, allow=["127.0.0.0/8:*", "udp:127.0.0.1:*"]) as t,
    ):
        datagrams = await t.session.open_udp("127.0.0.1", echo.port)
        named = await t.session.open_tcp("localhost", echo.port)
        half = await t.session.open_tcp("127.0.0.1", polite.port)
        await half.send(b"x")
        assert await half.receive() == b"bye"
        with pytest.raises(anyio.EndOfStream):
            await half.receive()
        await change(t, lambda: t.worker.set_allow([kk.tcp("localhost", echo.port)]))
        await ended(named)  # a rule for a name opens no loopback address
        with pytest.raises(kk.DeniedError):
            await datagrams.receive_datagram()
        await until(lambda: half._inbox.send_error is not None)
        with pytest.raises(kk.DeniedError):
            await half.send(b"y")
        await polite.made[0].lost
        for stream in (datagrams, half):
            await stream.aclose()
        await until(lambda: not t.session.stream_count and not t.worker._targets._open)


async def test_the_rules_change_while_a_target_is_dialed(certs, monkeypatch):
    dial = konnektor.targets.dial
    async with target() as echo, tunnel(certs) as t:

        async def slow(*args, **kwargs):
            sock = await dial(*args, **kwargs)
            t.worker.set_allow([])
            return sock

        monkeypatch.setattr("konnektor.targets.dial", slow)
        with pytest.raises(kk.DeniedError) as refused:
            await t.session.open_tcp("localhost", echo.port)
        assert refused.value.refused
        await until(lambda: echo.made and echo.made[0].lost.done())
        assert not t.worker._targets._open


@pytest.mark.replaces_methods
async def test_what_was_dialed_is_judged_though_nobody_knows_its_address(certs, monkeypatch):
    """It was reset before it could be asked: no rule can be shown to allow it."""
    monkeypatch.setattr("konnektor.targets._peer_address", lambda _sock: None)
    async with target() as echo, tunnel(certs) as t:
        stream = await t.session.open_tcp("localhost", echo.port)
        await echoes(stream)
        t.worker.set_allow(t.worker.allow.rules)
        assert "no longer allowed" in await ended(stream)


def test_a_socket_without_a_peer_has_no_address():
    with socket.socket() as sock:
        assert _peer_address(sock) is None


# What a control plane grants


async def test_a_route_is_withdrawn(certs, change, log):
    async with (
        target() as echo,
        proxied(certs, plane={"grant_routes": ["node-1=cidr=127.0.0.0/8"]}, routes=["cidr=127.0.0.1/32"]) as t,
    ):
        routed = await t.plane.open_tcp("127.0.0.1", echo.port)
        named = await t.plane.open_tcp("127.0.0.1", echo.port, worker="node-1")
        suffixed = await t.plane.open_tcp("127.0.0.1.node-1.konnektor.internal", echo.port)
        for stream in (routed, named, suffixed):
            await echoes(stream)
        await change(t, lambda: t.plane.set_grants(grant_routes=["node-1=cidr=127.0.0.0/30"]))
        await echoes(routed)  # a narrower grant still covers the claim

        await suspended(t)
        t.plane.set_grants(grant_routes=["node-2=cidr=127.0.0.0/8"])
        assert "the route was withdrawn" in await ended(routed)
        t.proxy.admit()
        await until(lambda: not t.session.suspended and not t.client.suspended)
        for stream in (named, suffixed):
            await echoes(stream)
            await stream.aclose()
        with pytest.raises(kk.NoRouteError):
            await t.plane.open_tcp("127.0.0.1", echo.port)
        await until(lambda: not t.client.stream_count)

        t.plane.set_grants(grant_routes=["node-1=cidr=127.0.0.1/32"])
        async with await t.plane.open_tcp("127.0.0.1", echo.port) as stream:
            await echoes(stream)
    assert "ended a stream to 127.0.0.1: worker node-1 has no route for it any more" in log()


async def test_claims_are_looked_at_once_however_many_streams_there_are(certs, monkeypatch):
    """A worker with hundreds of claims and of routed streams would hold the event loop for many seconds."""
    looked = []

    def counted(name, *rest):
        looked.append(name)
        return granted_routes(name, *rest)

    monkeypatch.setattr("konnektor.claims.granted_routes", counted)
    granted = ["node-1=host=localhost", "node-1=cidr=127.0.0.0/8"]
    routes = [grant.removeprefix("node-1=") for grant in granted]
    async with target() as echo, tunnel(certs, plane={"grant_routes": granted}, routes=routes) as t:
        streams = {host: [] for host in ("127.0.0.1", "localhost")}
        t.worker.set_allow([kk.tcp("127.0.0.1", echo.port)])
        for host, of_host in streams.items():
            of_host += [await t.plane.open_tcp(host, echo.port) for _ in range(5)]
        assert looked == ["node-1"]
        t.plane.set_grants(grant_routes=granted)
        t.plane.set_grants(grant_routes=granted[:1])
        assert looked == ["node-1"] * 3
        for stream in streams["127.0.0.1"]:
            assert "the route was withdrawn" in await ended(stream)
        for stream in streams["localhost"]:
            await echoes(stream)
            await stream.aclose()


async def test_a_route_is_withdrawn_while_a_stream_is_opened(certs):
    async with tunnel(certs, plane={"grant_routes": ["node-1=host=db.example"]}, routes=["host=db.example"]) as t:
        t.worker.handlers.remove(kk.Tcp)
        asked, answer = asyncio.Event(), asyncio.Event()

        @t.worker.handle(kk.Tcp)
        async def serve(stream, _request):
            asked.set()
            await answer.wait()
            await stream.accept()
            await ended(stream)

        opening = asyncio.create_task(t.plane.open_tcp("db.example", 5432))
        await asked.wait()
        t.plane.set_grants(grant_routes=[])
        answer.set()
        with pytest.raises(kk.NoRouteError):
            await opening
        await until(lambda: not t.session.stream_count)


async def test_what_was_routed_is_not_remembered_for_ever(certs, monkeypatch):
    monkeypatch.setattr("konnektor.claims.SWEEP", 2)
    async with target() as echo, tunnel(certs, plane={"grant_routes": ["node-1=default"]}, routes=["default"]) as t:
        async with await t.plane.open_tcp("127.0.0.1", echo.port) as kept:
            for _ in range(20):
                async with await t.plane.open_tcp("127.0.0.1", echo.port) as stream:
                    pass
                await until(lambda stream=stream: stream._mux.forgotten)
            assert len(t.plane._claims._routed[t.session]) <= 6
            t.plane.set_grants(grant_routes=[])
            await ended(kept)
        await t.session.aclose()
        assert t.session not in t.plane._claims._routed


async def test_a_worker_may_reach_less(certs, change):
    async with target() as echo, proxied(certs, plane={"allow_from": ["node-1=127.0.0.1:*"]}) as t:
        stream = await t.client.open_tcp("127.0.0.1", echo.port)
        await echoes(stream)
        with pytest.raises(kk.ConfigurationError):
            t.plane.set_grants(grant_routes=[], allow_from=["node-1"])
        await echoes(stream)
        await change(t, lambda: t.plane.set_grants(allow_from=["node-2=127.0.0.1:*"]))
        await ended(stream)
        with pytest.raises(kk.DeniedError):
            await t.client.open_tcp("127.0.0.1", echo.port)
        t.plane.set_grants(allow_from=[("node-1", kk.tcp("127.0.0.1", echo.port))])
        async with await t.client.open_tcp("127.0.0.1", echo.port) as stream:
            await echoes(stream)


# Certificates


@pytest.mark.parametrize("end", ["plane", "worker"])
async def test_a_ca_that_was_taken_out_meanwhile_resumes_nothing(certs, foreign, tmp_path, end):
    """Whoever comes back is judged by the files as they are then."""
    both = certs.ca.read_bytes() + foreign.ca.read_bytes()
    files = {}
    for name, own in (("plane", certs.plane), ("worker", foreign.worker())):
        ca = tmp_path / f"{name}.pem"
        ca.write_bytes(both)
        files[name] = dataclasses.replace(own, ca=ca)
    limits = kk.Limits(resume_grace=1.0)
    async with (
        target() as echo,
        kk.ControlPlane("127.0.0.1:0", tls=files["plane"], limits=limits) as plane,
        FaultProxy(plane.address) as proxy,
        kk.Worker([proxy.address], tls=files["worker"], allow=[kk.tcp("127.0.0.1", echo.port)], limits=limits),
    ):
        session = await plane.wait_for("node-1")
        stream = await session.open_tcp("127.0.0.1", echo.port)
        await echoes(stream)
        proxy.cut()
        await until(lambda: session.stats().resumed == 1)
        await echoes(stream)
        proxy.refuse()
        proxy.cut()
        changed = files[end]
        own = certs if end == "plane" else foreign
        new = tmp_path / "new.pem"
        new.write_bytes(own.ca.read_bytes())
        new.replace(changed.ca)
        proxy.admit()
        assert "was not resumed within 1 s" in await ended(stream, kk.SessionLost)
