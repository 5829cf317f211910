"""What a run found: every sample, and what must be known to read them; as JSON."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Self

__all__ = ["Entrant", "Machine", "Results"]

FORMAT = 1


@dataclass(frozen=True)
class Machine:
    """Where it ran."""

    processor: str
    cores: int
    memory_gb: float
    kernel: str
    python: str

    @classmethod
    def here(cls) -> Self:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
        return cls(
            names[0] if names else platform.machine(), len(os.sched_getaffinity(0)), round(memory, 1), platform.release(),
            platform.python_version(),
        )  # fmt: skip

    def __str__(self) -> str:
        return f"{self.processor}, {self.cores} cores, {self.memory_gb:g} GB, Linux {self.kernel}, Python {self.python}"


@dataclass(frozen=True)
class Entrant:
    """A peer as it was measured.

    Attributes:
        tuned: how.
        reference: not one to compare with.
        ours: konnektor, of this tree or another.
    """

    name: str
    version: str
    tuned: str
    reference: bool = False
    ours: bool = False


@dataclass
class Results:
    """One run.

    Attributes:
        command: that made it.
        begun: when, UTC.
        tools: version by name.
        left_out: reason by peer that was asked for.
        paces: microseconds (``pace``) before each measurement, in their order.
        samples: values by column, peer and figure, in the order of repeats.
        failures: what went wrong, or why there is no such figure, by column and peer.
    """

    command: str
    repeats: int
    seconds: float
    machine: Machine = field(default_factory=Machine.here)
    begun: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    tools: dict[str, str] = field(default_factory=dict)
    peers: list[Entrant] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    paces: list[float] = field(default_factory=list)
    samples: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    failures: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, column: str, peer: str, figures: Mapping[str, float]) -> None:
        mine = self.samples.setdefault(column, {}).setdefault(peer, {})
        for figure, value in figures.items():
            mine.setdefault(figure, []).append(value)

    def fail(self, column: str, peer: str, why: str) -> None:
        self.failures.setdefault(column, {})[peer] = why

    def of(self, column: str, peer: str, figure: str) -> list[float]:
        """Empty if there are none."""
        return self.samples.get(column, {}).get(peer, {}).get(figure, [])

    def median(self, column: str, peer: str, figure: str) -> float | None:
        values = self.of(column, peer, figure)
        return median(values) if values else None

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, file: Path) -> Self:
        """Of a file that ``save`` wrote.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not such a file; the text says so.
        """
        try:
            values: dict[str, Any] = json.loads(file.read_text())
            if values.pop("format") != FORMAT:
                raise ValueError
            machine, peers = values.pop("machine"), values.pop("peers")
            return cls(**values, machine=Machine(**machine), peers=[Entrant(**peer) for peer in peers])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{file} is not a result of python -m bench --json (format {FORMAT})") from None
