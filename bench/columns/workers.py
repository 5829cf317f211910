"""A thousand workers on one control plane."""

from __future__ import annotations

import os
import re
import select
import subprocess
import time

from bench.columns.column import Column, Figure, Figures
from bench.columns.tools import Failed
from bench.peers.peer import CONTROL_PLANE, Peer
from bench.processes import cpu_seconds

__all__ = ["COLUMNS", "connected"]

COUNT = 1000
PATIENCE = 60.0
SETTLE = 1.0
TICK = 1 / os.sysconf("SC_CLK_TCK")
"""Seconds: CPU time is told in these."""


def connected(process: subprocess.Popen[bytes], count: int, patience: float = PATIENCE) -> float:
    """Seconds that the workers say it took until all were connected.

    Raises:
        Failed: they are not.
    """
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    text = b""
    end = time.monotonic() + patience
    while not text.endswith(b"\n"):
        if not select.select([descriptor], [], [], max(0, end - time.monotonic()))[0]:
            raise Failed(f"{count} workers were not connected within {patience:g} s")
        data = os.read(descriptor, 4096)
        if not data:
            raise Failed("the workers' process ended")
        text += data
    found = re.search(rb"connected %d in ([\d.]+) s\n$" % count, text)
    if found is None:
        raise Failed(f"the workers said {text!r}")
    return float(found[1])


class Workers(Column):
    name = family = "workers"
    about = (
        f"{COUNT:,} workers dial one control plane: its handshakes for each second of its own CPU time, because the workers are one process "
        "here, which needs as much of the machine, and elsewhere have machines of their own; what it grows by for each of them; then it is "
        "killed and started again: its CPU time until all are back, less what starting takes, and the seconds, in which both share the machine"
    )
    figures = (
        Figure("handshakes", "/CPU s", "more"), Figure("memory", "KB/worker", "less"), Figure("storm CPU", "ms/worker", "less"),
        Figure("storm", "s", "less"),
    )  # fmt: skip
    most_repeats = 2

    def cost(self, seconds: float) -> float:
        return 15

    def unfit(self, peer: type[Peer]) -> str | None:
        return None if peer.dials_many else "cannot keep a thousand sessions up in one process"

    def measure(self, peer: Peer, seconds: float) -> Figures:
        with peer.another() as fresh:
            plane = fresh.sides[CONTROL_PLANE][0]
            before, starting = fresh.resident(CONTROL_PLANE), cpu_seconds([plane.pid])
            workers = fresh.dial_many(COUNT)
            connected(workers, COUNT)
            cpu = max(TICK, cpu_seconds([plane.pid]) - starting)
            time.sleep(SETTLE)
            memory = (fresh.resident(CONTROL_PLANE) - before) / COUNT
            again = fresh.kill(plane)()
            storm = connected(workers, COUNT)
            storm_cpu = cpu_seconds([again.pid]) - starting
        return {
            "handshakes": COUNT / cpu, "memory": memory, "storm CPU": max(0, storm_cpu) * 1e3 / COUNT, "storm": storm,
        }  # fmt: skip


COLUMNS = [Workers()]
