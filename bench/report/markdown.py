"""Tables for docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterator

from bench.columns import COLUMNS
from bench.report.tables import Cell, Table, about, goals, tables
from bench.results import Results

__all__ = ["lines"]

MISSED = "✗"
"""Beside a figure in bold: a goal that is not reached."""


def lines(results: Results) -> Iterator[str]:
    """The whole of it, line by line."""
    yield f"`{results.command}`"
    yield ""
    yield " ".join(about(results))
    yield ""
    yield "| peer | version | tuned |"
    yield "|---|---|---|"
    for peer in results.peers:
        yield f"| {peer.name} | {peer.version} | {peer.tuned} |"
    for name, why in results.left_out.items():
        yield f"| {name} | left out | {why} |"
    yield ""
    found = [goals(results), *tables(results)]
    if any(cell.missed for table in found for row in table.rows for cell in row):
        yield f"Bold with {MISSED}: a goal that is not reached."
        yield ""
    for table in found:
        yield from _table(table)
    for column in COLUMNS.values():
        if results.samples.get(column.name):
            yield f"- **{column.name}**: {column.about}."


def _table(table: Table) -> Iterator[str]:
    yield f"{table.title}:"
    yield ""
    yield "| " + " | ".join(table.heads) + " |"
    yield "|---" * len(table.heads) + "|"
    for row in table.rows:
        yield "| " + " | ".join(map(_cell, row)) + " |"
    yield ""
    for note in table.notes:
        yield f"- {note}"
    if table.notes:
        yield ""


def _cell(cell: Cell) -> str:
    return f"**{cell.text}** {MISSED}" if cell.missed else cell.text
