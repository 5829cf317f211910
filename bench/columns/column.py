"""What a column of the comparison is: one kind of measurement, of one peer at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from bench.peers.peer import Peer
from bench.processes import machine_time

__all__ = ["IDLE", "Column", "Figure", "Figures", "idle_since"]

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Figure:
    """One number that a column yields.

    Attributes:
        name: within the column.
        unit: may be empty.
        better: which end is.
    """

    name: str
    unit: str
    better: Literal["more", "less"]


IDLE = Figure("idle", "%", "less")
"""Of the machine while a load ran, its beginning and end included: what is idle under a load that asks for all of it waits
for somebody else to answer."""


def idle_since(before: tuple[float, float]) -> float:
    """``IDLE``, since the ``machine_time`` that is given."""
    idle, total = (now - then for now, then in zip(machine_time(), before, strict=True))
    return 100 * idle / total if total else 0.0


class Column(ABC):
    """One kind of measurement.

    Attributes:
        name: as given to ``--columns``.
        family: a name for several columns, which stand in one table.
        about: what is done, in a sentence.
        figures: what ``measure`` returns, by name.
        most_repeats: more are not worth their time.
    """

    name: str
    family: ClassVar[str]
    about: str
    figures: tuple[Figure, ...]
    most_repeats: ClassVar[int] = 100

    @abstractmethod
    def cost(self, seconds: float) -> float:
        """About how many seconds ``measure`` takes."""

    def unfit(self, peer: type[Peer]) -> str | None:
        """Why this peer has no such figure; None if it has."""
        return None

    @abstractmethod
    def measure(self, peer: Peer, seconds: float) -> Figures:
        """Once.

        Args:
            peer: running.
            seconds: of each part that is measured by time.

        Raises:
            Exception: it could not be measured; the text says why.
        """
