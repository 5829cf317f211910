"""The end of a session, and calls from inside callbacks, which may bring it."""

import pytest

from konnektor.errors import Code, SessionClosedError
from konnektor.frames import Ack, Close, Open, Streams, scan
from konnektor.limits import KIB, Limits
from tests.pair import Pair
from tests.unit.test_mux_streams import kinds

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
