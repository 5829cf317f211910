"""Memory of an idle stream, on each side."""

from __future__ import annotations

import time

from bench.columns.column import Column, Figure, Figures
from bench.columns.idle import Idle
from bench.peers.peer import SIDES, Peer

__all__ = ["COLUMNS"]

FEW, MANY = 100, 1000
SETTLE = 1.0


class Memory(Column):
    name = family = "memory"
    about = (
        f"growth of resident memory from stream {FEW:,} to {MANY:,}, each after one exchange, settled for {SETTLE:g} s"
    )
    figures = tuple(Figure(side, "KB/stream", "less") for side in SIDES)
    most_repeats = 3

    def cost(self, seconds: float) -> float:
        return 2 * SETTLE + 2

    def unfit(self, peer: type[Peer]) -> str | None:
        return "no tunnel" if peer.name == "direct" else None

    def measure(self, peer: Peer, seconds: float) -> Figures:
        with peer.another(streams=MANY) as fresh, Idle(fresh.ports["http"]) as idle:
            sizes = []
            for count in (FEW, MANY):
                idle.grow(count)
                time.sleep(SETTLE)
                sizes.append([fresh.resident(side) for side in SIDES])
        return {side: (many - few) / (MANY - FEW) for side, few, many in zip(SIDES, *sizes, strict=True)}


COLUMNS = [Memory()]
