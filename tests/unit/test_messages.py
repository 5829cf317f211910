"""Small messages of idle streams, which are rendered in a loop of their own: what holds for all else holds for them."""

import pytest

from konnektor.frames import Accept, Data, Datagram, scan
from konnektor.limits import KIB, MIB, Limits
from konnektor.scheduler import BUCKET, FRESH, WAITING
from tests.pair import Pair
from tests.unit.test_mux_flow import payloads

SIZE = 4000
FRAME = SIZE + 8


def messages(count, size=SIZE):
    """A pair, its client's mux, and so many of the client's streams, each with a message that waits."""
    pair = Pair(Limits(initial_window=MIB, initial_streams=32))
    streams = [pair.open()[0] for _ in range(count)]
    pair.sleep(1)
    for stream in streams:
        stream.write(bytes(size))
    return pair, pair.client.mux, streams


def frames(batch):
    return [frame for frame, _ in scan(batch)]


def test_each_goes_whole_in_the_order_of_writing():
    pair, mux, streams = messages(5)
    sent = [frame for frame in frames(mux.data_to_send(pair.now)) if isinstance(frame, Data)]
    assert [(frame.stream, len(frame.payload), frame.flags) for frame in sent] == [(s.id, SIZE, 0) for s in streams]
    assert not mux.scheduler.active and not mux.awake
    mux.assert_invariants()


def test_they_keep_to_the_size_of_a_batch():
    pair, mux, streams = messages(20)
    size = 0
    for _ in streams:
        batch = mux.data_to_send(pair.now, 4 * KIB)
        assert len(batch) <= 4 * KIB + FRAME
        size += len(batch)
        if not mux.awake:
            break
    assert len(streams) * FRAME <= size < len(streams) * FRAME + KIB


@pytest.mark.parametrize("times", [1, 2])
def test_they_keep_to_what_may_be_in_flight(times):
    """Past the cap by a cap more at most, as whatever was idle."""
    pair, mux, streams = messages(20)
    flight = mux.flight
    cap = flight.cap(pair.now)
    flight.in_flight = before = times * cap - SIZE
    mux.data_to_send(pair.now)
    went = 20 if times == 1 else 1
    assert flight.in_flight == before + went * FRAME <= 2 * cap + FRAME
    assert sum(stream.queued for stream in streams) == (20 - went) * SIZE


def test_a_datagram_goes_ahead_and_is_not_forgotten():
    pair = Pair()
    ours, _ = pair.open(name="udp", datagrams=True)
    ours.write(b"message")
    ours.send_datagram(b"datagram")
    assert [type(frame) for frame in frames(pair.client.mux.data_to_send(pair.now))] == [Datagram, Data]


def test_what_a_sink_does_in_the_middle_counts():
    """One that is told of room ends another stream, whose message is not sent any more, and writes to a third."""
    pair, mux, (first, second, third) = messages(3)

    def writable(_):
        second.cancel()
        third.write(b"more")

    first.sink.on["writable"] = writable
    first.want_room()
    sent = [frame for frame in frames(mux.data_to_send(pair.now)) if isinstance(frame, Data)]
    assert first.sink.kinds.count("writable") == 1
    assert next(frame.stream for frame in sent if frame.payload) == first.id
    assert second.id not in [frame.stream for frame in sent]
    assert sum(len(frame.payload) for frame in sent if frame.stream == third.id) == SIZE + 4
    pair.pump()
    assert pair.client.error is pair.server.error is None


@pytest.mark.parametrize(("spare", "sent"), [(1, (SIZE, 0)), (0, (SIZE, 0)), (-1, (SIZE - 1, 2))])
def test_they_keep_to_their_credit(spare, sent):
    pair, mux, (stream,) = messages(1)
    stream.send_window.limit = stream.send_window.sent + SIZE + spare
    (frame,) = (frame for frame in frames(mux.data_to_send(pair.now)) if isinstance(frame, Data))
    assert (len(frame.payload), frame.flags) == sent


def test_what_is_more_than_small_goes_in_frames_that_the_peer_takes():
    pair = Pair(server_limits=Limits(max_frame=16_376))
    ours, _ = pair.open()
    ours.write(bytes(17_000))
    sent = [len(frame.payload) for frame in frames(pair.client.mux.data_to_send(pair.now)) if isinstance(frame, Data)]
    assert sent == [16_376, 17_000 - 16_376]


def test_who_sends_many_is_bulky_in_the_end():
    pair, mux, (stream,) = messages(1)
    stream.send_window.limit = 2 * BUCKET
    for number in range(BUCKET // FRAME + 2):
        assert stream.place == (FRESH if number * FRAME < BUCKET else WAITING)
        mux.data_to_send(pair.now)
        mux.flight.in_flight = 0  # all of it has arrived
        stream.write(bytes(SIZE))


@pytest.mark.parametrize("batch", [1, 107, 108, 109, 216, 217])
def test_small_messages_end_a_batch_that_is_full(batch):
    pair, mux, _ = messages(4, 100)
    assert payloads(mux.data_to_send(pair.now, batch)) == [(100, 0)] * -(-batch // 108)
    assert mux.awake


@pytest.mark.parametrize("room", [-108, -1, 0, 1, 108, 109])
def test_small_messages_that_pass_the_cap_are_counted(room):
    pair, mux, _ = messages(4, 100)
    mux.flight.in_flight = mux.flight.sequenced = mux.flight.cap(pair.now) - room
    assert len(payloads(mux.data_to_send(pair.now))) == 4
    assert mux.outbound._passed == (4 - max(0, -(-room // 108))) * 108


def test_what_waits_for_credit_does_not_say_so_again_for_what_would_fit_by_itself():
    pair, mux, (ours,) = messages(1, 0)
    ours.send_window.limit = ours.send_window.sent + 500
    ours.write(bytes(501))
    assert payloads(mux.data_to_send(pair.now)) == [(0, 2)]
    ours.write(b"x")
    assert not mux.awake and mux.data_to_send(pair.now) == b""


@pytest.mark.parametrize("size", [4096, 4097, 16 * KIB])
def test_on_a_slow_path_only_what_fits_the_least_frame_goes_whole(size):
    pair, mux, _ = messages(1, size)
    mux.flight._rates[-1] = mux.flight.rate = 1000.0  # bytes a second
    assert max(payloads(mux.data_to_send(pair.now))) == (4096, 0)


def test_small_messages_are_booked_one_by_one_with_their_headers():
    pair, mux, streams = messages(3, 0)
    pair.sleep(1)
    for size, stream in enumerate(streams, 100):
        stream.write(bytes(size))
    mux.data_to_send(pair.now)
    assert list(mux.flight._sizes) == [stream.spent for stream in streams] == [108, 109, 110]


def test_a_bulky_stream_that_comes_up_between_small_messages_gives_way():
    """The sink of the first message brings it: the second has company."""
    pair, mux, (first, second, bulk) = messages(3, 0)
    first.sink.on["writable"] = lambda _: bulk.write(bytes(300 * KIB))
    bulk.spent, bulk.spent_at = 1e9, pair.now
    for again in (False, True):
        first.write(b"1")
        first.want_room()
        second.write(b"2")
        mux.data_to_send(pair.now)
        assert bulk.hurried == again
        mux.flight.in_flight = 0  # all of it has arrived


def test_the_last_message_makes_room_as_any_other():
    pair, mux, (ours,) = messages(1, 1)
    ours.want_room()
    ours.finish()
    assert payloads(mux.data_to_send(pair.now)) == [(1, 1)]
    assert ours.sink.kinds == ["accepted", "writable"]


def test_no_message_overtakes_its_accept():
    """Where there is more control than goes into one batch."""
    pair = Pair()
    for _ in range(4):
        pair.client.open()
    pair.pump()
    for stream in pair.server.opened:
        stream.accept(b"h" * 100)
        stream.write(b"x")
    batches = b"".join(pair.server.mux.data_to_send(pair.now, 128) for _ in range(9))
    seen = [(frame.stream, type(frame)) for frame, _ in scan(batches) if isinstance(frame, Accept | Data)]
    assert sorted(seen, key=lambda each: each[0]) == [(n, kind) for n in (1, 3, 5, 7) for kind in (Accept, Data)]


def test_bytes_for_a_stream_whose_open_waits_wake_nobody():
    pair = Pair()
    for _ in range(8):
        pair.open()
    waiting = pair.client.open()
    pair.pump()
    assert not waiting.id
    waiting.write(b"x")
    assert not pair.client.mux.awake and not pair.client.mux.scheduler.active
