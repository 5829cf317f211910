"""The session around its streams: HELLO, limits, PING, drain, the end, and calls from inside callbacks."""

import pytest

from konnektor.admission import LAST_ID
from konnektor.errors import Code, LimitError, PeerTimeoutError, SessionClosedError, SessionLost
from konnektor.frames import Ack, Close, Data, Goaway, Hello, Open, Ping, Pong, Refuse, Streams, scan
from konnektor.limits import KIB, MIB, Limits
from tests.pair import SMALL, Pair
from tests.unit.test_mux_streams import frames_of


def kinds(side):
    return [type(frame) for frame in frames_of(side)]


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
    theirs.write(b"x" * 400_000)
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
    pair.client.inject(*[Ping(n) for n in range(100)])
    assert frames_of(pair.server) == [Pong(99, before + 99 * 16)]


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


# Drain


def test_drain_of_an_empty_session():
    pair = Pair()
    pair.client.mux.drain(25, pair.now, reason="restart")
    assert kinds(pair.client) == [Goaway]
    pair.pump()
    pair.sleep(0.2)
    assert ("goaway", Code.SHUTDOWN, 25.0, "restart") in pair.server.events
    assert pair.server.events[-1] == pair.client.events[-1] == ("closed", "ShutdownError")


def test_two_phases():
    pair = Pair()
    _ours, _theirs = pair.open()
    pair.client.mux.drain(25, pair.now)
    crossing = pair.server.open()  # the server has not read GOAWAY
    pair.server.flush()
    pair.client.flush()
    pair.server.deliver()
    pair.client.deliver()
    assert pair.client.opened[-1].id == crossing.id == 2
    pair.client.opened[-1].accept()
    pair.sleep(0.2)
    assert crossing.sink.kinds == ["accepted"]
    assert pair.client.mux.leaving.last_taken == 2
    pair.client.inject()
    pair.server.inject(Open(4, 1, "x"))  # a peer that does not listen
    assert frames_of(pair.client)[-1] == Refuse(4, Code.LIMIT, 0, "this side is draining")
    with pytest.raises(SessionClosedError, match="draining"):
        pair.server.open()


def test_an_open_above_the_last_id_is_settled_by_its_refusal():
    pair = Pair()
    crossing = pair.server.open()
    crossing.write(b"early")
    pair.server.flush()  # and is so long on its way that the second GOAWAY does not wait for it
    pair.client.mux.drain(60, pair.now)
    pair.client.flush()
    pair.sleep(5.1, pump=False)
    assert [(f.last_id, f.code) for f in frames_of(pair.client)] == [(2**32 - 1, Code.SHUTDOWN), (0, Code.SHUTDOWN)]
    pair.client.deliver()
    assert pair.server.mux.draining and not crossing.sink.events
    pair.pump()
    assert not pair.client.opened
    assert crossing.sink.events == [("failed", "LimitError", True, True), ("closed",)]
    assert crossing.sink.error.refused and crossing.sink.error.retryable
    pair.sleep(0.2)
    assert pair.client.error.code == pair.server.error.code == Code.SHUTDOWN


def test_drain_waits_for_streams():
    pair = Pair()
    ours, theirs = pair.open()
    pair.client.mux.drain(25, pair.now)
    pair.sleep(10)
    ours.write(b"x" * 50_000)
    ours.finish()
    theirs.finish()
    pair.pump()
    assert theirs.sink.kinds[-2:] == ["eof", "closed"]
    pair.sleep(0.2)
    assert pair.client.error.code == Code.SHUTDOWN


def test_drain_grace_over():
    pair = Pair()
    ours, theirs = pair.open()
    pending, undecided = pair.open(pair.server, accept=False)
    half, _ = pair.open()
    half.finish()
    pair.client.mux.drain(2, pair.now)
    pair.client.mux.drain(50, pair.now)  # cannot make it longer
    pair.sleep(1.9)
    assert ours.sink.kinds == ["accepted"]
    pair.sleep(0.2)
    assert ours.sink.events[1] == ("failed", "ShutdownError", True, True)
    assert half.sink.events[1] == ("failed", "ShutdownError", True, False)
    assert undecided.sink.events[0] == ("failed", "ShutdownError", True, True)
    assert pending.sink.error.code == Code.LIMIT and pending.sink.error.refused
    assert theirs.sink.kinds[-1] == "closed"
    pair.sleep(0.2)
    assert pair.client.error.code == pair.server.error.code == Code.SHUTDOWN


def test_drain_of_a_peer_that_answers_nothing():
    pair = Pair()
    ours, _ = pair.open()
    pair.server.blocked = True
    pair.client.mux.drain(2, pair.now)
    pair.sleep(2.1)
    assert ours.sink.kinds == ["accepted", "failed"]
    pair.sleep(5.1)
    assert pair.client.error.code == Code.SHUTDOWN


def test_second_goaway_does_not_wait_for_ever():
    pair = Pair()
    pair.open()
    pair.server.blocked = True
    pair.client.mux.drain(60, pair.now)
    pair.sleep(4.9)
    assert pair.client.mux.leaving.last_taken is None
    pair.sleep(0.2)
    assert pair.client.mux.leaving.last_taken == 0


def test_both_drain():
    pair = Pair()
    pair.open()
    for side in pair.sides:
        side.mux.drain(1, pair.now)
    pair.sleep(2)
    assert pair.client.error.code == pair.server.error.code == Code.SHUTDOWN


@pytest.mark.parametrize("who", [0, 1])
def test_drain_before_hello(who):
    pair = Pair(hello=False)
    pair.sides[who].mux.drain(1, pair.now)
    pair.sleep(2)
    assert pair.client.error.code == pair.server.error.code == Code.SHUTDOWN


def test_drain_of_a_server_that_never_hears_of_its_client():
    pair = Pair(hello=False)
    pair.client.blocked = True
    pair.server.mux.drain(1, pair.now)
    pair.sleep(6.1)
    assert pair.server.error.code == Code.SHUTDOWN


def test_drain_fails_waiting_opens():
    pair = Pair()
    for _ in range(8):
        pair.open()
    mine, also = pair.client.open(), pair.client.open()
    pair.server.mux.drain(5, pair.now)
    pair.pump()
    assert [s.sink.events for s in (mine, also)] == [[("failed", "LimitError", True, True), ("closed",)]] * 2
    assert mine.sink.error.refused


def test_drain_again_and_after_the_end():
    pair = Pair()
    pair.client.mux.drain(5, pair.now)
    pair.client.mux.drain(0, pair.now)
    pair.sleep(1)
    assert pair.client.error is not None
    pair.client.mux.drain(5, pair.now)
    pair.client.mux.handle_timeout(pair.now)
    assert pair.client.mux.next_deadline() is None


# The end


def test_close():
    pair = Pair()
    ours, theirs = pair.open(auto=False)
    ours.write(b"x" * 1000)
    pair.pump()
    theirs.write(b"y" * 10)
    pair.client.mux.close(Code.INTERNAL, "oops")
    pair.pump()
    assert ours.sink.events[-2:] == [("failed", "SessionLost", True, True), ("closed",)]
    assert (ours.sink.error.sent, theirs.sink.error.received) == (1000, 1000)
    assert pair.server.error.code == Code.INTERNAL and pair.server.error.reason == "oops"
    assert pair.client.mux.data_to_send(pair.now) == b""
    assert pair.client.mux.receive(b"anything", pair.now) == 8
    for stream in (ours, theirs):
        stream.consumed(5)
        stream.cancel()
        stream.finish()
        stream.release()
        stream.prioritize(0)
    for side in pair.sides:
        side.mux.close()
        side.mux.connection_lost("again")
        side.mux.ping()
        assert not side.mux.awake
        with pytest.raises(SessionClosedError, match="closed"):
            side.open()


def test_connection_lost():
    pair = Pair()
    ours, _ = pair.open()
    waiting = [pair.client.open() for _ in range(9)][-1]
    pair.pump()
    pair.client.mux.connection_lost("reset by peer")
    assert ours.sink.error.code == Code.INTERNAL
    assert "reset by peer" in str(ours.sink.error)
    assert waiting.sink.kinds == ["failed", "closed"]
    assert pair.client.mux.data_to_send(pair.now) == b""


def test_connection_lost_right_after_close():
    pair = Pair()
    pair.client.mux.close()
    pair.client.mux.connection_lost("gone")
    assert pair.client.mux.data_to_send(pair.now) == b""


@pytest.mark.parametrize("who", [0, 1])
def test_close_may_be_the_first_frame(who):
    pair = Pair(hello=False)
    side = pair.sides[who]
    side.mux.close(Code.IDENTITY, "who are you")
    assert kinds(side) == [Close]
    pair.pump()
    assert side.peer.error.code == Code.IDENTITY and "hello" not in side.peer.kinds


def test_a_client_refused_for_its_hello_gets_no_hello():
    pair = Pair(hello=False)
    pair.server.on["hello"] = lambda side: side.mux.close(Code.IDENTITY, "not you")
    pair.pump()
    assert pair.client.error.code == Code.IDENTITY and "hello" not in pair.client.kinds


def test_session_end_spares_what_was_over():
    pair = Pair()
    ended, theirs = pair.open(auto=False)
    ended.finish()
    theirs.write(b"tail")
    theirs.finish()
    pair.pump()
    cancelled, _ = pair.open()
    cancelled.cancel()
    pair.client.flush()
    pair.client.mux.connection_lost("gone")
    assert ended.sink.kinds == ["accepted", "data", "eof", "closed"]
    assert cancelled.sink.kinds == ["accepted", "closed"]


# Calls from inside callbacks


def open_more(stream):
    side = stream._mux.handler
    if stream._mux.error is None and not stream._mux.draining and len(side.all) < 30:
        side.open()


CALLS = {
    "reset": lambda s: s.reset(),
    "stop": lambda s: s.stop(),
    "cancel": lambda s: s.cancel(),
    "finish": lambda s: s.finish() if s.sending.name != "UNDECIDED" else s.accept(),
    "write": lambda s: (
        s.write(b"!" * 3000) if s.sending.name in ("OPEN", "UNSENT") and s.send_window.sent < 10**6 else None
    ),
    "consume": lambda s: s.consumed(10**9),
    "close session": lambda s: s._mux.close(),
    "lose connection": lambda s: s._mux.connection_lost("gone"),
    "open": open_more,
    "drain": lambda s: s._mux.drain(1, 1000.0),
    "release": lambda s: s.release(),
    "prioritize": lambda s: s.prioritize(2, 3),
}


@pytest.mark.parametrize("event", ["accepted", "data", "eof", "writable", "failed", "closed"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("ending", ["finish", "cancel", "refuse", "close", "garbage", "drain"])
@pytest.mark.parametrize("max_bytes", [400, 64 * KIB])
def test_a_sink_may_call_anything_from_anywhere(event, call, ending, max_bytes):
    pair = Pair()
    on = {event: CALLS[call]}
    pair.server.sink_on = on
    pair.server.on_open = lambda s: s.refuse(Code.DENIED) if ending == "refuse" else s.accept()
    streams = [pair.client.open(on=on, deadline=3) for _ in range(3)]

    def move():
        for _ in range(200):
            before = pair.client.mux.bytes_sent + pair.server.mux.bytes_sent
            for side in pair.sides:
                side.flush(max_bytes)
                side.deliver()
            if before == pair.client.mux.bytes_sent + pair.server.mux.bytes_sent:
                break
        pair.sleep(0.1)

    for stream in streams:
        if stream.sending.name == "UNSENT":
            stream.write(b"x" * 30_000)
            stream.want_room(100)
    move()
    for stream in (*pair.client.all, *pair.server.all):
        if stream.sending.name == "OPEN":
            stream.write(b"y" * 100)
    if ending == "garbage" and pair.server.error is None:
        pair.client.inject(b"\x7f" * 8)
    elif ending == "close":
        pair.client.mux.close()
    elif ending == "drain":
        pair.client.mux.drain(0, pair.now)
    for stream in list(pair.client.all):
        if ending == "finish" and stream.sending.name == "OPEN":
            stream.finish()
        if ending == "cancel":
            stream.cancel()
    move()
    for _ in range(4):
        if pair.client.error or pair.server.error:
            for side in pair.sides:
                side.mux.connection_lost("the other side is gone")
        for side in pair.sides:
            for stream in list(side.all):
                stream.cancel()
                stream.release()
        pair.sleep(8)
    for side in pair.sides:
        assert side.kinds.count("closed") <= 1
        for stream in side.all:
            assert stream.sink.kinds.count("closed") == 1, stream
            assert stream.sink.kinds[-1] == "closed"
    if pair.client.error is None:
        pair.assert_empty()


@pytest.mark.parametrize("callback", ["hello", "opened", "pong", "goaway"])
def test_the_handler_may_end_the_session_from_anywhere(callback):
    pair = Pair(hello=False)
    pair.server.on = {callback: lambda side: side.mux.close(Code.IDENTITY)}
    stream = pair.client.open()
    stream.write(b"x")
    pair.client.mux.ping()
    pair.server.mux.ping()
    pair.pump()
    pair.client.mux.drain(1, pair.now)
    pair.pump()
    assert pair.server.error.code == pair.client.error.code == Code.IDENTITY


def test_a_driver_that_flushes_from_session_closed():
    """The nested call gives CLOSE; the outer one gives nothing after it."""
    pair = Pair()
    written = []
    ours, _ = pair.open(on={"writable": lambda s: s._mux.close()})
    pair.client.on = {"closed": lambda side: written.append(side.mux.data_to_send(pair.now))}
    ours.write(b"x" * 1000)
    ours.want_room()
    assert pair.client.mux.data_to_send(pair.now) == b""
    [data] = written
    assert [type(frame) for frame, _ in scan(data)] == [Close]


def test_work_added_while_rendering_is_not_forgotten():
    """writable() of one stream resets another, after the batch's control was rendered."""
    pair = Pair()
    other, theirs = pair.open()
    ours, _ = pair.open(on={"writable": lambda _: other.cancel()})
    ours.write(b"x" * 1000)
    ours.want_room()
    pair.pump()
    assert theirs.sink.kinds[-1] == "closed"


def test_a_waiting_open_that_another_ones_failure_cancels():
    pair = Pair()
    for _ in range(8):
        pair.open()
    doomed = pair.client.open(on={"failed": lambda _: other.cancel()})
    other = pair.client.open()
    pair.server.mux.drain(5, pair.now)
    pair.pump()
    assert doomed.sink.kinds == ["failed", "closed"]
    assert other.sink.kinds == ["closed"]


def _defect(_):
    raise ZeroDivisionError


def test_a_sink_that_raises_when_the_session_ends_keeps_nobody_from_hearing():
    pair = Pair()
    streams = [pair.client.open(on={"failed": _defect}) for _ in range(3)]
    pair.pump()
    with pytest.raises(ZeroDivisionError):
        pair.client.mux.close()
    assert [stream.sink.kinds[0] for stream in streams] == ["failed"] * 3
    assert pair.client.events == [("closed", "SessionError")]
    assert kinds(pair.client) == [Close]


def test_a_sink_that_raises_while_rendering_leaves_the_mux_fit_to_close():
    pair = Pair()
    ours, _ = pair.open(on={"writable": _defect})
    ours.write(b"x")
    ours.want_room()
    with pytest.raises(ZeroDivisionError):
        pair.client.mux.data_to_send(pair.now)
    pair.client.pending = False
    pair.client.mux.close(Code.INTERNAL)
    assert pair.client.pending
    assert kinds(pair.client) == [Close]


def test_garbage_after_close_frame():
    pair = Pair()
    pair.client.inject(Close(0), b"\xff" * 100)
    assert pair.server.error.code == Code.NO_ERROR


def test_acks():
    pair = Pair(Limits(ack_bytes=1000, ack_delay=0.5))
    ours, _ = pair.open()
    pair.sleep(1)
    acked = pair.client.mux.flight.acked
    ours.write(b"x")
    pair.pump()
    assert pair.client.mux.flight.acked == acked
    pair.sleep(0.49)
    assert pair.client.mux.flight.acked == acked
    pair.sleep(0.02)
    assert pair.client.mux.flight.in_flight == 0
    ours.write(b"x" * 1000)
    pair.pump()
    assert pair.client.mux.flight.in_flight == 0
    pair.server.inject(Ack(0))
    assert pair.client.error is None


def test_streams_frame_raises_and_never_lowers():
    pair = Pair()
    pair.server.inject(Streams(9), Streams(3))
    assert pair.client.mux.admission.allowed == 9
    for _ in range(9):
        pair.client.open()
    assert kinds(pair.client).count(Open) == 9


def test_a_handler_that_sets_no_sink():
    pair = Pair()
    pair.server.auto = None
    pair.server.stream_opened = lambda _: None
    stream = pair.client.open()
    stream.write(b"x")
    stream.finish()
    pair.pump()
    theirs = pair.server.mux.streams[1]
    theirs.accept()
    theirs.write(b"x")
    theirs.want_room()
    pair.pump()
    stream.stop()
    pair.pump()
    assert stream.sink.kinds == ["accepted", "data", "closed"]
    mine = pair.client.open()
    mine.write(b"x")
    pair.pump()
    pair.server.mux.streams[3].sink.accepted()
    mine.cancel()
    pair.pump()
    assert mine.sink.kinds == ["closed"]
