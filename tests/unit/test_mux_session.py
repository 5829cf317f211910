"""The session around its streams: HELLO, limits, and PING."""

import pytest

from konnektor.admission import LAST_ID
from konnektor.errors import Code, LimitError, PeerTimeoutError, SessionClosedError, SessionLost
from konnektor.frames import MAX_OPENS, Close, Data, Hello, HelloTLV, Open, Ping, Pong
from konnektor.limits import KIB, MIB, Limits
from konnektor.settings import Settings
from tests.pair import SMALL, Pair
from tests.unit.test_mux_streams import frames_of, kinds

# HELLO


def test_server_sends_nothing_before_the_clients_hello():
    pair = Pair(hello=False)
    pair.server.mux.ping()
    pair.server.open()
    assert kinds(pair.server) == []
    assert not pair.server.mux.established
    pair.pump()
    assert pair.server.mux.established and pair.client.mux.established
    assert len(pair.client.opened) == 1


def test_client_may_use_the_floors_before_the_servers_hello():
    pair = Pair(hello=False)
    streams = [pair.client.open() for _ in range(9)]
    for stream in streams:
        stream.write(b"x" * 20_000)
    frames = frames_of(pair.client)
    assert [type(f) for f in frames[:9]] == [Hello, *[Open] * 8]
    data = [f for f in frames if isinstance(f, Data)]
    assert sum(len(f.payload) for f in data if f.stream == 1) == 16_376  # what is left of 16 KiB is a crumb
    assert all(len(f.payload) <= 16_376 for f in data)
    pair.pump()
    assert [len(stream.sink.data) for stream in pair.server.opened] == [20_000] * 8
    assert streams[8].id == 0
    pair.server.opened[0].accept()
    for stream in (streams[0], pair.server.opened[0]):
        stream.cancel()
        stream.release()
    pair.pump()
    assert streams[8].id == 17


def test_data_beyond_the_floor_flows_when_hello_allows_it():
    pair = Pair(Limits(initial_window=64 * KIB, initial_streams=64, receive_pool=8 * MIB), hello=False)
    streams = [pair.client.open() for _ in range(20)]
    streams[0].write(b"x" * 60_000)
    pair.client.flush()
    assert streams[0].send_window.sent <= 16 * KIB
    pair.server.auto = False
    pair.pump()
    assert streams[0].send_window.sent == 60_000
    assert len(pair.server.opened) == 20


def test_no_hello_in_time():
    pair = Pair(hello=False)
    pair.server.blocked = True
    pair.sleep(9.9)
    assert pair.client.error is None
    pair.sleep(0.2, pump=False)
    assert isinstance(pair.client.error, PeerTimeoutError)
    assert kinds(pair.client)[-1] is Close


def test_settings_reach_the_peer():
    pair = Pair(hello=False)
    pair.client.mux.settings = type(pair.client.mux.settings).of(
        SMALL, name="node-1", routes=("host=node-1",), labels={"a": "b"}, instance=b"i" * 16, software="konnektor/0"
    )
    pair.pump()
    peer = pair.server.mux.peer
    assert (peer.name, peer.routes, peer.labels, peer.instance) == ("node-1", ("host=node-1",), {"a": "b"}, b"i" * 16)
    assert pair.server.mux.received_at == pair.now


# Limits on streams


def test_opens_wait_for_streams():
    pair = Pair()
    streams = [pair.client.open() for _ in range(20)]
    pair.pump()
    assert [s.id for s in streams] == [*range(1, 17, 2), *[0] * 12]
    for theirs in pair.server.opened[:4]:
        theirs.refuse(Code.DENIED)
        theirs.release()
    pair.pump()
    assert [s.id for s in streams] == [*range(1, 25, 2), *[0] * 8]


def test_streams_rises_only_when_the_handler_is_gone():
    pair = Pair()
    for _ in range(8):
        ours, theirs = pair.open()
        ours.cancel()
        pair.pump()
        assert theirs.forgotten
    late = pair.client.open()
    pair.pump()
    assert late.id == 0
    pair.server.opened[0].release()
    pair.pump()
    assert late.id == 17


def test_open_that_was_never_allowed_fails_at_its_deadline():
    pair = Pair()
    for _ in range(8):
        pair.open()
    stream = pair.client.open(deadline=1.0)
    cancelled = pair.client.open()
    cancelled.cancel()
    assert len(pair.client.mux.opens) == 1
    pair.sleep(1.1)
    assert isinstance(stream.sink.error, LimitError) and stream.sink.error.refused
    assert stream.sink.kinds == ["failed", "closed"]


def test_own_opens_wait_for_the_pool():
    limits = Limits(initial_window=16 * KIB, initial_streams=8, receive_pool=256 * KIB)
    pair = Pair(limits, Limits(initial_streams=64, initial_window=16 * KIB, receive_pool=8 * MIB))
    streams = [pair.client.open() for _ in range(10)]
    pair.pump()
    assert [s.id for s in streams] == [*range(1, 17, 2), 0, 0]
    streams[0].cancel()
    pair.pump()
    assert streams[8].id == 17
    for stream in streams:
        stream.cancel()
    pair.pump()
    for stream in pair.server.opened:
        stream.release()
    pair.assert_empty()


def test_own_opens_go_on_when_a_wide_window_is_read():
    limits = Limits(initial_window=16 * KIB, initial_streams=8, receive_pool=256 * KIB)
    pair = Pair(limits, Limits(initial_streams=64, initial_window=16 * KIB, receive_pool=8 * MIB))
    ours, theirs = pair.open(auto=False)
    theirs.write(b"x" * 800_000)
    theirs.finish()
    for _ in range(9):
        pair.pump()
        ours.consumed(ours.receive_window.unread)
    pair.pump()
    assert ours.receive_window.size > 16 * KIB
    assert pair.client.mux.pool.extra > 0
    more = [pair.client.open() for _ in range(7)]
    pair.pump()
    waiting = [s for s in more if not s.id]
    assert waiting
    ours.consumed(ours.receive_window.unread)
    pair.pump()
    while not ours.forgotten and ours.receive_window.unread:
        ours.consumed(ours.receive_window.unread)
        pair.pump()
    assert sum(1 for s in more if s.id) > len(more) - len(waiting)


def test_ids_run_out():
    pair = Pair()
    pair.client.mux.admission.next_id = LAST_ID - 3
    pair.server.mux.admission.next_peer_id = LAST_ID - 3
    ours, _ = pair.open()
    assert pair.client.mux.draining is False
    other, _ = pair.open()
    assert pair.client.mux.draining
    with pytest.raises(SessionClosedError):
        pair.client.open()
    pair.sleep(100)
    assert pair.client.error is None
    assert "goaway" in pair.server.kinds
    for stream in (ours, other):
        stream.cancel()
    pair.sleep(1)
    assert pair.client.error.code == Code.SHUTDOWN


# PING and life


def test_ping_pong():
    pair = Pair()
    first = pair.client.mux.ping()
    assert pair.client.mux.ping() == first
    pair.client.flush()
    pair.now += 0.25
    second = pair.client.mux.ping()  # waits for the first
    assert second == first + 1
    pair.pump()
    assert pair.client.events == [("pong", first, 0.25), ("pong", second, 0.0)]


def test_pong_of_no_ping():
    pair = Pair()
    pair.server.inject(Pong(77, 0))
    assert pair.client.error.code == Code.PROTOCOL


def test_pings_are_answered_by_one_pong_that_says_how_much_came():
    pair = Pair()
    before = pair.server.mux.bytes_received
    pair.client.inject(*[Ping(n) for n in range(19)])
    assert frames_of(pair.server) == [Pong(18, before + 18 * 16)]


def test_idle_sessions_live():
    pair = Pair()
    pair.sleep(3600)
    assert pair.client.error is pair.server.error is None


def test_silent_peer_dies_after_a_second_look():
    pair = Pair()
    pair.server.blocked = True
    pair.sleep(24.9)
    assert pair.client.error is None
    pair.sleep(0.2)
    assert isinstance(pair.client.error, PeerTimeoutError)
    assert "silent" in str(pair.client.error)


def test_overdue_is_who_is_past_the_deadline_unless_it_was_us_who_was_away():
    pair = Pair()
    pair.server.blocked = True
    liveness = pair.client.mux.liveness
    pair.sleep(24.9)
    assert not liveness.overdue(pair.now, rtt=0)
    assert liveness.overdue(pair.now + 0.2, rtt=0)
    assert not liveness.overdue(pair.now + 0.2, rtt=3)  # whose answer may take 12 s rather than 10
    assert not liveness.overdue(pair.now + 60, rtt=0)
    liveness.heard(pair.now)
    assert not liveness.overdue(pair.now + 0.2, rtt=0)


def test_any_byte_is_life():
    pair = Pair()
    pair.server.blocked = True
    for _ in range(10):
        pair.sleep(20)
        pair.client.mux.receive(b"", pair.now)
    assert pair.client.error is None


def test_paused_machine_kills_no_session():
    pair = Pair()
    for _ in range(5):
        pair.now += 60  # both timers are a minute late
        for side in pair.sides:
            pair.fire(side)
        assert pair.client.error is pair.server.error is None
        pair.pump()
        pair.sleep(1)
    pair.server.blocked = True
    pair.now += 60
    pair.fire(pair.client)
    pair.sleep(11)
    assert isinstance(pair.client.error, PeerTimeoutError)


def test_peer_that_talks_and_never_acknowledges():
    pair = Pair()
    pair.open()
    pair.sleep(1)
    pair.client.mux.ping()
    stream = pair.client.open()
    pair.client.flush()
    for _ in range(29):
        pair.sleep(1, pump=False)
        pair.server.inject(b"\x81\0\0\0\0\0\0\0")
        pair.client.flush()
    assert pair.client.error is None
    pair.sleep(20, pump=False)
    assert isinstance(pair.client.error, PeerTimeoutError)
    assert "acknowledged nothing" in str(pair.client.error)
    assert isinstance(stream.sink.error, SessionLost)


def test_data_before_hello_is_a_protocol_error_on_a_stream_that_was_opened_early_too():
    pair = Pair(hello=False)
    stream = pair.client.open()
    pair.client.flush()
    assert stream.id == 1
    pair.client.deceived = True
    pair.client.mux.receive(Data(1, b"x").encode(), pair.now)
    assert pair.client.error.code == Code.PROTOCOL


def test_a_peer_may_allow_as_many_streams_as_it_can_say():
    pair = Pair(hello=False)
    tlvs = Settings.of(Limits()).to_tlvs() | {HelloTLV.INITIAL_STREAMS: b"\xff" * 4}
    pair.client.mux.receive(Hello(1, 1, b"S" * 32, tlvs).encode(), pair.now)
    assert pair.client.error is None
    assert pair.client.mux.admission.allowed == MAX_OPENS
