"""Small messages of idle streams, which are rendered in a loop of their own: what holds for all else holds for them."""

import pytest

from konnektor.frames import Data, Datagram, scan
from konnektor.limits import KIB, Limits
from konnektor.scheduler import BUCKET, FRESH, WAITING
from tests.pair import Pair

SIZE = 4000
FRAME = SIZE + 8


def messages(count):
    """A pair whose client has so many streams open, each with a message that waits."""
    pair = Pair(Limits())
    streams = [pair.open()[0] for _ in range(count)]
    pair.sleep(1)
    for stream in streams:
        stream.write(bytes(SIZE))
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
