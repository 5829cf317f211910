"""Datagrams: bounded queues that drop the oldest, who may send when, and their place beside data and in flight."""

import pytest

from konnektor import flight
from konnektor.datagrams import LEAST, SESSION_HELD, STREAM_HELD, DatagramPool, DatagramQueue, Datagrams
from konnektor.errors import Code, LocalProtocolError, StreamClosedError, UnsupportedError
from konnektor.frames import Accept, Data, Datagram, Open, Ping, Reset, Stop, scan
from konnektor.limits import KIB, Limits
from konnektor.replay import Replay
from konnektor.settings import Settings
from konnektor.states import Receiving, Sending
from tests.pair import SMALL, Pair


def udp(pair, opener=None, **kwargs):
    return pair.open(opener, name="udp", datagrams=True, **kwargs)


def sent(side):
    """What a side has to say now, taken out of the wire."""
    side.flush()
    frames = [
        frame._replace(payload=bytes(frame.payload)) if isinstance(frame, Data | Datagram) else frame
        for frame, _ in scan(bytes(side.wire))
    ]
    side.wire.clear()
    return frames


# The queue


def test_first_in_first_out():
    queue = DatagramQueue(DatagramPool())
    queue.put(b"a")
    queue.put(b"")
    queue.put(b"c")
    assert len(queue) == 3 and queue
    assert [queue.take() for _ in range(3)] == [b"a", b"", b"c"]
    assert not queue and queue.held == queue.dropped == 0
    with pytest.raises(IndexError):
        queue.take()


def test_a_stream_drops_its_oldest():
    pool = DatagramPool()
    queue = DatagramQueue(pool)
    for number in range(70):
        queue.put(bytes([number]) * KIB)
        assert queue.held == pool.held <= STREAM_HELD
        pool.assert_invariants()
    assert (queue.dropped, pool.dropped) == (6, 6)
    assert [queue.take()[0] for _ in range(64)] == list(range(6, 70))
    assert pool.held == 0


def test_the_largest_displaces_everything_and_fits():
    queue = DatagramQueue(DatagramPool())
    for _ in range(10):
        queue.put(b"x" * 1000)
    queue.put(b"y" * 65_534)
    queue.put(b"")
    assert (len(queue), queue.dropped) == (1, 11)


def test_empty_ones_are_not_free():
    queue = DatagramQueue(DatagramPool())
    for _ in range(1000):
        queue.put(b"")
    assert len(queue) == STREAM_HELD // LEAST


def test_a_session_drops_its_oldest_whosever_it_is():
    pool = DatagramPool()
    queues = [DatagramQueue(pool) for _ in range(20)]
    for queue in queues:
        for _ in range(64):
            queue.put(b"x" * KIB)
        pool.assert_invariants()
    assert pool.held == SESSION_HELD
    assert [len(queue) for queue in queues] == [0] * 4 + [64] * 16
    assert [queue.dropped for queue in queues] == [64] * 4 + [0] * 16
    assert pool.dropped == 256
    # What was taken makes room; what is cleared is counted.
    queues[19].take()
    queues[0].put(b"x" * KIB)
    assert pool.dropped == 256
    queues[19].clear()
    queues[19].clear()
    assert (queues[19].dropped, pool.dropped, pool.held) == (63, 319, SESSION_HELD - 63 * KIB)
    pool.assert_invariants()


def test_what_is_not_even_kept_is_counted():
    both = Datagrams()
    queue = DatagramQueue(both.incoming)
    queue.discard()
    both.outgoing.dropped += 1
    assert (queue.dropped, both.dropped) == (1, 2)


# Who may, and when


def test_both_ways():
    pair = Pair()
    ours, theirs = udp(pair)
    ours.send_datagram(b"question")
    ours.send_datagram(b"")
    theirs.send_datagram(b"answer")
    pair.pump()
    assert theirs.sink.datagrams == [b"question", b""]
    assert ours.sink.datagrams == [b"answer"]
    client, server = pair.client.mux.datagrams, pair.server.mux.datagrams
    assert (client.sent, client.received, client.dropped) == (2, 1, 0)
    assert (server.sent, server.received, server.dropped) == (1, 2, 0)
    assert ours.send_window.sent == 0 and pair.client.mux.flight.sent == 1  # neither credit nor sequence
    for stream in (ours, theirs):
        stream.finish()
    pair.pump()
    pair.assert_empty()


def test_largest():
    pair = Pair()
    ours, theirs = udp(pair)
    assert ours.max_datagram == 65_534
    ours.send_datagram(b"x" * 65_534)
    pair.pump()
    assert theirs.sink.datagrams == [b"x" * 65_534]
    with pytest.raises(LocalProtocolError, match="at most 65534 bytes, not 65535"):
        ours.send_datagram(b"x" * 65_535)


def test_no_larger_than_the_peer_takes():
    pair = Pair(SMALL, Limits(max_frame=16_376, initial_streams=8))
    ours, theirs = udp(pair)
    with pytest.raises(LocalProtocolError, match="at most 16375 bytes, not 16376"):
        ours.send_datagram(b"x" * 16_376)
    ours.send_datagram(b"x" * 16_375)
    pair.pump()
    assert len(theirs.sink.datagrams[0]) == 16_375


def test_before_the_answer_they_wait():
    pair = Pair()
    ours, theirs = udp(pair, accept=False)
    ours.send_datagram(b"early")
    ours.write(b"data")
    assert [type(frame) for frame in sent(pair.client)] == [Data]
    theirs.accept()
    pair.pump()
    assert theirs.sink.datagrams == [b"early"]


def test_before_open_they_wait():
    pair = Pair()
    ours = pair.client.open("udp", datagrams=True)
    ours.send_datagram(b"early")
    pair.pump()
    pair.server.opened[0].accept()
    pair.pump()
    assert pair.server.opened[0].sink.datagrams == [b"early"]


def test_accepter_before_its_accept():
    pair = Pair()
    _ours, theirs = udp(pair, accept=False)
    with pytest.raises(LocalProtocolError, match="accept the stream"):
        theirs.send_datagram(b"x")
    theirs.accept()
    theirs.send_datagram(b"x")
    assert sent(pair.server) == [Accept(1), Datagram(1, 0, b"x")]


def test_refused_drops_what_waits():
    pair = Pair()
    ours, theirs = udp(pair, accept=False)
    ours.send_datagram(b"early")
    theirs.refuse(Code.DENIED)
    pair.pump()
    assert (ours.datagrams.dropped, pair.client.mux.datagrams.dropped) == (1, 1)
    pair.assert_empty()


@pytest.mark.parametrize("end", ["reset", "cancel"])
def test_reset_drops_what_waits(end):
    pair = Pair()
    ours, theirs = udp(pair)
    ours.send_datagram(b"late")
    getattr(ours, end)()
    pair.pump()
    assert theirs.sink.datagrams == [] and pair.client.mux.datagrams.dropped == 1
    with pytest.raises(StreamClosedError):
        ours.send_datagram(b"x")


def test_fin_comes_behind_them():
    pair = Pair()
    ours, theirs = udp(pair)
    ours.write(b"data")
    ours.send_datagram(b"last")
    ours.finish()
    frames = sent(pair.client)
    assert frames == [Datagram(1, 0, b"last"), Data(1, b"data", 1)]
    with pytest.raises(StreamClosedError):
        ours.send_datagram(b"x")
    theirs.cancel()


def test_fin_before_the_answer_does_not_wait_for_them():
    pair = Pair()
    ours, theirs = udp(pair, accept=False)
    ours.send_datagram(b"lost")
    ours.finish()
    pair.pump()
    assert ours.sending is Sending.ENDED and pair.client.mux.datagrams.dropped == 1
    theirs.accept()
    pair.pump()
    assert theirs.sink.events == [("eof",)]


def test_a_type_without():
    pair = Pair()
    ours, theirs = pair.open()
    for stream in (ours, theirs):
        assert stream.datagrams is None and stream.datagram_inbox() is None
        with pytest.raises(LocalProtocolError, match="'echo' have no datagrams"):
            stream.send_datagram(b"x")
    pair.client.inject(Datagram(1, 0, b"x"))
    assert pair.server.error.code == Code.STREAM_STATE
    assert pair.server.error.reason == "DATAGRAM on stream 1, whose type has none"


@pytest.mark.parametrize("who", ["client", "server"])
def test_used_only_if_both_have_them(who):
    pair = Pair(hello=False)
    getattr(pair, who).mux.settings = Settings.of(SMALL, features=0)
    early = pair.client.open("udp", datagrams=True)
    early.send_datagram(b"x")
    pair.pump()
    assert not pair.client.mux.datagrams.agreed and not pair.server.mux.datagrams.agreed
    for side in pair.sides:
        with pytest.raises(UnsupportedError, match="no datagrams"):
            side.open("udp", datagrams=True)
    pair.server.opened[0].accept()  # a careless handler
    pair.pump()
    assert pair.client.mux.datagrams.sent == 0 and len(early.datagrams) == 1
    early.write(b"data goes on")
    pair.pump()
    assert pair.server.opened[0].sink.data == b"data goes on"


# What the receiver drops


def dropped(pair):
    assert pair.server.error is None
    return pair.server.mux.datagrams.incoming.dropped


def test_never_opened_and_forgotten():
    pair = Pair()
    pair.client.inject(Datagram(1, 0, b"x"), Datagram(4711, 0, b""), Datagram(2, 0, b"x"))
    assert dropped(pair) == 3
    ours, theirs = udp(pair)
    ours.finish()
    theirs.finish()
    pair.pump()
    pair.client.inject(Datagram(1, 0, b"x"))
    assert dropped(pair) == 4


def test_pending():
    pair = Pair()
    _ours, theirs = udp(pair, accept=False)
    pair.client.inject(Datagram(1, 0, b"x"))
    assert dropped(pair) == 1 and theirs.sink.events == []
    # The other way round, too: the opener has no answer yet.
    opened = pair.server.open("udp", datagrams=True)
    pair.server.flush()
    pair.client.inject(Datagram(opened.id, 0, b"x"))
    opened.cancel()
    pair.server.flush()
    pair.client.inject(Datagram(opened.id, 0, b"x"))
    assert dropped(pair) == 3 and opened.sink.datagrams == []


def test_refused():
    pair = Pair()
    _ours, theirs = udp(pair, accept=False)
    theirs.refuse(Code.DENIED)
    pair.server.flush()
    assert theirs.receiving is Receiving.DISCARDING
    pair.client.inject(Datagram(1, 0, b"x"))
    assert dropped(pair) == 1


@pytest.mark.parametrize("frame", [Data(1, b"", 1), Reset(1, 40, 0)])
def test_finished(frame):
    pair = Pair()
    udp(pair)
    pair.client.inject(frame, Datagram(1, 0, b"x"))
    assert dropped(pair) == 1


def test_stopped():
    pair = Pair()
    ours, theirs = udp(pair)
    theirs.stop()
    pair.server.flush()
    ours.send_datagram(b"crosses")
    pair.client.flush()
    pair.client.deliver()
    assert dropped(pair) == 1 and theirs.sink.datagrams == []


def test_one_half_ended_leaves_the_other():
    pair = Pair()
    ours, theirs = udp(pair)
    ours.finish()
    pair.pump()
    theirs.send_datagram(b"still")
    pair.pump()
    assert ours.sink.datagrams == [b"still"]


def test_another_context_is_dropped():
    pair = Pair()
    _ours, theirs = udp(pair)
    pair.client.inject(Datagram(1, 1, b"x"), Datagram(1, 0, b"y"))
    assert dropped(pair) == 1 and theirs.sink.datagrams == [b"y"]


def test_a_sink_of_bytes_lets_them_pass():
    class Bytes:
        def closed(self):
            pass

    pair = Pair()
    _ours, theirs = udp(pair)
    sink, theirs.sink = theirs.sink, Bytes()
    pair.client.inject(Datagram(1, 0, b"x"))
    assert dropped(pair) == 1
    theirs.sink = sink


# Beside data, and in flight


def test_the_queue_drops_its_oldest_while_the_connection_is_full():
    pair = Pair()
    ours, theirs = udp(pair)
    pair.client.blocked = True
    for number in range(100):
        ours.send_datagram(bytes([number]) * KIB)
    pair.client.blocked = False
    pair.pump()
    assert [data[0] for data in theirs.sink.datagrams] == list(range(36, 100))
    assert pair.client.mux.datagrams.outgoing.dropped == 36


def test_a_stream_whose_datagrams_were_displaced_sends_nothing():
    pair = Pair(Limits(initial_streams=20))
    streams = [udp(pair) for _ in range(17)]
    pair.client.blocked = True
    for ours, _theirs in streams:
        for _ in range(64):
            ours.send_datagram(b"x" * KIB)
    pair.client.blocked = False
    pair.pump()
    pair.sleep(5)
    assert [len(theirs.sink.datagrams) for _, theirs in streams] == [0] + [64] * 16
    assert not pair.client.mux.scheduler.active


def test_displaced_with_data_that_lacks_credit():
    """BLOCKED is said once for each value of the credit, whatever comes and goes beside it."""
    pair = Pair(Limits(initial_window=16 * KIB, initial_streams=20))
    ours, theirs = udp(pair, auto=False)
    others = [udp(pair)[0] for _ in range(16)]
    ours.write(b"x" * 17 * KIB)
    pair.pump()
    pair.client.blocked = True
    ours.send_datagram(b"displaced")
    for other in others:
        for _ in range(64):
            other.send_datagram(b"x" * KIB)
    assert not ours.datagrams
    pair.client.blocked = False
    pair.pump()
    ours.send_datagram(b"needs no credit")
    frames = sent(pair.client)
    assert Datagram(ours.id, 0, b"needs no credit") in frames
    assert not any(isinstance(frame, Data) for frame in frames)
    theirs.consumed(17 * KIB)


def in_flight(pair):
    return pair.client.mux.flight.in_flight


def test_in_flight_until_the_pong():
    pair = Pair()
    ours, theirs = udp(pair)
    pair.sleep(1)
    assert in_flight(pair) == 0
    ours.send_datagram(b"x" * 1000)
    pair.pump()
    ours.send_datagram(b"x" * 1000)
    pair.client.flush()
    # The first one went with a PING before it, so only the next one speaks for it.
    assert in_flight(pair) == 2 * 1009
    pair.pump()
    assert len(theirs.sink.datagrams) == 2 and in_flight(pair) == 2 * 1009
    pair.client.mux.ping()
    pair.client.flush()
    ours.send_datagram(b"behind the PING")
    pair.pump()
    assert in_flight(pair) == 9 + len(b"behind the PING")


def test_beyond_the_cap_they_wait_for_a_pong():
    pair = Pair(Limits(initial_streams=20, flight_floor=64 * KIB))
    streams = [udp(pair) for _ in range(8)]
    pair.sleep(1)
    pair.server.blocked = True  # no PONG
    for ours, _theirs in streams:
        for _ in range(60):
            ours.send_datagram(b"x" * KIB)
    pair.pump()
    out = pair.client.mux.datagrams.sent
    assert 64 <= out <= 2 * 64 + 1 and pair.client.mux.datagrams.dropped == 0
    assert not pair.client.mux.awake
    pair.sleep(3)
    assert pair.client.mux.datagrams.sent == out
    pair.server.blocked = False
    pair.pump()
    assert pair.client.mux.datagrams.sent == 480
    assert all(len(theirs.sink.datagrams) == 60 for _, theirs in streams)
    assert in_flight(pair) < flight.REPORT_EVERY


def test_a_ping_for_each_64_kib():
    pair = Pair(Limits(initial_streams=20))
    ours, _theirs = udp(pair)
    pair.sleep(1)
    pings = 0
    for _ in range(40):
        for _ in range(16):
            ours.send_datagram(b"x" * KIB)
        pair.client.flush()
        pings += sum(isinstance(frame, Ping) for frame, _ in scan(bytes(pair.client.wire)))
        pair.pump()
    assert pings == 1 + 40 * 16 // 64  # and the one that data alone has, too


def test_a_ping_that_is_out_delays_the_next():
    pair = Pair(Limits(initial_streams=20))
    ours, _theirs = udp(pair)
    pair.sleep(1)
    pair.server.blocked = True
    for _ in range(40):
        ours.send_datagram(b"x" * 4 * KIB)
        pair.pump()
    assert pair.client.mux.flight.report_wanted
    pair.server.blocked = False
    pair.pump()
    assert not pair.client.mux.flight.report_wanted and in_flight(pair) < flight.REPORT_EVERY


def test_the_path_is_still_measured_without_its_queue():
    """Under datagrams a PING is nearly always out, behind a queue of theirs; what it takes must not become the cap."""
    pair = Pair(Limits(initial_streams=20))
    ours, _theirs = udp(pair)
    bulk, got = pair.open()
    mux = pair.client.mux
    mux.flight.on_rtt(0.01, 0)
    for _ in range(3):
        # Round trips of 20 ms, full: what is sent arrives, and is answered at its end.
        for _ in range(50):
            for _ in range(15):
                ours.send_datagram(b"x" * 4 * KIB)
            bulk.write(b"y" * 8 * KIB)
            pair.client.flush()
            pair.now += 0.02
            pair.client.deliver()
            pair.server.flush()
            pair.server.deliver()
        assert pair.now - mux.flight._clean_at < 1
    pair.pump()
    assert len(got.sink.data) == 150 * 8 * KIB


def test_shares_with_bulk():
    """A stream of datagrams and one of bytes take turns of 64 KiB, both being bulky."""
    pair = Pair(Limits(initial_window=512 * KIB, initial_streams=20))
    lossy, _ = udp(pair)
    bulk, _ = pair.open()
    for _ in range(2):
        bulk.write(b"x" * 60 * KIB)
        for _ in range(60):
            lossy.send_datagram(b"y" * KIB)
        pair.pump()
    pair.client.blocked = True
    bulk.write(b"x" * 256 * KIB)
    for _ in range(60):
        lossy.send_datagram(b"y" * KIB)
    pair.client.blocked = False
    order = [type(frame) for frame in sent(pair.client) if isinstance(frame, Data | Datagram)]
    first = order.index(Datagram)
    assert order.count(Datagram) == 60 and order[first : first + 60] == [Datagram] * 60
    assert 0 < first < order.count(Data)


def test_interactive_first():
    pair = Pair()
    bulk, _ = udp(pair, priority=2)
    quick, _ = udp(pair, priority=0)
    pair.client.blocked = True
    for _ in range(60):
        bulk.send_datagram(b"b" * KIB)
    for _ in range(10):
        quick.send_datagram(b"q" * KIB)
    pair.client.blocked = False
    order = [frame.stream for frame in sent(pair.client) if isinstance(frame, Datagram)]
    # A turn of bulk (16 KiB), then all of the interactive ones: their quantum is eight times that.
    assert order[16:26] == [quick.id] * 10 and len(order) == 70


def test_beside_datagrams_bulk_goes_in_smaller_batches():
    pair = Pair(Limits(initial_window=1024 * KIB, initial_streams=8))
    bulk, _ = pair.open()
    call, _ = udp(pair)
    for again in (False, True):
        pair.client.blocked = True
        bulk.write(b"x" * 256 * KIB)
        call.send_datagram(b"a word")
        pair.client.blocked = False
        pair.client.flush()
        assert bulk.hurried == again
        pair.pump()


def test_a_lost_connection_drops_them():
    pair = Pair()
    ours, _theirs = udp(pair)
    waiting = pair.client.open("udp", datagrams=True)
    plain = pair.client.open()
    ours.send_datagram(b"on its way")
    pair.client.flush()
    assert in_flight(pair) > 0
    ours.send_datagram(b"waits")
    waiting.send_datagram(b"waits, too")
    acked = in_flight(pair) - 9 - len(b"on its way")
    pair.client.mux.drop_datagrams()
    pair.client.check()
    assert in_flight(pair) == acked and not ours.datagrams and not waiting.datagrams
    assert pair.client.mux.datagrams.dropped == 2
    assert plain.datagrams is None
    pair.pump()


def test_what_is_kept_to_be_sent_again_has_none():
    pair = Pair()
    ours, _theirs = udp(pair)
    bulk, _ = pair.open()
    replay = pair.client.mux.resumption.replay = Replay()
    pair.client.blocked = True
    ours.send_datagram(b"lossy")
    bulk.write(b"kept")
    ours.send_datagram(b"lossy, too")
    pair.client.mux.ping()
    bulk.finish()
    pair.client.blocked = False
    assert [type(frame) for frame in sent(pair.client)].count(Datagram) == 2
    kept = [frame for frame, _ in scan(b"".join(replay.rest(0)))]
    assert kept == [Data(bulk.id, b"kept", 1)] and replay.sent == 12


def test_the_end_of_the_session_drops_them():
    pair = Pair()
    ours, _theirs = udp(pair)
    pair.client.blocked = True
    ours.send_datagram(b"waits")
    pair.client.mux.close()
    assert not ours.datagrams and pair.client.mux.datagrams.outgoing.held == 0


def test_stopped_by_the_peer():
    pair = Pair()
    pair.client.inject(Open(1, 1, "udp"))
    theirs = pair.server.opened[0]
    theirs.accept()
    theirs.send_datagram(b"waits")
    pair.client.inject(Stop(1, 40))
    assert not theirs.datagrams
    assert [type(frame) for frame in sent(pair.server)][-1] is Reset
