"""One end of the bare relay: ``python -m bench.peers.bare_endpoint control-plane|worker CA CERT KEY PORT=HOST:PORT ...``.

Two protocols that write into one another's transport, and pause one another's reading: the least that can relay bytes.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
from collections.abc import Coroutine
from typing import Any

from bench.peers.relay import run_end
from konnektor.acceptor import Acceptor
from konnektor.listening import bind_tcp
from konnektor.scratch import scratch
from konnektor.socket_transport import SocketTransport

HIGH = 256 * 1024


class Half:
    """What both legs have in common."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.other: Half | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class Plain(Half, asyncio.Protocol):
    def data_received(self, data: bytes) -> None:
        self.other.transport.write(data)


class Secure(Half, asyncio.BufferedProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.set_write_buffer_limits(HIGH)

    def get_buffer(self, sizehint: int) -> memoryview:
        return scratch().view

    def buffer_updated(self, nbytes: int) -> None:
        self.other.transport.write(scratch().view[:nbytes])


async def join(secure: Secure, sock: socket.socket) -> None:
    """The plain leg of a connection whose other is there."""
    plain = Plain()
    plain.other, secure.other = secure, plain
    SocketTransport(sock, plain)


class Tasks:
    """Keeps them from being collected."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def serve(tasks: Tasks, context: ssl.SSLContext, port: int, host: str, target: int) -> None:
    """The worker: TLS comes in, and plain TCP goes on."""
    loop = asyncio.get_running_loop()

    async def onward(secure: Secure) -> None:
        sock = socket.socket()
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(sock, (host, target))
        except OSError:
            sock.close()
            secure.transport.abort()
        else:
            await join(secure, sock)
            secure.transport.resume_reading()

    class Accepted(Secure):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.transport.pause_reading()
            tasks.start(onward(self))

    await loop.create_server(Accepted, "127.0.0.1", port, ssl=context, backlog=1024)


async def forward(tasks: Tasks, context: ssl.SSLContext, port: int, host: str, target: int) -> list[Acceptor]:
    """The control plane: plain TCP comes in, and TLS goes on."""
    loop = asyncio.get_running_loop()

    async def onward(sock: socket.socket) -> None:
        try:
            _, secure = await loop.create_connection(Secure, host, target, ssl=context, server_hostname="cp")
        except OSError:
            sock.close()
        else:
            await join(secure, sock)

    def accepted(sock: socket.socket, _address: object) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        tasks.start(onward(sock))

    return [Acceptor(sock, accepted) for sock in await bind_tcp("127.0.0.1", port)]


async def relay(role: str, context: ssl.SSLContext, routes: list[str]) -> None:
    tasks = Tasks()
    kept = []
    for route in routes:
        port, _, address = route.partition("=")
        host, _, target = address.rpartition(":")
        kept.append(await (serve if role == "worker" else forward)(tasks, context, int(port), host, int(target)))
    gc.freeze()
    await asyncio.Event().wait()


if __name__ == "__main__":
    run_end(relay)
