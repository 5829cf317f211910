"""What uses the tunnel in the demonstration: curl, a relay for curl, a CONNECT of our own, and bulk transfer."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeVar

from konnektor.demo.processes import DemoError
from konnektor.demo.report import Bar
from konnektor.demo.servers import BLOCK

__all__ = ["connect_request", "curl", "curl_arguments", "download", "unix_relay", "upload"]

T = TypeVar("T")

STALL: Final = 15.0
"""Seconds without a byte after which a transfer has failed."""


def curl_arguments(proxy: str, url: str, *more: str) -> list[str]:
    """curl, told to use CONNECT at ``HOST:PORT`` and nothing of the user's own settings or environment."""
    base = ["curl", "-q", "--silent", "--show-error", "--noproxy", "", "--proxy", f"http://{proxy}", "--proxytunnel"]
    return [*base, "--max-time", "20", *more, url]


async def curl(proxy: str, url: str, *more: str) -> tuple[bytes, float]:
    """What curl fetched, and the seconds it took.

    Raises:
        DemoError: curl failed; with its own words.
    """
    started = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *curl_arguments(proxy, url, "--fail", *more),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise DemoError(f"curl {url}: {err.decode(errors='replace').strip()}")
    return out, time.monotonic() - started


@asynccontextmanager
async def unix_relay(path: str) -> AsyncIterator[str]:
    """A TCP address that leads to a Unix socket.

    curl cannot speak to a proxy on a Unix socket: ``--proxy`` takes TCP addresses only, and ``--unix-socket``
    turns the proxy off. So curl speaks to this, which passes every byte on.
    """
    tasks: set[asyncio.Task[None]] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
            writer.write_eof()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(path)
        try:
            await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))
        finally:
            inner_writer.close()
            writer.close()

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accepted, "127.0.0.1", 0)
    try:
        host, port = server.sockets[0].getsockname()[:2]
        yield f"{host}:{port}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def connect_request(path: str, target: str, worker: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A tunnel by CONNECT at a Unix socket.

    Raises:
        DemoError: the answer was not 200.
    """
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nKonnektor-Worker: {worker}\r\n\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if not head.startswith("HTTP/1.1 200 "):
            raise DemoError(f"CONNECT {target} was answered {head.splitlines()[0]!r}")
    except BaseException:
        writer.close()
        raise
    return reader, writer


async def upload(port: int, total: int, bar: Bar) -> str:
    """Sends ``total`` bytes to a vault; returns its answer after a check of the checksum."""

    def work(sock: socket.socket) -> str:
        sock.sendall(b"PUT\n")
        left, checksum = total, 0
        while left:
            block = BLOCK[:left]
            sock.sendall(block)
            checksum = zlib.crc32(block, checksum)
            left -= len(block)
            bar.advance(len(block))
        sock.shutdown(socket.SHUT_WR)
        answer = _read_rest(sock).decode().strip()
        if answer != f"{total} bytes, crc32 {checksum:08x}":
            raise DemoError(f"sent {total} bytes with crc32 {checksum:08x}; what arrived: {answer!r}")
        return f"{checksum:08x}"

    return await _in_thread(port, work)


async def download(port: int, total: int, bar: Bar) -> str:
    """Gets ``total`` bytes from a vault and checks their checksum, which it returns."""

    def work(sock: socket.socket) -> str:
        sock.sendall(b"GET %d\n" % total)
        buffer = memoryview(bytearray(len(BLOCK)))
        left, checksum = total, 0
        while left:
            count = sock.recv_into(buffer[:left])
            if not count:
                raise DemoError(f"the stream ended {left} bytes early")
            checksum = zlib.crc32(buffer[:count], checksum)
            left -= count
            bar.advance(count)
        answer = _read_rest(sock).decode()
        if answer != f"{checksum:08x}":
            raise DemoError(f"crc32 {checksum:08x} of what arrived, {answer!r} of what was sent")
        return answer

    return await _in_thread(port, work)


def _read_rest(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(4096):
        parts.append(part)
    return b"".join(parts)


async def _in_thread(port: int, work: Callable[[socket.socket], T]) -> T:
    """Runs blocking work on a connection beside the loop: the work must not be the bottleneck of what it measures."""
    loop = asyncio.get_running_loop()
    sock = socket.socket()
    try:
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", port))
        sock.settimeout(STALL)
        working: Awaitable[T] = loop.run_in_executor(None, work, sock)
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(OSError, DemoError):
                await working
            raise
    except TimeoutError:
        raise DemoError(f"no byte moved for {STALL:.0f} s") from None
    finally:
        sock.close()
