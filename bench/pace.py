"""How fast the machine's cores are at this moment: a piece of work that never changes, timed.

A virtual machine's core gives more or less from one minute to the next: what others do on the other half of it, it cannot see.
Interpreting and copying feel it more than encrypting does, so peers do not lose alike. Every measurement has this one before it,
and a run says from where to where it went.
"""

from __future__ import annotations

import time

__all__ = ["pace"]

STEPS = 2000
ROUNDS = 50


def pace() -> float:
    """Microseconds of CPU time that a loop of 2,000 additions takes in this interpreter, on average over 50."""
    begun = time.thread_time()
    for _ in range(ROUNDS):
        total = 0
        for step in range(STEPS):
            total += step & 7
    return (time.thread_time() - begun) / ROUNDS * 1e6
