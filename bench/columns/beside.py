"""Small requests beside bulk: what each leaves the other."""

from __future__ import annotations

import time

from bench.columns.column import Column, Figure, Figures
from bench.columns.tools import transfer, transfer_begun, whole, wrk
from bench.peers.peer import Peer

__all__ = ["BESIDE", "COLUMNS"]

LEAD = 1.0
"""Seconds of bulk before the first request, and about as many after the last."""


class Beside(Column):
    name = family = "beside"
    about = "one client's small requests beside four bulk uploads, and what the uploads keep of their rate alone"
    figures = (
        Figure("p50", "ms", "less"), Figure("p99", "ms", "less"), Figure("bulk", "MB/s", "more"), Figure("kept", "%", "more"),
    )  # fmt: skip

    def cost(self, seconds: float) -> float:
        return 2 * whole(seconds) + 2 * LEAD + 1.5

    def measure(self, peer: Peer, seconds: float) -> Figures:
        alone = transfer(peer, seconds, "-P", "4")
        figures = self.together(peer, seconds)
        return {**figures, "kept": 100 * figures["bulk"] / alone.rate}

    def together(self, peer: Peer, seconds: float) -> Figures:
        """All figures but what needs bulk alone beforehand."""
        with transfer_begun(peer, whole(seconds) + 2 * LEAD, "-P", "4") as ended:
            time.sleep(LEAD)
            load = wrk(peer.ports["http"], seconds, 1)
            bulk = ended()
        return {"p50": load.latency["50"], "p99": load.latency["99"], "bulk": bulk.rate}


BESIDE = Beside()
COLUMNS = [BESIDE]
