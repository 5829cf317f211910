"""How long a new stream takes to bring its first byte."""

from __future__ import annotations

import socket
import time

from bench.columns.column import Column, Figure, Figures
from bench.columns.idle import REQUEST
from bench.columns.tools import Failed
from bench.peers.peer import Peer

__all__ = ["COLUMNS"]


class FirstByte(Column):
    name = family = "first-byte"
    about = "one connection after the other: from connecting to the first byte of the answer"
    figures = (Figure("p50", "ms", "less"), Figure("p99", "ms", "less"))

    def cost(self, seconds: float) -> float:
        return seconds

    def measure(self, peer: Peer, seconds: float) -> Figures:
        taken = []
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            with socket.create_connection(("127.0.0.1", peer.ports["http"]), 10) as sock:
                sock.sendall(REQUEST)
                if not sock.recv(4096):  # more than comes: what is left unread would become a reset
                    raise Failed("a connection was closed before the first byte")
                taken.append((time.perf_counter() - start) * 1e3)
        taken.sort()
        return {"p50": taken[len(taken) // 2], "p99": taken[len(taken) * 99 // 100]}


COLUMNS = [FirstByte()]
