"""The order of sending: shares, fresh streams ahead, nobody starved."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from konnektor.scheduler import BUCKET, FRESH, FRESH_RUN, IDLE, QUANTUM, REFILL, WAITING, Flow, Scheduler


def new_flow(priority=1, weight=1):
    flow = Flow(priority)
    flow.weight = weight
    return flow


def run(scheduler, size, turns, now=0.0):
    """Serves ``turns`` frames of ``size`` to flows that always have more."""
    sent = Counter()
    for _ in range(turns):
        flow = scheduler.next()
        sent[flow] += size
        scheduler.charge(flow, size, now)
    return sent


def test_empty():
    scheduler = Scheduler()
    assert not scheduler.active
    assert scheduler.next() is None and scheduler.next(fresh_only=True) is None


def test_a_fresh_stream_goes_ahead():
    scheduler = Scheduler()
    bulk, small = new_flow(), new_flow()
    scheduler.add(bulk)
    run(scheduler, 65_536, 2)
    assert bulk.place == WAITING and not scheduler.contended
    scheduler.add(small)
    scheduler.add(small)
    assert scheduler.contended and scheduler.active == 2
    assert scheduler.next() is scheduler.next(fresh_only=True) is small
    scheduler.finish(small, 100, 0.0)
    assert small.place == IDLE
    assert scheduler.next(fresh_only=True) is None
    assert scheduler.next() is bulk
    scheduler.finish(bulk, 0, 0.0)
    assert not scheduler.active


@pytest.mark.parametrize("size", [1000, 4096, 65_536])
def test_shares_of_classes_and_weights(size):
    scheduler = Scheduler()
    flows = [new_flow(0), new_flow(1), new_flow(2), new_flow(2, 3)]
    for flow in flows:
        flow.spent = BUCKET
        scheduler.add(flow)
    sent = run(scheduler, size, 64 * 2**20 // size)
    total = sum(sent.values())
    for flow, share in zip(flows, (8, 4, 1, 3), strict=True):
        assert sent[flow] / total == pytest.approx(share / 16, rel=0.05)


def test_a_bulky_stream_stays_behind_however_often_it_runs_dry():
    scheduler = Scheduler()
    greedy = new_flow()
    for _ in range(3):
        scheduler.add(greedy)
        assert scheduler.next() is greedy
        scheduler.finish(greedy, 32 * 1024, 0.0)
    scheduler.add(greedy)
    assert greedy.place == WAITING
    scheduler.finish(scheduler.next(), 0, 0.0)
    scheduler.next()
    # ... until the bucket has refilled
    scheduler.add(greedy)
    scheduler.finish(scheduler.next(), 1, 2 * BUCKET / REFILL)
    scheduler.add(greedy)
    assert greedy.place == FRESH


def test_fresh_streams_together_cannot_starve_a_bulky_one():
    scheduler = Scheduler()
    bulk = new_flow(2)
    bulk.spent = BUCKET
    scheduler.add(bulk)
    served = 0
    sent = 0
    while sent < 16 * FRESH_RUN:
        small = new_flow(0)
        scheduler.add(small)
        flow = scheduler.next()
        sent += 1000
        if flow is bulk:
            served += 1
            scheduler.charge(bulk, 1000, 0.0)
        else:
            scheduler.finish(flow, 1000, 0.0)
    assert served >= 15


def test_what_was_sent_alone_is_not_held_against_anybody():
    scheduler = Scheduler()
    early, late = new_flow(), new_flow()
    early.spent = late.spent = BUCKET
    scheduler.add(early)
    for _ in range(100):
        assert scheduler.next() is early
        scheduler.charge_alone(early, 3 * 65_536, 0.0)
    scheduler.add(late)
    sent = run(scheduler, 65_536, 8)
    assert sent[early] == sent[late]


def test_who_sends_alone_stays_bulky():
    scheduler = Scheduler()
    flow = new_flow()
    flow.spent = BUCKET
    scheduler.add(flow)
    scheduler.charge_alone(scheduler.next(), 10 * BUCKET, 0.0)
    scheduler.finish(flow, 0, 0.0)
    scheduler.add(flow)
    assert flow.place == WAITING


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 255)), min_size=2, max_size=8),
    st.lists(st.tuples(st.integers(0, 7), st.integers(1, 65_536), st.booleans()), max_size=200),
)
def test_nobody_waits_for_ever(kinds, steps):
    """Whatever the others do, everyone who wants a turn has one within bounded bytes."""
    scheduler = Scheduler()
    flows = [new_flow(*kind) for kind in kinds]
    victim = flows[0]
    victim.spent = BUCKET
    scheduler.add(victim)
    waited = 0
    bound = 2 * FRESH_RUN + sum((8, 4, 1)[f.priority] * f.weight * QUANTUM + 65_536 for f in flows) * 5
    for index, size, more in [*steps, *[(1, 65_536, True)] * 3]:
        scheduler.add(flows[index % len(flows)])
        flow = scheduler.next()
        waited = 0 if flow is victim else waited + size
        assert waited <= bound
        if more or flow is victim:
            scheduler.charge(flow, size, 0.0)
        else:
            scheduler.finish(flow, size, 0.0)
        assert scheduler.active == sum(f.place != IDLE for f in flows)


def test_a_waiting_stream_that_ends_its_turn_lets_fresh_ones_ahead_again():
    scheduler = Scheduler()
    bulk, other, *small = flows = [Flow(1) for _ in range(3 + FRESH_RUN // 4096)]
    bulk.spent = other.spent = BUCKET
    for flow in flows:
        scheduler.add(flow)
    for flow in small[:-1]:
        assert scheduler.next() is flow
        scheduler.finish(flow, 4096, 0.0)
    assert scheduler.next() is bulk
    scheduler.finish(bulk, 10, 0.0)
    assert scheduler.next() is small[-1]
