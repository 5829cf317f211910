"""Flow control and memory: stalled streams, peers that do not read, many streams, and the cap on bytes in flight."""

import pytest

from konnektor.errors import Code
from konnektor.frames import Credit, Data, FrameType, Ping, Priority, scan
from konnektor.limits import FULL_FRAME, KIB, MIB, Limits
from konnektor.mux import BATCH, PAYLOAD
from tests.pair import Pair
from tests.unit.test_mux_streams import frames_of


def move(pair, seconds=0.0):
    pair.pump()
    pair.sleep(seconds)


def test_255_stalled_streams_and_one_that_proceeds():
    limits = Limits(initial_streams=256, initial_window=32 * KIB, receive_pool=32 * MIB)
    pair = Pair(limits)
    stalled = [pair.open(auto=False) for _ in range(255)]
    ours, theirs = pair.open()
    for mine, _ in stalled:
        mine.write(b"s" * MIB)
    ours.write(b"x" * 4 * MIB)
    ours.finish()
    move(pair, 1)
    assert len(theirs.sink.data) == 4 * MIB
    assert theirs.sink.kinds[-1] == "eof"
    assert all(len(their.sink.data) <= 32 * KIB for _, their in stalled)


def test_stalled_streams_hold_their_reservation_however_wide_they_were():
    limits = Limits(initial_streams=64, initial_window=16 * KIB, receive_pool=4 * MIB)
    pair = Pair(limits)
    streams = [pair.open() for _ in range(64)]
    for mine, _ in streams:
        mine.write(b"x" * MIB)
    pair.pump()
    pool = pair.server.mux.pool
    assert pool.free >= 0
    for _, theirs in streams:
        theirs.sink.auto = False
    for mine, _ in streams[1:]:
        mine.write(b"y" * MIB)
    pair.pump()
    streams[0][1].sink.auto = True
    streams[0][0].write(b"z" * MIB)
    pair.pump()
    assert len(streams[0][1].sink.data) == 2 * MIB


def test_ten_thousand_streams():
    limits = Limits(initial_streams=10_000, initial_window=16 * KIB, receive_pool=512 * MIB)
    pair = Pair(limits)
    for side in pair.sides:
        side.check = lambda: None  # the books of 10,000 streams after each step would take minutes
    pair.server.on_open = lambda stream: stream.accept()
    streams = [pair.client.open() for _ in range(10_000)]
    pair.pump()
    assert len(pair.client.mux.streams) == len(pair.server.mux.streams) == 10_000
    for stream in streams:
        stream.write(b"hello")
    pair.pump()
    for stream in pair.server.opened:
        assert stream.sink.data == b"hello"
        stream.write(bytes(stream.sink.data))
        stream.finish()
        stream.release()
    for stream in streams:
        stream.finish()
    pair.pump()
    assert all(stream.sink.data == b"hello" and stream.forgotten for stream in streams)
    for side in pair.sides:
        del side.check
    pair.assert_empty()


def test_beside_an_interactive_stream_bulk_goes_in_smaller_batches():
    pair = Pair(Limits(initial_window=MIB, initial_streams=8))
    bulk, _ = pair.open()
    talk, _ = pair.open()
    mux = pair.client.mux
    bulk.write(b"x" * 300 * KIB)
    assert len(mux.data_to_send(pair.now)) > 200 * KIB and not bulk.hurried
    for again in (False, True):
        bulk.write(b"x" * 300 * KIB)
        talk.write(b"y")
        mux.flight.in_flight = 0  # all of it has arrived
        mux.data_to_send(pair.now)
        assert bulk.hurried == talk.hurried == again
    bulk.write(b"x" * 300 * KIB)
    mux.flight.in_flight = 0  # all of it has arrived
    assert FULL_FRAME <= len(mux.data_to_send(pair.now)) < 2 * FULL_FRAME
    assert len(mux.data_to_send(pair.now, KIB)) < 2 * FULL_FRAME


@pytest.mark.parametrize("priority", [0, 1, 2])
@pytest.mark.parametrize("datagrams", [False, True])
def test_a_stream_of_the_interactive_class_is_believed_at_once(priority, datagrams):
    pair = Pair(Limits(initial_window=MIB, initial_streams=8))
    bulk, _ = pair.open()
    talk, _ = pair.open(priority=priority, datagrams=datagrams)
    mux = pair.client.mux
    bulk.write(b"x" * 300 * KIB)
    mux.data_to_send(pair.now)
    assert not bulk.hurried
    mux.flight.in_flight = 0  # all of it has arrived
    (talk.send_datagram if datagrams else talk.write)(b"y")
    bulk.write(b"x" * 300 * KIB)
    mux.data_to_send(pair.now)
    assert bulk.hurried == (priority == 0)


def test_by_default_a_turn_is_one_full_frame():
    """Always: of a quantum that is larger the rest adds up, and buys two of them in the 22nd turn or so."""
    pair = Pair(Limits(initial_window=2 * MIB, initial_streams=8))
    mux = pair.client.mux
    streams = [pair.open()[0] for _ in range(3)]
    for stream in streams:
        stream.write(bytes(30 * PAYLOAD))
    frames = []
    while len(frames) < 3 * 28:
        mux.flight.in_flight = 0  # all of it has arrived
        frames += [frame for frame, _ in scan(mux.data_to_send(pair.now)) if isinstance(frame, Data)]
    assert {len(frame.payload) for frame in frames} == {PAYLOAD}
    assert [frame.stream for frame in frames[: 3 * 28]] == [stream.id for stream in streams] * 28


@pytest.mark.parametrize("window", [32 * KIB, MIB])
def test_what_begins_bulky_is_ahead_once_and_no_interactive_stream(window):
    pair = Pair(Limits(initial_window=window, initial_streams=8))
    mux = pair.client.mux
    bulk, *others = [pair.open()[0] for _ in range(4)]
    bulk.write(b"x" * 300 * KIB)
    for other in others:
        bulk.write(b"x" * 300 * KIB)
        other.write(b"x" * 300 * KIB)
        mux.flight.in_flight = 0  # all of it has arrived
        assert mux.data_to_send(pair.now)
        assert not bulk.hurried


def bulky():
    """A pair, and its client's only stream, whose first bytes have made it bulky."""
    pair = Pair(Limits(initial_window=MIB, initial_streams=8))
    ours, _ = pair.open()
    ours.write(b"." * 128 * KIB)
    pair.pump()
    return pair, ours


def payloads(data):
    return [(len(frame.payload), frame.flags) for frame, _ in scan(data) if isinstance(frame, Data)]


@pytest.mark.parametrize("queued", [1, 2, 3, 4, 5, 9])
def test_bulk_that_is_alone_goes_in_full_frames_and_nothing_is_left_behind(queued):
    pair, ours = bulky()
    mux = pair.client.mux
    ours.write(bytes(queued * PAYLOAD))
    ours.finish()
    sent = []
    while mux.awake:
        before = mux.flight.in_flight
        batch = mux.data_to_send(pair.now)
        frames = payloads(batch)
        assert 0 < len(frames) <= 4
        assert mux.flight.in_flight - before == sum(8 + size for size, _ in frames)
        sent += frames
        mux.flight.in_flight = 0  # all of it has arrived
    assert sent == [(PAYLOAD, 0)] * (queued - 1) + [(PAYLOAD, 1)]


def test_a_batch_that_takes_all_there_was_needs_no_other():
    pair, ours = bulky()
    mux = pair.client.mux
    ours.write(bytes(4 * PAYLOAD))
    assert len(mux.data_to_send(pair.now)) == BATCH
    assert not mux.awake
    mux.flight.in_flight = 0  # all of it has arrived
    ours.write(bytes(4 * PAYLOAD + 1))
    assert len(mux.data_to_send(pair.now)) == BATCH
    assert mux.awake


@pytest.mark.parametrize("spare", [-1, 0, 1, 1023, 1024, 4096, PAYLOAD - 1, PAYLOAD, PAYLOAD + 1])
def test_bulk_that_is_alone_keeps_to_its_credit(spare):
    pair, ours = bulky()
    mux = pair.client.mux
    window = ours.send_window
    window.limit = window.sent + 2 * PAYLOAD + spare
    ours.write(bytes(4 * PAYLOAD))
    frames = payloads(mux.data_to_send(pair.now))
    assert sum(size for size, _ in frames) <= 2 * PAYLOAD + spare
    assert window.limit - window.sent < 1024
    assert [flags for _, flags in frames] == [0] * (len(frames) - 1) + [2]


def test_bulk_that_is_alone_keeps_to_what_may_be_in_flight():
    pair, ours = bulky()
    mux = pair.client.mux
    cap = mux.flight.cap(pair.now)
    mux.flight.in_flight = mux.flight.sequenced = cap - PAYLOAD - 1
    ours.write(bytes(4 * PAYLOAD))
    assert payloads(mux.data_to_send(pair.now)) == [(PAYLOAD, 0)]


@pytest.mark.parametrize("queued", [2, 3, 4, 6])
def test_bulk_that_is_alone_says_when_there_is_room(queued):
    """Though the frame that makes the room is not the last that goes."""
    pair, ours = bulky()
    mux = pair.client.mux
    mux.flight.in_flight = mux.flight.sequenced = mux.flight.cap(pair.now) - (queued - 1) * PAYLOAD
    ours.write(bytes(queued * PAYLOAD))
    ours.want_room(PAYLOAD)
    mux.data_to_send(pair.now)
    assert ours.queued == (PAYLOAD if queued < 6 else 2 * PAYLOAD)
    assert ours.sink.kinds.count("writable") == (queued < 6)


def test_idle_streams_hold_no_buffers():
    pair = Pair()
    ours, _ = pair.open()
    ours.write(b"x" * 1000)
    pair.pump()
    assert ours._queue is None


def test_a_peer_that_never_reads_leaves_memory_flat():
    """Whatever the peer asks, what is kept to answer does not grow."""
    pair = Pair()
    ours, theirs = pair.open()
    pair.pump()
    pair.server.blocked = True
    mux = pair.server.mux
    for n in range(2000):
        pair.client.inject(Data(ours.id, b"x"))
        theirs.prioritize(n % 3)
        if n % 40 == 0:
            # as often as is allowed
            pair.now += 0.25
            pair.client.inject(Ping(n), Credit(ours.id, n), Priority(ours.id, 0, 5))
    assert len(mux.control) <= 1
    assert len(mux.flight._sizes) < 10
    theirs.write(b"y" * 100_000)
    assert pair.server.wire == b""
    pair.server.blocked = False
    pair.server.mux.wake()
    pair.server.pending = True
    pair.server.flush()
    controls = [frame for frame, _ in scan(bytes(pair.server.wire)) if not isinstance(frame, Data)]
    assert len(controls) <= 5
    assert len([f for f in controls if isinstance(f, Credit)]) <= 1


def test_a_peer_that_never_acknowledges_stops_the_data():
    pair = Pair(server_limits=Limits(initial_window=16 * MIB, initial_streams=8, receive_pool=256 * MIB))
    ours, _ = pair.open()
    pair.sleep(1)
    ours.write(b"x" * 8 * MIB)
    pair.client.flush()
    flight = pair.client.mux.flight
    assert flight.cap(pair.now) <= flight.in_flight <= flight.cap(pair.now) + 64 * KIB
    small = pair.client.open()
    small.write(b"!")
    before = len(pair.client.wire)
    pair.client.flush()
    assert any(isinstance(f, Data) and bytes(f.payload) == b"!" for f in frames_of(pair.client))
    assert len(pair.client.wire) - before < 1000
    pair.pump()
    assert len(pair.server.opened[0].sink.data) == 8 * MIB


def test_frames_never_exceed_what_the_peer_takes():
    """Neither while the cap on bytes in flight lets only small streams through."""
    pair = Pair(server_limits=Limits(max_frame=16_376, initial_window=MIB, initial_streams=8, receive_pool=64 * MIB))
    ours, theirs = pair.open()
    other, _ = pair.open()
    ours.write(b"x" * MIB)
    pair.client.flush()
    other.write(b"y" * 100_000)
    pair.client.flush()
    sizes = {len(f.payload) for f in frames_of(pair.client) if isinstance(f, Data)}
    assert max(sizes) == 16_376
    pair.pump()
    assert pair.server.error is None
    assert len(theirs.sink.data) == MIB


def test_blocked_is_said_once_per_credit():
    pair = Pair()
    ours, theirs = pair.open(auto=False)
    ours.write(b"x" * 20_000)
    pair.client.flush()
    ours.write(b"y")
    ours.write(b"y" * 5000)
    pair.client.flush()
    blocked = [f for f in frames_of(pair.client) if isinstance(f, Data) and f.flags == 2]
    assert len(blocked) == 1
    pair.pump()
    theirs.consumed(16 * KIB)
    pair.pump()
    assert len(theirs.sink.data) == 25_001
    assert theirs.receive_window.size > 16 * KIB


def test_blocked_without_a_byte():
    pair = Pair()
    ours, theirs = pair.open(auto=False)
    ours.write(b"x" * (16 * KIB - 500))
    pair.pump()
    ours.write(b"y" * 600)
    assert frames_of(pair.client)[-1] == Data(1, b"", 2)
    pair.pump()
    theirs.consumed(16 * KIB)
    pair.pump()
    assert len(theirs.sink.data) == 16 * KIB + 100


def test_a_crumb_of_credit_is_answered_by_blocked_again():
    pair = Pair()
    ours, _ = pair.open(auto=False)
    ours.write(b"x" * 20_000)
    pair.pump()
    pair.server.inject(Credit(1, 16 * KIB + 10))
    assert frames_of(pair.client) == [Data(1, b"", 2)]
    pair.server.inject(Credit(1, 16 * KIB + 10))
    assert frames_of(pair.client) == [Data(1, b"", 2)]


def test_fin_needs_no_credit():
    pair = Pair()
    ours, theirs = pair.open(auto=False)
    ours.write(b"x" * 16 * KIB)
    pair.pump()
    ours.finish()
    pair.pump()
    assert theirs.sink.kinds[-1] == "eof"


def test_fin_waits_behind_blocked_data():
    pair = Pair()
    ours, theirs = pair.open(auto=False)
    ours.write(b"x" * 30_000)
    ours.finish()
    pair.pump()
    assert theirs.sink.kinds[-1] == "data"
    theirs.consumed(20_000)
    pair.pump()
    assert theirs.sink.kinds[-1] == "eof" and len(theirs.sink.data) == 30_000


def test_consuming_more_than_came_counts_once():
    pair = Pair()
    ours, theirs = pair.open(auto=False)
    ours.write(b"x" * 100)
    pair.pump()
    theirs.consumed(1000)
    theirs.consumed(1000)
    assert theirs.receive_window.consumed == 100


def test_writable_once_per_wish():
    pair = Pair()
    ours, theirs = pair.open(auto=False)
    ours.write(b"x" * 40_000)
    ours.want_room(25_000)
    pair.pump()
    assert ours.queued == 40_000 - 16 * KIB
    assert ours.sink.kinds == ["accepted", "writable"]
    theirs.consumed(16 * KIB)
    pair.pump()
    assert ours.sink.kinds == ["accepted", "writable"]


def test_no_writable_after_the_end():
    pair = Pair()
    ours, theirs = pair.open()
    theirs.finish()
    pair.pump()
    ours.write(b"x")
    ours.want_room()
    ours.finish()
    pair.pump()
    assert ours.sink.kinds == ["accepted", "eof", "closed"]


def test_interactive_passes_bulk():
    pair = Pair(Limits(initial_window=4 * MIB, initial_streams=8, receive_pool=256 * MIB))
    bulk = [pair.open(priority=2)[0] for _ in range(4)]
    key, _ = pair.open(priority=0)
    for stream in bulk:
        stream.write(b"x" * 4 * MIB)
    for _ in range(8):
        pair.client.mux.data_to_send(pair.now)
    key.write(b"k")
    batch = pair.client.mux.data_to_send(pair.now)
    first = next(frame for frame, _ in scan(batch) if isinstance(frame, Data))
    assert bytes(first.payload) == b"k"


def test_control_takes_at_most_its_share_of_a_batch():
    pair = Pair(Limits(initial_streams=1000, initial_window=16 * KIB, receive_pool=64 * MIB))
    _ours, theirs = pair.open()
    theirs.write(b"x" * 16_000)
    for _ in range(900):
        pair.client.open()
    pair.client.flush()
    pair.client.deliver()
    for stream in pair.server.opened[1:]:
        stream.accept(b"h" * 100)
    batch = pair.server.mux.data_to_send(pair.now, 64 * KIB)
    kinds = [type(frame) for frame, _ in scan(batch)]
    assert Data in kinds
    assert sum(kind is not Data for kind in kinds) * 112 < 32 * KIB
    pair.pump()


@pytest.mark.parametrize("kind", [kind for kind in FrameType if kind not in (FrameType.HELLO, FrameType.CLOSE)])
def test_nothing_before_hello(kind):
    pair = Pair(hello=False)
    length = {0x80: 2, 0x41: 60, 0x42: 40, 0x45: 16, 0x05: 4, 0x08: 12, 0x04: 12, 0x01: 3, 0x02: 0}.get(kind, 8)
    stream = 0 if 0x40 <= kind < 0x46 or kind in (7, 8) else 1
    pair.client.inject(bytes([kind, 0, 0, length]) + stream.to_bytes(4, "big") + bytes(length))
    assert pair.server.error.code == Code.PROTOCOL


def test_bulk_pauses_for_a_ping_that_measures_the_path():
    pair = Pair()
    ours, _theirs = pair.open()
    mux = pair.client.mux
    pair.pump()
    mux.flight.on_sent(100_000)  # as if so much were on its way
    pair.now += 1.0
    ours.write(b"x" * 1000)
    kinds = [type(frame) for frame, _ in scan(mux.data_to_send(pair.now))]
    assert kinds == [Data], "a stream that was idle does not wait for it"
    ours.spent, ours.spent_at = 1e9, pair.now
    ours.write(b"x" * 1000)
    assert mux.data_to_send(pair.now) == b""
    mux.flight.on_ack(mux.flight.sent, pair.now)
    kinds = [type(frame) for frame, _ in scan(mux.data_to_send(pair.now))]
    assert kinds == [Ping, Data]


def test_the_last_streams_may_all_be_wanted_after_one_was_gone():
    pair = Pair(Limits(initial_streams=100))
    ours, theirs = pair.open()
    ours.cancel()
    theirs.release()
    pair.pump()
    for _ in range(100):
        pair.client.open()
    pair.pump()
    assert len(pair.server.mux.streams) == 100


def test_what_idle_streams_hold_beyond_their_reservations_is_counted():
    pair = Pair()
    ours, theirs = pair.open()
    ours.write(bytes(4 * MIB))
    pair.pump()
    mux = pair.server.mux
    assert len(theirs.sink.data) == 4 * MIB and mux.pool.extra > 0
    assert mux.idle_credit(pair.now) == 0
    pair.sleep(60)
    assert mux.idle_credit(pair.now) == mux.pool.extra > 0
    ours.write(bytes(4 * MIB))
    pair.pump()
    assert mux.idle_credit(pair.now) == 0
