"""What stands behind the worker in the demonstration: an HTTP server, a kubelet's double, an echo, and a vault.

Each is the plain kind of server that knows nothing of tunnels, on a free port of the loopback address. They run in
threads of the demonstration's process: the system calls and the checksum, which are nearly all they do, run beside
each other there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import socketserver
import ssl
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

__all__ = ["BLOCK", "LINES_A_SECOND", "PAGE", "Echo", "Kubelet", "echo", "kubelet", "vault", "web"]

PAGE: Final = b"".join(b"%05d konnektor demo\n" % number for number in range(10_000))
BLOCK: Final = memoryview(os.urandom(1 << 20))
"""What bulk data is made of, again and again."""
LINES_A_SECOND: Final = 50


class _Http(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass  # the demonstration has its own report


class _Page(_Http):
    """Answers any GET with the page."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)


class _Logs(_Http):
    """Streams a container's log in chunks until the reader goes away, as a kubelet does for ``kubectl logs -f``."""

    server: Kubelet

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.server.followers += 1
        try:
            number = 0
            while True:
                number += 1
                line = b"line %d of web-0\n" % number
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                self.wfile.flush()
                time.sleep(1 / LINES_A_SECOND)
        except OSError:
            self.close_connection = True  # the reader is gone
        finally:
            self.server.followers -= 1


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that goes away is no finding


class Kubelet(_HttpServer):
    """An HTTPS server with a certificate of its own.

    Attributes:
        followers: logs being followed now.
    """

    def __init__(self, cert: Path, key: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Logs)
        self.followers = 0
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(cert, key)

    def finish_request(self, request: object, client_address: object) -> None:
        # Here, in the connection's own thread: a handshake must not keep others from being accepted.
        assert isinstance(request, socket.socket)
        with self._context.wrap_socket(request, server_side=True) as secured:
            super().finish_request(secured, client_address)


class _Vault(socketserver.StreamRequestHandler):
    """``PUT`` takes bytes until EOF and answers with their checksum; ``GET N`` gives N bytes and their checksum."""

    rbufsize = 0

    def handle(self) -> None:
        verb, _, argument = self.rfile.readline(64).decode().strip().partition(" ")
        sock = self.request
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if verb == "PUT":
            buffer = memoryview(bytearray(len(BLOCK)))
            total = checksum = 0
            while count := sock.recv_into(buffer):
                total += count
                checksum = zlib.crc32(buffer[:count], checksum)
            sock.sendall(b"%d bytes, crc32 %08x\n" % (total, checksum))
        else:
            left, checksum = int(argument), 0
            while left:
                block = BLOCK[:left]
                sock.sendall(block)
                checksum = zlib.crc32(block, checksum)
                left -= len(block)
            sock.sendall(b"%08x" % checksum)


class _VaultServer(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@contextmanager
def _serving(server: socketserver.TCPServer) -> Iterator[None]:
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.05), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        with contextlib.suppress(OSError):
            server.socket.close()  # not server_close(), which waits for connections


@contextmanager
def web() -> Iterator[int]:
    """The HTTP server's port."""
    server = _HttpServer(("127.0.0.1", 0), _Page)
    with _serving(server):
        yield server.server_address[1]


@contextmanager
def kubelet(cert: Path, key: Path) -> Iterator[Kubelet]:
    """The kubelet's double."""
    server = Kubelet(cert, key)
    with _serving(server):
        yield server


@contextmanager
def vault() -> Iterator[int]:
    """The bulk server's port."""
    server = _VaultServer(("127.0.0.1", 0), _Vault)
    with _serving(server):
        yield int(server.server_address[1])


class Echo(asyncio.Protocol):
    """Says back what it hears."""

    def __init__(self, count: Callable[[int], None]) -> None:
        self._count = count

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._count(1)

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)  # type: ignore[attr-defined]

    def connection_lost(self, exc: Exception | None) -> None:
        self._count(-1)


@asynccontextmanager
async def echo() -> AsyncIterator[tuple[int, Callable[[], int]]]:
    """The echo's port, and a function that says how many connections it has now."""
    connections = 0

    def count(change: int) -> None:
        nonlocal connections
        connections += change

    server = await asyncio.get_running_loop().create_server(lambda: Echo(count), "127.0.0.1", 0, backlog=1024)
    try:
        yield server.sockets[0].getsockname()[1], lambda: connections
    finally:
        server.close()
