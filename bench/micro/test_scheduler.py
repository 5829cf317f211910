"""The scheduler with many streams that all have something to send."""

from __future__ import annotations

import pytest

from konnektor.scheduler import Flow, Scheduler

TURNS = 1000


@pytest.mark.parametrize("active", [1, 100, 10_000])
def test_1000_turns(benchmark, active):
    scheduler, now = Scheduler(), 0.0
    for n in range(active):
        scheduler.add(Flow(n % 3))

    def once():
        nonlocal now
        for _ in range(TURNS):
            flow = scheduler.next()
            scheduler.charge(flow, 16 * 1024, now)
        now += 0.01

    benchmark(once)
    assert scheduler.active == active


@pytest.mark.parametrize("active", [1, 100, 10_000])
def test_1000_that_come_and_go(benchmark, active):
    """Small messages: each is active for one frame, beside others that always are."""
    scheduler, now = Scheduler(), 0.0
    for _ in range(active):
        scheduler.add(Flow(2))
    small = [Flow(0) for _ in range(TURNS)]

    def once():
        nonlocal now
        for flow in small:
            scheduler.add(flow)
            while (turn := scheduler.next()) is not flow:
                scheduler.charge(turn, 16 * 1024, now)
            scheduler.finish(flow, 64, now)
        now += 0.1

    benchmark(once)
    assert scheduler.active == active
