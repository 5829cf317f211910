"""One stream over a long path."""

from __future__ import annotations

from bench.columns.column import Column, Figure, Figures
from bench.columns.tools import transfer, whole
from bench.peers.peer import Link, Peer

__all__ = ["COLUMNS", "LINK"]

LINK = Link(round_trip=0.05, rate=125e6)
WARM = 3
"""Seconds that do not count: windows open over many round trips."""


class LongPath(Column):
    name = family = "path50"
    about = (
        f"one stream while a relay in user space holds each byte between the ends back for half of {LINK.round_trip * 1e3:g} ms "
        f"and passes {(LINK.rate or 0) / 1e6:g} MB/s; counted after {WARM} s"
    )
    figures = (Figure("up", "MB/s", "more"), Figure("down", "MB/s", "more"))
    most_repeats = 2

    def cost(self, seconds: float) -> float:
        return 2 * (WARM + whole(seconds) + 1) + 1.5

    def unfit(self, peer: type[Peer]) -> str | None:
        return "no tunnel" if peer.name == "direct" else None

    def measure(self, peer: Peer, seconds: float) -> Figures:
        with peer.another(link=LINK) as far:
            return {
                name: transfer(far, seconds, "-O", str(WARM), *args).rate
                for name, args in (("up", ()), ("down", ("-R",)))
            }


COLUMNS = [LongPath()]
