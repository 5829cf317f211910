"""Traffic of all kinds while the connection breaks again and again: ``python -m bench.faults --cuts 200 --megabytes 1000``.

Both endpoints are processes; between them stands a ``FaultProxy`` that cuts, closes, silences, delays and slows, at random
moments and in random order. Every byte of the traffic is known beforehand and checked at the other end. Ends with status 1 if
a stream broke, a byte was wrong, an endpoint ended or complained of itself, memory grew, or descriptors were left open.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from bench.processes import interruptible
from bench.soak import Tunnel, heal, settled
from konnektor.testing import FaultProxy

STALLED = 60.0
"""Seconds without a byte after which a stream has failed: twice what liveness may take to find a silent connection."""
GROWTH = 96.0
"""MB by which an endpoint may grow: replay buffers (16), receive pools (64), and what the allocator keeps."""
CHUNK = 64 * 1024
BLOB = random.Random(0).randbytes(1 << 20)
OUTAGE = 0.3
"""Seconds without a connection after which there are no more faults until there is one: streams that were not accepted yet
fail after 2 s, as they should."""
HANDSHAKE = 5_000
"""Bytes in either direction: more than TLS and resuming take."""
LONG_SILENCE = 45.0
"""Seconds: more than liveness takes to find out."""


@dataclass
class Outcome:
    """What happened."""

    bytes: int = 0
    transfers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    cuts: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    resumed: int = 0
    seconds: float = 0.0
    resident: list[tuple[str, float, float]] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)


class WrongBytes(Exception):
    """What nothing excuses."""


# What the tunnel leads to


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The first byte says what is wanted: e(cho), s(ource), d(igest); a source is told how much."""
    try:
        match await reader.readexactly(1):
            case b"e":
                while data := await reader.read(CHUNK):
                    writer.write(data)
                    await writer.drain()
            case b"s":
                size = int.from_bytes(await reader.readexactly(8), "big")
                for offset in range(0, size, len(BLOB)):
                    writer.write(memoryview(BLOB)[: size - offset])
                    await writer.drain()
            case _:
                digest = hashlib.sha256()
                while data := await reader.read(CHUNK):
                    digest.update(data)
                writer.write(digest.digest())
        writer.write_eof()
        await writer.drain()
        while await reader.read(CHUNK):
            pass
    except (OSError, asyncio.IncompleteReadError):
        pass  # the other end says what is wrong with that
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


# Traffic


def expected(size: int) -> bytes:
    """The digest of that many bytes of the traffic."""
    digest = hashlib.sha256()
    for offset in range(0, size, len(BLOB)):
        digest.update(memoryview(BLOB)[: size - offset])
    return digest.digest()


class Traffic:
    """Everything that goes through one port of the tunnel."""

    def __init__(self, port: int, frontend: tuple[str, str], outcome: Outcome) -> None:
        self._port = port
        self._frontend = frontend
        self._outcome = outcome
        self.done = False

    @asynccontextmanager
    async def _connected(self, *, proxied: bool = False) -> AsyncIterator[Any]:
        where, name = self._frontend
        host, _, port = where.rpartition(":") if proxied else ("127.0.0.1", "", str(self._port))
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            if proxied:
                writer.write(f"CONNECT {name} HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
                head = await reader.readuntil(b"\r\n\r\n")
                if b" 200 " not in head:
                    raise WrongBytes(f"the frontend said {head.splitlines()[0].decode()}")
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _read(self, reader: asyncio.StreamReader) -> bytes:
        start = time.monotonic()
        async with asyncio.timeout(STALLED):
            data = await reader.read(CHUNK)
        self._outcome.bytes += len(data)
        self._outcome.stalls.append(time.monotonic() - start)
        return data

    async def upload(self) -> None:
        """Bulk to the target, which answers with what it got, in short."""
        size = random.randrange(1, 8 * len(BLOB))
        async with self._connected() as (reader, writer):
            writer.write(b"d")
            for offset in range(0, size, CHUNK):
                start = offset % len(BLOB)
                piece = BLOB[start : start + min(CHUNK, size - offset)]
                writer.write(piece)
                async with asyncio.timeout(STALLED):
                    await writer.drain()
                self._outcome.bytes += len(piece)
            writer.write_eof()
            if await self._all(reader) != expected(size):
                raise WrongBytes(f"other bytes than the {size:,} that were sent")

    async def download(self) -> None:
        """Bulk from the target."""
        size = random.randrange(1, 8 * len(BLOB))
        async with self._connected() as (reader, writer):
            writer.write(b"s" + size.to_bytes(8, "big"))
            digest, count = hashlib.sha256(), 0
            while data := await self._read(reader):
                digest.update(data)
                count += len(data)
            if digest.digest() != expected(size):
                raise WrongBytes(f"{count:,} bytes, which are not the {size:,} that were sent")

    async def talk(self) -> None:
        """Small questions and answers on one connection."""
        async with self._connected() as (reader, writer):
            writer.write(b"e")
            for _ in range(200):
                if self.done:
                    break
                start = random.randrange(len(BLOB) - 2000)
                question = BLOB[start : start + random.randrange(1, 2000)]
                writer.write(question)
                answer = b""
                while len(answer) < len(question) and (data := await self._read(reader)):
                    answer += data
                if answer != question:
                    raise WrongBytes(f"an answer of {len(answer)} bytes to a question of {len(question)}")

    async def visit(self) -> None:
        """A short connection by way of the frontend, which is half-closed."""
        question = BLOB[: random.randrange(1, 20_000)]
        async with self._connected(proxied=True) as (reader, writer):
            writer.write(b"e" + question)
            writer.write_eof()
            if await self._all(reader) != question:
                raise WrongBytes(f"not the {len(question):,} bytes that were sent")

    async def _all(self, reader: asyncio.StreamReader) -> bytes:
        parts = []
        while data := await self._read(reader):
            parts.append(data)
        return b"".join(parts)

    async def repeat(self, name: str, once: Callable[[], Awaitable[None]], pause: float) -> None:
        """Until it is done; what fails is written down."""
        while not self.done:
            try:
                await once()
            except (OSError, asyncio.IncompleteReadError, WrongBytes) as error:
                self._outcome.wrong.append(f"{name}: {type(error).__name__}: {error}")
                if len(self._outcome.wrong) > 20:
                    return
            self._outcome.transfers[name] += 1
            await asyncio.sleep(pause)


# Faults


async def break_again_and_again(
    proxy: FaultProxy, outcome: Outcome, cuts: int, rng: random.Random, silences: int
) -> None:
    """Any fault at any moment, until there were so many cuts; ``silences`` of them are left for liveness to find."""
    whole_at = time.monotonic()
    while cuts_of(proxy) < cuts:
        await asyncio.sleep(rng.choice((rng.uniform(0, 0.02), rng.uniform(0, 0.4))))
        if whole(proxy):
            whole_at = time.monotonic()
        elif time.monotonic() - whole_at > OUTAGE:
            heal(proxy)
            continue
        side = rng.choice(("client", "target"))
        match rng.choice(
            ("cut", "cut", "one first", "after", "close", "half open", "again", "refuse", "delay", "drip")
        ):
            case "cut":
                proxy.cut()
            case "one first":
                proxy.cut(side, other_after=rng.uniform(0, 0.5))
            case "after":
                proxy.cut_after(rng.choice((0, 1, 60, 3_000, 300_000)), to=side)
            case "close":
                proxy.close()
            case "half open":
                proxy.silence(to=rng.choice((side, None)))
                await asyncio.sleep(rng.uniform(0, 0.3))
                rng.choice((proxy.cut, proxy.resume))()
            case "again":
                proxy.cut()
                proxy.cut_after(rng.randrange(5_000), to=side)
            case "refuse":
                # For less than streams that are not accepted yet may wait (2 s).
                proxy.refuse()
                proxy.cut()
                await asyncio.sleep(rng.uniform(0, 0.3))
                proxy.admit()
            case "delay":
                proxy.delay(rng.uniform(0, 0.03), to=side)
            case "drip":
                proxy.drip(rng.uniform(500_000, 20_000_000), to=side)
        if rng.random() < 0.7:
            await asyncio.sleep(rng.uniform(0, 0.2))
            heal(proxy)
        outcome.cuts = cuts_of(proxy)
    heal(proxy)
    for _ in range(silences):
        before, end = proxy.stats().connections, time.monotonic() + LONG_SILENCE
        for connection in proxy:
            connection.silence()
        while proxy.stats().connections == before and time.monotonic() < end:  # noqa: ASYNC110 - it announces nothing
            await asyncio.sleep(0.1)
        if proxy.stats().connections == before:
            outcome.wrong.append("a silent connection was not found")
        await asyncio.sleep(1)
        heal(proxy)


def whole(proxy: FaultProxy) -> bool:
    """Whether there is a connection that has got beyond its handshake."""
    return any(min(each.delivered("client"), each.delivered("target")) > HANDSHAKE for each in proxy)


def cuts_of(proxy: FaultProxy) -> int:
    """How many connections were broken."""
    faults = proxy.stats().faults
    return sum(faults.get(name, 0) for name in ("cut", "cut_after", "close"))


async def trial(directory: Path, *, cuts: int, megabytes: float, seed: int, silences: int = 0) -> Outcome:
    """So many cuts during so much traffic, or more."""
    loop = asyncio.get_running_loop()
    outcome = Outcome()
    async with AsyncExitStack() as stack:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        stack.callback(server.close)
        port = server.sockets[0].getsockname()[1]
        proxies: list[FaultProxy] = []

        def between(address: str) -> str:  # in another thread
            proxies.append(FaultProxy(address))
            return asyncio.run_coroutine_threadsafe(stack.enter_async_context(proxies[0]), loop).result().address

        tunnel = await asyncio.to_thread(Tunnel, {"all": port}, directory, between)
        stack.push_async_callback(asyncio.to_thread, tunnel.stop)
        proxy = proxies[0]
        traffic = Traffic(tunnel.ports["all"], (tunnel.frontend, tunnel.name_of(port)), outcome)
        for once in (traffic.upload, traffic.download, traffic.visit):  # what is allocated once is no leak
            await once()
        idle, before = await settled(tunnel, [0, 0], seconds=1), tunnel.megabytes()
        start = time.monotonic()
        kinds = [("upload", traffic.upload, 0.0), ("download", traffic.download, 0.0), *[("talk", traffic.talk, 0.0)] * 4,
                 *[("visit", traffic.visit, 0.05)] * 2]  # fmt: skip
        peak = list(before)
        async with asyncio.TaskGroup() as group:
            for name, once, pause in kinds:
                group.create_task(traffic.repeat(name, once, pause))
            breaking = group.create_task(break_again_and_again(proxy, outcome, cuts, random.Random(seed), silences))
            while not outcome.wrong and not tunnel.ended() and (not breaking.done() or outcome.bytes < megabytes * 1e6):
                await asyncio.sleep(0.2)
                if not tunnel.ended():
                    peak = [max(pair) for pair in zip(peak, tunnel.megabytes(), strict=True)]
            traffic.done = True
            breaking.cancel()
            heal(proxy)
        outcome.seconds = time.monotonic() - start
        outcome.faults = dict(proxy.stats().faults)
        judge(outcome, tunnel, await settled(tunnel, idle) if not tunnel.ended() else [], idle)
        outcome.resident = list(zip(("control plane", "worker"), before, peak, strict=True))
        outcome.wrong += [
            f"the {name} grew from {first:.0f} to {most:.0f} MB"
            for name, first, most in outcome.resident
            if most - first > GROWTH
        ]
    return outcome


def judge(outcome: Outcome, tunnel: Tunnel, after: list[int], idle: list[int]) -> None:
    """What the endpoints say of themselves, and what they have left."""
    if tunnel.ended():
        outcome.wrong.append("an endpoint ended by itself")
    for name, one, two in zip(("control plane", "worker"), idle, after, strict=False):
        if two > one:
            outcome.wrong.append(f"the {name} has left {two - one} descriptors open")
    for log in sorted(tunnel.directory.glob("konnektor-*.log")):
        text = log.read_text(errors="replace")
        outcome.resumed += text.count("resumed the session with")
        outcome.wrong += [line for line in text.splitlines() if "internal error" in line or "Traceback" in line]
        outcome.wrong += [line for line in text.splitlines() if "no longer knows the session" in line]


def report(outcome: Outcome) -> None:
    stalls = sorted(outcome.stalls)
    print(
        f"{outcome.cuts} cuts during {outcome.bytes / 1e6:,.0f} MB in {outcome.seconds:.0f} s; resumed {outcome.resumed} times"
    )
    print("  faults     " + ", ".join(f"{name} {count}" for name, count in sorted(outcome.faults.items())))
    print("  transfers  " + ", ".join(f"{name} {count}" for name, count in sorted(outcome.transfers.items())))
    print(
        f"  waits      longest for a byte {stalls[-1]:.2f} s, 99 of 100 below {stalls[len(stalls) * 99 // 100]:.3f} s"
    )
    for name, first, most in outcome.resident:
        print(f"  memory     {name}: {first:.0f} MB at first, {most:.0f} MB at most")


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__)
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--silences", type=int, default=1, help="besides, that only liveness finds: half a minute each")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        outcome = uvloop.run(
            trial(Path(directory), cuts=args.cuts, megabytes=args.megabytes, seed=args.seed, silences=args.silences)
        )
        report(outcome)
        if outcome.wrong:
            for log in sorted(Path(directory).glob("*.log")):
                print(f"\nthe end of {log.name}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-10:]))
    print("\n" + ("\n".join(outcome.wrong) if outcome.wrong else "nothing broke, nothing was wrong, nothing leaked"))
    sys.exit(1 if outcome.wrong else 0)


if __name__ == "__main__":
    main()
