"""One stream over a long path, beside plain TLS on the same path: ``python -m bench.paths``.

Three processes: the sender, a relay that delays each byte by half the round trip and passes so many a second, and the
receiver, which counts. Both contenders use the same certificates and TLS contexts, uvloop, and the kernel's own choice of
socket buffers; konnektor's sessions can be resumed, as those of its endpoints.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import platform
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection
from pathlib import Path as FilePath
from typing import NamedTuple, cast

import konnektor as kk
from bench.link import queue
from bench.processes import interruptible
from konnektor import pki, runtime
from konnektor.frames import Feature
from konnektor.handlers import Handlers
from konnektor.limits import MIB, parse_size
from konnektor.session import Session
from konnektor.settings import Settings
from konnektor.stream_types import StreamType
from konnektor.testing import delaying_relay

BLOCK = bytes(256 * 1024)
REPLY = struct.Struct("!d")


class Path(NamedTuple):
    """Seconds, and bytes a second."""

    round_trip: float
    rate: float | None

    def __str__(self) -> str:
        return f"{self.round_trip * 1e3:g} ms, {'no limit' if self.rate is None else f'{self.rate / 1e6:g} MB/s'}"


class Bulk(StreamType):
    """Bytes without end until the receiver has seen enough."""

    name = "bulk@bench"
    warm: float
    seconds: float


class Count:
    """Bytes a second, of ``seconds`` that begin ``warm`` seconds after the first byte."""

    def __init__(self, warm: float, seconds: float) -> None:
        self.warm, self.seconds = warm, seconds
        self.begin = self.total = self.before = 0.0
        self.since = 0.0

    def add(self, size: int) -> float | None:
        """The result, once it is there."""
        now = time.monotonic()
        self.begin = self.begin or now
        if not self.since and now >= self.begin + self.warm:
            self.since, self.before = now, self.total
        self.total += size
        if self.since and now >= self.since + self.seconds:
            return (self.total - self.before) / (now - self.since)
        return None


# The receiver


class PlainSink(asyncio.BufferedProtocol):
    """Told in the first bytes how long to count, answers with the result."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.buffer = memoryview(bytearray(len(BLOCK)))
        self.count: Count | None = None
        self.done = False

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self.count is None:
            self.count = Count(*struct.unpack_from("!dd", self.buffer))
        elif not self.done and (rate := self.count.add(nbytes)) is not None:
            self.done = True
            self.transport.write(REPLY.pack(rate))


async def take_bulk(stream: kk.Stream, request: Bulk) -> None:
    count = Count(request.warm, request.seconds)
    await stream.accept()
    async for chunk in stream:
        if (rate := count.add(len(chunk))) is not None:
            await stream.send(REPLY.pack(rate))
            await stream.aclose()
            return


def resumable(limits: kk.Limits) -> Settings:
    return Settings.of(limits, features=Feature.RESUME)


async def receive(files: kk.TLSFiles, limits: kk.Limits, ports: Connection) -> None:
    loop = asyncio.get_running_loop()
    context = files.server_context()
    handlers = Handlers()
    handlers.add(Bulk, take_bulk)
    plain = await loop.create_server(PlainSink, "127.0.0.1", 0, ssl=context)
    ours = await loop.create_server(
        lambda: Session("server", handlers=handlers, limits=limits, settings=resumable(limits)).protocol(),
        "127.0.0.1",
        0,
        ssl=context,
    )
    ports.send([server.sockets[0].getsockname()[1] for server in (plain, ours)])
    await asyncio.Event().wait()


# The relay


async def relay(targets: list[int], paths: list[Path], ports: Connection) -> None:
    async with AsyncExitStack() as stack:
        entries = []
        for path in paths:
            size = queue(path.round_trip, path.rate)
            proxies = [
                await stack.enter_async_context(
                    delaying_relay(f"127.0.0.1:{port}", path.round_trip, rate=path.rate, buffer=size)
                )
                for port in targets
            ]
            entries.append([proxy.port for proxy in proxies])
        ports.send(entries)
        await asyncio.Event().wait()


# The sender


class PlainSource(asyncio.Protocol):
    def __init__(self) -> None:
        self.may_write = asyncio.Event()
        self.may_write.set()
        self.rate = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(MIB)

    def pause_writing(self) -> None:
        self.may_write.clear()

    def resume_writing(self) -> None:
        self.may_write.set()

    def data_received(self, data: bytes) -> None:
        self.rate.set_result(REPLY.unpack(data)[0])


async def plain(files: kk.TLSFiles, _limits: kk.Limits, port: int, warm: float, seconds: float) -> float:
    loop = asyncio.get_running_loop()
    transport, source = await loop.create_connection(
        PlainSource, "127.0.0.1", port, ssl=files.client_context(), server_hostname="cp"
    )
    transport.write(struct.pack("!dd", warm, seconds))
    await asyncio.sleep(0.1)  # that it comes by itself
    while not source.rate.done():
        transport.write(BLOCK)
        await asyncio.sleep(0)
        await source.may_write.wait()
    transport.abort()
    return await source.rate


async def konnektor(files: kk.TLSFiles, limits: kk.Limits, port: int, warm: float, seconds: float) -> float:
    sock = socket.create_connection(("127.0.0.1", port))
    tls = {"tls": files.client_context(), "server_name": "cp"}
    session = await Session.client(sock, limits=limits, settings=resumable(limits), **tls)
    async with session, await session.open(Bulk(warm, seconds)) as stream:

        async def send() -> None:
            try:
                while True:
                    await stream.send(BLOCK)
            except kk.PeerError:
                pass  # it has seen enough

        sending = asyncio.create_task(send())
        try:
            return REPLY.unpack(await stream.receive(REPLY.size))[0]
        finally:
            sending.cancel()


Contender = Callable[[kk.TLSFiles, kk.Limits, int, float, float], Awaitable[float]]
CONTENDERS: dict[str, Contender] = {"plain TLS": plain, "konnektor": konnektor}


def run(main: Callable[..., Awaitable[None]], *args: object) -> None:
    runtime.run(main(*args))  # type: ignore[arg-type]


async def measure(
    files: kk.TLSFiles, limits: kk.Limits, ports: list[list[int]], paths: list[Path], repeats: int, seconds: float
) -> list[dict[str, list[float]]]:
    results: list[dict[str, list[float]]] = [{name: [] for name in CONTENDERS} for _ in paths]
    for repeat in range(repeats):
        for path, pair, result in zip(paths, ports, results, strict=True):
            for port, (name, contender) in zip(pair, CONTENDERS.items(), strict=True):
                rate = await asyncio.wait_for(contender(files, limits, port, 1 + 15 * path.round_trip, seconds), 60)
                result[name].append(rate / 1e6)
                print(f"{repeat + 1}/{repeats} {path}, {name}: {rate / 1e6:.0f} MB/s", file=sys.stderr)
    return results


def show(values: list[float], digits: int = 0) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.paths", description=__doc__)
    parser.add_argument("--round-trips", default="1,10,50,200", help="milliseconds")
    parser.add_argument("--rates", default="125,none", help="of the path, MB/s; none for no limit")
    parser.add_argument(
        "--pool", type=parse_size, default=kk.Limits().receive_pool, help="Limits.receive_pool of both ends"
    )
    parser.add_argument(
        "--window", type=parse_size, default=kk.Limits().max_window, help="Limits.max_window of both ends"
    )
    parser.add_argument(
        "--streams", type=int, default=kk.Limits().initial_streams, help="Limits.initial_streams of both"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2, help="counted, after a second and 15 round trips")
    args = parser.parse_args()
    rates = [None if text == "none" else float(text) * 1e6 for text in args.rates.split(",")]
    paths = [Path(float(text) / 1e3, rate) for rate in rates for text in args.round_trips.split(",")]
    limits = kk.Limits(receive_pool=args.pool, max_window=args.window, initial_streams=args.streams)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        folder = FilePath(directory)
        ca = pki.init_ca(folder).cert
        issued = [pki.issue(folder, role, name) for role, name in (("worker", "node"), ("control-plane", "cp"))]
        worker, plane = (kk.TLSFiles(ca, each.cert, each.key) for each in issued)
        ours, theirs = spawn.Pipe()
        processes = [spawn.Process(target=run, args=(receive, plane, limits, theirs), daemon=True)]
        processes[0].start()
        try:
            targets = ours.recv()
            processes.append(spawn.Process(target=run, args=(relay, targets, paths, theirs), daemon=True))
            processes[1].start()
            results: list[dict[str, list[float]]] = []

            async def all_of_it() -> None:
                results.extend(await measure(worker, limits, ours.recv(), paths, args.repeats, args.seconds))

            run(all_of_it)
        finally:
            for process in processes:
                process.terminate()
                process.join()
    print(f"`python -m bench.paths {' '.join(sys.argv[1:])}`".replace(" `", "`"))
    print(f"\nPython {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}; "
          f"median (lowest-highest) of {args.repeats} interleaved repeats\n")  # fmt: skip
    print("| path | plain TLS MB/s | konnektor MB/s | konnektor / plain |\n|---|---|---|---|")
    for path, result in zip(paths, results, strict=True):
        by_name = [result[name] for name in CONTENDERS]
        ratio = statistics.median(by_name[1]) / statistics.median(by_name[0])
        print(f"| {path} | {show(by_name[0])} | {show(by_name[1])} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
