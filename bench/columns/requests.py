"""Small requests and new connections, by wrk against nginx."""

from __future__ import annotations

from bench.columns.column import IDLE, Column, Figure, Figures, idle_since
from bench.columns.tools import whole, wrk
from bench.peers.peer import Peer
from bench.processes import machine_time

__all__ = ["COLUMNS"]


class Requests(Column):
    family = "requests"
    figures = (
        Figure("rate", "/s", "more"), Figure("p50", "ms", "less"), Figure("p99", "ms", "less"), Figure("p99.9", "ms", "less"),
        Figure("CPU", "s/100k", "less"), IDLE,
    )  # fmt: skip

    def __init__(self, name: str, about: str, connections: int, *args: str) -> None:
        self.name, self.about, self.connections, self.args = name, about, connections, args

    def cost(self, seconds: float) -> float:
        return whole(seconds) + 0.2

    def measure(self, peer: Peer, seconds: float) -> Figures:
        before, machine = peer.cpu(), machine_time()
        load = wrk(peer.ports["http"], seconds, self.connections, *self.args)
        idle = idle_since(machine)
        return {"rate": load.rate, **load.figures(), "CPU": (peer.cpu() - before) / (load.requests / 1e5), "idle": idle}


class Connections(Requests):
    family = "connections"


COLUMNS = [
    Requests("requests1", "requests over one connection that is kept alive", 1),
    Requests("requests32", "requests over 32 connections that are kept alive", 32),
    Requests("requests256", "requests over 256 connections that are kept alive", 256),
    Connections("connections", "a new connection for each request, 16 at a time", 16, "-H", "Connection: close"),
]
