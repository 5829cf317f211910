"""What a process needs around an endpoint: signals, logs, limits, a loop."""

import asyncio
import contextlib
import json
import logging
import resource
import signal
import sys

import pytest

import konnektor as kk
from konnektor import runtime
from konnektor.runtime import run, serve, set_up_logging
from tests.endpoints.parts import ask, connection, tunnel, until


class Fake:
    """An endpoint that drains when told to, and counts."""

    def __init__(self, *, drains=True):
        self.drains = drains
        self.drained = []
        self.closed = 0

    async def drain(self, grace):
        self.drained.append(grace)
        if not self.drains:
            await asyncio.Event().wait()

    async def aclose(self):
        self.closed += 1


async def forever():
    await asyncio.Event().wait()


async def raise_signals(endpoint, numbers):
    for number in numbers:
        before = len(endpoint.drained)
        signal.raise_signal(number)
        await until(lambda before=before: len(endpoint.drained) > before or endpoint.closed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains(number):
    endpoint = Fake()

    async def life():
        signal.raise_signal(number)
        await forever()

    assert await serve(endpoint, life(), 7) == 0
    assert endpoint.drained == [7] and endpoint.closed == 1


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_aborts(second, log):
    endpoint = Fake(drains=False)
    serving = asyncio.create_task(serve(endpoint, forever(), 25))
    await asyncio.sleep(0)
    await raise_signals(endpoint, [signal.SIGTERM, second])
    assert await serving == 130
    assert endpoint.closed == 1
    assert log() == ["SIGTERM: draining for up to 25 s; once more aborts", f"{second.name}: aborting"]


async def test_a_hangup_ends_nothing(log):
    endpoint = Fake(drains=False)
    serving = asyncio.create_task(serve(endpoint, forever(), 25))
    await asyncio.sleep(0)
    for lines in (1, 3):
        signal.raise_signal(signal.SIGHUP)
        await until(lambda lines=lines: len(log()) == lines)
        if lines == 1:
            await raise_signals(endpoint, [signal.SIGTERM])
    assert not serving.done() and not endpoint.closed
    assert set(log()[::2]) == {"SIGHUP: going on; certificate files that change are read again by themselves"}
    await raise_signals(endpoint, [signal.SIGINT])
    assert await serving == 130


async def test_a_life_that_ends_by_itself():
    endpoint = Fake()
    assert await serve(endpoint, asyncio.sleep(0), 1) == 0
    assert not endpoint.drained and endpoint.closed == 1


async def test_a_life_that_fails():
    async def life():
        raise ValueError("no")

    endpoint = Fake()
    with pytest.raises(ValueError, match="no"):
        await serve(endpoint, life(), 1)
    assert endpoint.closed == 1


async def test_cancelled():
    endpoint = Fake()
    serving = asyncio.create_task(serve(endpoint, forever(), 1))
    await asyncio.sleep(0)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert endpoint.closed == 1


# Logs


@pytest.fixture
def logging_as_it_was():
    root, other = logging.getLogger(), logging.getLogger("asyncio")
    before = root.handlers[:], root.level, other.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    other.setLevel(before[2])


def log_something():
    logger = logging.getLogger("konnektor.test")
    logger.debug("details")
    logger.info("a\nb")
    try:
        raise ValueError("x")
    except ValueError:
        logger.exception("broken")
    logging.getLogger("asyncio").info("inside")


@pytest.mark.parametrize(("verbosity", "lines"), [(0, 2), (1, 3), (2, 4)])
def test_text(logging_as_it_was, capsys, verbosity, lines):
    set_up_logging("text", verbosity)
    log_something()
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == lines
    assert " INFO konnektor.test: a | b\n" in err and "ERROR konnektor.test: broken | Traceback" in err
    assert err[10] == "T" and err[23] == "Z"


def test_json(logging_as_it_was, capsys):
    set_up_logging("json", 0)
    log_something()
    first, second = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert first["level"] == "info" and first["logger"] == "konnektor.test" and first["message"] == "a\nb"
    assert first["time"].endswith("Z") and "exception" not in first
    assert second["exception"].endswith("ValueError: x")


async def test_json_says_who(logging_as_it_was, capsys, certs):
    """Whichever line it is: a session's own, or one about a worker."""
    set_up_logging("json", 1)
    async with tunnel(certs) as t:
        here, there = t.session.number, t.worker.sessions[0].number
        where = await t.plane.add_forward("127.0.0.1:0=node-1/192.0.2.1:9")
        http = await t.plane.add_frontend("http://127.0.0.1:0")
        with pytest.raises(kk.DeniedError) as caught:
            await t.plane.open_tcp("192.0.2.1", 9, worker="node-1")
        assert await ask(http, "192.0.2.1:9", "Konnektor-Worker: node-1") == "HTTP/1.1 403 Destination Denied by Policy"
        async with connection(where) as (reader, _):
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
        await t.worker.drain(0)
        await t.session.wait_closed()
    assert caught.value.worker == "node-1"
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]

    def fields(text):
        (line,) = {line["message"]: line for line in lines if text in line["message"]}.values()
        return tuple(line.get(field) for field in ("session", "peer", "worker"))

    assert fields("worker node-1 connected") == (here, "node-1", "node-1")
    assert fields("worker node-1 at ") == (here, "node-1", "node-1")
    assert fields(f"[{here} node-1] the peer drains") == (here, "node-1", None)
    assert fields("connected to cp at") == (there, "cp", None)
    assert fields(f"[{there} cp] refused cp a stream to 192.0.2.1:9") == (there, "cp", None)
    assert fields("403 Destination Denied by Policy (worker node-1: denied)") == (None, None, "node-1")
    assert fields("=node-1/192.0.2.1:9: worker node-1: denied") == (None, None, "node-1")


# The process


@pytest.fixture
def limits_as_they_were():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("with_uvloop", [True, False])
def test_run(monkeypatch, limits_as_they_were, with_uvloop):
    if not with_uvloop:
        monkeypatch.setitem(sys.modules, "uvloop", None)
    _, hard = limits_as_they_were
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1000, hard), hard))

    async def main():
        return type(asyncio.get_running_loop()).__module__

    assert run(main()).startswith("uvloop" if with_uvloop else "asyncio")
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)


def test_what_the_system_does_not_allow_is_done_without(monkeypatch):
    asked = []

    def refuse(_, limits):
        asked.append(limits)
        raise ValueError("not allowed to raise maximum limit")

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(resource, "setrlimit", refuse)

    def missing(library):
        asked.append(library)
        raise OSError("no such library")

    monkeypatch.setattr(runtime.ctypes, "CDLL", missing)

    async def main():
        return "ran all the same"

    assert run(main()) == "ran all the same"
    assert asked == [(before[1], before[1]), "libc.so.6"]
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
