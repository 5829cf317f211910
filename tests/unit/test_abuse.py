"""The limits against abuse: each as far as it goes and one beyond, and that honest peers are nowhere near."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from konnektor.abuse import CRUMBS_DEBT, PAUSE, Abuse, Allowance, Bucket
from konnektor.admission import Admission
from konnektor.errors import CalmError, Code
from konnektor.frames import (
    HEADER,
    Ack,
    Close,
    Credit,
    Data,
    Datagram,
    Goaway,
    Open,
    OpenTLV,
    Ping,
    Priority,
    Refuse,
    Reset,
    Stop,
    Streams,
)
from konnektor.limits import KIB, MIB, Limits
from tests.pair import SMALL, Pair
from tests.unit.test_mux_streams import frames_of

UNKNOWN = HEADER.pack(0x81, 0, 0, 0)
UNSEQUENCED = HEADER.pack(0xC1, 0, 3, 9) + b"abc"


def tick(pair, seconds):
    """Time passes for the limits, and too little for anything else to happen."""
    pair.now += seconds


def two_streams(pair):
    """One that is open (1), and one that is forgotten (3): two OPENs of the client's, none of the server's."""
    pair.open()
    ours, _ = pair.open()
    ours.cancel()
    pair.pump()
    assert list(pair.server.mux.streams) == [1]


# Each limit: the frame, and how many of them are taken

LIMITS = {
    "PING": (Ping(1), 19),  # one more came with HELLO
    "ACK": (Ack(0), 20),
    "PRIORITY": (Priority(1, 0, 5), 100 + 2),
    "PRIORITY, forgotten": (Priority(3, 0, 5), 100 + 2),
    "unknown": (UNKNOWN, 100 + 2),
    "unknown, unsequenced": (UNSEQUENCED, 100 + 2),
    "CREDIT": (Credit(1, 50_000), None),
    "CREDIT, forgotten": (Credit(3, 50_000), None),
    "STREAMS": (Streams(100), 64),
    "RESET, forgotten": (Reset(3, 0, 0), 200 + 3 * 2),
    "STOP, forgotten": (Stop(3, 0), 200 + 3 * 2),
    "GOAWAY": (Goaway(2**32 - 1, 7, 1000), 4),
}
RATES = {"PING": 4, "ACK": 10, "PRIORITY": 10, "unknown": 10}


def prepared(name):
    pair = Pair()
    two_streams(pair)
    frame, count = LIMITS[name]
    if count is None:
        count = 64 + 2 * 2 + 8 * pair.server.mux.flight.sent
    return pair, frame, count


@pytest.mark.parametrize("name", LIMITS)
def test_one_beyond_the_limit_is_calm(name):
    pair, frame, count = prepared(name)
    pair.client.inject(*[frame] * count)
    assert pair.server.error is None
    pair.client.inject(frame)
    assert isinstance(pair.server.error, CalmError)
    assert name.partition(",")[0] in pair.server.error.limit or "unknown" in pair.server.error.limit
    assert frames_of(pair.server)[-1] == Close(Code.CALM, pair.server.error.reason)
    pair.pump()
    assert isinstance(pair.client.error, CalmError)
    assert not pair.client.error.limit
    assert pair.client.error.reason == pair.server.error.reason


@pytest.mark.parametrize("name", RATES)
def test_so_many_more_each_second(name):
    pair, frame, count = prepared(name)
    pair.client.inject(*[frame] * count)
    for _ in range(3):
        tick(pair, 1)
        pair.client.inject(*[frame] * RATES[name])
    assert pair.server.error is None
    pair.client.inject(frame)
    assert pair.server.error.code == Code.CALM


def test_what_is_not_used_is_not_saved_up():
    pair, frame, count = prepared("PING")
    tick(pair, 1000)
    pair.client.inject(*[frame] * (count + 1))
    assert pair.server.error is None
    pair.client.inject(frame)
    assert pair.server.error.code == Code.CALM


@given(st.integers(1, 200), st.floats(0.1, 1000), st.floats(0, 1e9))
def test_buckets_are_exact_whatever_the_rounding(burst, rate, now):
    bucket = Bucket(burst, rate)
    assert all(bucket.take(now) for _ in range(burst))
    assert not bucket.take(now)
    assert now < bucket.ready_at <= now + 1 / rate
    assert bucket.take(bucket.ready_at)


def test_each_cause_allows_one_more():
    allowance = Allowance(2, 1.0)
    assert [allowance.take(3, 0.0) for _ in range(6)] == [True] * 5 + [False]
    assert allowance.ready_at(3) > 0
    assert allowance.ready_at(4) < 0
    assert allowance.take(4, 0.0)


def test_causes_are_counted_both_ways():
    """What the server opened and sent lets the client say more."""
    pair = Pair(Limits(initial_window=16 * KIB, initial_streams=64, receive_pool=8 * MIB))
    for _ in range(10):
        pair.open(pair.server)
    admission, flight = pair.server.mux.admission, pair.server.mux.flight
    assert (admission.opens, flight.sent) == (10, 10)
    pair.client.inject(*[Credit(2, 1)] * (64 + 2 * 10 + 8 * 10))
    pair.client.inject(*[Streams(1)] * (64 + 10))
    pair.client.inject(*[Priority(2, 0, 1)] * (100 + 10))
    assert pair.server.error is None


# Case 32: tiny frames. Reading pauses, and nobody is shown out


def crumbs_for(seconds, a_second, make=lambda: Data(1, b"x")):
    """The longest pause asked for while such frames come, in seconds."""
    pair = Pair(Limits(initial_window=256 * KIB, initial_streams=8))
    _, theirs = pair.open()
    longest = 0.0
    for _ in range(int(seconds * 100)):
        pair.client.inject(*[make()] * (a_second // 100))
        longest = max(longest, pair.server.mux.pause_reading_until - pair.now)
        theirs.sink.events.clear()
        pair.server.flush()  # CREDIT
        tick(pair, 0.01)
    assert pair.server.error is None
    return longest


def test_a_flood_of_tiny_frames_pauses_reading():
    assert crumbs_for(0.5, 20_000) <= 0
    assert 0.04 < crumbs_for(0.5, 40_000) <= 0.05 + 1e-6
    assert 0.04 < crumbs_for(0.5, 40_000, lambda: Datagram(99, 0, b"")) <= 0.05 + 1e-6


def test_frames_that_carry_something_pause_nothing():
    assert crumbs_for(0.3, 60_000, lambda: Data(1, bytes(100))) <= 0
    assert crumbs_for(0.3, 60_000, lambda: Data(1, bytes(64))) <= 0
    assert crumbs_for(0.3, 40_000, lambda: Data(1, bytes(43))) <= 0  # the shortest request of HTTP


def test_empty_blocked_floods_pause_reading():
    assert crumbs_for(0.3, 40_000, lambda: Data(1, b"", 2)) > 0.04


def test_a_flood_is_soon_forgotten():
    abuse = Abuse()
    for n in range(100):
        assert abuse.crumbs(30_000, 0, n / 100) == n / 100 + PAUSE
    assert abuse.crumbs(1, 1, 1.0) > 1.0
    assert abuse.crumbs(1, 1, 1.0 + CRUMBS_DEBT) <= 1.0 + CRUMBS_DEBT


# Case 33: rapid and provoked resets


RAPID = {
    "RESET": lambda n: [Reset(n, 0, 0)],
    "STOP and RESET": lambda n: [Stop(n, 0), Reset(n, 0, 0)],
    "early data": lambda n: [Data(n, b"x" * 100), Reset(n, 0, 100), Stop(n, 0)],
    "FIN and STOP": lambda n: [Data(n, b"", 1), Stop(n, 0)],
}


@pytest.mark.parametrize("ends", RAPID.values(), ids=RAPID)
def test_rapid_resets_keep_handlers_bounded(ends):
    """CVE-2023-44487: the place of a stream comes back with its handler, however fast the stream itself went."""
    pair = Pair()
    server = pair.server
    running = []
    server.on_open = running.append
    n = 1
    for _ in range(300):
        while (n + 1) // 2 <= server.mux.admission.granted:
            pair.client.inject(Open(n, 1, "echo", {}), *ends(n))
            n += 2
        server.flush()
        server.wire.clear()
        assert len(running) == SMALL.initial_streams
        assert len(server.mux.streams) + len(server.mux.control) == 0
        running.pop(0).release()
        server.flush()
        server.wire.clear()
    pair.client.inject(*[Open(n + 2 * k, 1, "echo", {}) for k in range(2)])
    assert server.error.code == Code.PROTOCOL
    assert len(running) <= SMALL.initial_streams


PROVOKED = {
    "a critical parameter": (lambda n: Open(n, 1, "echo", {9: b""}), []),
    "a deadline of nothing": (lambda n: Open(n, 1, "echo", {int(OpenTLV.DEADLINE): bytes(4)}), []),
    "stopped by the server": (lambda n: Open(n, 1, "echo", {}), ["cancel"]),
}


@pytest.mark.parametrize("name", PROVOKED)
def test_provoked_resets_keep_handlers_bounded(name):
    """CVE-2025-8671: it is no matter which side ends the streams."""
    pair = Pair()
    server = pair.server
    make, calls = PROVOKED[name]
    running = []

    def opened(stream):
        running.append(stream)
        for call in calls:
            getattr(stream, call)()

    server.on_open = opened
    n = 1
    for _ in range(100):
        while (n + 1) // 2 <= server.mux.admission.granted:
            pair.client.inject(make(n))
            n += 2
        pair.sleep(0.06, pump=False)
        server.flush()
        refused = [frame.stream for frame in frames_of(server) if isinstance(frame, Refuse)]
        server.wire.clear()
        pair.client.inject(*[Reset(stream, 0, 0) for stream in refused])
        server.flush()
        assert server.error is None
        assert len(running) <= SMALL.initial_streams
        assert len(server.mux.streams) <= SMALL.initial_streams
        if running:
            running.pop(0).release()
    assert server.mux.admission.taken > 100


# This side's own pace


def test_pings_without_end_are_paced():
    pair = Pair()
    pair.sleep(10)
    rtts = 0
    for _ in range(2000):
        if not pair.client.mux.liveness.ping_due:
            pair.client.mux.ping()
        pair.sleep(0.01)
    rtts = pair.client.kinds.count("pong")
    assert pair.server.error is None
    assert 10 + 3 * 19 <= rtts <= 10 + 3 * 20 + 1
    pair.sleep(1)
    assert not pair.client.mux.liveness.ping_due, "the last one went out by itself"


def test_a_ping_for_each_64_kib_is_free_at_both_ends():
    """As a sender of datagrams needs, which learns from PONGs alone what has arrived."""
    pair = Pair(Limits())
    ours, _ = pair.open()
    for _ in range(100):
        ours.write(bytes(64 * KIB))
        pair.pump()
        pair.client.mux.ping()
        pair.pump()
    assert pair.server.error is None
    assert pair.client.kinds.count("pong") >= 100


def test_priorities_without_end_are_paced_and_the_last_one_counts():
    pair = Pair()
    streams = [pair.open() for _ in range(8)]
    for n in range(500):
        for ours, theirs in streams:
            ours.prioritize(n % 2, 1 + n % 255)
            theirs.prioritize(n % 2, 1 + n % 200)
        pair.sleep(0.01)
    dead, _ = streams.pop()
    dead.prioritize(2, 2)
    dead.cancel()
    for ours, _ in streams:
        ours.prioritize(2, 77)
    pair.sleep(60)
    assert pair.client.error is pair.server.error is None
    assert [(theirs.priority, theirs.weight) for _, theirs in streams] == [(2, 77)] * 7
    assert not pair.client.mux.outbound._waiting


def test_each_open_may_have_its_priority():
    """Thousands of weighted streams a second are no flood."""
    pair = Pair(Limits())
    for _ in range(20):
        pairs = [pair.client.open() for _ in range(30)]
        for stream in pairs:
            stream.weight = 3
        pair.pump()
        for stream in pairs:
            stream.cancel()
        pair.pump()
        prune(pair)
    assert pair.server.error is None
    assert not pair.client.mux.outbound._waiting


# Case 41: honest extremes. Pair itself asserts after each delivery that not even half of a limit is used


def prune(pair):
    """The pair keeps all streams there ever were, for its books; here they are too many."""
    for side in pair.sides:
        for stream in side.opened:
            if stream.forgotten:
                stream.release()
        side.opened = [stream for stream in side.opened if not stream.forgotten]
        side.all = [stream for stream in side.all if not stream.retired]


def test_six_thousand_opens_a_second():
    pair = Pair(Limits())
    pair.server.on_open = lambda stream: stream.accept()
    for _ in range(50):
        streams = [pair.client.open() for _ in range(60)]
        for stream in streams:
            stream.write(b"x" * 100)
            stream.finish()
        pair.pump()
        for stream in pair.server.opened:
            stream.write(b"y" * 200)
            stream.finish()
        pair.sleep(0.01)
        assert all(stream.sink.kinds[-2:] == ["eof", "closed"] for stream in streams)
        for side in pair.sides:
            assert side.mux.pause_reading_until <= pair.now
        prune(pair)
    assert pair.server.mux.admission.taken == 3000


def test_a_target_that_resets_a_thousand_times_a_second():
    """Half of the resets cross a cancel, so that they come for streams that are forgotten."""
    pair = Pair(Limits())
    pair.server.on_open = lambda stream: stream.accept()
    for _ in range(200):
        streams = [pair.client.open() for _ in range(10)]
        for stream in streams:
            stream.write(b"x" * 100)
        pair.pump()
        for stream in pair.server.opened:
            stream.cancel(Code.TARGET_RESET)
        for stream in streams[::2]:
            stream.cancel()
        pair.sleep(0.01)
        prune(pair)
    assert pair.client.error is pair.server.error is None
    assert pair.server.mux.admission.taken == 2000


def test_keystrokes_at_30_hz():
    pair = Pair(Limits())
    ours, theirs = pair.open()
    for _ in range(1800):
        ours.write(b"k")
        pair.pump()
        theirs.write(b"k")
        pair.sleep(1 / 30)
        assert pair.server.mux.pause_reading_until <= pair.now
    assert len(ours.sink.data) == 1800


@pytest.mark.parametrize("count", [1, 40])
def test_a_gigabyte_a_second_one_way(count):
    """Over one stream, or over many with small windows and many CREDITs."""
    pair = Pair(Limits(receive_pool=64 * MIB if count == 1 else 4 * MIB, initial_streams=64))
    streams = [pair.open() for _ in range(count)]
    chunk = bytes(MIB // count)
    for _ in range(100):
        for ours, theirs in streams:
            ours.write(chunk)
            theirs.sink.data.clear()
        pair.pump()
        pair.sleep(0.001)
        for side in pair.sides:
            assert side.mux.pause_reading_until <= pair.now
    assert all(not ours.queued for ours, _ in streams)


@given(
    st.lists(
        st.tuples(st.integers(0, 11), st.booleans(), st.integers(1, 70_000), st.integers(1, 20)),
        min_size=20,
        max_size=120,
    ),
    st.sampled_from([None, [700], [20_000]]),
)
def test_credits_are_never_too_many_however_it_is_read(steps, pieces):
    """A scarce pool, blocked senders, and readers that take bits: Pair checks the limits after each delivery."""
    pair = Pair(Limits(initial_window=16 * KIB + 1, initial_streams=8, receive_pool=320 * KIB, max_window=64 * KIB))
    streams = [pair.open(auto=False) for _ in range(6)]
    for index, back, size, reads in steps:
        sender, reader = streams[index % 6][:: -1 if back else 1]
        sender.write(bytes(size))
        pair.pump()
        for _ in range(reads):
            reader.consumed(max(1, min(size, 20_000) // reads))
            pair.pump(pieces)
    assert pair.client.error is pair.server.error is None


def test_four_credits_for_each_data_are_honest():
    """Whole windows are sent at once and read by quarters: the most that CREDITs can be, for as long as one likes."""
    pair = Pair(Limits(initial_window=16 * KIB, max_window=16 * KIB, initial_streams=8, receive_pool=MIB))
    ours, theirs = pair.open(auto=False)
    ours.write(bytes(201 * 16 * KIB))
    pair.pump()
    for _ in range(200):
        pair.client.blocked = True
        for _ in range(4):
            theirs.consumed(4 * KIB)
            pair.pump()
        pair.client.blocked = False
        pair.client.pending = pair.client.mux.awake
        pair.pump()
    frames = pair.client.mux.flight.sent - 1  # less the OPEN
    credits_ = pair.client.mux.inbound.abuse._credits
    assert (frames, credits_, len(theirs.sink.data)) == (201, 800, 201 * 16 * KIB)


def test_opens_counts_both_sides():
    admission = Admission("client", 8)
    admission.open()
    admission.take(2)
    admission.take(4)
    assert admission.opens == 3
