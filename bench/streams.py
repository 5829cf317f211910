"""Memory per idle stream, and ten thousand streams at once: ``python -m bench.streams``."""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import resource
import subprocess
import tempfile
import time
from pathlib import Path

import uvloop

from bench.peers import Konnektor, free_port, wait_for_port

REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n"
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class Target(asyncio.Protocol):
    """Answers whatever comes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(REPLY)  # type: ignore[attr-defined]


def serve(port: int) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Target, "127.0.0.1", port, backlog=4096)
        await server.serve_forever()

    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    uvloop.run(main())


class Streams(Konnektor):
    """Endpoints that allow as many streams as are wanted."""

    count = 1024

    def run(self, *args: str, **kwargs: object) -> subprocess.Popen[bytes]:
        if "control-plane" in args or "worker" in args:
            args = (*args, "--max-streams", str(max(1024, self.count)))
        return super().run(*args, **kwargs)

    def resident(self) -> list[int]:
        """KB of both endpoints."""
        status = (Path(f"/proc/{process.pid}/status").read_text() for process in self.processes)
        return [int(text.partition("VmRSS:")[2].split()[0]) for text in status]


async def measure(peer: Streams, count: int) -> None:
    streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    limit = asyncio.Semaphore(256)
    port = peer.ports["target"]

    async def one() -> None:
        async with limit:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(REQUEST)
            await reader.readexactly(len(REPLY))
            streams.append((reader, writer))

    async def grow(to: int) -> list[int]:
        await asyncio.gather(*(one() for _ in range(to - len(streams))))
        await asyncio.sleep(1)
        return peer.resident()

    few, many = await grow(100), await grow(1000)
    growth = [(b - a) / 900 for a, b in zip(few, many, strict=True)]
    print(f"idle stream: control plane {growth[0]:.2f} KB, worker {growth[1]:.2f} KB (from stream 100 to 1,000)")
    start = time.monotonic()
    resident = await grow(count)
    print(f"{count} streams open, the last {count - 1000} in {time.monotonic() - start - 1:.1f} s; "
          f"resident: control plane {resident[0] / 1024:.0f} MB, worker {resident[1] / 1024:.0f} MB")  # fmt: skip
    start = time.monotonic()
    for _, writer in streams:
        writer.write(REQUEST)
    for reader, _ in streams:
        await reader.readexactly(len(REPLY))
    print(f"one exchange on each of them: {time.monotonic() - start:.2f} s")
    for _, writer in streams:
        writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.streams", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    args = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    target = free_port()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(target,), daemon=True)
    server.start()
    wait_for_port(target)
    Streams.count = args.count
    with tempfile.TemporaryDirectory() as directory:
        peer = Streams({"target": target}, Path(directory))
        try:
            uvloop.run(measure(peer, args.count))
        finally:
            peer.stop()
            server.terminate()
            server.join()


if __name__ == "__main__":
    main()
