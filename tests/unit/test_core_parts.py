"""The small parts of the core by themselves: admission, acks, liveness, drain, deadlines, flight."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from konnektor.acks import Acks
from konnektor.admission import LAST_ID, Admission
from konnektor.deadlines import TICK, Deadlines
from konnektor.drain import ALL_IDS, Drain, Step
from konnektor.errors import ProtocolError
from konnektor.flight import Flight
from konnektor.frames import MAX_OPENS
from konnektor.liveness import Liveness
from konnektor.outbound import LARGE, RECORD, joined

# Admission


def test_ids_of_both_roles():
    client, server = Admission("client", 8), Admission("server", 8)
    assert [client.open(), client.open()] == [1, 3]
    assert [server.open(), server.open()] == [2, 4]
    assert client.is_ours(5) and not client.is_ours(4)
    assert client.was_opened(3) and not client.was_opened(5) and not client.was_opened(2)
    assert client.last_taken == 0
    client.take(2)
    assert client.last_taken == 2 and client.was_opened(2)
    client.assert_invariants()


def test_take_in_order_and_as_many_as_granted():
    server = Admission("server", 8)
    for wrong in (2, 3):
        with pytest.raises(ProtocolError):
            server.take(wrong)
    for stream_id in range(1, 17, 2):
        server.take(stream_id)
    with pytest.raises(ProtocolError, match="number 9"):
        server.take(17)
    server.retire()
    assert server.grant_due
    assert server.grant() == 9
    server.take(17)
    server.assert_invariants()


def test_streams_is_due_at_an_eighth_or_when_few_are_left():
    server = Admission("server", 80)
    for stream_id in range(1, 81, 2):
        server.take(stream_id)
    due = []
    for _ in range(10):
        server.retire()
        due.append(server.grant_due)
    assert due == [False] * 9 + [True]
    scarce = Admission("server", 80)
    for stream_id in range(1, 141, 2):
        scarce.take(stream_id)
    scarce.retire()
    assert scarce.grant_due


def test_allow():
    client = Admission("client", 8)
    assert client.may_open
    assert not client.allow(8)
    assert client.allow(MAX_OPENS)
    with pytest.raises(ProtocolError):
        client.allow(MAX_OPENS + 1)
    client.next_id = LAST_ID - 1
    assert not client.exhausted
    client.open()
    assert client.exhausted


# Acks


def test_ack_after_bytes_or_time():
    acks = Acks(100, 0.025)
    acks.taken(50, 1.0)
    assert (acks.due, acks.due_at) == (False, 1.025)
    acks.taken(10, 1.01)
    assert acks.due_at == 1.025
    acks.check(1.02)
    assert not acks.due
    acks.check(1.025)
    assert acks.due and acks.due_at == math.inf
    acks.taken(1, 1.03)
    assert acks.due_at == math.inf  # it is due anyway
    acks.seq = 7
    assert acks.rendered() == 7
    acks.taken(100, 2.0)
    assert acks.due


# Liveness


def test_hello_in_time():
    life = Liveness(0.0, 10.0)
    life.heard(9.0)
    assert life.check(10.0, 0.0) == "no HELLO within 10 s"


@pytest.mark.parametrize(("idle", "silence"), [(60, 15), (30, 15), (20, 10)])
def test_ping_after_silence(idle, silence):
    life = Liveness(0.0, 10.0)
    life.heard(1.0)
    life.established(idle)
    assert life.ping_ready and life.due == 1 + silence
    assert life.ping(1.0) == 1
    assert life.pong(1, 1.5) == 0.5
    life.heard(1.5)
    assert life.check(life.due, 0.5) is None  # bytes came since it was armed
    assert life.due == 1.5 + silence and not life.ping_ready
    assert life.check(life.due, 0.5) is None
    assert life.ping_ready
    assert life.due == 1.5 + silence + 10
    life.ping(life.due - 10)
    assert life.check(life.due, 0.5) is None  # a second look
    assert "silent" in life.check(life.due, 0.5)


def test_patience_grows_with_the_round_trip():
    life = Liveness(0.0, 10.0)
    life.established(60)
    assert life.check(15.0, 5.0) is None
    assert life.due == 15 + 20


def test_a_byte_between_the_looks_saves():
    life = Liveness(0.0, 10.0)
    life.established(60)
    for when in (15.0, 25.0):
        life.check(when, 0.0)
    life.heard(25.01)
    assert life.check(25.05, 0.0) is None
    assert life.due == pytest.approx(40.01)


def test_only_the_ping_that_is_out_is_answered():
    life = Liveness(0.0, 10.0)
    with pytest.raises(ProtocolError):
        life.pong(0, 0.0)
    life.established(60)
    assert life.want_ping() == 1
    life.ping(0.0)
    assert life.want_ping() == 2
    assert not life.ping_ready
    with pytest.raises(ProtocolError):
        life.pong(2, 0.0)
    life.pong(1, 0.0)
    with pytest.raises(ProtocolError):
        life.pong(1, 0.0)
    assert life.ping_ready


def test_round_trips_are_measured_while_frames_flow():
    life = Liveness(0.0, 10.0)
    assert not life.measure_due(0.0)
    life.established(60)
    assert life.measure_due(0.0)
    life.ping(0.0)
    assert not life.measure_due(5.0)
    life.pong(1, 5.0)
    assert not life.measure_due(0.4)
    assert life.measure_due(5.0)


def test_no_progress():
    life = Liveness(0.0, 10.0)
    life.established(60)
    life.sent(1.0)
    life.acked(2.0, all_of_it=False)
    life.heard(31.0)
    life.due = 31.0
    assert life.check(31.0, 0.0) is None
    assert life.due == 32.0
    assert "acknowledged nothing for 30 s" in life.check(32.0, 0.0)
    life.acked(32.0, all_of_it=True)
    assert life.check(32.0, 0.0) is None


def test_no_progress_of_a_peer_that_is_silent_is_silence():
    life = Liveness(0.0, 10.0)
    life.established(60)
    life.sent(5.0)
    assert life.check(15.0, 10.0) is None
    assert life.due == 35.0
    life.due = 36.0
    assert life.check(36.0, 10.0) is None
    assert life.due == 55.0


def test_a_peer_that_takes_nothing():
    life = Liveness(0.0, 10.0)
    life.write_blocked(0.0)  # judged by its HELLO alone at first
    assert life.due == 10.0
    life.write_resumed()
    life.established(60)
    life.write_blocked(1.0)
    assert life.due == 15.0
    life.heard(15.0)
    assert life.check(15.0, 0.0) is None
    life.heard(29.0)
    assert life.check(30.0, 0.0) is None
    assert life.due == 31.0
    assert life.check(31.0, 0.0) == "the peer has taken nothing for 30 s"
    life.acked(30.0, all_of_it=True)
    life.heard(31.0)
    assert life.check(31.0, 0.0) is None
    life.write_resumed()
    life.heard(61.0)
    assert life.check(61.0, 0.0) is None


def test_a_paused_machine_blocks_no_writing():
    life = Liveness(0.0, 10.0)
    life.established(60)
    life.write_blocked(0.0)
    assert life.check(90.0, 0.0) is None
    assert life.due == 100.0
    life.heard(90.0)
    life.stuck = 5.0
    assert "taken nothing for 5 s" in life.check(95.0, 0.0)


@given(st.floats(0, 1e7), st.floats(0, 100), st.floats(0, 3), st.booleans())
def test_due_always_lies_ahead(start, step, rtt, blocked):
    life = Liveness(start, 10.0)
    life.established(60)
    life.sent(start)
    if blocked:
        life.write_blocked(start)
    now = start
    for _ in range(8):
        now = max(life.due, now + step)
        life.heard_at = min(life.heard_at + step, now)
        if life.check(now, rtt) is not None:
            break
        assert life.due > now


# Drain


def step(drain, now, *, acked=0, streams=False, quiet=True):
    return drain.step(now, acked=acked, streams=streams, quiet=quiet)


def test_drain_step_by_step():
    drain = Drain()
    assert step(drain, 0.0) is Step.WAIT and drain.due == math.inf
    assert drain.begin(25.0, 7, "bye", 0.0)
    assert not drain.begin(10.0, 0, "", 0.0)
    assert step(drain, 0.0) is Step.WAIT
    first = drain.goaway(41, 0.0)
    assert (first.last_id, first.code, first.grace_ms, first.text) == (ALL_IDS, 7, 10_000, "bye")
    drain.sent(5)
    assert step(drain, 1.0, acked=4) is Step.WAIT
    assert step(drain, 1.0, acked=5) is Step.SAY_GOAWAY
    assert step(drain, 1.0, acked=5) is Step.WAIT
    assert drain.goaway(43, 1.0).last_id == 43 == drain.last_taken
    assert step(drain, 2.0, streams=True) is Step.WAIT
    assert step(drain, 2.0) is Step.LINGER
    drain.linger(2.0)
    assert not drain.begin(1.0, 0, "", 2.0)
    assert drain.due == 7.0
    assert step(drain, 2.0, quiet=False) is Step.WAIT
    assert step(drain, 2.0, streams=True) is Step.WAIT
    assert step(drain, 2.0) is Step.CLOSE
    assert step(drain, 7.0, quiet=False) is Step.CLOSE
    drain.assert_invariants()


def test_grace_over_before_anything_was_said():
    drain = Drain()
    drain.begin(-1.0, 7, "", 0.0)
    assert drain.due == 0.0
    assert step(drain, 0.0, streams=True) is Step.LINGER
    drain.linger(0.0)
    assert step(drain, 1.0) is Step.WAIT  # GOAWAY is still to be said
    assert drain.goaway(1, 1.0).grace_ms == 0


@pytest.mark.parametrize("grace", [1e12, math.inf])
def test_endless_grace(grace):
    drain = Drain()
    drain.begin(grace, 7, "", 0.0)
    assert 0 <= drain.goaway(1, 0.0).grace_ms <= 2**32 - 1


# Deadlines


def test_deadlines():
    wheel = Deadlines()
    assert wheel.next() is None
    keys = {name: wheel.add(name, when) for name, when in (("a", 1.0), ("b", 1.01), ("c", 2.0), ("d", 1.0))}
    assert 1.0 <= wheel.next() <= 1.0 + TICK
    wheel.discard("d", keys["d"])
    assert wheel.expire(0.99) == []
    assert wheel.expire(1.01) == ["a"]
    assert wheel.expire(1.5) == ["b"]
    wheel.discard("a", keys["a"])
    wheel.discard("c", keys["c"])
    assert wheel.next() is None


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_deadlines_are_never_early_and_at_most_a_tick_late(times):
    wheel = Deadlines()
    for number, when in enumerate(times):
        wheel.add(number, when)
    seen = []
    while (when := wheel.next()) is not None:
        due = wheel.expire(when)
        assert due
        for number in due:
            assert times[number] - 1e-9 * times[number] <= when <= times[number] * (1 + 1e-9) + TICK
        seen += due
    assert sorted(seen) == list(range(len(times)))


# Flight


def test_flight_counts_and_estimates():
    flight = Flight(1000)
    assert (flight.rate, flight.rtt_min, flight.cap(0.0), flight.frame_limit()) == (0, 0, 1000, 65_535)
    flight.on_batch(0.0, limited=False)
    flight.on_batch(0.0, limited=False)
    for _ in range(10):
        flight.on_sent(1000)
    flight.on_batch(0.0, limited=False)
    for sample in (0.1, 0.3):
        flight.in_flight = 0  # as when nothing is on its way
        flight.on_ping(0.0, 0)
        flight.on_rtt(sample, 0)
        flight.in_flight = 10_000
    assert flight.rtt == pytest.approx(0.125)
    assert flight.rtt_min == pytest.approx(0.1)
    flight.on_ack(4, 0.1)
    flight.on_ack(5, 0.1)
    assert (flight.in_flight, flight.acked) == (5000, 5)
    flight.on_ack(10, 0.1)
    assert flight.rate == pytest.approx(100_000)
    assert flight.cap(0.1) == int(2 * flight.rate * (flight.rtt_min + 0.002))
    flight.on_interactive(0.05)
    assert not flight.tight  # once is over, and may stay the only time
    flight.on_interactive(0.1)
    assert flight.cap(0.1) == int(1.25 * flight.rate * (flight.rtt_min + 0.000_1))
    assert flight.frame_limit() == 4096
    flight.on_sent(10)
    flight.on_batch(1.0, limited=True)
    flight.on_ack(11, 2.0)
    assert flight.rate == pytest.approx(100_000)  # a trickle says nothing about the path
    flight.on_sent(10)
    flight.on_batch(3.0, limited=True)
    flight.on_ack(12, 3.0)
    flight.assert_invariants()


def test_beside_interactive_streams_bulk_fills_paths_and_no_queues_of_processes():
    """A round trip of half a millisecond is two busy processes: the floor does there."""
    flight = Flight(262_144)
    flight.rate = 1e9
    flight.on_interactive(-0.5)
    flight.on_interactive(0.0)
    for rtt, cap in ((0.000_1, 262_144), (0.000_6, 262_144), (0.001, 1_000_000), (0.05, int(1.25 * 1e9 * 0.0501))):
        flight.rtt_min = rtt
        assert flight.cap(0.5) == pytest.approx(cap, abs=1)
    assert flight.tight
    assert flight.cap(1.5) == pytest.approx(int(1.25 * 1e9 * 0.0501)) and not flight.tight  # told by now, and over
    assert flight.cap(1.5) == pytest.approx(2 * 1e9 * 0.052)


def test_acks_that_come_together_prove_no_speed():
    flight = Flight(1000)
    flight.on_sent(1000)
    flight.on_batch(0.0, limited=False)
    flight.on_sent(1000)
    flight.on_batch(0.9, limited=False)
    # Both were acknowledged in one go: 2,000 bytes in a second, not 1,000 in a tenth of one.
    flight.on_ack(2, 1.0)
    assert flight.rate == pytest.approx(2000)


def pinged(flight, sample, now=0.0, received=0):
    flight.on_ping(now, 0)
    flight.on_rtt(sample, received)


def test_the_queue_is_drained_now_and_then_so_that_a_ping_measures_the_path():
    flight = Flight(1000)
    pinged(flight, 0.1)
    flight.on_sent(100_000)
    assert not flight.pause_wanted(3.9)
    assert flight.pause_wanted(4.1)
    pinged(flight, 0.01, 4.1)
    assert flight.rtt_min == 0.1  # that PING stood behind too much
    assert flight.pause_wanted(4.1)
    flight.on_ack(1, 4.2)
    assert not flight.pause_wanted(4.2)
    pinged(flight, 0.05, 4.2)
    assert flight.rtt_min == 0.05
    flight.on_sent(100_000)
    assert not flight.pause_wanted(6.1)
    assert flight.pause_wanted(6.3)


def test_bulk_does_not_pause_for_long():
    """Streams that were idle pass the pause, and many of them could keep it up."""
    flight = Flight(1000)
    pinged(flight, 0.01)
    flight.on_sent(100_000)
    assert flight.pause_wanted(1.0)
    assert flight.pause_wanted(1.05)
    assert not flight.pause_wanted(1.2)
    assert not flight.pause_wanted(1.5)
    assert flight.pause_wanted(1.7)


def test_a_ping_answered_from_behind_the_peers_bulk_measures_that():
    flight = Flight(1000)
    pinged(flight, 0.01)
    pinged(flight, 0.02, received=100_000)  # this side sends nothing much: it may well be the path
    flight.on_sent(100_000)
    assert flight.pause_wanted(5.0)
    flight.on_ack(1, 5.0)
    for _ in range(3):
        flight.on_sent(100_000)
        flight.pause_wanted(5.0 + 100 * flight.sent)
        flight.on_ack(flight.sent, 5.0)
        pinged(flight, 0.5, received=100_000)
    assert flight.rtt_min == 0.01


def test_rates_are_forgotten_at_clean_pings_only_and_later_than_round_trips():
    flight = Flight(1000)

    def deliver(rate, now):
        flight.on_sent(10_000)
        flight.on_batch(now, limited=False)
        flight.on_ack(flight.sent, now + 10_000 / rate)

    pinged(flight, 0.01)
    deliver(1e6, 0.0)
    for hour in range(5):
        deliver(1e3, 3600.0 * (hour + 1))
    assert flight.rate == pytest.approx(1e6)
    for _ in range(3):
        pinged(flight, 0.08)
    assert (flight.rtt_min, flight.rate) == (0.08, pytest.approx(1e6))
    for hour in range(2):
        deliver(1e3, 3600.0 * (hour + 10))
        pinged(flight, 0.08)
    assert flight.rate == pytest.approx(1e3)


# Joining


@given(
    st.lists(st.one_of(st.integers(1, 40), st.integers(LARGE - 3, LARGE + 3), st.integers(60_000, 65_536)), min_size=1)
)
def test_joined_is_the_same_bytes_in_full_records(sizes):
    parts = [bytes([n % 251]) * size for n, size in enumerate(sizes)]
    chunks = joined(list(parts))
    assert b"".join(chunks) == b"".join(parts)
    assert all(chunks)
    large = [part for part in parts if len(part) >= LARGE]
    assert len(chunks) <= 2 * len(large) + 1
    copied = [chunk for chunk in chunks if isinstance(chunk, bytes) and not any(chunk is part for part in large)]
    assert all(len(chunk) % RECORD == 0 for chunk in copied if chunk is not chunks[-1])


def test_joined_does_not_copy_what_is_large():
    header, payload = bytes(8), bytes(65_528)
    head, rest = joined([header, payload])
    assert len(head) == RECORD
    assert isinstance(rest, memoryview) and rest.obj is payload
    assert joined([payload])[0] is payload
