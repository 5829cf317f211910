"""What the demonstration says: a line for each step while it runs, a progress bar, and a table at the end."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Final

__all__ = ["Bar", "Report", "Result", "rate", "size"]

_BAR: Final = 28
_REDRAW: Final = 0.1


@dataclass(frozen=True, slots=True)
class Result:
    """What a step achieved.

    Attributes:
        amount: how much, in words.
        speed: how fast, in words.
    """

    amount: str
    speed: str


def size(count: int) -> str:
    """A number of bytes for people: ``1 GiB``, ``12.5 MiB``."""
    for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= bytes_:
            return f"{count / bytes_:.1f}".removesuffix(".0") + f" {unit}"
    return f"{count:.0f} bytes"


def rate(count: float, seconds: float) -> str:
    """Bytes a second for people."""
    return f"{count / 2**20 / max(seconds, 1e-9):.0f} MiB/s"


class Bar:
    """A progress bar on standard error where that is a terminal, and nothing elsewhere. Any thread may move it."""

    def __init__(self, title: str, total: int) -> None:
        self._title = title
        self._total = total
        self._done = 0
        self._drawn_at = 0.0
        self._started = time.monotonic()
        self._shown = sys.stderr.isatty()

    def advance(self, count: int) -> None:
        """``count`` bytes more are through."""
        self._done += count
        now = time.monotonic()
        if self._shown and now - self._drawn_at >= _REDRAW:
            self._drawn_at = now
            share = self._done / self._total
            filled = round(share * _BAR)
            speed = rate(self._done, now - self._started)
            bar = "#" * filled + "." * (_BAR - filled)
            sys.stderr.write(f"\r  {self._title:<{Report.WIDTH}} [{bar}] {share:4.0%} {speed:>12} ")
            sys.stderr.flush()

    def clear(self) -> None:
        """Takes the bar off the screen."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


class Report:
    """The steps and their outcome."""

    WIDTH: Final = 44

    def __init__(self) -> None:
        self._rows: list[tuple[str, str, str, str]] = []

    def note(self, text: str) -> None:
        """A line of its own."""
        print(text, flush=True)

    def passed(self, what: str, result: Result) -> None:
        """The step worked."""
        self._rows.append((what, result.amount, result.speed, "ok"))
        print(f"  {what:<{self.WIDTH}} ok", flush=True)

    def failed(self, what: str) -> None:
        """The step did not."""
        self._rows.append((what, "", "", "FAILED"))
        print(f"  {what:<{self.WIDTH}} FAILED", flush=True)

    def table(self) -> None:
        """Everything, once more and in order."""
        rows = [("what", "how much", "how fast", "ok"), *self._rows]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        rows.insert(1, ("-" * widths[0], "-" * widths[1], "-" * widths[2], "-" * widths[3]))
        print()
        for row in rows:
            print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
