"""Connections that have not said what they want: those that say nothing keep nobody out, and others have to end."""

import asyncio
import contextlib
import errno
import os
import resource
import socket
from functools import partial
from types import SimpleNamespace

import pytest

from konnektor.listening import bind_tcp, bind_unix
from konnektor.newcomers import Newcomers
from konnektor.poller import Poller
from tests.endpoints.parts import until


@contextlib.asynccontextmanager
async def listening(path=None):
    """``newcomers`` of a listener, those who were ``heard``, and ``connect``, for more of them."""
    sockets = [bind_unix(str(path))] if path else await bind_tcp("127.0.0.1", 0)
    heard, places, clients = [], [], []
    newcomers = Newcomers(sockets, lambda sock, _, place: (heard.append(sock), places.append(place)))

    def connect(first=b""):
        client = socket.socket(sockets[0].family)
        client.connect(sockets[0].getsockname())
        client.setblocking(False)
        client.send(first)
        clients.append(client)
        return client

    try:
        yield SimpleNamespace(newcomers=newcomers, heard=heard, places=places, connect=connect)
    finally:
        newcomers.close()
        for sock in (*heard, *clients):
            sock.close()


def is_dropped(client):
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


async def test_who_speaks_is_heard(tmp_path):
    for path in (None, tmp_path / "s"):
        async with listening(path) as n:
            n.connect(b"at once")
            later, gone, broken = n.connect(), n.connect(), n.connect()
            await until(lambda: len(n.heard) == 1 and len(n.newcomers) == 4)
            later.send(b"x")
            await until(lambda: len(n.heard) == 2)
            gone.close()
            await until(lambda: len(n.heard) == 3)
            broken.send(b"x")
            await until(lambda: len(n.heard) == 4)
            assert [sock.recv(9) for sock in n.heard] == [b"at once", b"x", b"", b"x"]
            for place in n.places:
                place.leave()
                place.leave()
            assert not len(n.newcomers)


async def test_the_oldest_silent_one_makes_room(monkeypatch, caplog):
    monkeypatch.setattr("konnektor.newcomers.PLACES", 3)
    monkeypatch.setattr("konnektor.newcomers.FIRST_BYTE", 60.0)
    async with listening() as n:
        first = [n.connect() for _ in range(3)]
        await until(lambda: len(n.newcomers) == 3)
        assert not any(map(is_dropped, first))
        n.connect(b"x")
        await until(lambda: n.heard)
        await until(lambda: is_dropped(first[0]))
        n.connect(b"y")
        await until(lambda: is_dropped(first[1]))
        assert not is_dropped(first[2]) and len(n.newcomers) == 3
        told = (
            f"3 connections to {n.newcomers.name} have not said what they want: of those that are silent the oldest go"
        )
        assert [r.getMessage() for r in caplog.records] == [told]  # once
        for place in n.places:
            place.leave()
        n.places.clear()
        first[2].send(b"z")
        await until(lambda: n.places)
        n.places[0].leave()
        n.connect()  # the only one there: it is better
        await until(lambda: len(n.newcomers) == 1)
        for _ in range(3):
            n.connect()
        await until(lambda: len(caplog.records) == 2)
        assert [r.getMessage() for r in caplog.records] == [told, told]


async def test_one_that_has_spoken_and_was_not_heard_yet_is_not_dropped(monkeypatch):
    monkeypatch.setattr("konnektor.newcomers.PLACES", 1)
    monkeypatch.setattr(Poller, "_ready", lambda _: None)  # it has not come to it
    async with listening() as n:
        client = n.connect()
        await until(lambda: len(n.newcomers) == 1)
        client.send(b"x")
        n.connect()
        await until(lambda: n.heard or is_dropped(client))
        assert n.heard[0].recv(1) == b"x"


async def test_when_all_have_begun_to_speak_others_wait(monkeypatch):
    monkeypatch.setattr("konnektor.newcomers.PLACES", 2)
    async with listening() as n:
        for _ in range(2):
            n.connect(b"x")
        await until(lambda: len(n.heard) == 2)
        third, fourth = n.connect(b"third"), n.connect()
        await asyncio.sleep(0.02)
        assert len(n.heard) == 2
        n.places[0].leave()
        await until(lambda: len(n.heard) == 3)
        assert n.heard[2].recv(9) == b"third" and not is_dropped(third) and not is_dropped(fourth)
        n.newcomers.close()
        n.places[1].leave()  # in vain


async def test_silence_has_an_end(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("konnektor.newcomers.FIRST_BYTE", 0.05)
    for path in (None, tmp_path / "s"):
        async with listening(path) as n:
            spoke, silent = n.connect(), n.connect()
            await until(lambda: len(n.newcomers) == 2)
            spoke.send(b"x")
            await until(partial(is_dropped, silent))
            assert len(n.newcomers) == 1 == len(n.heard) and not is_dropped(spoke)
    tcp, unix = (record.getMessage() for record in caplog.records)
    assert tcp.startswith("refused a connection: the client at 127.0.0.1:") and tcp.endswith("said nothing for 0.05 s")
    assert unix == "refused a connection: a local client said nothing for 0.05 s"


@pytest.mark.parametrize("hear", [False, True])
async def test_closing(hear):
    async with listening() as n:
        silent = n.connect()
        await until(lambda: len(n.newcomers) == 1)
        n.newcomers.close(hear=hear)
        assert len(n.heard) == hear == len(n.newcomers)
        assert is_dropped(silent) is not hear


@pytest.mark.parametrize("first", [b"", b"x"])
async def test_there_is_nothing_left_to_watch_one_with(monkeypatch, first):
    """Whose socket is closed, and whose place is free again."""
    monkeypatch.setattr("konnektor.acceptor.ACCEPT_PAUSE", 0.01)
    async with listening() as n:

        def fail(sock, _, place):
            n.places.append(place)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        with monkeypatch.context() as patch:
            patch.setattr(n.newcomers, "_heard", fail)
            client = n.connect(first)
            await until(lambda: len(n.newcomers) or n.places)
            if not first:
                client.send(b"x")
            await until(lambda: is_dropped(client))
        assert not len(n.newcomers)
        n.connect(b"x")
        await until(lambda: n.heard)


async def test_there_are_fewer_places_where_descriptors_are_few(monkeypatch):
    places = []
    for soft in (4096, 1024, 4, resource.RLIM_INFINITY):
        monkeypatch.setattr("konnektor.newcomers.resource.getrlimit", lambda _, soft=soft: (soft, soft))
        async with listening() as n:
            places.append(n.newcomers._places)
    assert places == [512, 128, 1, 512]
