"""Streams from OPEN to forgotten: answers, halves, cancels and their crossings."""

import pytest

from konnektor.errors import Code, LocalProtocolError, StreamClosedError
from konnektor.frames import (
    HEADER_SIZE,
    Accept,
    Credit,
    Data,
    DataFlag,
    Datagram,
    Open,
    OpenTLV,
    Ping,
    Priority,
    Refuse,
    Reset,
    Stop,
    scan,
)
from konnektor.inbound import STRETCH
from konnektor.limits import KIB, Limits
from konnektor.mux_stream import DirectSink
from konnektor.states import Receiving, Sending
from tests.link import Link
from tests.pair import Pair, Recorder


def frames_of(side):
    """What a side has rendered and its peer not yet received."""
    side.flush()
    return [
        frame._replace(payload=bytes(frame.payload)) if isinstance(frame, Data) else frame
        for frame, _ in scan(bytes(side.wire))
    ]


def kinds(side):
    return [type(frame) for frame in frames_of(side)]


def test_open_accept_data_finish():
    pair = Pair()
    ours, theirs = pair.open(name="echo@test", header=b"request", tlvs={OpenTLV.SOURCE: b"10.0.0.1"}, accept=False)
    assert (theirs.name, theirs.header, theirs.tlvs[OpenTLV.SOURCE]) == ("echo@test", b"request", b"10.0.0.1")
    assert theirs.deadline == pair.now + 30
    theirs.accept(b"reply")
    pair.pump()
    assert ours.header == b"reply"
    ours.write(b"ping")
    ours.finish()
    theirs.write(b"pong")
    theirs.finish()
    pair.pump()
    assert ours.sink.events == [("accepted",), ("data", 4), ("eof",), ("closed",)]
    assert theirs.sink.events == [("data", 4), ("eof",), ("closed",)]
    assert (bytes(ours.sink.data), bytes(theirs.sink.data)) == (b"pong", b"ping")
    assert repr(ours) == "<MuxStream 1 echo@test receiving=ENDED sending=ENDED>"
    pair.assert_empty()


@pytest.mark.parametrize("together", [True, False])
def test_a_sink_learns_that_the_end_is_next(together):
    """From the same frame: a socket then sends both at once."""
    pair = Pair()
    ending = []
    ours, theirs = pair.open()
    theirs.sink.on["data"] = theirs.sink.on["eof"] = lambda stream: ending.append(stream.ending)
    ours.write(b"not the last")
    pair.pump()
    ours.write(b"the last")
    if not together:
        pair.pump()
    ours.finish()
    pair.pump()
    assert theirs.sink.kinds == ["data", "data", "eof"]
    assert ending == [False, together, together]


@pytest.mark.replaces_methods
def test_a_sink_may_derive_from_the_core():
    class Derived(Recorder, DirectSink):
        pass

    pair = Pair()
    ours, theirs = pair.open()
    theirs.sink = sink = Derived()
    sink.stream = theirs
    ours.write(b"data")
    pair.pump()
    assert sink.data == b"data"
    with pytest.raises(NotImplementedError):
        DirectSink().data_received(b"")


def test_both_sides_open():
    pair = Pair()
    a, _ = pair.open(pair.client)
    b, _ = pair.open(pair.server)
    c, _ = pair.open(pair.client)
    assert (a.id, b.id, c.id) == (1, 2, 3)


def test_half_close_leaves_the_other_direction_open():
    pair = Pair()
    ours, theirs = pair.open()
    ours.finish()
    pair.pump()
    theirs.write(b"x" * 100_000)
    pair.pump()
    assert len(ours.sink.data) == 100_000
    theirs.finish()
    pair.pump()
    pair.assert_empty()


def test_refusal_reaches_the_opener_with_all_it_says():
    pair = Pair()
    ours, theirs = pair.open(accept=False)
    theirs.refuse(Code.LIMIT, "no more descriptors", retry_after=1.5)
    theirs.refuse(Code.DENIED)  # the first word counts
    pair.pump()
    assert ours.sink.events == [("failed", "LimitError", True, True), ("closed",)]
    error = ours.sink.error
    assert (error.code, error.reason, error.refused, error.retry_after) == (39, "no more descriptors", True, 1.5)
    pair.assert_empty()


@pytest.mark.parametrize("retry_after", [-1.0, 1e99])
def test_retry_after_is_clamped(retry_after):
    pair = Pair()
    ours, theirs = pair.open(accept=False)
    theirs.refuse(Code.LIMIT, retry_after=retry_after)
    pair.pump()
    assert 0 <= ours.sink.error.retry_after <= 86_400


def test_early_data_then_refuse():
    pair = Pair()
    ours, theirs = pair.open(accept=False, auto=False)
    ours.write(b"x" * 5000)
    pair.pump()
    assert len(theirs.sink.data) == 5000
    theirs.refuse(Code.DENIED, "no")
    ours.write(b"y" * 5000)  # on its way while REFUSE is
    pair.client.flush()
    pair.pump()
    assert theirs.sink.events == [("data", 5000), ("closed",)]
    assert ours.sink.events == [("failed", "DeniedError", True, True), ("closed",)]
    pair.assert_empty()


def test_early_data_and_fin_then_refuse_needs_no_reset():
    pair = Pair()
    ours, theirs = pair.open(accept=False)
    ours.write(b"x")
    ours.finish()
    pair.pump()
    theirs.refuse(Code.DENIED)
    pair.pump()
    assert ours.sink.events == [("failed", "DeniedError", True, False), ("closed",)]
    pair.assert_empty()


def test_data_never_overtakes_accept():
    """However full of control the batch is."""
    pair = Pair()
    pair.server.on_open = lambda stream: (stream.accept(b"h" * 3000), stream.write(b"data"), stream.finish())
    streams = [pair.client.open() for _ in range(8)]
    pair.client.flush()
    pair.client.deliver()
    pair.server.flush(max_bytes=2000)
    seen = set()
    for frame, _ in scan(bytes(pair.server.wire)):
        if isinstance(frame, Accept):
            seen.add(frame.stream)
        elif isinstance(frame, Data):
            assert frame.stream in seen
    assert len(seen) == 8
    pair.pump()
    assert [bytes(stream.sink.data) for stream in streams] == [b"data"] * 8


def test_finish_before_open_is_rendered():
    pair = Pair()
    stream = pair.client.open()
    stream.write(b"x")
    stream.finish()
    with pytest.raises(StreamClosedError):
        stream.write(b"y")
    pair.pump()
    assert pair.server.opened[0].sink.kinds == ["data", "eof"]


def test_finish_at_once_without_data():
    pair = Pair()
    pair.server.on_open = lambda stream: (stream.accept(), stream.finish())
    stream = pair.client.open()
    stream.finish()
    pair.pump()
    assert stream.sink.kinds == ["accepted", "eof", "closed"]
    pair.assert_empty()


@pytest.mark.parametrize("call", ["reset", "stop", "cancel"])
def test_a_stream_cancelled_before_its_open_never_existed(call):
    pair = Pair()
    sent = pair.client.mux.flight.sent
    stream = pair.client.open()
    stream.write(b"lost")
    getattr(stream, call)()
    assert stream.sink.events == [("closed",)]
    for again in ("reset", "stop", "cancel", "finish"):
        getattr(stream, again)()
    pair.pump()
    assert (stream.id, pair.client.mux.flight.sent, pair.server.opened) == (0, sent, [])
    other, _ = pair.open()
    assert other.id == 1


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("call", ["reset", "cancel"])
def test_cancel_while_pending(call, finished):
    pair = Pair()
    ours, theirs = pair.open(accept=False)
    ours.write(b"early")
    if finished:
        ours.finish()
    pair.pump()
    getattr(ours, call)(Code.CANCELLED, "changed my mind")
    pair.pump()
    if finished and call == "reset":
        assert theirs.sink.kinds == ["data", "eof"]  # there was nothing left to reset
        return
    assert theirs.sink.events[-2:] == [("failed", "CancelledStreamError", not finished, True), ("closed",)]
    # who cancels hears of no failure; who only reset waits for the answer
    assert ours.sink.kinds == (["failed", "closed"] if call == "reset" else ["closed"])
    theirs.refuse(Code.DENIED)
    with pytest.raises(LocalProtocolError):
        theirs.accept()
    pair.assert_empty()


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("answer", ["accept", "accept and finish", "accept and reset", "refuse"])
def test_cancel_crosses_the_answer(answer, finished):
    pair = Pair()
    ours, theirs = pair.open(accept=False)
    if finished:
        ours.finish()
        pair.pump()
    if answer == "refuse":
        theirs.refuse(Code.DENIED)
    else:
        theirs.accept()
        theirs.write(b"hello")
        if "finish" in answer:
            theirs.finish()
        if "reset" in answer:
            theirs.reset()
    pair.server.flush()
    ours.cancel()
    pair.client.flush()
    pair.pump()
    assert ours.sink.kinds == ["closed"]
    assert theirs.sink.kinds[-1] == "closed"
    assert pair.client.error is pair.server.error is None
    pair.assert_empty()


def test_stop_elicits_reset():
    pair = Pair()
    ours, theirs = pair.open()
    theirs.write(b"x" * 1_000_000)
    ours.stop(Code.TARGET_RESET)
    pair.pump()
    assert theirs.sink.events == [("failed", "TargetResetError", False, True)]
    assert ours.receiving is Receiving.ENDED
    assert ours.sink.kinds.count("failed") == 0
    with pytest.raises(StreamClosedError):
        theirs.write(b"y")
    ours.finish()
    pair.pump()
    pair.assert_empty()


def test_stop_after_fin_was_sent_is_answered_by_nothing_more():
    pair = Pair()
    ours, theirs = pair.open(auto=False)
    theirs.write(b"x")
    theirs.finish()
    pair.server.flush()
    ours.stop()
    pair.client.flush()
    pair.pump()
    assert ours.sink.events == [("accepted",)]
    assert theirs.sink.events == []
    ours.finish()
    pair.pump()
    pair.assert_empty()


def test_stop_of_unread_data_after_fin_gives_the_slot_back_but_does_not_release_the_handler():
    pair = Pair()
    ours, theirs = pair.open(auto=False)
    ours.write(b"x" * 1000)
    ours.finish()
    theirs.finish()
    pair.pump()
    assert theirs.forgotten and theirs.receive_window.unread == 1000
    theirs.stop()
    assert theirs.receive_window.unread == 0
    assert pair.server.mux.admission.retired == 0
    theirs.release()
    theirs.release()
    assert pair.server.mux.admission.retired == 1
    pair.assert_empty()


def test_stop_before_the_answer_refuses():
    """STOP before ACCEPT would be an offence."""
    pair = Pair()
    ours, theirs = pair.open(accept=False)
    theirs.stop(Code.DENIED)
    pair.pump()
    assert ours.sink.kinds == ["failed", "closed"]
    assert ours.sink.error.code == Code.DENIED
    pair.assert_empty()


def test_stop_before_the_answer_after_fin_only_drops():
    pair = Pair()
    ours, theirs = pair.open(accept=False, auto=False)
    ours.write(b"x")
    ours.finish()
    pair.pump()
    theirs.stop()
    assert theirs.receive_window.unread == 0
    theirs.accept()
    theirs.write(b"y")
    theirs.finish()
    pair.pump()
    ours.consumed(1)
    pair.assert_empty()


def test_reset_drops_the_queue_and_says_how_far_it_got():
    pair = Pair()
    ours, theirs = pair.open(auto=False)
    ours.write(b"x" * 100_000)
    pair.client.flush()
    sent = ours.send_window.sent
    assert 0 < sent < 100_000
    ours.reset(Code.TARGET_RESET, "broken")
    assert ours.queued == 0
    assert frames_of(pair.client)[-1] == Reset(1, Code.TARGET_RESET, sent, "broken")
    pair.pump()
    assert theirs.sink.events[-1] == ("failed", "TargetResetError", True, False)
    assert theirs.sink.error.reason == "broken"
    assert theirs.receive_window.unread == 0
    theirs.consumed(sent)  # what the application had already been handed: counted by the reset
    assert theirs.receive_window.consumed == sent
    theirs.finish()
    pair.pump()
    pair.assert_empty()


def test_finish_then_reset_while_data_is_queued():
    pair = Pair()
    ours, theirs = pair.open(auto=False)
    ours.write(b"x" * 100_000)
    ours.finish()
    pair.pump()
    ours.reset()
    ours.finish()
    ours.reset()
    pair.pump()
    assert theirs.sink.kinds[-1] == "failed"
    theirs.reset()
    pair.pump()
    pair.assert_empty()


def test_finish_then_reset_after_fin_changes_nothing():
    pair = Pair()
    ours, theirs = pair.open()
    ours.write(b"x")
    ours.finish()
    pair.pump()
    ours.reset()
    pair.pump()
    assert theirs.sink.events == [("data", 1), ("eof",)]


def test_resets_cross():
    pair = Pair()
    ours, theirs = pair.open()
    ours.cancel()
    theirs.cancel()
    pair.client.flush()
    pair.server.flush()
    assert [type(f) for f in frames_of(pair.client)] == [type(f) for f in frames_of(pair.server)] == [Stop, Reset]
    pair.pump()
    assert ours.sink.kinds == ["accepted", "closed"]
    assert theirs.sink.kinds == ["closed"]
    pair.assert_empty()


def test_reset_and_stop_are_sent_once():
    pair = Pair()
    ours, theirs = pair.open()
    for _ in range(3):
        ours.cancel()
        theirs.stop()
    pair.server.inject()
    sent = frames_of(pair.client)
    assert [type(f) for f in sent] == [Stop, Reset]
    pair.pump()
    pair.assert_empty()


def test_stop_after_reset_was_queued_is_not_answered_twice():
    pair = Pair()
    ours, theirs = pair.open()
    ours.reset(Code.TARGET_RESET)
    theirs.stop()
    pair.server.flush()
    pair.server.deliver()  # STOP arrives before our RESET is rendered
    assert [f for f in frames_of(pair.client) if isinstance(f, Reset)] == [Reset(1, Code.TARGET_RESET, 0)]
    assert ours.sink.kinds == ["accepted"]


def test_stop_of_a_finishing_stream_resets_it():
    pair = Pair()
    ours, theirs = pair.open(auto=False)
    ours.write(b"x" * 100_000)
    ours.finish()
    pair.pump()
    theirs.stop(Code.DENIED)
    pair.pump()
    assert ours.sink.events[-1] == ("failed", "DeniedError", False, True)
    assert theirs.receiving is Receiving.ENDED


def test_frames_for_a_forgotten_stream():
    pair = Pair()
    ours, _theirs = pair.open()
    ours.cancel()
    pair.pump()
    pair.client.inject(Credit(1, 99_999), Stop(1, 40), Reset(1, 40, 0), Priority(1, 0, 1), Datagram(1, 0, b"x"))
    assert pair.server.error is None
    pair.client.inject(Data(1, b"late"))
    assert pair.server.error.code == Code.STREAM_STATE


@pytest.mark.parametrize("frame", [Data(1, b"", 1), Accept(1), Refuse(1, 32)])
def test_other_frames_for_a_forgotten_stream_are_offences(frame):
    pair = Pair()
    ours, _theirs = pair.open()
    ours.cancel()
    pair.pump()
    pair.server.inject(frame)
    assert pair.client.error.code == Code.STREAM_STATE


@pytest.mark.parametrize("frame", [Stop(1, 40), Reset(1, 40, 0), Data(1, b"x"), Data(1, b"", 1)])
@pytest.mark.parametrize("cancelled", [False, True])
def test_an_accepter_must_accept_first(frame, cancelled):
    pair = Pair()
    stream = pair.client.open()
    pair.client.flush()
    if cancelled:
        stream.cancel()
        pair.client.flush()
    pair.server.inject(frame)
    assert pair.client.error.code == Code.STREAM_STATE


def test_credit_before_accept_is_allowed():
    pair = Pair()
    stream = pair.client.open()
    pair.client.flush()
    pair.server.inject(Credit(1, 50_000))
    assert stream.send_window.limit == 50_000


def test_datagram_on_a_live_stream_is_an_offence():
    pair = Pair()
    pair.open()
    pair.client.inject(Datagram(1, 0, b"x"))
    assert pair.server.error.code == Code.STREAM_STATE


def test_accept_with_a_critical_unknown_cancels_the_stream():
    pair = Pair()
    stream = pair.client.open()
    pair.client.flush()
    pair.server.inject(Accept(1, {0x1001: b"?", 0x1000: b"!"}))
    assert stream.sink.events == [("failed", "UnsupportedError", True, True)]
    assert [type(f) for f in frames_of(pair.client)[-2:]] == [Stop, Reset]
    assert frames_of(pair.client)[-1].code == Code.UNSUPPORTED


def test_accept_with_a_skippable_unknown():
    pair = Pair()
    stream = pair.client.open()
    pair.client.flush()
    pair.server.inject(Accept(1, {0x1000: b"!"}))
    assert stream.sink.kinds == ["accepted"]


def test_unknown_parameter_is_refused_without_troubling_the_handler():
    pair = Pair()
    stream = pair.client.open(tlvs={0x1001: b"?"})
    pair.pump()
    assert stream.sink.error.code == Code.UNSUPPORTED
    assert pair.server.opened == []
    assert pair.server.mux.admission.retired == 1


def test_calls_that_do_not_fit():
    pair = Pair()
    ours, theirs = pair.open(accept=False)
    with pytest.raises(LocalProtocolError):
        theirs.write(b"x")
    with pytest.raises(LocalProtocolError):
        theirs.finish()
    with pytest.raises(LocalProtocolError):
        theirs.accept(b"h" * 8189)
    with pytest.raises(LocalProtocolError):
        ours.accept()
    with pytest.raises(LocalProtocolError):
        ours.refuse(32)
    theirs.accept(b"h" * 8188)
    for call in (theirs.accept, lambda: theirs.refuse(32)):
        with pytest.raises(LocalProtocolError):
            call()
    pair.pump()
    assert ours.sink.kinds == ["accepted"]
    for code in (-1, 2**32):
        for call in (ours.reset, ours.stop, pair.open(accept=False)[1].refuse):
            with pytest.raises(LocalProtocolError):
                call(code)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("", {}),
        ("a b", {}),
        ("é", {}),
        ("n" * 256, {}),
        ("x", {"header": b"h" * 8192}),
        ("x", {"priority": 3}),
        ("x", {"weight": 0}),
    ],
)
def test_opens_that_cannot_be(name, kwargs):
    pair = Pair()
    with pytest.raises(LocalProtocolError):
        pair.client.open(name, **kwargs)
    assert not pair.client.mux.opens


def test_largest_open():
    pair = Pair()
    header = b"h" * (8192 - 2 - 255 - 4 - 8)  # the fixed fields, the name, the header's TLV, and DEADLINE
    _, theirs = pair.open(name="n" * 255, header=header)
    assert (theirs.name, theirs.header) == ("n" * 255, header)
    with pytest.raises(LocalProtocolError):
        pair.client.open("n" * 255, header + b"h")


def test_priority_goes_to_the_peer_and_stays_within_bounds():
    pair = Pair()
    ours, theirs = pair.open(priority=2)
    assert theirs.priority == 2
    ours.prioritize(0, 5)
    pair.pump()
    assert (theirs.priority, theirs.weight) == (0, 5)
    for bad in ((3, 1), (-1, 1), (0, 0), (0, 256)):
        with pytest.raises(LocalProtocolError):
            ours.prioritize(*bad)


def test_priority_before_open_or_accept_is_not_lost():
    pair = Pair()
    ours = pair.client.open()
    ours.prioritize(2, 7)
    pair.pump()
    theirs = pair.server.opened[0]
    assert (theirs.priority, theirs.weight) == (2, 7)
    theirs.prioritize(0, 9)
    pair.server.flush()
    assert not any(isinstance(frame, Priority) for frame in frames_of(pair.server))
    theirs.accept()
    assert [type(f) for f in frames_of(pair.server)] == [Accept, Priority]
    pair.pump()
    assert (ours.priority, ours.weight) == (0, 9)


def test_a_pinned_priority_is_asked_for_and_not_taken():
    pair = Pair()
    ours = pair.client.open(priority=2, weight=3)
    pair.client.flush()
    pair.client.deliver()
    theirs = pair.server.opened[0]
    theirs.pin(0, 9)
    theirs.accept()
    pair.pump()
    assert (theirs.priority, theirs.weight) == (0, 9)
    assert (ours.priority, ours.weight) == (0, 9), "it was asked for the same"
    ours.prioritize(1, 1)
    pair.pump()
    assert (theirs.priority, theirs.weight) == (0, 9)
    theirs.prioritize(2, 2)  # a call comes before the rule
    pair.pump()
    assert (theirs.priority, theirs.weight) == (ours.priority, ours.weight) == (2, 2)


def test_a_pin_that_changes_nothing_is_not_told():
    pair = Pair()
    pair.client.open(priority=2)
    pair.client.flush()
    pair.client.deliver()
    theirs = pair.server.opened[0]
    theirs.pin(2, 1)
    theirs.accept()
    assert [type(frame) for frame in frames_of(pair.server)] == [Accept]


def test_priority_is_not_sent_where_it_says_nothing():
    pair = Pair()
    ours, theirs = pair.open()
    ours.prioritize(0)
    theirs.finish()
    pair.server.flush()
    pair.server.deliver()
    assert not any(isinstance(frame, Priority) for frame in frames_of(pair.client))
    ours.prioritize(0)
    assert not any(isinstance(frame, Priority) for frame in frames_of(pair.client))


def test_deadline_of_the_opener():
    pair = Pair()
    pair.server.blocked = True
    stream = pair.client.open(deadline=2.0)
    pair.pump()
    pair.sleep(1.9, pump=True)
    assert stream.sink.events == []
    pair.sleep(0.2)
    assert stream.sink.events == [("failed", "DialTimeoutError", True, True)]
    assert stream.receiving is Receiving.GIVEN_UP
    pair.server.blocked = False
    pair.server.pending = pair.server.mux.awake
    pair.pump()
    assert stream.sink.kinds == ["failed", "closed"]
    pair.assert_empty()


def test_the_opener_waits_two_round_trips_beyond_its_deadline():
    pair = Pair()
    pair.client.mux.flight.rtt = 0.5
    pair.server.blocked = True
    stream = pair.client.open(deadline=2.0)
    pair.sleep(2.8)
    assert stream.sink.events == []
    pair.sleep(0.3)
    assert stream.sink.kinds == ["failed"]


def test_deadline_of_the_accepter():
    pair = Pair()
    ours, theirs = pair.open(accept=False, deadline=2.0)
    assert theirs.deadline == pytest.approx(pair.now + 2, abs=0.01)
    pair.client.blocked = True
    pair.sleep(2.1)
    assert theirs.sink.events == [("failed", "DialTimeoutError", True, True)]
    assert ours.sink.kinds in (["failed"], ["failed", "closed"])
    pair.client.blocked = False
    pair.client.pending = pair.client.mux.awake
    pair.pump()
    pair.assert_empty()


def test_deadline_passes_without_effect_once_accepted():
    pair = Pair()
    ours, theirs = pair.open(deadline=0.5)
    pair.sleep(5)
    assert ours.sink.kinds == ["accepted"]
    assert theirs.sink.kinds == []


@pytest.mark.parametrize(("deadline", "expected"), [(float("inf"), 300.0), (1e9, 300.0), (-5.0, 0.0)])
def test_deadlines_are_clamped(deadline, expected):
    pair = Pair()
    stream = pair.client.open(deadline=deadline)
    assert stream.deadline == pair.now + expected


def test_a_deadline_longer_than_allowed_is_cut_by_the_accepter():
    pair = Pair()
    pair.client.inject(Open(1, 1, "x", {2: (10**9).to_bytes(4, "big")}), Open(3, 1, "x"))
    assert pair.server.opened[0].deadline == pair.now + 300
    assert pair.server.opened[1].deadline == pair.now + 30


@pytest.mark.parametrize("how", ["STOP", "REFUSE", "cancel while pending"])
def test_reset_owed_and_not_sent_ends_the_session(how):
    """A peer that acknowledges STOP and goes on sending for ever."""
    pair = Pair()
    if how == "STOP":
        ours, theirs = pair.open()
        ours.stop()
        victim = pair.client
    elif how == "REFUSE":
        ours, theirs = pair.open(accept=False)
        theirs.refuse(Code.DENIED)
        victim = pair.server
    else:
        ours, theirs = pair.open(accept=False)
        ours.cancel()
        victim = pair.client
    victim.flush()
    victim.wire.clear()
    for _ in range(50):
        victim.peer.inject(b"\x43\0\0\x08\0\0\0\0" + victim.mux.flight.sent.to_bytes(8, "big"))
        assert victim.error is None, "too early"
        if pair.now > 1028:
            break
        pair.sleep(1, pump=False)
        victim.flush()
    pair.sleep(1.5, pump=False)
    assert victim.error.code == Code.TIMEOUT


def test_reset_after_the_ack_and_in_time():
    pair = Pair()
    ours, _theirs = pair.open()
    ours.stop()
    pair.client.flush()
    pair.client.wire.clear()
    pair.server.inject(b"\x43\0\0\x08\0\0\0\0" + pair.client.mux.flight.sent.to_bytes(8, "big"))
    pair.now += 1
    pair.server.inject(Reset(1, 40, 0))
    for _ in range(40):
        pair.sleep(1, pump=False)
        pair.server.inject(b"\x81\0\0\0\0\0\0\0")
    assert pair.client.error is None
    assert ours.receiving is Receiving.ENDED


def test_reset_that_comes_in_time():
    pair = Pair()
    ours, theirs = pair.open()
    ours.stop()
    pair.pump()
    pair.sleep(60)
    assert pair.client.error is None
    assert theirs.sending is Sending.ENDED


@pytest.mark.parametrize("how", ["cancel", "refuse"])
def test_a_sink_that_hears_of_a_deadline_may_end_other_streams_that_are_due(how):
    """They are over then, and nobody is late with anything."""
    pair = Pair()
    bystander, _ = pair.open()
    if how == "cancel":
        later = []
        pair.client.open(deadline=5, on={"failed": lambda _: later[0].cancel()})
        later.append(pair.client.open(deadline=5))
        pair.client.flush()
        pair.client.wire.clear()
    else:
        for _ in range(2):
            pair.client.open(deadline=5)
        pair.client.flush()
        pair.client.deliver()
        first, second = pair.server.opened[1:]
        first.sink.on["failed"] = lambda _: second.refuse(Code.LIMIT)
    pair.sleep(8, pump=False)
    assert pair.client.error is None and pair.server.error is None
    assert bystander.sink.error is None


@pytest.mark.parametrize("how", ["fin", "reset", "stop", "stop after fin"])
def test_room_that_a_stream_gives_back_is_for_an_open_that_waits(how):
    """Nothing else happens that would bring the OPEN about."""
    pair = Pair(Limits(initial_window=16 * KIB, initial_streams=8, receive_pool=512 * KIB), Limits(initial_streams=100))
    link = Link(pair, delay=0.02, rate=50e6)
    ours, theirs = link.open()
    theirs.write()
    link.run(3)
    theirs.writing = False
    if "stop" in how:
        ours.auto = False
        theirs.stream.write(bytes(256 * KIB))
    link.run(1)
    if how == "stop after fin":
        theirs.stream.finish()
        link.run(1)
    pool = pair.client.mux.pool
    assert pool.extra > 128 * KIB
    while pool.free >= pool.base:
        link.open()
    waiting = pair.client.open(deadline=100)
    link.run(1)
    assert not waiting.id
    if "stop" in how:
        ours.stream.stop()
    elif how == "reset":
        theirs.stream.reset()
    else:
        theirs.stream.finish()
    link.run(0.2)
    assert waiting.id


@pytest.mark.parametrize("short", range(-1, 24))
def test_a_frame_is_the_same_wherever_it_lies_in_what_was_received(short):
    """The stretch that is taken apart at a time ends before it, behind it, and at every byte of it."""
    pair = Pair(Limits(initial_window=64 * KIB, initial_streams=8, receive_pool=1024 * KIB))
    ours, theirs = pair.open()
    frames = [
        Data(ours.id, b"a" * (STRETCH - HEADER_SIZE - short)),
        Data(ours.id, b"0123456789"),
        Ping(7),
        Data(ours.id, b"b" * STRETCH),
        Data(ours.id, b"end", int(DataFlag.FIN)),
    ]
    pair.client.inject(*frames)
    sizes = [event[1] for event in theirs.sink.events if event[0] == "data"]
    assert sizes == [len(frame.payload) for frame in frames if isinstance(frame, Data)]
    assert theirs.sink.data == b"".join(frame.payload for frame in frames if isinstance(frame, Data))
    assert theirs.sink.kinds[-1] == "eof" and pair.server.error is None
