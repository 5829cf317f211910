"""Names whose servers do not answer hold up nobody else, neither the loop's threads nor the end of the process."""

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from konnektor.errors import LimitError
from konnektor.resolver import THREADS, Resolver
from tests.endpoints.parts import until


@pytest.fixture
def dns(monkeypatch):
    """``asked`` in order; names that begin with "slow" have no answer until ``answer`` is set, "no" is none."""
    known = SimpleNamespace(asked=[], answer=threading.Event(), threads=[])

    def getaddrinfo(host, port, **options):
        known.asked.append(host)
        known.threads.append(threading.current_thread())
        if host.lower().startswith("slow"):
            known.answer.wait()
        if host.startswith("no"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, options["type"], 6, "", ("192.0.2.1", port)),
                (socket.AF_INET6, options["type"], 6, "", ("2001:db8::1", port, 0, 7))]  # fmt: skip

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield known
    known.answer.set()
    for thread in known.threads:
        thread.join()


def look_up(resolver, host, port=80):
    return resolver.look_up(host, port, type=socket.SOCK_STREAM)


def begin(resolver, *hosts):
    return [asyncio.ensure_future(look_up(resolver, host)) for host in hosts]


async def give_up(tasks):
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
async def test_names_resolve_as_the_loop_has_them(host, kind):
    options = {"type": kind, "flags": socket.AI_PASSIVE}
    assert await Resolver().look_up(host, 443, **options) == socket.getaddrinfo(host, 443, **options)


async def test_an_answer_has_the_port_of_each_caller(dns):
    resolver = Resolver()
    first, second = await asyncio.gather(look_up(resolver, "a", 1), look_up(resolver, "A", 2))
    assert dns.asked == ["a"]
    assert [address for *_, address in first] == [("192.0.2.1", 1), ("2001:db8::1", 1, 0, 7)]
    assert [address for *_, address in second] == [("192.0.2.1", 2), ("2001:db8::1", 2, 0, 7)]
    assert await look_up(resolver, "a")
    assert dns.asked == ["a", "a"]  # nothing is kept: the system's resolver knows for how long


async def test_names_without_an_answer_hold_up_no_other(dns):
    """Nor do those that nobody waits for any more, which took every thread of the loop for themselves."""
    resolver = Resolver()
    slow = begin(resolver, *(f"slow{i}" for i in range(THREADS - 1)))
    await until(lambda: len(dns.asked) == THREADS - 1)
    await give_up(slow)
    async with asyncio.timeout(30):
        assert await look_up(resolver, "quick")
        with pytest.raises(socket.gaierror, match="not known"):
            await look_up(resolver, "none")
        assert await asyncio.get_running_loop().run_in_executor(None, int, "7") == 7


async def test_a_name_without_an_answer_takes_one_thread_whoever_asks(dns):
    resolver = Resolver()
    await give_up(begin(resolver, "slow"))
    for host in ("slow", "SLOW", "slow") * 10:
        await give_up(begin(resolver, host))
    waiting = begin(resolver, *["slow"] * 3)
    await asyncio.sleep(0)
    assert dns.asked == ["slow"]
    dns.answer.set()
    for answer in await asyncio.gather(*waiting):
        assert len(answer) == 2


async def test_what_nobody_waits_for_any_more_is_not_begun(dns, monkeypatch):
    monkeypatch.setattr("konnektor.resolver.THREADS", 1)
    resolver = Resolver()
    (running,) = begin(resolver, "slow")
    await until(lambda: dns.asked)
    gone = begin(resolver, "a", "b")
    shared = begin(resolver, "c", "c", "c")
    await asyncio.sleep(0)
    await give_up([*gone, *shared[:2]])
    dns.answer.set()
    assert await shared[2] and await running
    assert dns.asked == ["slow", "c"]


async def test_more_names_than_may_wait_are_refused(dns, monkeypatch):
    monkeypatch.setattr("konnektor.resolver.THREADS", 1)
    monkeypatch.setattr("konnektor.resolver.WAITING", 2)
    resolver = Resolver()
    tasks = begin(resolver, "slow0", "slow1", "slow2")
    await asyncio.sleep(0)
    with pytest.raises(LimitError, match=r"^more is not looked up: 2 other names wait for an answer already$"):
        await look_up(resolver, "more")
    tasks += begin(resolver, "slow0", "slow2")  # they wait already
    await asyncio.sleep(0)
    await give_up(tasks)
    dns.answer.set()
    assert await look_up(resolver, "more")


async def test_no_thread_to_be_had(dns, monkeypatch):
    def start(_thread):
        raise RuntimeError("can't start new thread")

    resolver = Resolver()
    with monkeypatch.context() as patch:
        patch.setattr("konnektor.resolver.Thread.start", start)
        with pytest.raises(OSError) as caught:
            await look_up(resolver, "a")
        assert caught.value.errno == errno.EAGAIN
    assert await look_up(resolver, "a")


def test_an_answer_for_a_loop_that_is_closed(dns):
    async def leave():
        await give_up(begin(Resolver(), "slow"))

    async def run():
        task = asyncio.ensure_future(look_up(Resolver(), "slow"))
        await until(lambda: dns.asked)
        await give_up([task])

    asyncio.run(leave())
    asyncio.run(run())
    dns.answer.set()  # in vain
    threads = [thread for thread in threading.enumerate() if thread.name == "resolver"]
    assert threads
    for thread in threads:
        thread.join()  # and in silence: what a thread raises is an error here


ENDLESS = """
import asyncio, socket, threading
from konnektor.listening import bind_tcp
from konnektor.runtime import run

def getaddrinfo(*_, **__):
    print("asked", flush=True)
    threading.Event().wait()

async def main():
    asyncio.get_running_loop().add_signal_handler(15, asyncio.current_task().cancel)
    try:
        await bind_tcp("slow", 0)
    except asyncio.CancelledError:
        print("left", flush=True)

socket.getaddrinfo = getaddrinfo
run(main())
"""


def test_the_process_ends_while_a_name_has_no_answer():
    process = subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, env=dict(os.environ), text=True)
    with process:
        try:
            assert process.stdout.readline() == "asked\n"
            process.send_signal(signal.SIGTERM)
            assert process.stdout.read() == "left\n"
            assert process.wait(30) == 0
        finally:
            process.kill()
