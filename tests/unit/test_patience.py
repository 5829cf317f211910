"""What a peer cannot bring about by keeping to the format and doing nothing that it owes; and what a pause of ours cannot."""

import tracemalloc

import pytest

from konnektor.errors import CalmError, PeerTimeoutError
from konnektor.flight import LONGEST
from konnektor.frames import Ack, Credit, Datagram, Feature, Hello, Open, OpenTLV, Pong, Reset
from konnektor.limits import KIB, MIB, Limits
from konnektor.mux import Mux
from konnektor.outbound import UNACKNOWLEDGED
from konnektor.owed import RESET_OWED
from konnektor.replay import BATCH_COST, Replay, Ticket
from konnektor.settings import Settings
from tests.link import Link, Meter
from tests.pair import Pair
from tests.unit.test_resume import resumable


class Datagrams(Meter):
    def datagram_received(self, data): ...


class Refusing:
    """A handler that takes no stream."""

    def output_pending(self): ...
    def deadline_moved(self, when): ...
    def hello_received(self, settings): ...

    def stream_opened(self, stream):
        stream.refuse(33)
        stream.release()


def refusing(features):
    """A server that refuses every stream, and whose peer has said HELLO with ``features``."""
    limits = Limits()
    own = Settings.of(limits, features=Feature.RESUME | Feature.DATAGRAM)
    mux = Mux("server", Refusing(), limits, own, nonce=b"S" * 32, now=0.0, ticket=Ticket(b"i" * 16, b"k" * 32))
    mux.start()
    mux.receive(Hello(1, 1, b"C" * 32, Settings.of(limits, features=features).to_tlvs()).encode(), 0.0)
    mux.data_to_send(0.0)
    return mux


@pytest.mark.parametrize(
    "tlvs", [{1: bytes(8 * KIB - 20)}, dict.fromkeys(range(1000, 5000, 2), b"")], ids=["long", "many"]
)
@pytest.mark.parametrize("features", [Feature.RESUME, 0], ids=["resumable", "not"])
def test_streams_that_were_refused_are_not_kept_for_a_peer_that_acknowledges_nothing(features, tlvs):
    mux = refusing(features)
    tracemalloc.start()
    try:
        for number in range(1, 1000, 2):
            mux.receive(Open(number, 1, "x", tlvs).encode(), 0.0)
            mux.data_to_send(0.0)
            mux.receive(Reset(number, 40, 0).encode(), 0.0)
            mux.data_to_send(0.0)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert mux.error is None and not mux.streams
    assert len(mux.owed) <= 65
    assert held < 500 * (BATCH_COST + 512)


def test_what_nobody_knows_of_a_stream_is_not_kept():
    pair = Pair()
    _, theirs = pair.open(tlvs={OpenTLV.SOURCE: b"10.0.0.1"} | dict.fromkeys(range(1000, 5000, 2), b""))
    assert set(theirs.tlvs) == {OpenTLV.HEADER, OpenTLV.DEADLINE, OpenTLV.SOURCE}


def test_without_a_replay_buffer_the_frames_that_wait_for_an_ack_are_bounded_too():
    mux = refusing(0)
    mux.flight.sent += UNACKNOWLEDGED  # as if so many had gone out
    mux.receive(Open(1, 1, "x").encode(), 0.0)
    assert not mux.data_to_send(0.0) and mux.control
    mux.flight._sizes.extend([0] * UNACKNOWLEDGED)
    mux.receive(Ack(mux.flight.sent - 10).encode(), 0.0)
    assert mux.awake and mux.data_to_send(0.0) and not mux.control


# The replay buffer


def test_what_is_sent_again_is_no_second_copy():
    replay = Replay()
    for _ in range(32):
        replay.keep([bytes(64 * KIB)] * 4, 256 * KIB)
    tracemalloc.start()
    try:
        rest = replay.rest(64 * KIB)
        size = 0
        for batch in rest:
            size += len(batch)
            assert tracemalloc.get_traced_memory()[0] < MIB
    finally:
        tracemalloc.stop()
    assert size == 8 * MIB - 64 * KIB


def test_large_payloads_are_kept_as_they_are_held_anyway():
    pair = resumable(Limits(initial_window=MIB, initial_streams=8))
    stream, _ = pair.open()
    payload = bytes(256 * KIB)
    stream.write(payload)
    pair.client.flush()
    kept = [part for _, batch, _ in pair.client.mux.resumption.replay._batches for part in batch]
    assert sum(len(part) for part in kept if isinstance(part, memoryview) and part.obj is payload) >= 128 * KIB
    assert sum(len(part) for part in kept if not isinstance(part, memoryview)) < KIB


def test_batches_count_as_much_after_a_resume():
    pair = resumable()
    stream, _ = pair.open()
    for _ in range(100):
        stream.write(b"x")
        pair.client.flush()
    before = pair.client.mux.resumption.replay.footprint
    assert before > 100 * BATCH_COST
    pair.client.mux.flight.reconnected()
    assert pair.client.mux.resumption.replay.footprint == before


# PINGs


@pytest.mark.parametrize("round_trip", [0.0002, 0.03, 0.25])
@pytest.mark.parametrize("rate", [600_000, 20_000_000])
def test_datagrams_beyond_a_path_full_do_not_end_the_session(round_trip, rate):
    """One PING is out at a time: that which measures waits for the one that reports datagrams, or takes its place."""
    pair = Pair()
    link = Link(pair, delay=round_trip / 2, rate=12.5e6)
    stream = pair.client.open("udp", datagrams=True)
    link.run(2 * round_trip + 0.1)
    theirs = pair.server.opened[-1]
    theirs.accept()
    theirs.sink = Datagrams(theirs)
    keys, _ = link.open()
    end = pair.now + 4
    measured = pair.client.mux.flight._clean_at
    while pair.now < end:
        for _ in range(10):
            stream.send_datagram(bytes(1200))
        keys.stream.write(b"x")
        link.run(12_000 / rate)
        assert pair.client.error is None and pair.server.error is None
    assert pair.client.mux.flight._clean_at > measured


def test_a_ping_that_is_never_answered_ends_the_session():
    """Datagrams are counted as in flight until a PONG tells of them, and what else there is to send would wait for ever."""
    pair = Pair(Limits(initial_streams=20))
    side = pair.client
    pair.sleep(1)
    side.mux.ping()
    for _ in range(1400):
        side.flush()
        side.wire.clear()
        side.mux.receive(Datagram(999, 0, b"a byte of life").encode(), pair.now)
        if side.mux.flight.sent > side.mux.flight.acked:
            side.mux.receive(Ack(side.mux.flight.sent).encode(), pair.now)
        pair.now += 0.25
        if side.timer is not None and side.timer <= pair.now:
            pair.fire(side)
        if side.error is not None:
            break
    assert isinstance(side.error, PeerTimeoutError)
    assert "PING" in str(side.error)


def test_a_round_trip_is_not_believed_beyond_what_any_path_takes():
    pair = Pair()
    side = pair.client
    side.mux.ping()
    side.flush()
    pair.now += 600
    side.mux.receive(Pong(side.mux.liveness._ping_count, 0).encode(), pair.now)
    assert side.error is None
    assert side.mux.flight.rtt <= LONGEST


# Time


def test_a_process_that_stood_still_does_not_blame_its_peer_for_a_reset_it_has_not_read():
    pair = Pair()
    ours, _theirs = pair.open()
    ours.stop()
    pair.client.flush()
    pair.client.deliver()
    pair.client.mux.receive(Ack(pair.server.mux.inbound.acks.seq).encode(), pair.now)
    pair.now += RESET_OWED + 1.5
    pair.fire(pair.client)  # the timer before the reading, as a loop may
    assert pair.client.error is None
    pair.pump()
    assert pair.client.error is None


def test_a_stream_that_comes_when_the_grace_is_over_is_refused():
    pair = Pair()
    ours = pair.client.open()
    pair.client.flush()
    pair.server.on_open = lambda stream: stream.accept()
    pair.server.mux.drain(0.0, pair.now)
    pair.server.flush()
    pair.client.deliver()
    pair.pump()
    assert ours.sink.error is not None and ours.sink.error.refused
    assert not pair.server.opened


# Credit


def test_credit_that_is_no_use_does_not_buy_more():
    pair = Pair()
    streams = [pair.open()[0] for _ in range(4)]
    for stream in streams:
        stream.write(bytes(MIB))
    pair.client.flush()
    limits = [stream.send_window.limit for stream in streams]
    with pytest.raises(CalmError):
        for crumb in range(1, 2000):
            for stream, limit in zip(streams, limits, strict=True):
                pair.client.mux.receive(Credit(stream.id, limit + crumb).encode(), pair.now)
            pair.client.flush()
            pair.client.mux.receive(Ack(pair.client.mux.flight.sent).encode(), pair.now)
            if pair.client.mux.error:
                raise pair.client.mux.error


def test_a_batch_that_was_taken_in_is_not_sent_again():
    replay = Replay()
    replay.keep([b"abc"], 3)
    replay.keep([b"de"], 2)
    assert list(replay.rest(3)) == [b"de"]
