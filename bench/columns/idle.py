"""Streams that are open and idle, each after one exchange."""

from __future__ import annotations

import socket
import time
from types import TracebackType
from typing import Self

from bench.columns.tools import Failed

__all__ = ["REQUEST", "Idle"]

REQUEST = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n"
BATCH = 64


class Idle:
    """Connections to a web server through a tunnel; a context manager."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socks: list[socket.socket] = []

    def grow(self, count: int, patience: float = 60) -> None:
        """So many are open, and each has answered a request.

        Raises:
            Failed: one has not, or it took too many seconds.
            OSError: one was refused or reset.
        """
        end = time.monotonic() + patience
        while (missing := count - len(self._socks)) > 0:
            if time.monotonic() > end:
                raise Failed(f"{count:,} streams were not open after {patience:g} s but {len(self._socks):,}")
            batch = [self._one() for _ in range(min(BATCH, missing))]
            for sock in batch:
                sock.sendall(REQUEST)
            for sock in batch:
                if not sock.recv(4096).startswith(b"HTTP/1.1 200"):
                    raise Failed(f"a connection of {count} was closed")

    def _one(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self._port), 20)
        self._socks.append(sock)
        return sock

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sock in self._socks:
            sock.close()
