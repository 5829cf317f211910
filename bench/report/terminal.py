"""Tables in the terminal, and progress while it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from bench.report.tables import Table, about, goals, show, tables
from bench.results import Results
from bench.run import Step

__all__ = ["Watch", "show_tables", "watch"]


class Watch:
    """Says what was found, step by step, on standard error."""

    def __init__(self, progress: Progress, total: float, repeats: int) -> None:
        self._progress, self._repeats = progress, repeats
        self._task = progress.add_task("", total=total)

    def __call__(self, step: Step) -> None:
        what = f"{step.repeat}/{self._repeats} {step.column.name:11} {step.peer:12}"
        units = {figure.name: figure.unit for figure in step.column.figures}
        found = ", ".join(f"{name} {show(value)} {units[name]}".strip() for name, value in step.figures.items())
        line = Text(f"{what} {found}").append(f" {step.failure}" if step.failure else "", style="red")
        self._progress.console.print(line, soft_wrap=True)
        self._progress.update(self._task, advance=step.cost, description=what)


@contextmanager
def watch(total: float, repeats: int) -> Iterator[Watch]:
    """Progress over about so many seconds."""
    console = Console(stderr=True, highlight=False)
    parts = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*parts, console=console, disable=not console.is_terminal) as progress:
        yield Watch(progress, total, repeats)


def show_tables(results: Results) -> None:
    """On standard output."""
    # What is not a terminal has no width; a file may be wide.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    for line in about(results):
        console.print(line)
    for name, why in results.left_out.items():
        console.print(Text(f"{name} is left out: {why}", style="yellow"))
    for table in [*tables(results), goals(results)]:
        console.print(_drawn(table))
        for note in table.notes:
            console.print(Text(note, style="dim"))


def _drawn(table: Table) -> RichTable:
    drawn = RichTable(title=table.title, title_justify="left")
    for index, head in enumerate(table.heads):
        drawn.add_column(head, justify="left" if index == 0 else "right", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(cell.text, style="bold red" if cell.missed else "") for cell in row))
    return drawn
