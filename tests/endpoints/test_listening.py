"""Listening sockets: which addresses, whose file, and what happens when descriptors run out."""

import asyncio
import contextlib
import errno
import os
import resource
import socket
import sys
from pathlib import Path

import pytest

from konnektor.acceptor import Acceptor, _allowance
from konnektor.errors import ListenError
from konnektor.listening import bind_tcp, bind_unix, bound_name
from konnektor.socket_transport import SocketTransport
from tests.endpoints.parts import until


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


async def names(host, port=0):
    sockets = await bind_tcp(host, port)
    for sock in sockets:
        sock.close()
    return [sock.family for sock in sockets]


def resolve_to(monkeypatch, *addresses):
    def getaddrinfo(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


async def test_every_address_of_a_name_on_one_port():
    sockets = await bind_tcp("localhost", 0)
    try:
        assert len({sock.getsockname()[1] for sock in sockets}) == 1
        assert bound_name(sockets[0]) == "{}:{}".format(*sockets[0].getsockname()) or has_ipv6()
    finally:
        for sock in sockets:
            sock.close()


async def test_ipv6():
    if not has_ipv6():
        pytest.skip("no IPv6 here")
    (sock,) = await bind_tcp("::1", 0)
    with sock:
        assert bound_name(sock).startswith("[::1]:")


@pytest.mark.parametrize(
    ("host", "port", "sentence"),
    [
        ("192.0.2.1", 0, "cannot listen on 192.0.2.1:0: the address is not one of this machine's"),
        ("no-such-host.invalid", 1, r"cannot listen on no-such-host.invalid:1: the host does not resolve \(.+\)"),
    ],
)
async def test_what_cannot_be_had(host, port, sentence):
    with pytest.raises(ListenError, match=sentence):
        await bind_tcp(host, port)


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (errno.EACCES, "permission denied; ports below 1024"),
        (errno.EMFILE, "Too many open files"),
        (None, "odd"),
    ],
)
async def test_why(monkeypatch, number, why):
    class Refusing(socket.socket):
        def bind(self, address):
            raise OSError(number, why) if number else OSError(why)

    monkeypatch.setattr(socket, "socket", Refusing)
    with pytest.raises(ListenError, match=why):
        await bind_tcp("127.0.0.1", 80)


async def test_addresses_that_this_machine_lacks_are_left_out(monkeypatch):
    original = socket.socket

    class WithoutSome(original):
        def bind(self, address):
            if address[0] == "127.0.0.9":
                raise OSError(errno.EADDRNOTAVAIL, "no")
            super().bind(address)

    resolve_to(monkeypatch, "127.0.0.9", "127.0.0.1")
    monkeypatch.setattr(socket, "socket", WithoutSome)
    (sock,) = await bind_tcp("name.test", 0)
    with sock:
        assert sock.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize("always", [False, True])
async def test_the_free_port_may_be_taken_on_the_next_address(monkeypatch, always):
    attempts = []

    class Taken(socket.socket):
        def bind(self, address):
            attempts.append(address)
            if address[1] and (always or len(attempts) < 5):
                raise OSError(errno.EADDRINUSE, "taken")
            super().bind(address)

    resolve_to(monkeypatch, "127.0.0.1", "127.0.0.2")
    monkeypatch.setattr(socket, "socket", Taken)
    if always:
        with pytest.raises(ListenError, match="in use"):
            await bind_tcp("name.test", 0)
    else:
        first, second = await bind_tcp("name.test", 0)
        with first, second:
            assert first.getsockname()[1] == second.getsockname()[1]


# Unix


def test_a_stale_socket_that_goes_by_itself(tmp_path, monkeypatch):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)

    gone = []

    class Racing(socket.socket):
        def connect(self, address):
            Path(address).unlink()
            gone.append(address)
            raise ConnectionRefusedError

    with monkeypatch.context() as patch:
        patch.setattr("konnektor.listening.socket.socket", Racing)
        listener = bind_unix(path)
    assert gone == [path]
    with listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        assert client.getpeername() == path


def test_a_live_server_with_a_full_backlog_is_live(tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as live, socket.socket(socket.AF_UNIX) as client:
        live.bind(path)
        live.listen(0)
        client.connect(path)
        before = os.umask(0o022)
        os.umask(before)
        with pytest.raises(ListenError, match="another program is listening there"):
            bind_unix(path)
        after = os.umask(before)
        assert after == before


# Accepting


class Scripted:
    """A listening socket that stays readable, with errors to raise from ``_accept`` first."""

    family = socket.AF_INET

    def __init__(self, sock, *errors):
        self._sock = sock
        self.errors = list(errors)
        self.accepts = 0

    def __getattr__(self, name):
        return getattr(self._sock, name)

    def _accept(self):
        self.accepts += 1
        if self.errors:
            error = self.errors.pop(0)
            if error is not None:
                raise error
        return self._sock._accept()


async def scripted(*errors):
    (sock,) = await bind_tcp("127.0.0.1", 0)
    return Scripted(sock, *errors)


async def test_the_last_descriptor_was_its_own(monkeypatch, caplog):
    """Whoever is accepted last finds none for what watches it: the connection ends, and the next ones wait."""
    monkeypatch.setattr("konnektor.acceptor.ACCEPT_PAUSE", 0.02)
    (listener,) = await bind_tcp("127.0.0.1", 0)
    accepted = []

    def accept(sock, _address):
        accepted.append(sock)
        if len(accepted) == 1:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    acceptor = Acceptor(listener, accept)
    with socket.create_connection(listener.getsockname()), socket.create_connection(listener.getsockname()):
        await until(lambda: len(accepted) == 2)
    assert accepted[0].fileno() < 0 <= accepted[1].fileno()
    assert [r.getMessage() for r in caplog.records] == [f"cannot accept on {acceptor.name}: Too many open files"]
    accepted[1].close()
    acceptor.close()


async def test_out_of_descriptors_it_pauses(monkeypatch, caplog):
    monkeypatch.setattr("konnektor.acceptor.ACCEPT_PAUSE", 0.02)
    accepted = []
    no_more = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    listener = await scripted(no_more, no_more, no_more)
    acceptor = Acceptor(listener, lambda sock, _: accepted.append(sock))
    with socket.create_connection(listener.getsockname()):
        await until(lambda: accepted)
    assert listener.accepts <= 5  # once a pause, and not once a turn of the loop
    assert [r.getMessage() for r in caplog.records] == [
        f"cannot accept on {acceptor.name}: Too many open files"
    ]  # told once
    listener.errors = [no_more]
    with socket.create_connection(listener.getsockname()):
        await until(lambda: len(caplog.records) == 2)
        acceptor.close()  # while it pauses
        acceptor.close()
    for sock in accepted:
        sock.close()


@pytest.mark.replaces_methods
async def test_a_modest_listener_leaves_the_last_descriptors_to_others(monkeypatch, caplog):
    monkeypatch.setattr("konnektor.acceptor.ACCEPT_PAUSE", 0.02)
    accepted = []
    (listener,), (other,) = await bind_tcp("127.0.0.1", 0), await bind_tcp("127.0.0.1", 0)
    with socket.socket() as lowest, contextlib.ExitStack() as stack:
        free = lowest.fileno()
        monkeypatch.setattr("konnektor.acceptor._allowance", lambda: free)
        modest = Acceptor(listener, lambda sock, _: accepted.append(sock), modest=True)
        client = stack.enter_context(socket.create_connection(listener.getsockname()))
        client.setblocking(False)
        assert await asyncio.get_running_loop().sock_recv(client, 1) == b""
        greedy = Acceptor(other, lambda sock, _: accepted.append(sock))
        stack.enter_context(socket.create_connection(other.getsockname()))
        await until(lambda: accepted)
        assert [r.getMessage() for r in caplog.records] == [
            f"cannot accept on {modest.name}: the last descriptors are kept for workers; raise the limit of open files"
        ]
        monkeypatch.setattr("konnektor.acceptor._allowance", lambda: 1 << 20)
        stack.enter_context(socket.create_connection(listener.getsockname()))
        await until(lambda: len(accepted) == 2)
    for acceptor in (modest, greedy):
        acceptor.close()
    for sock in accepted:
        sock.close()


@pytest.mark.parametrize(
    ("soft", "allowed"), [(80, 60), (1024, 768), (1 << 19, (1 << 19) - 1024), (resource.RLIM_INFINITY, sys.maxsize)]
)
def test_how_many_descriptors_are_for_modest_listeners(monkeypatch, soft, allowed):
    monkeypatch.setattr("konnektor.acceptor.resource.getrlimit", lambda _: (soft, soft))
    assert _allowance() == allowed


async def test_the_end_of_a_pause_for_descriptors_does_not_end_another(monkeypatch):
    """Resumed by its owner meanwhile, and paused again, it stays so."""
    monkeypatch.setattr("konnektor.acceptor.ACCEPT_PAUSE", 0.02)
    accepted = []
    listener = await scripted(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    acceptor = Acceptor(listener, lambda sock, _: accepted.append(sock))
    with socket.create_connection(listener.getsockname()):
        await until(lambda: listener.accepts)
        acceptor.resume()
        acceptor.pause()
        await asyncio.sleep(0.05)
        assert listener.accepts == 1
        acceptor.resume()
        await until(lambda: accepted)
    acceptor.close()
    accepted[0].close()


async def test_an_error_of_one_connection_is_no_reason_to_stop():
    accepted = []
    listener = await scripted(ConnectionAbortedError(errno.ECONNABORTED, "gone"), OSError(errno.ENETUNREACH, "?"))
    acceptor = Acceptor(listener, lambda sock, _: accepted.append(sock))
    with socket.create_connection(listener.getsockname()):
        await until(lambda: accepted)
    assert listener.accepts >= 3
    acceptor.close()
    accepted[0].close()


async def test_pausing_within_a_burst():
    accepted = []
    (sock,) = await bind_tcp("127.0.0.1", 0)

    def take(sock, _):
        accepted.append(sock)
        acceptor.pause()

    acceptor = Acceptor(sock, take)
    clients = [socket.create_connection(sock.getsockname()) for _ in range(3)]
    await until(lambda: accepted)
    await asyncio.sleep(0.01)
    assert len(accepted) == 1
    acceptor.resume()
    acceptor.resume()
    await until(lambda: len(accepted) == 2)
    acceptor.close()
    acceptor.resume()  # in vain
    for each in (*clients, *accepted):
        each.close()


async def test_what_a_client_has_said_when_it_is_accepted_is_heard_at_once():
    heard = []

    class Client(asyncio.Protocol):
        def data_received(self, data):
            heard.append(bytes(data))

    made = []
    (listening,) = await bind_tcp("127.0.0.1", 0)
    acceptor = Acceptor(listening, lambda sock, _address: made.append(SocketTransport(sock, Client())))
    with contextlib.ExitStack() as stack:
        stack.callback(acceptor.close)
        for number in range(3):
            sock = stack.enter_context(socket.create_connection(listening.getsockname()))
            sock.send(b"%d" % number)
        acceptor._ready()  # the loop has no turn before the assertion
        assert heard == [b"0", b"1", b"2"]
        for transport in made:
            transport.abort()
        await asyncio.sleep(0)
