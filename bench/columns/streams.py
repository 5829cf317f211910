"""What a request costs while many streams are open."""

from __future__ import annotations

import time

from bench.columns.column import Column, Figure, Figures
from bench.columns.idle import Idle
from bench.columns.tools import Failed, whole, wrk
from bench.peers.peer import Peer

__all__ = ["COLUMNS", "COUNTS"]

COUNTS = (1, 100, 1_000, 10_000)
BUSY = 8
"""Connections that requests are made over, beside those that are open and idle."""
PATIENCE = 20.0
"""Seconds that opening so many may take; where each stream costs the more the more there are, it is minutes."""


class Streams(Column):
    name = family = "streams"
    about = f"CPU time of requests over {BUSY} connections while 1 to 10,000 others are open and idle; the last by the first; how long opening took"
    figures = (
        *(Figure(f"{count:,} open", "s/100k", "less") for count in COUNTS), Figure("last / first", "", "less"),
        Figure("10,000 opened in", "s", "less"),
    )  # fmt: skip
    most_repeats = 2

    def cost(self, seconds: float) -> float:
        return len(COUNTS) * (whole(seconds) + 0.5) + 6

    def unfit(self, peer: type[Peer]) -> str | None:
        if peer.name == "direct":
            return "no tunnel"
        return None if peer.most_streams >= COUNTS[-1] else f"takes no more than {peer.most_streams:,} here"

    def measure(self, peer: Peer, seconds: float) -> Figures:
        figures: dict[str, float] = {}
        opening = 0.0
        with peer.another(streams=COUNTS[-1] + BUSY) as fresh, Idle(fresh.ports["http"]) as idle:
            for count in COUNTS:
                start = time.monotonic()
                try:
                    idle.grow(count, PATIENCE)
                except (OSError, Failed) as error:
                    raise Failed(f"{error} (on the way to {count:,})", figures) from None
                opening += time.monotonic() - start
                time.sleep(0.3)
                before = fresh.cpu()
                load = wrk(fresh.ports["http"], seconds, BUSY)
                figures[f"{count:,} open"] = (fresh.cpu() - before) / (load.requests / 1e5)
        return {
            **figures,
            "last / first": figures[f"{COUNTS[-1]:,} open"] / figures[f"{COUNTS[0]:,} open"],
            "10,000 opened in": opening,
        }


COLUMNS = [Streams()]
