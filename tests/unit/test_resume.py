"""Sessions that outlive their connections: cut anywhere, resumed, exactly once; and who may not resume."""

import pytest

from konnektor import frames
from konnektor.errors import Code, ProtocolError, ResumeRefusedError, SessionClosedError, UnreachableError, VersionError
from konnektor.frames import Hello, HelloTLV
from konnektor.limits import KIB, MIB, Limits
from konnektor.rejoin import Rejoin
from konnektor.replay import Replay, Ticket
from konnektor.states import Receiving
from tests.link import Link
from tests.pair import SMALL, Newcomer, Pair, Side


def resumable(limits=SMALL, **kwargs):
    return Pair(limits, resumable=True, **kwargs)


# Exactly once


def conversation(pair):
    """Both sides write on several streams, finish one, reset one; nothing is delivered yet."""
    first, theirs = pair.open()
    second, seconds = pair.open(pair.server)
    third, _ = pair.open()
    for _ in range(3):
        first.write(b"abc" * 20)
        theirs.write(b"defg" * 10)
        second.write(b"hi")
        seconds.write(b"jkl")
    first.finish()
    third.write(b"lost")
    third.reset(Code.CANCELLED)
    pair.client.mux.ping()
    pair.client.open("echo", b"x").write(b"early")
    for side in pair.sides:
        side.flush()
    return (first, theirs), (second, seconds), third


def check(pair, streams):
    (first, theirs), (second, seconds), _third = streams
    pair.pump()
    assert bytes(theirs.sink.data) == b"abc" * 60
    assert "eof" in theirs.sink.kinds
    assert bytes(first.sink.data) == b"defg" * 30
    assert bytes(seconds.sink.data) == b"hi" * 3
    assert bytes(second.sink.data) == b"jkl" * 3
    late = pair.server.opened[-1]
    assert bytes(late.sink.data) == b"early"
    for side in pair.sides:
        assert side.error is None
        side.check()
    assert pair.server.opened[1].sink.error is not None  # the one that was reset
    second.write(b"and on")
    pair.pump()
    assert bytes(seconds.sink.data) == b"hi" * 3 + b"and on"


@pytest.mark.parametrize("notice", [("client", "server"), ("server", "client"), ("client",)])
def test_cut_at_every_byte(notice):
    pair = resumable()
    conversation(pair)
    total = max(len(side.wire) for side in pair.sides)
    for count in range(total + 1):
        pair = resumable()
        streams = conversation(pair)
        pair.cut(count, total - count, notice=notice)
        pair.resume()
        check(pair, streams)


def test_the_second_connection_cut_at_every_byte():
    count = 0
    while True:
        pair = resumable()
        streams = conversation(pair)
        pair.cut(40, 60)
        pair.reconnect()
        budget = count
        moved = True
        while moved and budget:
            moved = False
            for side in pair.sides:
                side.flush()
                part = min(len(side.wire), budget)
                if part:
                    side.deliver(part)
                    budget -= part
                    moved = True
        pair.cut()
        pair.resume()
        check(pair, streams)
        if budget:
            assert count > 500
            return
        count += 1


def test_the_old_connection_still_lives_and_delivers():
    """The client gives up first; what the server still writes on the old connection is sent again on the new one."""
    pair = resumable()
    streams = conversation(pair)
    pair.client.deliver()
    pair.client.lose()
    pair.server.flush()
    pair.server.wire.clear()
    pair.reconnect()
    assert not pair.server.gone
    pair.pump()
    check(pair, streams)


def test_written_while_suspended():
    pair = resumable()
    stream, theirs = pair.open()
    pair.cut()
    stream.write(b"meanwhile")
    theirs.write(b"here, too")
    for side in pair.sides:
        side.flush()
        assert not side.wire
    pair.resume()
    assert bytes(theirs.sink.data) == b"meanwhile"
    assert bytes(stream.sink.data) == b"here, too"


def with_nothing_to_spare(initial_window):
    """A pair, and eight streams, which take all of the client's pool: its replay buffer is all it has."""
    pair = resumable(
        Limits(
            initial_window=initial_window,
            initial_streams=8,
            receive_pool=16 * initial_window,
            replay_buffer=256 * KIB,
        )
    )
    streams = [pair.open() for _ in range(8)]
    assert pair.client.mux.pool.free == 0
    assert pair.client.mux.resumption.room == 256 * KIB
    return pair, streams


def test_full_replay_buffers_block_and_do_not_deadlock():
    pair, streams = with_nothing_to_spare(64 * KIB)
    for stream, theirs in streams:
        for _ in range(8):
            stream.write(b"x" * 50_000)
            theirs.write(b"y" * 50_000)
    full = 0
    for _ in range(3):
        for side in pair.sides:
            side.flush()
            flight, room = side.mux.flight, side.mux.resumption.room
            full += side.mux.resumption.replay.footprint >= room
            assert flight.sequenced <= room + 64 * KIB
        pair.cut(100_000, 150_000)
        pair.resume()
    assert full
    for stream, theirs in streams:
        assert len(stream.sink.data) == len(theirs.sink.data) == 400_000


def test_what_the_pool_can_spare_holds_what_was_sent():
    pair = resumable(
        Limits(
            initial_window=MIB,
            initial_streams=8,
            receive_pool=16 * MIB,
            replay_buffer=256 * KIB,
            flight_floor=16 * MIB,
        )
    )
    streams = [pair.open() for _ in range(2)]
    mux = pair.client.mux
    room = mux.resumption.room
    assert room == 256 * KIB + 3 * (16 - 8 - 2 - 1) * MIB // 4
    for stream, _ in streams:
        stream.write(bytes(3 * MIB))
    pair.client.flush()
    assert 256 * KIB < mux.resumption.replay.footprint <= room
    assert mux.pool.lent == mux.resumption.replay.footprint - 256 * KIB
    before = mux.pool.lent
    pair.client.deliver(800_000)
    pair.server.flush()
    pair.server.deliver()
    assert before - 800_000 <= mux.pool.lent < before - 400_000
    before = mux.pool.lent
    pair.cut()
    assert mux.pool.lent == before
    pair.resume()
    assert mux.pool.lent == 0
    for _, theirs in streams:
        assert len(theirs.sink.data) == 3 * MIB


def test_what_waited_for_room_in_the_replay_buffer_is_not_forgotten():
    pair, streams = with_nothing_to_spare(64 * KIB)
    pair.sleep(1)
    for stream, _ in streams:
        stream.write(b"x" * 64 * KIB)
    pair.client.flush()
    assert pair.client.mux.resumption.replay.footprint >= 256 * KIB
    assert sum(stream.queued for stream, _ in streams)
    pair.client.mux.drain(60, pair.now)
    pair.client.flush()
    assert "goaway" not in pair.server.kinds
    pair.pump()
    assert "goaway" in pair.server.kinds


def test_tiny_frames_cost_what_they_cost():
    pair, streams = with_nothing_to_spare(32 * KIB)
    stream = streams[0][0]
    sent = 0
    while True:
        stream.write(b"x")
        pair.client.flush()
        if not pair.client.wire:
            break
        sent += 1
        pair.client.wire.clear()
    assert 256 < sent < 600  # though they weigh nine bytes each


def test_a_ping_that_was_out_is_not_waited_for():
    pair = resumable()
    pair.client.mux.ping()
    pair.client.flush()
    pair.cut()
    pair.resume()
    opaque = pair.client.mux.ping()
    pair.sleep(1)
    assert ("pong", opaque) in [event[:2] for event in pair.client.events]


# Who may


def attempt(pair, *, nonce=b"c" * 32, change=lambda frame: frame):
    """A RESUME by hand; returns the newcomer that judged it, and what it sent."""
    server = pair.server
    newcomer = Newcomer(server)
    server.machine = newcomer.mux
    tlvs = {**pair.client.mux.settings.to_tlvs(), int(HelloTLV.RESUME_INTENT): b""}
    hello = Hello(1, 1, nonce, tlvs).encode()
    assert newcomer.mux.receive(hello, pair.now) == len(hello)
    newcomer.mux.data_to_send(pair.now)
    frame = pair.client.mux.resumption.request(nonce + newcomer.mux.nonce)
    raw = change(frame).encode()
    newcomer.mux.receive(raw, pair.now)
    return newcomer, raw


BAD = {
    "forged": lambda f: f._replace(mac=bytes(32)),
    "another attempt": lambda f: f._replace(attempt=f.attempt + 1),
    "ahead": lambda f: f._replace(rx_seq=f.rx_seq + 1),
    "behind": lambda f: f._replace(rx_seq=0),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_a_resume_that_was_tampered_with(change):
    pair = resumable()
    pair.open()
    pair.cut()
    newcomer, _ = attempt(pair, change=change)
    assert newcomer.error.code == Code.RESUME_REFUSED
    assert pair.server.gone


def signed(pair, **changes):
    """A RESUME whose proof is right, of what cannot be."""

    def change(frame):
        frame = frame._replace(**changes)
        ticket = pair.client.mux.resumption.ticket
        return frame._replace(mac=ticket.client_mac(frame.attempt, frame.rx_seq, b"c" * 32 + b"n" * 32))

    return change


@pytest.mark.parametrize("changes", [{"attempt": 0}, {"rx_seq": 10**9}, {"rx_seq": 0}], ids=str)
def test_a_resume_of_what_cannot_be(changes):
    pair = resumable()
    pair.open()
    pair.sleep(1)  # so that something is acknowledged
    pair.cut()
    newcomer, _ = attempt(pair, change=signed(pair, **changes))
    assert newcomer.error.code == Code.RESUME_REFUSED
    assert pair.server.gone


def test_a_resume_is_taken_once():
    pair = resumable()
    pair.cut()
    newcomer, raw = attempt(pair)
    assert newcomer.error.code == Code.NO_ERROR or not pair.server.gone
    pair.server.lose()
    # The same bytes again, and the same nonces: the attempt was made.
    again = Newcomer(pair.server)
    hello = Hello(1, 1, b"c" * 32, {int(HelloTLV.RESUME_INTENT): b""}).encode()
    again.mux.receive(hello, pair.now)
    again.mux.receive(raw, pair.now)
    assert again.error.code == Code.RESUME_REFUSED
    assert pair.server.gone


@pytest.mark.parametrize("frame", [frames.Ping(1), frames.Streams(100), frames.Hello(1, 1, b"2" * 32)], ids=repr)
def test_nothing_but_resume_follows_the_intent(frame):
    pair = resumable()
    newcomer = Newcomer(pair.server)
    hello = Hello(1, 1, b"c" * 32, {int(HelloTLV.RESUME_INTENT): b""}).encode()
    newcomer.mux.receive(hello + frame.encode(), pair.now)
    assert newcomer.error.code == Code.PROTOCOL


@pytest.mark.parametrize("tlvs", [{HelloTLV.RESUME_INTENT: b"1"}, {HelloTLV.RESUME_INTENT: b"", HelloTLV.AFRESH: b"1"}])
def test_the_intent_has_no_value(tlvs):
    newcomer = Newcomer(resumable().server)
    newcomer.mux.receive(Hello(1, 1, b"c" * 32, {int(tlv): value for tlv, value in tlvs.items()}).encode(), 0)
    assert newcomer.error.code == Code.PROTOCOL


def test_an_empty_session_id_is_none_and_not_absent():
    pair = Pair(hello=False)
    pair.server.inject(Hello(1, 1, b"s" * 32, {int(HelloTLV.SESSION_ID): b"", int(HelloTLV.RESUME_KEY): b""}))
    assert pair.client.error.code == Code.PROTOCOL


def test_a_server_has_no_intent():
    pair = Pair(hello=False)
    pair.server.inject(Hello(1, 1, b"s" * 32, {int(HelloTLV.RESUME_INTENT): b""}))
    assert "RESUME_INTENT" in str(pair.client.error)


@pytest.mark.parametrize("frame", [frames.Resume(bytes(16), 1, 0, bytes(32)), frames.Resumed(0, bytes(32))], ids=repr)
def test_resume_in_the_middle_of_a_session(frame):
    pair = resumable()
    pair.client.inject(frame)
    assert pair.server.error.code == Code.PROTOCOL


@pytest.mark.parametrize("tlvs", [{11: b"short", 12: bytes(32)}, {11: bytes(16)}, {12: bytes(32)}], ids=str)
def test_a_ticket_that_is_none(tlvs):
    with pytest.raises(ProtocolError):
        Ticket.from_tlvs(tlvs)


@pytest.mark.parametrize("features", [(1, 0), (0, 1)])
def test_both_must_want_it(features):
    pair = Pair(hello=False)
    ticket = Ticket(bytes(16), bytes(32))
    pair.client = Side(pair, "client", SMALL, features=features[0])
    pair.server = Side(pair, "server", SMALL, features=features[1], ticket=ticket)
    pair.pump()
    for side in pair.sides:
        assert not side.mux.resumption.possible
        assert side.mux.resumption.replay is None


# The client's first words


class Attempt:
    """A Rejoin and what it reports, with a session that was cut."""

    def __init__(self):
        self.pair = resumable()
        self.stream, _ = self.pair.open()
        self.pair.cut()
        self.rejoin = Rejoin(self.pair.client.mux, self, b"c" * 32)
        self.failed = []
        self.succeeded = False

    def output_pending(self):
        assert self.rejoin.awake

    def rejoined(self):
        self.succeeded = True

    def rejoin_failed(self, error):
        self.failed.append(error)

    def receive(self, *frames):
        data = b"".join(frame if isinstance(frame, bytes) else frame.encode() for frame in frames)
        return self.rejoin.receive(data, self.pair.now)


HELLO = Hello(1, 1, b"s" * 32)


def test_hello_in_single_bytes_then_close():
    attempt = Attempt()
    assert attempt.rejoin.data_to_send(0).startswith(b"\x40")
    raw, used = HELLO.encode(), 0
    for end in range(len(raw) + 1):
        used += attempt.receive(raw[used:end])
    assert used == len(raw)
    assert attempt.rejoin.data_to_send(0).startswith(b"\x41")
    attempt.receive(b"\x9f\0\0\1\0\0\0\0?", frames.Close(Code.RESUME_REFUSED, "no such session"))
    (error,) = attempt.failed
    assert isinstance(error, ResumeRefusedError)
    assert not attempt.rejoin.awake
    attempt.rejoin.connection_lost("later")
    attempt.rejoin.write_blocked(0)
    attempt.rejoin.write_resumed()
    assert attempt.failed == [error]
    assert attempt.pair.client.gone


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ([Hello(2, 3, b"s" * 32)], VersionError),
        ([HELLO, HELLO], ProtocolError),
        ([Hello(1, 1, b"s" * 32, {int(HelloTLV.RESUME_INTENT): b""})], ProtocolError),
        ([frames.Resumed(0, bytes(32))], ProtocolError),
        ([HELLO, frames.Resumed(0, bytes(32))], ProtocolError),
        ([frames.Ping(1)], ProtocolError),
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], ProtocolError),
    ],
    ids=str,
)
def test_an_answer_that_is_none(answer, kind):
    attempt = Attempt()
    attempt.rejoin.data_to_send(0)
    attempt.receive(*answer)
    (error,) = attempt.failed
    assert isinstance(error, kind)
    assert b"\x47" in attempt.rejoin.data_to_send(0)
    assert attempt.pair.client.gone and not attempt.succeeded


def test_a_driver_may_have_the_bytes_of_an_attempt_in_chunks():
    one, other = Attempt(), Attempt()
    assert b"".join(one.rejoin.chunks_to_send(0)) == other.rejoin.data_to_send(0) != b""
    assert one.rejoin.chunks_to_send(0) == [] and not one.rejoin.awake


def test_resumed_by_one_who_took_in_what_was_never_sent():
    attempt = Attempt()
    attempt.receive(HELLO)
    ticket = attempt.pair.client.mux.resumption.ticket
    attempt.receive(frames.Resumed(10**6, ticket.server_mac(1, 10**6, b"c" * 32 + b"s" * 32)))
    assert isinstance(attempt.failed[0], ProtocolError)


def test_an_attempt_that_is_given_up():
    attempt = Attempt()
    attempt.rejoin.data_to_send(0)
    attempt.rejoin.close(Code.IDENTITY, "somebody else")
    assert attempt.failed[0].code == Code.IDENTITY
    assert b"somebody else" in attempt.rejoin.data_to_send(0)


@pytest.mark.parametrize("how", ["given up", "told so", "offended"])
def test_after_a_failed_attempt_nothing_is_kept_for_later(how):
    """A peer that talked on filled the driver's buffer, which keeps what was not taken."""
    attempt = Attempt()
    if how == "given up":
        attempt.rejoin.close(Code.IDENTITY, "somebody else")
    else:
        attempt.receive(frames.Close(Code.RESUME_REFUSED, "") if how == "told so" else frames.Ping(1))
    assert attempt.failed
    for rest in (b"half a", frames.Ping(2).encode(), bytes(100_000)):
        assert attempt.receive(rest) == len(rest)
    raw = frames.Close(Code.RESUME_REFUSED, "").encode() + b"and more"
    again = Attempt()
    assert again.receive(raw) == len(raw)


# Time without a connection


def test_streams_that_were_not_accepted_can_be_tried_elsewhere():
    pair = resumable()
    early = pair.client.open(repeatable=True)
    early.write(b"ahead of the answer")
    sent = pair.client.open(repeatable=True)
    once = pair.client.open()
    pair.client.flush()
    pair.cut()
    unsent = pair.client.open()
    pair.sleep(1.9)
    assert not early.sink.error and not sent.sink.error and not unsent.sink.error
    pair.sleep(0.2)
    # The peer may have accepted it and done all that its header asks for.
    for stream, retryable in ((early, False), (sent, True), (once, False), (unsent, True)):
        assert isinstance(stream.sink.error, UnreachableError)
        assert stream.sink.error.retryable is retryable
    with pytest.raises(UnreachableError):
        pair.client.open()
    pair.resume()
    assert pair.client.open().sink.error is None


def test_a_stream_that_fails_takes_another_with_it():
    pair = resumable()
    pair.cut()
    others = []
    pair.client.open(on={"failed": lambda _: others[0].cancel()})
    others.append(pair.client.open())
    pair.sleep(3)
    assert others[0].sink.is_closed and others[0].sink.error is None


def test_streams_opened_in_the_meantime_go_out_when_it_is_back():
    pair = resumable()
    pair.cut()
    stream = pair.client.open()
    pair.sleep(1, pump=False)
    pair.resume()
    assert pair.server.opened[-1].id == stream.id


@pytest.mark.parametrize("who", ["client", "server"])
def test_the_grace_is_over(who):
    pair = resumable()
    stream, theirs = pair.open()
    stream.write(b"123")
    theirs.write(b"4567")
    pair.pump()
    pair.cut(notice=[who])
    pair.sleep(59, pump=False)
    side, end = (pair.client, stream) if who == "client" else (pair.server, theirs)
    assert side.error is None
    pair.sleep(2, pump=False)
    assert side.error.code == Code.TIMEOUT
    assert "not resumed within 60 s" in str(side.error)
    assert {end.sink.error.sent, end.sink.error.received} == {3, 4}


def owed(pair):
    """A stream whose peer has acknowledged STOP and owes RESET, which was lost with the connection."""
    stream, theirs = pair.open()
    stream.stop()
    pair.client.flush()
    pair.client.deliver()
    pair.server.mux.inbound.acks.due = True
    ack = frames.Ack(pair.server.mux.inbound.acks.seq)
    pair.client.mux.receive(ack.encode(), pair.now)
    assert stream.watch is not None
    return stream, theirs


def test_a_reset_that_is_owed_is_waited_for_when_the_connection_is_back():
    pair = resumable()
    _, theirs = owed(pair)
    pair.cut()
    pair.sleep(40, pump=False)
    assert pair.client.error is None
    pair.resume()
    pair.sleep(1)
    assert pair.client.error is None
    assert theirs.sending.name == "ENDED"


@pytest.mark.parametrize("broken_for", [5, 40])
def test_the_time_for_a_reset_that_is_owed_begins_anew_with_the_connection(broken_for):
    """However much of it had gone, or would have."""
    pair = resumable()
    stream, _ = owed(pair)
    pair.server.mux.control.clear()  # a server that forgets what it owes
    pair.sleep(20, pump=False)
    pair.cut()
    pair.sleep(broken_for, pump=False)
    pair.resume()
    assert stream.receiving is Receiving.DISCARDING
    pair.sleep(29)
    assert pair.client.error is None
    pair.sleep(1.1)
    assert f"stream {stream.id} was not ended within 30 s" in str(pair.client.error)


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_reset_that_is_owed_may_stand_behind_what_is_sent_again(cancelled):
    """All of that goes first: on a path that has become slow it takes longer than a RESET may take."""
    pair = resumable(Limits())
    link = Link(pair, delay=0.1, rate=20 * MIB)
    down, up = link.open()
    up.write()
    link.run(6)
    asked = pair.client.open()
    if cancelled:
        asked.cancel()
    link.run(0.15)
    up.writing = False
    link.stop()
    pair.cut()
    pair.sleep(3, pump=False)  # long enough for what was not accepted to be given up
    pair.reconnect()
    slow = Link(pair, delay=0.05, rate=100 * KIB, queue=256 * KIB)
    before = down.received
    slow.run(70)
    assert pair.client.error is None and pair.server.error is None
    assert down.received - before > 5 * MIB
    assert pair.client.mux.streams.keys() == {down.stream.id}


@pytest.mark.parametrize("talking", [False, True])
def test_a_reset_that_is_owed_is_not_waited_for_for_ever(talking):
    """Thirty seconds of a peer that sends nothing that counts, ten minutes of one that sends anything else."""
    pair = resumable()
    bystander, theirs = pair.open()
    stream, _ = owed(pair)
    pair.client.deceived = True  # by that ACK, which the server sends once more
    pair.server.mux.control.clear()  # a server that forgets what it owes
    since = pair.now
    while pair.client.error is None and pair.now < since + 1000:
        if talking:
            theirs.write(b"x")
        pair.sleep(5)
    assert f"stream {stream.id} was not ended within" in str(pair.client.error)
    assert pair.now - since < (640 if talking else 40)
    assert pair.now - since >= (600 if talking else 30)
    assert bystander.sink.error is not None


@pytest.mark.parametrize("cut", [False, True])
def test_who_has_ended_the_half_that_was_stopped_owes_nothing_more(cut):
    """Though the other half goes on for as long as it likes."""
    pair = resumable()
    stream, theirs = owed(pair)
    pair.client.deceived = True  # by that ACK, which the server sends once more
    pair.pump()
    assert stream.owed is not None and not stream.owes
    if cut:
        pair.cut()
        pair.resume()
    for _ in range(50):
        stream.write(b"x")
        pair.sleep(3)
    assert pair.client.error is None and len(theirs.sink.data) == 50


@pytest.mark.parametrize("before", [True, False])
def test_drained_while_suspended_without_streams(before):
    pair = resumable()
    if before:
        pair.client.mux.drain(60, pair.now)
    pair.cut(notice=["client"])
    if not before:
        pair.client.mux.drain(60, pair.now)
    assert pair.client.error.code == Code.SHUTDOWN
    with pytest.raises(SessionClosedError):
        pair.client.open()


def test_drained_while_suspended_with_streams():
    pair = resumable()
    stream, theirs = pair.open()
    pair.cut()
    pair.client.mux.drain(10, pair.now)
    pair.sleep(5, pump=False)
    pair.resume()
    assert "goaway" in pair.server.kinds
    theirs.write(b"to the end")
    theirs.finish()
    stream.finish()
    pair.sleep(1)
    assert bytes(stream.sink.data) == b"to the end"
    assert pair.client.error.code == Code.SHUTDOWN


def test_the_grace_of_a_drain_runs_while_suspended():
    pair = resumable()
    stream, _ = pair.open()
    pair.cut(notice=["client"])
    pair.client.mux.drain(10, pair.now)
    pair.sleep(16, pump=False)
    assert pair.client.error is not None
    assert stream.sink.is_closed


def test_resuming_hears_that_all_a_drain_waited_for_has_arrived():
    pair = resumable()
    stream, theirs = pair.open()
    stream.finish()
    theirs.finish()
    pair.pump()
    pair.client.mux.drain(10, pair.now)
    pair.client.flush()
    pair.client.deliver()
    assert pair.client.error is None
    pair.server.mux.drain(10, pair.now)
    pair.cut(notice=["client"])
    # Its GOAWAY is not acknowledged, as far as it knows.
    assert pair.client.error is None
    pair.resume()
    pair.sleep(1)
    assert pair.client.error is not None and pair.client.error.code == Code.SHUTDOWN


@pytest.mark.parametrize("noticed", [True, False])
def test_what_has_ended_at_the_draining_side_arrives_at_the_other(noticed):
    """Its stream is forgotten as soon as FIN is on the wire, which says nothing about the other end."""
    pair = resumable()
    ours, theirs = pair.open()
    ours.finish()
    pair.pump()
    theirs.write(b"x" * 8 * KIB)
    theirs.finish()
    pair.server.flush()
    assert not pair.server.mux.streams
    pair.server.mux.drain(30, pair.now)
    pair.server.flush()
    pair.cut(notice=["client", "server"][: 1 + noticed])
    pair.sleep(7, pump=False)
    assert pair.server.error is None
    pair.resume()
    assert len(ours.sink.data) == 8 * KIB and ours.sink.kinds[-2:] == ["eof", "closed"]
    pair.sleep(1)
    assert pair.server.error.code == Code.SHUTDOWN


def test_what_has_ended_waits_for_another_connection_no_longer_than_the_grace():
    pair = resumable()
    _, theirs = pair.open()
    theirs.write(b"x")
    theirs.cancel()
    pair.server.flush()
    pair.server.mux.drain(10, pair.now)
    pair.cut()
    pair.sleep(9, pump=False)
    assert pair.server.error is None
    pair.sleep(7, pump=False)
    assert pair.server.error is not None


def test_a_drain_lingers_while_what_is_sent_again_arrives():
    """However slow the new path is: as long as something arrives, and the grace is not over."""
    pair = resumable(Limits())
    link = Link(pair, delay=0.1, rate=60 * MIB)
    down, up = link.open()
    up.write()
    link.run(6)
    pair.server.mux.drain(3600, pair.now)
    link.run(1)
    up.writing = False
    while up.stream.queued:
        link.run(0.005)
    up.stream.finish()
    link.run(0.01)
    total = up.stream.send_window.sent
    assert pair.server.mux.flight.sequenced > 8 * MIB
    link.stop()
    pair.cut()
    pair.reconnect()
    slow = Link(pair, delay=0.05, rate=400 * KIB, queue=256 * KIB)
    slow.run(1)
    down.stream.finish()
    slow.run(60)
    assert down.received == total and down.kinds[-2:] == ["eof", "closed"]
    assert pair.server.error.code == Code.SHUTDOWN


@pytest.mark.parametrize("lingering", [False, True])
def test_a_second_drain_shortens_the_wait_for_what_has_ended(lingering):
    pair = resumable()
    pair.server.mux.drain(1000, pair.now)
    pair.server.flush()
    pair.server.deliver()
    pair.server.mux.receive(frames.Ack(pair.client.mux.inbound.acks.seq).encode(), pair.now)
    pair.server.flush()  # the second GOAWAY, which nobody gets
    if lingering:
        pair.fire(pair.server)
    assert pair.server.mux.leaving._lingering is lingering
    pair.cut()
    pair.sleep(20, pump=False)
    assert pair.server.error is None
    pair.server.mux.drain(0, pair.now)
    pair.sleep(4.9, pump=False)
    assert pair.server.error is None
    pair.sleep(0.2, pump=False)
    assert pair.server.error is not None


def test_silence_suspends():
    pair = resumable()
    pair.open()
    pair.cut(notice=[])
    pair.sleep(30, pump=False)
    for side in pair.sides:
        assert "dead" in side.kinds
        assert side.gone and side.error is None
    pair.resume()


def test_a_peer_that_is_heard_and_acknowledges_nothing_is_no_broken_connection():
    pair = resumable()
    stream, _ = pair.open()
    stream.write(b"x")
    pair.client.flush()
    for _ in range(40):
        pair.client.wire.clear()
        pair.client.mux.receive(frames.Credit(stream.id, 1).encode(), pair.now)
        pair.sleep(1, pump=False)
    assert pair.client.error.code == Code.TIMEOUT
    assert "dead" not in pair.client.kinds


# Parts


def test_replay_gives_back_what_was_not_acknowledged():
    replay = Replay()
    replay.keep([b"..abc"], 3)
    replay.keep([b"de", b"fg"], 4)
    assert replay.sent == 7
    assert list(replay.rest(0)) == [b"abc", b"defg"]
    assert list(replay.rest(2)) == [b"c", b"defg"]
    replay.release(3)
    assert list(replay.rest(3)) == [b"defg"]
    replay.release(6)
    assert list(replay.rest(6)) == [b"g"]
    replay.release(7)
    assert list(replay.rest(7)) == []


def test_a_server_without_tickets_refuses():
    pair = Pair()
    server = pair.server
    newcomer = Newcomer(server)
    hello = Hello(1, 1, b"c" * 32, {int(HelloTLV.RESUME_INTENT): b""})
    newcomer.mux.receive(hello.encode(), pair.now)
    newcomer.mux.receive(frames.Resume(bytes(16), 1, 0, bytes(32)).encode(), pair.now)
    assert newcomer.error.code == Code.RESUME_REFUSED


def test_early_data_of_a_client_survives_the_loss():
    """Sent within the floors, before the client knew whether the server keeps sessions at all."""
    pair = resumable(hello=False)
    stream = pair.client.open()
    stream.write(b"early")
    pair.client.flush()
    pair.client.deliver()
    pair.server.flush()
    pair.server.deliver()
    assert pair.client.mux.resumption.possible
    pair.cut()
    pair.resume()
    pair.server.opened[0].accept()
    pair.pump()
    assert bytes(pair.server.opened[0].sink.data) == b"early"
