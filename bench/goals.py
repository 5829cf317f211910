"""What konnektor is to reach, each goal against what else was measured in the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.columns import COLUMNS
from bench.peers.peer import SIDES
from bench.results import Results

__all__ = ["GOALS", "OURS", "Goal", "Verdict", "best", "verdict"]

OURS = "konnektor"


@dataclass(frozen=True)
class Goal:
    """One figure's.

    Attributes:
        text: what is to be reached.
        bound: the figure that is needed, or None if the run does not say.
    """

    column: str
    figure: str
    text: str
    bound: Callable[[Results], float | None]


@dataclass(frozen=True)
class Verdict:
    goal: Goal
    value: float
    bound: float
    reached: bool


def best(results: Results, column: str, figure: str) -> tuple[str, float] | None:
    """The peer that leads but for konnektor and what is no peer, and its median."""
    better = {each.name: each.better for each in COLUMNS[column].figures}[figure]
    found = [
        (peer.name, value)
        for peer in results.peers
        if not (peer.ours or peer.reference) and (value := results.median(column, peer.name, figure)) is not None
    ]
    if not found:
        return None
    return (max if better == "more" else min)(found, key=lambda pair: pair[1])


def _of(peer: str, column: str, figure: str, factor: float = 1) -> Callable[[Results], float | None]:
    def bound(results: Results) -> float | None:
        value = results.median(column, peer, figure)
        return None if value is None else factor * value

    return bound


def _best(column: str, figure: str, factor: float) -> Callable[[Results], float | None]:
    def bound(results: Results) -> float | None:
        found = best(results, column, figure)
        return None if found is None else factor * found[1]

    return bound


_BULK = ("up", "down", "both", "up8", "down8", "both8")
_RATES = ("requests1", "requests32", "requests256", "connections")

GOALS = [
    *(Goal(column, "rate", "OpenSSH's or more", _of("openssh", column, "rate")) for column in _BULK),
    *(Goal(column, "CPU", "OpenSSH's or less", _of("openssh", column, "CPU")) for column in _BULK),
    *(Goal(column, "rate", "1.3 x the best peer's or more", _best(column, "rate", 1.3)) for column in _RATES),
    *(Goal("beside", figure, "half the best peer's or less", _best("beside", figure, 0.5)) for figure in ("p50", "p99")),
    Goal("beside", "kept", "75 % or more", lambda _: 75),
    *(Goal("path50", figure, "90 % of plain TLS (haproxy) or more", _of("haproxy", "path50", figure, 0.9)) for figure in ("up", "down")),
    *(Goal("memory", side, "4 KB or less", lambda _: 4) for side in SIDES),
    Goal("streams", "last / first", "1.2 or less", lambda _: 1.2),
]  # fmt: skip


def verdict(results: Results, column: str, figure: str) -> Verdict | None:
    """Whether konnektor reaches the goal of a figure; None if there is none, or the run does not say."""
    value = results.median(column, OURS, figure)
    goal = next((goal for goal in GOALS if (goal.column, goal.figure) == (column, figure)), None)
    bound = None if goal is None else goal.bound(results)
    if goal is None or value is None or bound is None:
        return None
    better = {each.name: each.better for each in COLUMNS[column].figures}[figure]
    return Verdict(goal, value, bound, value >= bound if better == "more" else value <= bound)
