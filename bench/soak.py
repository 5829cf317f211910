"""Everyday tools through the tunnel, all at once, for minutes: ``python -m bench.soak --seconds 180``.

Ends with status 1 if a run failed, an endpoint ended, or descriptors were left open. The row "control" is iperf3 without the
tunnel: what fails there too is iperf3's own.

With ``--faults`` the worker dials through a proxy that breaks the connection every few seconds. Runs may fail then, but never
with wrong bytes; and once the faults are over, every tool must pass again.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import uvloop

from bench.peers.konnektor import Konnektor
from bench.peers.peer import CONTROL_PLANE, SIDES
from bench.processes import free_port, interruptible, wait_for_port
from konnektor.testing import FaultProxy

PATIENCE = 60
"""Seconds after which a run has failed."""
SETTLE = 20
"""Seconds that endpoints may take to close what the tools have left."""
GROWTH = 8.0
"""MB by which an endpoint may grow in the second half: pools and buffers have their size by then, in bursts a few MB more or less."""
PAUSE = 0.1
"""Seconds between two runs of a tool."""
REPORT_EVERY = 15

BLOB = random.Random(0).randbytes(1 << 20)

NGINX = """
worker_processes 1; daemon off; pid {dir}/nginx.pid; error_log {dir}/nginx.err;
events {{ worker_connections 4096; }}
http {{ access_log off; client_body_temp_path {dir}; proxy_temp_path {dir}; fastcgi_temp_path {dir}; uwsgi_temp_path {dir};
  scgi_temp_path {dir}; keepalive_requests 100000000;
  server {{ listen 127.0.0.1:{http} backlog=4096; listen 127.0.0.1:{https} ssl;
    ssl_certificate {dir}/cert.pem; ssl_certificate_key {dir}/key.pem;
    location = / {{ return 200 "ok\\n"; }} location = /blob {{ root {dir}/www; }} }} }}
"""


class Failed(Exception):
    """A run did not do what it should."""


class WrongBytes(Failed):
    """What no fault excuses."""


class Tunnel(Konnektor):
    """The endpoints, with a frontend besides the forwards; ``between`` puts something before the control plane."""

    def __init__(self, targets: Mapping[str, int], directory: Path, between: Callable[[str], str]) -> None:
        self.path_to = between
        self.frontend = f"127.0.0.1:{free_port()}"
        super().__init__(targets, directory)

    def flags(self, side: str) -> list[str]:
        return ["--frontend", f"http://{self.frontend}"] if side == CONTROL_PLANE else []

    def wait_until_ready(self) -> None:
        """As they say themselves: the servers come later."""

    def name_of(self, port: int) -> str:
        """What to ask the frontend for to reach a port at the worker."""
        return f"127.0.0.1.node.konnektor.internal:{port}"

    def megabytes(self) -> list[float]:
        """Resident memory of both endpoints."""
        return [self.resident(side) / 1024 for side in SIDES]

    def descriptors(self) -> list[int]:
        """Open ones of both endpoints."""
        return [len(list(Path(f"/proc/{process.pid}/fd").iterdir())) for process in self.processes]


async def run(*command: str, send: bytes = b"") -> bytes:
    """What a program says; fails with the first line of its complaint."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        async with asyncio.timeout(PATIENCE):
            out, err = await process.communicate(send)
    except TimeoutError:
        raise Failed(f"{command[0]} took more than {PATIENCE} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        lines = (err or out).decode(errors="replace").strip().splitlines() or ["nothing said"]
        line = next((line for line in lines if "error" in line or "failed" in line), lines[0])
        raise Failed(f"{command[0]} ended with status {process.returncode}: {line}")
    return out


@asynccontextmanager
async def iperf_server(port: int) -> AsyncIterator[None]:
    """A server for one test, when it is ready.

    Its own word for it is taken: a probe of the port would be that test. One that is kept for more tests is busy for a moment
    after each, and for good (3.12) after one that broke off.
    """
    process = await asyncio.create_subprocess_exec(
        "iperf3", "-s", "-1", "--forceflush", "-B", "127.0.0.1", "-p", str(port),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async for line in process.stdout:
            if b"Server listening" in line:
                break
        else:
            raise Failed(f"the iperf3 server ended with status {await process.wait()}")
        yield
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


# The tools


def iperf(server: int, port: int, *args: str) -> Callable[[], Awaitable[None]]:
    """A test through ``port``, which leads to that of the server."""

    async def once() -> None:
        async with iperf_server(server):
            # Whole seconds: iperf3 takes 0.5 for endless.
            await run("iperf3", "-c", "127.0.0.1", "-p", str(port), "-P", "8", "-t", "2", *args)

    return once


def wrk(port: int) -> Callable[[], Awaitable[None]]:
    async def once() -> None:
        out = (await run("wrk", "-t", "2", "-c", "64", "-d", "2", f"http://127.0.0.1:{port}/")).decode()
        for line in out.splitlines():
            if "Socket errors" in line or "Non-2xx" in line:
                raise Failed(f"wrk: {line.strip()}")

    return once


def curl(frontend: str, address: str) -> Callable[[], Awaitable[None]]:
    async def once() -> None:
        out = await run("curl", "-q", "--silent", "--show-error", "--fail", "--noproxy", "", "--proxytunnel",
                        "--proxy", f"http://{frontend}", f"http://{address}/blob")  # fmt: skip
        if out != BLOB:
            raise WrongBytes(f"curl got other bytes than were sent ({len(out):,} of {len(BLOB):,})")

    return once


def s_client(frontend: str, address: str, certificate: Path) -> Callable[[], Awaitable[None]]:
    async def once() -> None:
        out = await run("openssl", "s_client", "-proxy", frontend, "-connect", address, "-CAfile", str(certificate),
                        "-verify_return_error", "-quiet",
                        send=b"GET /blob HTTP/1.0\r\n\r\n")  # fmt: skip
        _, _, body = out.partition(b"\r\n\r\n")
        if out and not (out.startswith(b"HTTP/1.1 200") and BLOB.startswith(body)):
            raise WrongBytes(f"openssl s_client got other bytes than were sent ({len(out):,})")
        if body != BLOB:
            raise Failed(f"openssl s_client got {len(body):,} bytes of {len(BLOB):,}, and took it for the end")

    return once


class Row:
    """A tool that is run again and again; ``counts`` says whether its failures are the tunnel's."""

    def __init__(self, name: str, once: Callable[[], Awaitable[None]], *, counts: bool = True) -> None:
        self.name = name
        self.counts = counts
        self.runs = 0
        self.errors: Counter[str] = Counter()  # by the first of those that differ in numbers only
        self._first: dict[str, str] = {}
        self.wrong_bytes = False
        self._once = once

    async def once(self) -> None:
        try:
            await self._once()
        except Failed as error:
            alike = re.sub(r"\d+", "N", str(error))
            self.errors[self._first.setdefault(alike, str(error))] += 1
            self.wrong_bytes |= isinstance(error, WrongBytes)
        self.runs += 1

    async def until(self, end: float) -> None:
        while time.monotonic() < end:
            await self.once()
            await asyncio.sleep(PAUSE)

    @property
    def failures(self) -> int:
        return self.errors.total()


@asynccontextmanager
async def nginx(directory: Path, ports: Mapping[str, int]) -> AsyncIterator[None]:
    (directory / "www").mkdir()
    (directory / "www" / "blob").write_bytes(BLOB)
    (directory / "nginx.conf").write_text(NGINX.format(dir=directory, **ports))
    await run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
              "-subj", "/CN=soak", "-keyout", f"{directory}/key.pem", "-out", f"{directory}/cert.pem")  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        shutil.which("nginx") or "/usr/sbin/nginx", "-c", f"{directory}/nginx.conf", "-e", f"{directory}/nginx.err"
    )
    try:
        await asyncio.to_thread(wait_for_port, ports["http"])
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def report(rows: list[Row], tunnel: Tunnel, seconds: float) -> None:
    print(f"\nafter {seconds:.0f} s")
    for row in rows:
        print(f"  {row.name:10} {row.runs:6} runs {row.failures:6} failed")
        for error, count in row.errors.items():
            print(f"  {'':10} {count:6} x {error}")
    if not tunnel.ended():
        for name, memory, count in zip(("plane", "worker"), tunnel.megabytes(), tunnel.descriptors(), strict=True):
            print(f"  {name:10} {memory:6.1f} MB {count:6} descriptors")
    sys.stdout.flush()


async def settled(tunnel: Tunnel, wanted: list[int], seconds: float = SETTLE) -> list[int]:
    """Descriptors, as soon as there are no more than wanted, or they have had their time."""
    end = time.monotonic() + seconds
    while True:
        now = tunnel.descriptors()
        if all(a <= b for a, b in zip(now, wanted, strict=True)) or time.monotonic() > end:
            return now
        await asyncio.sleep(0.5)


# Faults


async def disturb(proxy: FaultProxy, end: float) -> None:
    """Any fault, every few seconds, until there shall be no more."""
    rng = random.Random()
    while (left := end - time.monotonic()) > 0:
        await asyncio.sleep(min(left, rng.uniform(0.5, 5)))
        side = rng.choice(("client", "target"))
        match rng.choice(("cut", "one first", "cut after", "close", "silence", "delay", "drip", "refuse")):
            case "cut":
                proxy.cut()
            case "one first":
                proxy.cut(side, other_after=rng.uniform(0, 3))
            case "cut after":
                proxy.cut_after(rng.choice((0, 1, 500, 5_000, 50_000_000)), to=side)
            case "close":
                proxy.close()
            case "silence":
                proxy.silence(to=rng.choice((side, None)))
            case "delay":
                proxy.delay(rng.uniform(0, 0.05), to=side)
            case "drip":
                proxy.drip(rng.uniform(1_000, 10_000_000), to=side)
            case "refuse":
                proxy.cut()
                proxy.refuse()
        if rng.random() < 0.5:
            await asyncio.sleep(rng.uniform(0, 2))
            heal(proxy)
    heal(proxy)


def heal(proxy: FaultProxy) -> None:
    """Ends every fault that lasts."""
    proxy.resume()
    proxy.delay(0)
    proxy.drip(None)
    proxy.admit()
    for side in ("client", "target"):
        proxy.cut_after(None, to=side)


async def recovered(rows: list[Row]) -> list[str]:
    """Which tools do not pass once the faults are over, however long they are given."""
    wrong = []
    for row in rows:
        last = Row(row.name, row._once)
        end = time.monotonic() + PATIENCE
        await last.once()
        while last.failures == last.runs and time.monotonic() < end:
            await asyncio.sleep(1)
            await last.once()
        if last.failures == last.runs:
            wrong.append(f"{row.name} does not recover: {list(last.errors)[-1]}")
    return wrong


# The whole


def grown(halfway: list[float], end: list[float]) -> list[str]:
    """Who has more memory at the end than half a run explains; MB of the control plane and the worker."""
    return [
        f"the {name} grew from {one:.1f} to {two:.1f} MB in the second half"
        for name, one, two in zip(("control plane", "worker"), halfway, end, strict=True)
        if two > one + GROWTH
    ]


async def soak(tunnel: Tunnel, proxy: FaultProxy | None, rows: list[Row], seconds: float) -> list[str]:
    """What was wrong, in sentences."""
    idle = tunnel.descriptors()
    start = time.monotonic()
    halfway: list[float] = []
    asyncio.get_running_loop().call_later(seconds / 2, lambda: tunnel.ended() or halfway.extend(tunnel.megabytes()))
    for row in rows:  # what is opened once and kept, such as a pool's first thread, is no leak
        await row.once()
    before = await settled(tunnel, idle)
    end = start + seconds
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(row.until(end)) for row in rows]
        if proxy is not None:
            running.append(group.create_task(disturb(proxy, end)))
        while not all(task.done() for task in running):
            await asyncio.wait(running, timeout=REPORT_EVERY)
            report(rows, tunnel, time.monotonic() - start)
            if proxy is not None:
                print(f"  proxy      {proxy.stats()}")
            if tunnel.ended():
                for task in running:
                    task.cancel()
                break
    wrong = [
        f"{row.failures} of {row.runs} runs of {row.name} failed"
        for row in rows
        if row.counts and (row.wrong_bytes or (row.failures and proxy is None))
    ]
    if tunnel.ended():
        return [*wrong, "an endpoint ended by itself"]
    if proxy is not None:
        wrong += await recovered(rows)
    elif halfway:  # what is kept for a resume comes and goes with faults; bench.faults bounds it
        wrong += grown(halfway, tunnel.megabytes())
    after = await settled(tunnel, before)
    for name, one, two in zip(("control plane", "worker"), before, after, strict=True):
        print(f"descriptors of the {name}: {one} before, {two} after")
        if two > one:
            wrong.append(f"the {name} has left {two - one} descriptors open")
    return wrong


async def measure(seconds: float, directory: Path, *, faults: bool) -> list[str]:
    loop = asyncio.get_running_loop()
    targets = {name: free_port() for name in ("up", "down", "http", "https")}
    control = free_port()
    proxies: list[FaultProxy] = []

    def between(address: str) -> str:  # in another thread
        if not faults:
            return address
        proxies.append(FaultProxy(address))
        return asyncio.run_coroutine_threadsafe(stack.enter_async_context(proxies[0]), loop).result().address

    async with AsyncExitStack() as stack:
        # Before the servers: it probes the ports.
        tunnel = await asyncio.to_thread(Tunnel, targets, directory, between)
        stack.push_async_callback(asyncio.to_thread, tunnel.stop)
        await stack.enter_async_context(nginx(directory, {name: targets[name] for name in ("http", "https")}))
        rows = [
            Row("iperf3 up", iperf(targets["up"], tunnel.ports["up"])),
            Row("iperf3 down", iperf(targets["down"], tunnel.ports["down"], "-R")),
            Row("wrk", wrk(tunnel.ports["http"])),
            Row("curl", curl(tunnel.frontend, tunnel.name_of(targets["http"]))),
            Row("s_client", s_client(tunnel.frontend, tunnel.name_of(targets["https"]), directory / "cert.pem")),
            Row("control", iperf(control, control, "-b", "10M"), counts=False),  # slow: the CPU is for the tunnel
        ]
        return await soak(tunnel, proxies[0] if faults else None, rows, seconds)


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--faults", action="store_true", help="break the tunnel's connection again and again")
    args = parser.parse_args()
    missing = [
        tool for tool in ("iperf3", "wrk", "nginx", "curl", "openssl")
        if shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin") is None
    ]  # fmt: skip
    if missing:
        sys.exit(f"missing: {', '.join(missing)}; the soak needs iperf3, wrk, nginx, curl and openssl")
    with tempfile.TemporaryDirectory() as directory:
        wrong = uvloop.run(measure(args.seconds, Path(directory), faults=args.faults))
        if wrong:
            for log in sorted(Path(directory).glob("*.log")):
                print(f"\nthe end of {log.name}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-10:]))
    print("\n" + ("\n".join(wrong) if wrong else "nothing failed, nothing leaked"))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
