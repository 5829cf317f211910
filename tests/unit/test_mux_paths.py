"""Windows and the cap on bytes in flight fitted to a path: over a link with a rate and a delay, in virtual time."""

from collections import deque

import pytest

from konnektor.credit import TURN
from konnektor.errors import PeerTimeoutError
from konnektor.frames import Data, Ping
from konnektor.limits import FULL_FRAME, KIB, MIB, Limits
from konnektor.mux import PAYLOAD
from konnektor.outbound import FRESH_PAYLOAD
from tests.link import Link, Meter
from tests.pair import Pair

PATHS = [(0.001, 50e6), (0.010, 20e6), (0.050, 20e6), (0.200, 4e6)]
"""Round trip in seconds, bytes a second."""


def linked(rtt, rate, limits=None, *, resumable=False, **kwargs):
    pair = Pair(limits or Limits(), hello=False, resumable=resumable)
    link = Link(pair, delay=rtt / 2, rate=rate, **kwargs)
    link.run(3 * rtt)
    return pair, link


def ask(link, questions):
    """Seconds from each question, one a millisecond, to its answer."""
    asked, took = deque(), []

    class Asker(Meter):
        def data_received(self, data):
            super().data_received(data)
            took.extend(link.pair.now - asked.popleft() for _ in range(len(data) // 64))

    class Answerer(Meter):
        def data_received(self, data):
            super().data_received(data)
            self.stream.write(bytes(data))

    ours, theirs = link.open()
    Answerer(theirs.stream)
    asker = Asker(ours.stream)
    for _ in range(questions):
        asked.append(link.pair.now)
        asker.stream.write(bytes(64))
        link.run(0.001)
    link.run(1)
    assert len(took) == questions
    return took


@pytest.mark.parametrize(("rtt", "rate"), PATHS)
def test_tuning_reaches_the_bandwidth_delay_product_then_stops(rtt, rate):
    pair, link = linked(rtt, rate)
    ours, theirs = link.open()
    ours.write()
    link.run(16 * rtt)
    window = theirs.stream.receive_window
    assert link.goodput(theirs, 1.0) > 0.95 * rate
    size = window.size
    # The receiver's PINGs are answered from behind the sender's queue, which is another round trip at most.
    assert rate * rtt < size < 2 * rate * (2 * (rtt + TURN) + TURN) + 64 * KIB
    link.run(8)
    size = window.size
    assert link.goodput(theirs, 4.0) > 0.95 * rate
    assert rate * rtt < window.size == size < 2 * rate * (2 * (rtt + TURN) + TURN) + 64 * KIB
    assert pair.server.mux.pool.extra <= window.size


def test_one_stream_alone_has_most_of_what_is_not_reserved():
    """To have on its way, and to be kept for sending again: both within what the two bounds allow together."""
    limits = Limits(initial_streams=128, receive_pool=8 * MIB, replay_buffer=MIB)
    pair, link = linked(0.050, 40e6, limits, resumable=True)
    ours, theirs = link.open()
    ours.write()
    link.run(2)
    lent = []
    link.watch = lambda: lent.append(pair.client.mux.pool.lent)
    assert link.goodput(theirs, 1) > 0.95 * link.rate
    assert max(lent) > MIB
    assert theirs.stream.receive_window.held > 2 * MIB


def test_both_directions_and_streams_of_either_side_are_tuned():
    pair, link = linked(0.050, 10e6)
    ours, theirs = link.open(pair.server)
    theirs.write()
    ours.write()
    link.run(2)
    for meter in (ours, theirs):
        assert link.goodput(meter, 1) > 0.6 * link.rate


def test_a_slow_reader_has_a_window_of_its_own_pace():
    _, link = linked(0.050, 20e6)
    ours, theirs = link.open()
    theirs.auto = False
    ours.write()
    for _ in range(200):
        link.run(0.010)
        theirs.stream.consumed(10 * KIB)  # a megabyte a second, beside the path's twenty
    window = theirs.stream.receive_window
    assert window.size < 4 * 1e6 * (0.050 + TURN)
    assert window.unread <= window.size
    theirs.auto = True
    theirs.stream.consumed(window.unread)
    link.run(1)
    assert link.goodput(theirs, 1) > 0.95 * link.rate


def test_nothing_is_tuned_before_the_round_trip_is_known():
    pair = Pair()
    pair.server.mux.flight.reconnected()
    ours, theirs = pair.open()
    ours.write(bytes(MIB))
    pair.pump()
    assert theirs.receive_window.size == 16 * KIB
    assert len(theirs.sink.data) == MIB


def test_streams_that_stall_with_wide_windows_leave_room_for_others():
    pair, link = linked(0.200, 100e6)
    pool = pair.server.mux.pool
    meters = [link.open() for _ in range(6)]
    for ours, _ in meters:
        ours.write()
    link.run(8)
    windows = [theirs.stream.receive_window for _, theirs in meters]
    assert max(w.size for w in windows) < 2 * min(w.size for w in windows)
    for _, theirs in meters:
        theirs.auto = False
    link.run(2)
    assert all(w.unread == w.granted - w.consumed for w in windows)
    assert pool.free >= pool.size // 16
    for opener in pair.sides:
        mine, theirs = link.open(opener)
        mine.write()
        link.run(3)
        assert link.goodput(theirs, 1) > 1e6


@pytest.mark.parametrize("grown", [False, True])
def test_streams_that_stall_slow_no_other(grown):
    """Whether they never were read, or had wide windows when their readers stopped."""
    _, link = linked(0.010, 20e6)
    alone = max(ask(link, 100))
    stalled = [link.open() for _ in range(6 if grown else 100)]
    for ours, theirs in stalled:
        ours.auto = theirs.auto = grown
        ours.write()
        theirs.write()
    link.run(1)
    for ours, theirs in stalled:
        ours.auto = theirs.auto = False
    link.run(2)
    assert all(theirs.stream.receive_window.unread for _, theirs in stalled)
    assert max(ask(link, 100)) < alone + 0.0001
    ours, theirs = link.open()
    ours.write()
    link.run(0.5)
    assert link.goodput(theirs, 1) > 0.95 * link.rate


@pytest.mark.parametrize("back", [False, True])
def test_small_requests_beside_bulk_wait_for_what_the_cap_allows(back):
    _, link = linked(0.010, 20e6)
    for ours, theirs in [link.open() for _ in range(16)]:
        (theirs if back else ours).write()
    link.run(1)
    took = sorted(ask(link, 500))
    assert took[len(took) // 2] < 1.5 * 0.010
    # The round trip, the floor of the cap, and one frame that goes beyond it.
    assert took[-1] < 0.010 + (4 * FULL_FRAME + PAYLOAD) / link.rate


def test_the_cap_does_not_collapse_when_the_round_trip_rises_from_10_to_80_ms():
    pair, link = linked(0.010, 20e6)
    flight = pair.client.mux.flight
    ours, theirs = link.open()
    ours.write()
    link.run(3)
    before = flight.cap(pair.now)
    assert before > 1.5 * link.rate * 0.010
    lowest = []
    link.watch = lambda: lowest.append(flight.cap(pair.now))
    link.delay = 0.040
    link.run(3)
    assert min(lowest) > 0.9 * before
    assert flight.cap(pair.now) > link.rate * 0.080
    assert link.goodput(theirs, 1) > 0.95 * link.rate


def test_the_cap_follows_a_path_that_becomes_slower_or_shorter():
    pair, link = linked(0.080, 20e6)
    flight = pair.client.mux.flight
    ours, theirs = link.open()
    ours.write()
    link.run(3)
    link.delay = 0.005
    link.run(5)
    assert flight.cap(pair.now) < 3 * link.rate * 0.012
    link.rate = 5e6
    link.run(10)
    assert flight.rate < 1.1 * link.rate
    assert link.goodput(theirs, 1) > 0.95 * link.rate


@pytest.mark.parametrize("both_ways", [False, True])
def test_ping_is_bounded_under_saturation(both_ways):
    """By what the caps allow each way, for as long as it goes on: neither end may take the other's queue for the path."""
    pair, link = linked(0.020, 10e6)
    ours, theirs = link.open()
    ours.write()
    if both_ways:
        theirs.write()
    link.run(2)
    pair.client.events.clear()
    for _ in range(20):
        pair.client.mux.ping()
        link.run(1)
    round_trips = [event[2] for event in pair.client.events if event[0] == "pong"]
    assert len(round_trips) >= 20
    assert max(round_trips) < (1 + 2 * (1 + both_ways)) * (0.020 + 0.002)
    for meter in (theirs, ours)[: 1 + both_ways]:
        assert link.goodput(meter, 2) > 0.7 * link.rate


class Echo(Meter):
    def data_received(self, data):
        super().data_received(data)
        self.stream.write(bytes(data))


def keystrokes(link, ours, count):
    """The round trips of single bytes that are echoed, one a tenth of a second."""
    took = []
    for _ in range(count):
        pressed, seen, echoed = link.pair.now, ours.received, []
        link.watch = lambda seen=seen, echoed=echoed: ours.received > seen and echoed.append(link.pair.now)
        ours.stream.write(b"k")
        link.run(0.1)
        took.append(echoed[0] - pressed)
    return sorted(took)


@pytest.mark.parametrize("both_ways", [False, True])
def test_keystrokes_beside_16_bulk_streams(both_ways):
    """They wait for what the cap lets into the path's queue, never for the streams; and these still fill the path."""
    rtt, rate = 0.010, 20e6
    _, link = linked(rtt, rate)
    ours, theirs = link.open(priority=0)
    Echo(theirs.stream)
    assert keystrokes(link, ours, 10)[-1] < 1.01 * rtt
    meters = [link.open() for _ in range(16)]
    receiving = []
    for n, (mine, other) in enumerate(meters):
        sender, receiver = (other, mine) if both_ways and n % 2 else (mine, other)
        sender.write()
        receiving.append(receiver)
    link.run(3)
    # The first one finds what bulk had on its way when it was alone: twice what fills the path, and a frame.
    (first,) = keystrokes(link, ours, 1)
    assert first < 3 * rtt + (2 * 0.002) + PAYLOAD / rate
    before = [meter.received for meter in receiving]
    took = keystrokes(link, ours, 50)
    assert took[25] < 2.5 * rtt
    assert took[-1] < 3 * rtt
    came = [meter.received - was for meter, was in zip(receiving, before, strict=True)]
    assert sum(came) > (2 * 0.7 if both_ways else 0.85) * rate * 5
    assert min(came) > 0.5 * max(came)


class Asker(Meter):
    """Sends as much as fresh streams may have beyond the cap, and again as soon as that is answered."""

    def ask(self):
        self.stream.write(bytes(FRESH_PAYLOAD))

    def data_received(self, data):
        super().data_received(data)
        self.ask()


class Answerer(Meter):
    def data_received(self, data):
        before = self.received // FRESH_PAYLOAD
        super().data_received(data)
        self.stream.write(bytes(self.received // FRESH_PAYLOAD - before))


@pytest.mark.parametrize("priority", [0, 1])
def test_small_streams_that_keep_the_connection_full_do_not_starve_bulk(priority):
    """Each of them is idle until it is answered, so each may pass the cap; together they are more than the path takes."""
    pair, link = linked(0.02, 4e6, queue=128 * KIB)
    bulk, meter = link.open(priority=priority)
    askers = []
    for _ in range(30):
        asking, answering = link.open(priority=2)
        Answerer(answering.stream)
        askers.append(Asker(asking.stream))
    bulk.write()
    link.run(3)
    for asker in askers:
        asker.ask()
    link.run(3)
    assert pair.client.mux.flight.in_flight > 0.9 * pair.client.mux.flight.cap(pair.now)
    for _ in range(4):
        assert link.goodput(meter, 2) > 0.04 * link.rate


def test_a_receiver_of_bulk_measures_the_path_as_well():
    pair, link = linked(0.010, 10e6)
    ours, _ = link.open()
    ours.write()
    link.run(2)
    assert pair.server.mux.liveness._ping_count > 2
    link.delay = 0.040
    link.run(4)
    assert pair.server.mux.flight.rtt_min >= 0.080


@pytest.mark.parametrize("busy", [False, True])
def test_a_peer_that_takes_nothing_is_given_up(busy):
    """Whether nothing comes from it, or now and then something does."""
    pair = Pair()
    ours, _ = pair.open()
    ours.write(bytes(10_000))
    pair.client.flush()
    pair.client.blocked = True
    pair.client.mux.write_blocked(pair.now)
    start = pair.now
    for n in range(40):
        pair.sleep(1, pump=False)
        if busy and pair.client.error is None:
            pair.server.inject(Data(ours.id, b"x") if n % 2 else Ping(n))
    assert isinstance(pair.client.error, PeerTimeoutError)
    assert pair.now - start >= 25
    assert ("taken" in str(pair.client.error) or "acknowledged" in str(pair.client.error)) is busy


def test_a_peer_that_takes_little_is_not():
    pair = Pair()
    ours, _ = pair.open()
    mux = pair.client.mux
    mux.write_blocked(pair.now)
    for _ in range(10):
        ours.write(bytes(100))
        pair.sleep(20)  # and an ACK comes, so something was taken
    assert pair.client.error is None
    mux.write_resumed()
    pair.sleep(100)
    assert pair.client.error is None


def test_what_idle_streams_hold_is_counted():
    pair, link = linked(0.050, 20e6)
    ours, theirs = link.open()
    ours.write()
    link.run(2)
    mux = pair.server.mux
    assert mux.idle_credit(pair.now) == 0
    ours.writing = False
    link.run(40)
    assert not theirs.stream.receive_window.unread
    assert mux.idle_credit(pair.now) == mux.pool.extra > MIB
    ours.write()
    link.run(0.3)
    assert mux.idle_credit(pair.now) == 0
