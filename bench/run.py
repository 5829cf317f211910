"""Measures: every column of every peer in turn, and that as often as is asked."""

from __future__ import annotations

import re
import ssl
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from bench.columns import Column, Figures
from bench.columns.tools import Failed
from bench.pace import pace
from bench.peers import Peer
from bench.peers.go import GoPeer
from bench.peers.konnektor import Konnektor
from bench.peers.peer import Unusable, said
from bench.processes import raise_descriptor_limit
from bench.results import Entrant, Results
from bench.targets import targets

__all__ = ["Step", "cost", "measure", "prepare"]


@dataclass(frozen=True)
class Step:
    """One column of one peer.

    Attributes:
        repeat: from 1.
        figures: all of them, or those from before it failed.
        failure: why, if it did.
        cost: about how many seconds it was to take.
    """

    repeat: int
    column: Column
    peer: str
    figures: Figures
    failure: str | None
    cost: float


def prepare(chosen: Sequence[type[Peer]], results: Results) -> list[type[Peer]]:
    """Those that can be measured here; the others are noted with the reason."""
    usable = []
    for peer in chosen:
        try:
            peer.prepare()
        except (Unusable, subprocess.TimeoutExpired) as error:
            results.left_out[peer.name] = str(error)
        else:
            usable.append(peer)
            ours = issubclass(peer, Konnektor)
            results.peers.append(Entrant(peer.name, peer.version(), peer.tuned, peer.reference, ours))
    return usable


def cost(chosen: Sequence[type[Peer]], columns: Sequence[Column], repeats: int, seconds: float) -> float:
    """About how many seconds ``measure`` takes."""
    return sum(
        min(repeats, column.most_repeats) * column.cost(seconds)
        for column in columns
        for peer in chosen
        if column.unfit(peer) is None
    )


class _Entry:
    """A peer for as long as a repeat lasts, started again when it has broken."""

    def __init__(self, kind: type[Peer], ports: Mapping[str, int], directory: Path) -> None:
        self.kind, self._ports, self._directory = kind, ports, directory
        self._peer: Peer | None = None
        self._starts = 0

    def measure(self, column: Column, seconds: float) -> Figures:
        try:
            if self._peer is None or self._peer.ended():
                self.stop()
                self._starts += 1
                own = self._directory / f"{self.kind.name}-{self._starts}"
                own.mkdir()
                self._peer = self.kind(self._ports, own)
            return column.measure(self._peer, seconds)
        except Exception:
            self.stop()  # whatever state it is in, the next column begins with a fresh one
            raise

    def stop(self) -> None:
        if self._peer is not None:
            self._peer.stop()
            self._peer = None


def measure(
    chosen: Sequence[type[Peer]],
    columns: Sequence[Column],
    results: Results,
    directory: Path,
    report: Callable[[Step], object],
) -> None:
    """Fills in the results.

    Args:
        chosen: peers that were prepared.
        columns: in order.
        results: says how often and for how long.
        directory: for files and logs; exists.
        report: called after each step.
    """
    results.tools = {
        "iperf3": said(["iperf3", "--version"], r"iperf (\S+)"), "wrk": said(["wrk", "-v"], r"wrk (?:debian/)?(\S+)"),
        "nginx": said(["nginx", "-v"], r"nginx/(\S+)"), "OpenSSL": ssl.OPENSSL_VERSION.split()[1],
    }  # fmt: skip
    if any(issubclass(peer, GoPeer) for peer in chosen):
        results.tools["Go"] = said(["go", "version"], r"go(\d\S*)")
    with ExitStack() as stack:
        ports = stack.enter_context(targets(directory, raise_descriptor_limit()))
        entries = [_Entry(kind, ports, directory) for kind in chosen]
        for entry in entries:
            stack.callback(entry.stop)
        for repeat in range(1, results.repeats + 1):
            for column in columns:
                if repeat > column.most_repeats:
                    continue
                for entry in entries:
                    name = entry.kind.name
                    if (why := column.unfit(entry.kind)) is not None:
                        results.fail(column.name, name, why)
                        continue
                    results.paces.append(pace())
                    figures: Figures = {}
                    failure = None
                    try:
                        figures = entry.measure(column, results.seconds)
                    except Exception as error:  # noqa: BLE001 a peer that breaks is a result
                        if isinstance(error, Failed):
                            figures = error.figures
                        failure = re.sub(r"\s+", " ", f"{error}")[:200] or type(error).__name__
                        results.fail(column.name, name, failure)
                    figures = {figure: value for figure, value in figures.items() if isfinite(value)}
                    results.add(column.name, name, figures)
                    report(Step(repeat, column, name, figures, failure, column.cost(results.seconds)))
            # Anew for each repeat, and the other way round in every second one: of one build, one start may be several percent
            # faster than the next for as long as it runs, and to be measured first may be worth something.
            for entry in entries:
                entry.stop()
            entries.reverse()
