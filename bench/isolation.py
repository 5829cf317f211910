"""What one stream notices of others: ``python -m bench.isolation``.

A control plane and a worker, as the library's users have them (mutual TLS, sessions that can be resumed), in a process each. Small
questions go out on one stream, one each millisecond whether or not the last one was answered, and their time counts from
the moment they were due until the application has the answer: what holds up the whole process is in it, too.
Beside them are streams that nobody reads, another worker that was stopped, or bulk. Each case has processes of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import multiprocessing
import os
import platform
import signal
import statistics
import struct
import sys
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import ClassVar, NamedTuple

import konnektor as kk
from bench.processes import interruptible
from konnektor import pki, runtime

QUESTION = bytes(64)
INTERVAL = 0.001
BLOCK = bytes(64 * 1024)
SETTLE = 1.5
"""Seconds of load before anything is counted."""
MANY, STALLED = 16, 255

Figures = dict[str, float]


class Case(NamedTuple):
    """What goes on at once; ``away`` and ``back`` are bulk streams from and to the control plane."""

    name: str
    asking: bool = True
    stalled: int = 0
    stopped: bool = False
    away: int = 0
    back: int = 0


CASES = [
    Case("nothing"),
    Case(f"{STALLED} stalled streams", stalled=STALLED),
    Case("a peer that never reads", stopped=True),
    Case(f"{MANY} bulk streams away", away=MANY),
    Case(f"{MANY} bulk streams back", back=MANY),
    Case(f"{MANY} bulk streams each way", away=MANY, back=MANY),
    Case("bulk away beside nothing", asking=False, away=1),
    Case(f"bulk away beside {STALLED} stalled streams", asking=False, away=1, stalled=STALLED),
    Case("bulk away beside a peer that never reads", asking=False, away=1, stopped=True),
    Case("bulk back beside nothing", asking=False, back=1),
    Case(f"bulk back beside {STALLED} stalled streams", asking=False, back=1, stalled=STALLED),
    Case("bulk back beside a peer that never reads", asking=False, back=1, stopped=True),
]


class Echo(kk.StreamType, frozen=True):
    name: ClassVar[str] = "echo@bench"


class Away(kk.StreamType, frozen=True):
    name: ClassVar[str] = "away@bench"


class Back(kk.StreamType, frozen=True):
    name: ClassVar[str] = "back@bench"


class Stall(kk.StreamType, frozen=True):
    """Each end sends without end, and neither reads."""

    name: ClassVar[str] = "stall@bench"


class Count:
    """What the application has sent, or received."""

    bytes = 0


# The worker


async def echo(stream: kk.Stream, _request: Echo) -> None:
    await stream.accept()
    async for chunk in stream:
        await stream.send(chunk)


async def take(stream: kk.Stream, _request: Away) -> None:
    await stream.accept()
    async for _ in stream:
        pass


async def give(stream: kk.Stream, _request: Back | Stall) -> None:
    await stream.accept()
    await send_on(stream)


async def send_on(stream: kk.Stream, count: Count | None = None) -> None:
    while True:
        await stream.send(BLOCK)
        if count is not None:
            count.bytes += len(BLOCK)


async def swallow(stream: kk.Stream, count: Count) -> None:
    async for chunk in stream:
        count.bytes += len(chunk)


async def work(files: kk.TLSFiles, address: str) -> None:
    worker = kk.Worker([address], tls=files)
    worker.handle(Echo)(echo)
    worker.handle(Away)(take)
    worker.handle(Back)(give)
    worker.handle(Stall)(give)
    async with worker:
        await worker.wait_closed()


# The control plane


class Ticker:
    """Calls ``tick`` with the time each question is due at: by timerfd_create(2), for a loop's timers are not that exact."""

    def __init__(self, tick: Callable[[float], None]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._tick = tick
        self._next = time.monotonic() + INTERVAL
        interval = (0, int(INTERVAL * 1e9))
        first = divmod(int(self._next * 1e9), 10**9)
        self._libc.timerfd_settime(self._fd, 1, struct.pack("4l", *interval, *first), None)
        asyncio.get_running_loop().add_reader(self._fd, self._expired)

    def _expired(self) -> None:
        for _ in range(int.from_bytes(os.read(self._fd, 8), sys.byteorder)):
            self._tick(self._next)
            self._next += INTERVAL

    def stop(self) -> None:
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1


async def ask(session: kk.Session, seconds: float) -> list[float]:
    """Seconds that each question took."""
    reader, writer = (await session.open(Echo())).as_asyncio()
    due: deque[float] = deque()
    took: list[float] = []

    def tick(when: float) -> None:
        due.append(when)
        writer.write(QUESTION)

    ticker = Ticker(tick)
    end = time.monotonic() + seconds
    while due or time.monotonic() < end:
        await reader.readexactly(len(QUESTION))
        took.append(time.monotonic() - due.popleft())
        if time.monotonic() >= end:
            ticker.stop()
    writer.close()
    return took


def resident(processes: list[int]) -> list[float]:
    """MB."""
    status = (Path(f"/proc/{process}/status").read_text() for process in processes)
    return [int(text.partition("VmRSS:")[2].split()[0]) / 1024 for text in status]


async def measure(case: Case, plane: kk.ControlPlane, others: dict[str, int], seconds: float) -> Figures:
    session = await plane.wait_for("node")
    ends = [os.getpid(), others["node"]]
    figures: Figures = {}

    def note(when: str) -> None:
        figures.update(zip((f"control plane MB, {when}", f"worker MB, {when}"), resident(ends), strict=True))

    await asyncio.sleep(0.5)
    note("idle")
    tasks: list[asyncio.Task[None]] = []
    loop = asyncio.get_running_loop()

    async def start(session: kk.Session, request: kk.StreamType, count: int) -> Count:
        moved = Count()
        serve = swallow if isinstance(request, Back) else send_on
        streams = [await session.open(request) for _ in range(count)]
        tasks.extend(loop.create_task(serve(stream, moved)) for stream in streams)
        return moved

    if case.stopped:
        mute = await plane.wait_for("mute")
        await start(mute, Away(), MANY)
        await asyncio.sleep(0.2)
        os.kill(others["mute"], signal.SIGSTOP)
    await start(session, Stall(), case.stalled)
    away = await start(session, Away(), case.away)
    back = await start(session, Back(), case.back)
    await asyncio.sleep(SETTLE)
    note("loaded")
    before, begin = (away.bytes, back.bytes), time.monotonic()
    if case.asking:
        took = sorted(await ask(session, seconds))
        figures["questions"] = len(took)
        for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)):
            figures[f"{name} ms"] = took[min(len(took) - 1, int(len(took) * share))] * 1e3
    else:
        await asyncio.sleep(seconds)
    elapsed = time.monotonic() - begin
    if case.away:
        figures["away MB/s"] = (away.bytes - before[0]) / elapsed / 1e6
    if case.back:
        figures["back MB/s"] = (back.bytes - before[1]) / elapsed / 1e6
    note("at the end")
    for task in tasks:
        if task.done() and (error := task.exception()) is not None:
            raise error
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return figures


async def control(files: kk.TLSFiles, case: Case, seconds: float, pipe: Connection) -> None:
    async with kk.ControlPlane("127.0.0.1:0", tls=files) as plane:
        pipe.send(plane.address)
        others = await asyncio.to_thread(pipe.recv)
        try:
            pipe.send(await asyncio.wait_for(measure(case, plane, others, seconds), seconds + 30))
        finally:
            if case.stopped:
                os.kill(others["mute"], signal.SIGCONT)


# All of them


def run(main: Callable[..., Awaitable[None]], *args: object) -> None:
    runtime.run(main(*args))  # type: ignore[arg-type]


@contextmanager
def certificates() -> Iterator[dict[str, kk.TLSFiles]]:
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        ca = pki.init_ca(folder).cert
        roles = {"cp": "control-plane", "node": "worker", "mute": "worker"}
        issued = {name: pki.issue(folder, role, name) for name, role in roles.items()}  # type: ignore[arg-type]
        yield {name: kk.TLSFiles(ca, each.cert, each.key) for name, each in issued.items()}


def trial(files: dict[str, kk.TLSFiles], case: Case, seconds: float) -> Figures:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    processes = {"cp": spawn.Process(target=run, args=(control, files["cp"], case, seconds, theirs), daemon=True)}
    processes["cp"].start()
    theirs.close()
    try:
        address = ours.recv()
        for name in ("node", "mute") if case.stopped else ("node",):
            processes[name] = spawn.Process(target=run, args=(work, files[name], address), daemon=True)
            processes[name].start()
        ours.send({name: process.pid for name, process in processes.items()})
        return ours.recv()
    finally:
        for process in processes.values():
            process.kill()
            process.join()


def table(results: dict[str, dict[str, list[float]]], chosen: list[Case], first: str, columns: list[str]) -> list[str]:
    lines = [f"| {first} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for case in chosen:
        figures = results[case.name]

        def show(column: str, figures: dict[str, list[float]] = figures) -> str:
            if column.endswith("MB"):
                stages = [figures[f"{column}, {when}"] for when in ("idle", "loaded", "at the end")]
                return ", ".join(f"{statistics.median(values):.0f}" for values in stages)
            if column not in figures:
                return ""
            values = figures[column]
            digits = 0 if column.endswith("MB/s") else 2
            return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"

        lines.append(f"| {case.name} | {' | '.join(map(show, columns))} |")
    return lines


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.isolation", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5, help="of each case, after the load has settled; below 20")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="a file for every figure of every repeat")
    args = parser.parse_args()
    cases = [case for case in CASES if args.only in case.name]
    if not cases or not 0 < args.seconds < 20:
        parser.error("--only fits no case" if not cases else "--seconds: a peer that is silent for longer is given up")
    results: dict[str, dict[str, list[float]]] = {case.name: {} for case in cases}
    with certificates() as files:
        for repeat in range(args.repeats):
            for case in cases:
                figures = trial(files, case, args.seconds)
                for name, value in figures.items():
                    results[case.name].setdefault(name, []).append(value)
                shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
                print(f"{repeat + 1}/{args.repeats} {case.name}: {shown}", file=sys.stderr, flush=True)
    print(f"`python -m bench.isolation {' '.join(sys.argv[1:])}`".replace(" `", "`"))
    print(f"\nPython {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}; "
          f"median (lowest-highest) of {args.repeats} interleaved repeats; memory when connected, under load, at the end\n")  # fmt: skip
    memory = ["control plane MB", "worker MB"]
    asking, quiet = ([case for case in cases if case.asking is wanted] for wanted in (True, False))
    speeds = ["away MB/s", "back MB/s"]
    if asking:
        latency = ["p50 ms", "p99 ms", "p99.9 ms", "max ms"]
        print("\n".join(table(results, asking, "questions beside", latency + speeds + memory)), end="\n\n")
    if quiet:
        print("\n".join(table(results, quiet, "without questions", speeds + memory)))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
