"""The figures as SVG files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from bench.columns.streams import COUNTS
from bench.peers.direct import Direct
from bench.peers.peer import SIDES
from bench.results import Results

__all__ = ["write"]

OURS, PEER, REFERENCE = "#b5360b", "#5b7c99", "#b9c4cd"
STYLE = {
    "svg.hashsalt": "konnektor",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
"""The same figures make the same file."""


def bars(axes: Axes, results: Results, column: str, figure: str, title: str) -> None:
    """A bar for each peer, with the range of its samples."""
    # Without a tunnel everything is several times faster: the bars of the others would say nothing.
    peers = [peer for peer in results.peers if results.of(column, peer.name, figure) and peer.name != Direct.name]
    samples = [results.of(column, peer.name, figure) for peer in peers]
    medians = [results.median(column, peer.name, figure) or 0 for peer in peers]
    spread = [
        [middle - min(values) for middle, values in zip(medians, samples, strict=True)],
        [max(values) - middle for middle, values in zip(medians, samples, strict=True)],
    ]
    colors = [OURS if peer.ours else REFERENCE if peer.reference else PEER for peer in peers]
    axes.barh([peer.name for peer in peers], medians, xerr=spread, color=colors, error_kw={"elinewidth": 0.8})
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9)


def row_of_bars(*shown: tuple[str, str, str]) -> Callable[[Results], Figure | None]:
    """Side by side, as many as were measured."""

    def draw(results: Results) -> Figure | None:
        measured = [each for each in shown if results.samples.get(each[0])]
        if not measured:
            return None
        figure = Figure(figsize=(3.2 * len(measured) + 1, 0.8 + 0.28 * len(results.peers)), layout="constrained")
        for axes, each in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured, strict=True):
            bars(axes, results, *each)
        return figure

    return draw


def cost_of_streams(results: Results) -> Figure | None:
    """A line for each peer."""
    if not results.samples.get("streams"):
        return None
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for peer in results.peers:
        found = [(count, results.median("streams", peer.name, f"{count:,} open")) for count in COUNTS]
        known = [pair for pair in found if pair[1] is not None]  # fewer where it gave up on the way
        if known:
            style = {"color": OURS, "linewidth": 2.2, "zorder": 3} if peer.ours else {"linewidth": 1}
            axes.plot(*zip(*known, strict=True), marker="o", markersize=3, label=peer.name, **style)
    axes.set(xscale="log", yscale="log", xlabel="streams open beside", ylabel="CPU s per 100,000 requests, both ends")
    axes.set_xticks(COUNTS, [f"{count:,}" for count in COUNTS])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=7, ncols=2)
    return figure


PLOTS: dict[str, Callable[[Results], Figure | None]] = {
    "bulk": row_of_bars(("up", "rate", "up, MB/s"), ("down", "rate", "down, MB/s"), ("up8", "rate", "up, 8 streams, MB/s"),
                        ("down8", "rate", "down, 8 streams, MB/s")),
    "cpu": row_of_bars(("up", "CPU", "up, CPU s/GB"), ("down", "CPU", "down, CPU s/GB"),
                       ("requests32", "CPU", "CPU s/100,000 requests")),
    "requests": row_of_bars(("requests1", "rate", "requests/s, 1 connection"), ("requests32", "rate", "32 connections"),
                            ("requests256", "rate", "256 connections"), ("connections", "rate", "new connections/s")),
    "beside": row_of_bars(("beside", "p50", "requests beside bulk: p50, ms"), ("beside", "p99", "p99, ms"),
                          ("beside", "bulk", "the bulk, MB/s")),
    "memory": row_of_bars(*(("memory", side, f"KB per idle stream: {side}") for side in SIDES)),
    "path50": row_of_bars(("path50", "up", "one stream over 50 ms: up, MB/s"), ("path50", "down", "down, MB/s")),
    "streams": cost_of_streams,
}  # fmt: skip


def write(results: Results, directory: Path) -> list[Path]:
    """Every plot that there are figures for; the files that were written."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(STYLE):
        for name, draw in PLOTS.items():
            figure = draw(results)
            if figure is not None:
                file = directory / f"{name}.svg"
                figure.savefig(file, metadata={"Date": None})
                written.append(file)
    return written
