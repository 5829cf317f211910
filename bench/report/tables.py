"""The tables, before they are drawn: cells of text, and which of them are goals that were not reached."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from bench.columns import COLUMNS, Column, Figure
from bench.columns.column import IDLE
from bench.goals import OURS, best, verdict
from bench.results import Results

__all__ = ["Cell", "Table", "about", "goals", "show", "tables"]


@dataclass(frozen=True)
class Cell:
    """Attributes: missed: a goal that is not reached."""

    text: str
    missed: bool = False


@dataclass(frozen=True)
class Table:
    """Attributes: notes: what the cells cannot say."""

    title: str
    heads: list[str]
    rows: list[list[Cell]]
    notes: list[str]


def show(value: float) -> str:
    """Three figures, or all before the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def spread(values: list[float], middle: float) -> str:
    """The median, and between what the samples lay."""
    return show(middle) if len(values) == 1 else f"{show(middle)} ({show(min(values))}-{show(max(values))})"


def families(results: Results) -> dict[str, list[Column]]:
    """Columns that were measured."""
    found: dict[str, list[Column]] = {}
    for column in COLUMNS.values():
        if results.samples.get(column.name):
            found.setdefault(column.family, []).append(column)
    return found


def goals(results: Results) -> Table:
    """konnektor, the best peer and the goal, figure by figure."""
    rows = []
    for column in (column for family in families(results).values() for column in family):
        for figure in column.figures:
            value = results.median(column.name, OURS, figure.name)
            if value is None or figure is IDLE:  # which explains others, and is nothing to win by
                continue
            leader = best(results, column.name, figure.name)
            judged = verdict(results, column.name, figure.name)
            missed = judged is not None and not judged.reached
            aim = "" if judged is None else f"{judged.goal.text}: {show(judged.bound)}"
            rows.append([
                Cell(column.name), Cell(f"{figure.name} {figure.unit}".strip()),
                Cell(spread(results.of(column.name, OURS, figure.name), value), missed),
                Cell("-" if leader is None else f"{show(leader[1])} {leader[0]}"),
                Cell("-" if leader is None or not leader[1] else f"{value / leader[1]:.2f}"),
                Cell(aim), Cell("" if judged is None else "missed" if missed else "reached", missed),
            ])  # fmt: skip
    heads = ["column", "figure", OURS, "best peer", "ratio", "goal", ""]
    notes = [
        "The ratio is konnektor's figure by the best peer's: above 1 leads in a rate, below 1 in a time, a size or a cost."
    ]
    return Table("konnektor and its goals", heads, rows, notes)


def tables(results: Results) -> Iterator[Table]:
    """One for each family: every peer, every figure."""
    for family, columns in families(results).items():
        shown = [(column, figure) for column in columns for figure in column.figures]
        if len(columns) > 1:  # one table for each figure, or it becomes too wide
            for name in dict.fromkeys(figure.name for _, figure in shown):
                chosen = [pair for pair in shown if pair[1].name == name]
                unit = chosen[0][1].unit
                yield _table(results, f"{family}: {name}, {unit}", chosen, [column.name for column, _ in chosen])
        else:
            yield _table(
                results, columns[0].name, shown, [f"{figure.name} {figure.unit}".strip() for _, figure in shown]
            )


def _table(results: Results, title: str, shown: list[tuple[Column, Figure]], heads: list[str]) -> Table:
    rows, notes = [], []
    for peer in results.peers:
        cells = []
        for column, figure in shown:
            value = results.median(column.name, peer.name, figure.name)
            judged = verdict(results, column.name, figure.name) if peer.name == OURS else None
            text = "-" if value is None else spread(results.of(column.name, peer.name, figure.name), value)
            cells.append(Cell(text, judged is not None and not judged.reached))
        rows.append([Cell(peer.name), *cells])
        for column in dict.fromkeys(column for column, _ in shown):
            why = results.failures.get(column.name, {}).get(peer.name)
            if why:
                notes.append(f"{peer.name}, {column.name}: {why}")
    return Table(title, ["", *heads], rows, notes)


def about(results: Results) -> list[str]:
    """Where, when, with what."""
    tools = ", ".join(f"{name} {version}" for name, version in results.tools.items())
    said = [
        f"{results.machine}; {tools}; begun {results.begun}.",
        f"Median (lowest-highest) of {results.repeats} interleaved repeats, fewer where a column is slow; {results.seconds:g} s each.",
    ]
    if results.paces:
        said.append(
            "Before each, a loop of the interpreter's that never changes was timed (bench/pace.py): "
            f"{spread(results.paces, median(results.paces))} us of CPU time."
        )
    return said
