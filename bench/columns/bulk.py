"""Throughput, by iperf3."""

from __future__ import annotations

import time

from bench.columns.column import IDLE, Column, Figure, Figures, idle_since
from bench.columns.tools import transfer, whole
from bench.peers.peer import Peer
from bench.processes import machine_time

__all__ = ["COLUMNS"]


class Bulk(Column):
    family = "bulk"
    figures = (Figure("rate", "MB/s", "more"), Figure("CPU", "s/GB", "less"), IDLE)

    def __init__(self, name: str, about: str, *args: str) -> None:
        self.name, self.about, self.args = name, about, args

    def unfit(self, peer: type[Peer]) -> str | None:
        stops = "--bidir" in self.args and not peer.both_ways
        return "full in both directions at once it stops for good" if stops else None

    def cost(self, seconds: float) -> float:
        return whole(seconds) + 0.7

    def measure(self, peer: Peer, seconds: float) -> Figures:
        before, machine = peer.cpu(), machine_time()
        received = transfer(peer, seconds, *self.args)
        idle = idle_since(machine)
        time.sleep(0.2)
        return {"rate": received.rate, "CPU": (peer.cpu() - before) / (received.bytes / 1e9), "idle": idle}


COLUMNS = [
    Bulk("up", "one stream from the control plane's side to the worker's"),
    Bulk("down", "one stream from the worker's side", "-R"),
    Bulk("both", "one stream each way at once, rates added", "--bidir"),
    Bulk("up8", "eight streams to the worker's side", "-P", "8"),
    Bulk("down8", "eight streams from the worker's side", "-P", "8", "-R"),
    Bulk("both8", "eight streams each way at once, rates added", "-P", "8", "--bidir"),
]
