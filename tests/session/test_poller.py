"""One epoll for many sockets: every one is served, whatever the others do, and nothing is left of it at the end."""

import asyncio
import contextlib
import errno
import select
import socket

import pytest

from konnektor.poller import READ, WRITE, Poller, poller_of
from konnektor.socket_transport import SocketTransport
from tests.session.pairs import descriptors
from tests.session.test_socket_transport import Recorder, joined


class Owner:
    def __init__(self, sock, on_ready=lambda _events: None):
        self.sock = sock
        self.events = []
        self.on_ready = on_ready

    def ready(self, events):
        self.events.append(events)
        self.on_ready(events)


async def until(predicate):
    async with asyncio.timeout(10):
        while not predicate():
            await asyncio.sleep(0)


@contextlib.contextmanager
def readable(poller, count):
    """The owners of so many sockets, watched, with a byte to read in each."""
    with contextlib.ExitStack() as stack:
        owners = []
        for _ in range(count):
            near, far = (stack.enter_context(sock) for sock in socket.socketpair())
            far.send(b"x")
            owners.append(Owner(near))
            poller.add(near.fileno(), owners[-1], READ)
        yield owners


async def test_a_descriptor_only_while_there_are_sockets():
    before = descriptors()
    poller = Poller(asyncio.get_running_loop())
    assert descriptors() == before
    one, other = socket.socketpair()
    with one, other:
        for _ in range(2):
            poller.add(one.fileno(), Owner(one), READ)
            poller.add(other.fileno(), Owner(other), READ)
            poller.remove(one.fileno())
            assert len(descriptors() - before) == 3
            poller.remove(other.fileno())
            assert len(descriptors() - before) == 2


async def test_the_loop_has_one_poller():
    loop = asyncio.get_running_loop()
    poller = poller_of(loop)
    assert poller_of(loop) is poller and poller.loop is loop


def test_another_loop_has_another():
    async def its_own():
        return poller_of(asyncio.get_running_loop())

    assert asyncio.run(its_own()) is not asyncio.run(its_own())


async def test_what_is_watched_for_is_what_is_told():
    poller = Poller(asyncio.get_running_loop())
    one, other = socket.socketpair()
    with one, other:
        owner = Owner(one)
        poller.add(one.fileno(), owner, WRITE)
        await until(lambda: owner.events)
        assert owner.events[0] == WRITE
        poller.change(one.fileno(), READ)
        owner.events.clear()
        other.send(b"x")
        await until(lambda: owner.events)
        assert owner.events[0] == READ
        poller.change(one.fileno(), 0)
        owner.events.clear()
        await asyncio.sleep(0.01)
        assert not owner.events
        poller.remove(one.fileno())


async def test_an_owner_that_fails_keeps_no_other_from_its_turn():
    loop = asyncio.get_running_loop()
    poller = Poller(loop)
    complaints = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))

    def fail(_events):
        poller.remove(failing.sock.fileno())
        raise RuntimeError("no")

    with readable(poller, 3) as (first, failing, last):
        failing.on_ready = fail
        await until(lambda: first.events and failing.events and last.events)
        (context,) = complaints
        assert str(context["exception"]) == "no" and context["transport"] is failing
        for owner in (first, last):
            poller.remove(owner.sock.fileno())


@pytest.mark.parametrize(("watched", "turns"), [(16, [16]), (17, [16, 1]), (50, [25, 25]), (530, [256, 256, 18])])
async def test_half_are_served_before_the_loop_has_its_turn(watched, turns):
    """So what they brought goes out before the others are read."""
    poller = Poller(asyncio.get_running_loop())
    served = [0]
    with readable(poller, watched) as owners:

        def serve(sock):
            if not served[-1]:
                asyncio.get_running_loop().call_soon(served.append, 0)
            sock.recv(1)
            served[-1] += 1

        for owner in owners:
            owner.on_ready = lambda _events, sock=owner.sock: serve(sock)
        await until(lambda: sum(served) == watched)
        assert all(owner.events == [READ] for owner in owners)
        assert [count for count in served if count] == turns
        for owner in owners:
            poller.remove(owner.sock.fileno())


async def test_none_starves_beside_those_that_are_always_ready():
    poller = Poller(asyncio.get_running_loop())
    with readable(poller, 100) as owners:
        await until(lambda: all(owner.events for owner in owners))
        assert max(len(owner.events) for owner in owners) <= 2
        for owner in owners:
            poller.remove(owner.sock.fileno())


async def test_one_that_closes_another_whose_number_is_taken_at_once():
    """Both were ready: what is told of the second concerns nobody any more, and the third is none the worse for it."""
    poller = Poller(asyncio.get_running_loop())
    (one, far_one), (two, far_two) = socket.socketpair(), socket.socketpair()
    third = []

    def replace(_events):
        for near in (one, two):
            poller.remove(near.fileno())
        number = two.fileno()
        two.close()
        near, far = socket.socketpair()
        assert near.fileno() == number
        near.setblocking(False)
        recorder = Recorder()
        third.append((SocketTransport(near, recorder), recorder, far))

    owners = Owner(one, replace), Owner(two, replace)
    for owner, far in zip(owners, (far_one, far_two), strict=True):
        far.send(b"x")
        poller.add(owner.sock.fileno(), owner, READ)
    await until(lambda: third)
    transport, recorder, far = third[0]
    transport.ready(READ)  # as it would be told, had it the same poller
    transport.ready(READ | WRITE | select.EPOLLHUP | select.EPOLLERR)
    far.send(b"its own")
    await recorder.until("data")
    assert recorder.received == b"its own" and not transport.is_closing()
    transport.abort()
    for sock in (one, far_one, far_two, far):
        sock.close()


async def test_a_socket_has_one_owner():
    poller = Poller(asyncio.get_running_loop())
    near, far = socket.socketpair()
    with near, far:
        owner = Owner(near)
        poller.add(near.fileno(), owner, READ)
        with pytest.raises(FileExistsError):
            poller.add(near.fileno(), Owner(near), READ)
        far.send(b"x")
        await until(lambda: owner.events)
        poller.remove(near.fileno())


@pytest.mark.parametrize("failing", ["epoll", "register", "add_reader"])
async def test_no_more_to_be_had(failing, monkeypatch):
    before = descriptors()

    class Exhausted:
        def __init__(self):
            if failing == "epoll":
                raise OSError(errno.EMFILE, "Too many open files")
            self.inner = epoll()

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def fileno(self):
            return self.inner.fileno() if failing != "add_reader" else 1_000_000  # which no loop can watch

        def register(self, *_):
            raise OSError(errno.ENOSPC, "No space left on device")

    epoll = select.epoll
    monkeypatch.setattr(select, "epoll", Exhausted)
    near, far = socket.socketpair()
    with near, far, pytest.raises(OSError):
        SocketTransport(near, Recorder())
    monkeypatch.undo()
    assert descriptors() == before
    with joined() as (_, recorder, far):
        far.send(b"again")
        await recorder.until("data")
