"""The steps of the demonstration, in order, and what happens when one fails."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from konnektor.demo import clients, servers
from konnektor.demo.processes import DemoError, Endpoint
from konnektor.demo.report import Bar, Report, Result, rate, size
from konnektor.errors import KonnektorError
from konnektor.pki import init_ca, issue
from konnektor.runtime import run
from konnektor.tls import Role

__all__ = ["run_demo"]

STREAMS: Final = 500
LOG_LINES: Final = 50
PATIENCE: Final = 30.0
"""Seconds that any one step may take, and bulk transfer beyond what SLOWEST explains."""
SLOWEST: Final = 16 * 2**20
"""Bytes a second."""
SETTLE: Final = 0.3
"""Seconds for the endpoints to log what they make of a failure."""
METADATA: Final = "169.254.169.254:80"
"""Where clouds tell machines their secrets; no worker's allow list opens it by accident."""
WORKER: Final = "node-1"
EXIT_ABORTED: Final = 130


def run_demo(bulk: int) -> int:
    """Runs every step and prints the table. Leaves no process and no file behind, however it ends.

    Args:
        bulk: bytes to move each way.

    Returns:
        The exit status: 0 if every step worked, 1 if one did not, 130 after Ctrl-C.
    """
    if shutil.which("curl") is None:
        print("curl is missing: please install it.", file=sys.stderr)
        return 1
    # A short path: that of a Unix socket has about 100 bytes.
    with tempfile.TemporaryDirectory(prefix="konnektor-demo-") as folder:
        return run(_main(bulk, Path(folder)))


async def _main(bulk: int, folder: Path) -> int:
    """Runs the tour so that Ctrl-C and SIGTERM end it in good order."""
    loop = asyncio.get_running_loop()
    task = loop.create_task(Tour(bulk, folder).run())

    def interrupt() -> None:
        if not task.cancelling():  # a second one must not keep it from clearing up
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    try:
        return await task
    except asyncio.CancelledError:
        print("\ninterrupted: everything is stopped and removed", file=sys.stderr)
        return EXIT_ABORTED
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


class Tour:
    """The demonstration's state: what was started, and where it is.

    Args:
        bulk: bytes to move each way.
        folder: for keys, logs and the Unix socket.
    """

    def __init__(self, bulk: int, folder: Path) -> None:
        self._bulk = bulk
        self._folder = folder
        self._report = Report()
        self._stack = AsyncExitStack()
        self._endpoints: list[Endpoint] = []
        self._socket = str(folder / "connect.sock")

    async def run(self) -> int:
        """Every step, until one fails."""
        steps: list[tuple[str, Callable[[], Awaitable[Result]]]] = [
            ("make a CA and certificates", self._certificates),
            ("start servers, control plane and worker", self._start),
            ("curl, CONNECT on TCP", self._curl_tcp),
            ("curl (by a relay), CONNECT on the Unix socket", self._curl_unix),
            ("follow a kubelet's log over TLS", self._follow),
            (f"{STREAMS} streams at once, each echoing", self._many),
            ("bulk up, with checksum", self._up),
            ("bulk down, with checksum", self._down),
            ("half-close: EOF, then the answer", self._half_close),
            ("a denied destination is refused", self._denied),
            ("restart the worker and carry on", self._restart),
        ]
        report = self._report
        report.note("konnektor demo: client -> control plane -> one mutual-TLS connection -> worker -> servers")
        started = time.monotonic()
        try:
            for what, step in steps:
                try:
                    async with asyncio.timeout(PATIENCE + self._bulk / SLOWEST):
                        result = await step()
                except (DemoError, KonnektorError, OSError, EOFError) as error:
                    report.failed(what)
                    report.table()
                    why = str(error) or ("it took too long" if isinstance(error, TimeoutError) else repr(error))
                    await asyncio.sleep(SETTLE)
                    print(f"\nfailed: {what}: {why}", flush=True)
                    for endpoint in self._endpoints:
                        print(endpoint.tail(), flush=True)
                    return 1
                except Exception:  # a defect: whoever catches it says what, and here is where
                    report.failed(what)
                    report.table()
                    raise
                report.passed(what, result)
        finally:
            await self._stop()
        report.table()
        report.note(f"\nevery step worked; {time.monotonic() - started:.0f} s in all")
        return 0

    async def _stop(self) -> None:
        await asyncio.gather(*(endpoint.stop() for endpoint in self._endpoints))
        await self._stack.aclose()

    # Setting up

    async def _certificates(self) -> Result:
        started = time.monotonic()
        tunnel, cluster = self._folder / "tunnel", self._folder / "cluster"
        init_ca(tunnel)
        issue(tunnel, Role.CONTROL_PLANE, "cp")
        issue(tunnel, Role.WORKER, WORKER)
        # The kubelet has a certificate from a CA of its own, which the tunnel knows nothing of; any for servers will do.
        init_ca(cluster, "cluster.local")
        issue(cluster, Role.CONTROL_PLANE, "kubelet", ["127.0.0.1"])
        return Result("2 CAs, 3 certificates", _milliseconds(time.monotonic() - started))

    def _identity(self, name: str) -> list[str]:
        pki = self._folder / "tunnel"
        return ["--ca", str(pki / "ca.pem"), "--cert", str(pki / f"{name}.pem"), "--key", str(pki / f"{name}.key")]

    async def _start(self) -> Result:
        started = time.monotonic()
        enter = self._stack.enter_context
        cluster = self._folder / "cluster"
        self._kubelet = enter(servers.kubelet(cluster / "kubelet.pem", cluster / "kubelet.key"))
        self._web = enter(servers.web())
        self._vault = enter(servers.vault())
        self._echo, self._echo_connections = await self._stack.enter_async_context(servers.echo())
        ports = {"web": self._web, "vault": self._vault, "echo": self._echo, "log": self._kubelet.server_address[1]}
        self._allowed = "127.0.0.1:" + ",".join(map(str, ports.values()))

        # Both forwards listen on a free port; the ready line says which, in the same order.
        control_plane = Endpoint(
            "control plane",
            ["control-plane", "--listen", "127.0.0.1:0", *self._identity("cp"),
             "--frontend", "http://127.0.0.1:0", "--frontend", f"http+unix://{self._socket}",
             "--forward", f"127.0.0.1:0={WORKER}/127.0.0.1:{self._echo}",
             "--forward", f"127.0.0.1:0={WORKER}/127.0.0.1:{self._vault}"],
            self._folder / "control-plane.log",
        )  # fmt: skip
        self._endpoints.append(control_plane)
        await control_plane.start()
        self._tunnel = control_plane.ready["tunnel"]
        self._proxy = control_plane.ready["http"]
        self._echo_at, self._vault_at = (int(word.rpartition(":")[2]) for word in control_plane.forwards)
        self._worker = await self._start_worker("worker")
        return Result("2 processes, 4 servers", _milliseconds(time.monotonic() - started))

    async def _start_worker(self, name: str) -> Endpoint:
        worker = Endpoint(
            name,
            ["worker", "--connect", self._tunnel, *self._identity(WORKER), "--allow", self._allowed],
            self._folder / f"{name.replace(' ', '-')}.log",
        )
        self._endpoints.append(worker)
        await worker.start()
        return worker

    # Fetching

    async def _curl_tcp(self) -> Result:
        # The worker is named by the host: HOST.WORKER.konnektor.internal.
        return await self._fetch(self._proxy, f"http://127.0.0.1.{WORKER}.konnektor.internal:{self._web}/")

    async def _curl_unix(self) -> Result:
        # Here by a header of the CONNECT request.
        async with clients.unix_relay(self._socket) as proxy:
            header = ("--proxy-header", f"Konnektor-Worker: {WORKER}")
            return await self._fetch(proxy, f"http://127.0.0.1:{self._web}/", *header)

    async def _fetch(self, proxy: str, url: str, *more: str) -> Result:
        page, seconds = await clients.curl(proxy, url, *more)
        if page != servers.PAGE:
            raise DemoError(f"{len(page)} bytes came, which are not the page of {len(servers.PAGE)}")
        return Result(f"{size(len(page))} page", _milliseconds(seconds))

    async def _follow(self) -> Result:
        """The log comes line by line as it is written; and when curl goes, the kubelet notices."""
        port = self._kubelet.server_address[1]
        arguments = clients.curl_arguments(
            self._proxy, f"https://127.0.0.1:{port}/containerLogs/default/web-0/app?follow=true",
            "--no-buffer", "--cacert", str(self._folder / "cluster" / "ca.pem"),
            "--proxy-header", f"Konnektor-Worker: {WORKER}",
        )  # fmt: skip
        process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            moments = []
            for number in range(1, LOG_LINES + 1):
                line = await process.stdout.readline()
                if line != b"line %d of web-0\n" % number:
                    raise DemoError(f"line {number} was {line!r}; {(await process.stderr.read(500)).decode().strip()}")
                moments.append(time.monotonic())
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        seconds = moments[-1] - moments[0]
        if seconds < 0.5 * (LOG_LINES - 1) / servers.LINES_A_SECOND:
            raise DemoError(f"{LOG_LINES} lines in {seconds:.2f} s: they were held back and came together")
        await _until(lambda: self._kubelet.followers == 0, "the kubelet still writes after its reader has gone")
        return Result(f"{LOG_LINES} lines, as written", f"{(LOG_LINES - 1) / seconds:.0f} lines/s")

    # Many, and much

    async def _many(self) -> Result:
        """All are open before any is used a second time; the server counts them."""
        started = time.monotonic()
        streams = await asyncio.gather(*(self._open_echo(number) for number in range(STREAMS)))
        seconds = time.monotonic() - started
        try:
            if self._echo_connections() != STREAMS:
                raise DemoError(f"the echo has {self._echo_connections()} connections, not {STREAMS}")
            await asyncio.gather(*(_echo(stream, b"again %d\n" % n) for n, stream in enumerate(streams)))
        finally:
            for _, writer in streams:
                writer.close()
        await _until(lambda: self._echo_connections() == 0, "connections were left open at the echo")
        return Result(f"{STREAMS} open together", f"{STREAMS / seconds:.0f} streams/s")

    async def _open_echo(self, number: int) -> _Stream:
        stream = await asyncio.open_connection("127.0.0.1", self._echo_at)
        await _echo(stream, b"stream %d\n" % number)
        return stream

    async def _up(self) -> Result:
        return await self._move("up", clients.upload)

    async def _down(self) -> Result:
        return await self._move("down", clients.download)

    async def _move(self, title: str, transfer: Callable[[int, int, Bar], Awaitable[str]]) -> Result:
        bar = Bar(f"bulk {title}, {size(self._bulk)}", self._bulk)
        started = time.monotonic()
        try:
            checksum = await transfer(self._vault_at, self._bulk, bar)
        finally:
            bar.clear()
        return Result(f"{size(self._bulk)}, crc32 {checksum}", rate(self._bulk, time.monotonic() - started))

    # Ends and errors

    async def _half_close(self) -> Result:
        """The vault answers only after EOF, so the other direction must outlive it. By CONNECT on the Unix socket."""
        started = time.monotonic()
        reader, writer = await clients.connect_request(self._socket, f"127.0.0.1:{self._vault}", WORKER)
        try:
            writer.write(b"PUT\n")
            writer.write(bytes(servers.BLOCK))
            await writer.drain()
            writer.write_eof()
            answer = (await reader.read()).decode().strip()
        finally:
            writer.close()
        expected = f"{len(servers.BLOCK)} bytes, crc32 {zlib.crc32(servers.BLOCK):08x}"
        if answer != expected:
            raise DemoError(f"the answer after EOF was {answer!r}, not {expected!r}")
        return Result(
            f"{size(len(servers.BLOCK))}, EOF, {size(len(answer))} back", _milliseconds(time.monotonic() - started)
        )

    async def _denied(self) -> Result:
        """The client gets 403 and a phrase, the worker's log says why."""
        started = time.monotonic()
        header = ("--proxy-header", f"Konnektor-Worker: {WORKER}")
        head = self._folder / "denied.txt"
        try:
            await clients.curl(self._proxy, f"http://{METADATA}/", *header, "--dump-header", str(head))
        except DemoError:
            pass  # as it should
        else:
            raise DemoError(f"{METADATA} was reached")
        seconds = time.monotonic() - started
        status = head.read_text().partition("\n")[0].strip()
        if status != "HTTP/1.1 403 Destination Denied by Policy":
            raise DemoError(f"the answer was {status!r}")
        line = await self._worker.logged(METADATA)
        self._report.note(f"  client: {status}")
        self._report.note(f"  worker: {line.partition(' ')[2]}")
        return Result(f"{METADATA}: 403", _milliseconds(seconds))

    async def _restart(self) -> Result:
        """The old worker finishes what is open while the new one already takes what comes."""
        stream = await asyncio.open_connection("127.0.0.1", self._echo_at)
        try:
            await _echo(stream, b"before\n")
            old, started = self._worker, time.monotonic()
            old.terminate()
            await old.logged("draining")
            self._worker = await self._start_worker("second worker")
            result = await self._curl_tcp()
            seconds = time.monotonic() - started
            await _echo(stream, b"the old one still serves this\n")
        finally:
            stream[1].close()
        status = await old.wait()
        if status != 0:
            raise DemoError(f"the first worker ended with status {status}, not 0")
        return Result(f"open stream kept, {result.amount}", _milliseconds(seconds))


_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _echo(stream: _Stream, text: bytes) -> None:
    reader, writer = stream
    writer.write(text)
    heard = await reader.readline()
    if heard != text:
        raise DemoError(f"said {text!r}, heard {heard!r}")


async def _until(condition: Callable[[], bool], otherwise: str) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise DemoError(otherwise)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"
