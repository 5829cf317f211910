"""Two whole multiplexers and a connection that breaks, or one of them against a peer that keeps no rule.

An input is a program: three bytes that set the stage, then operations, each a byte and its arguments. Operations are what an
application does at either end, what the world does (delivering so many bytes, cuts, time, a path with a delay), and what a liar does: sound
frames with numbers near those that would be right, frames with damaged bytes, proofs of who holds the ticket. After each,
both multiplexers' invariants must hold, and no side may hold more than its limits. As long as nobody has lied, no side may end
the session, and what arrives must be what was written; at the end all of it must have arrived. Afterwards a side may end,
with an error of the session's.
"""

import contextlib
from collections.abc import Callable, Iterator

from fuzz import vectors
from fuzz.liar import Liar
from fuzz.stage import DELAYS, RATES, Program
from konnektor.errors import LocalProtocolError, SessionError
from konnektor.mux import BATCH
from konnektor.states import Sending

MAX_INPUT = 1500
OPERATIONS = 400
"""Of one input; with the bytes of each it bounds what a run can take."""

OPERATIONS_BY_BYTE: tuple[Callable[[Liar], None], ...] = (
    Liar.open, Liar.answer, Liar.write, Liar.send_datagram, Liar.finish, Liar.break_off, Liar.consume, Liar.let_go,
    Liar.hint, Liar.ping, Liar.leave, Liar.flush, Liar.deliver, Liar.exchange, Liar.block, Liar.sleep,
    Liar.cut, Liar.reconnect, Liar.lie, Liar.babble, Liar.damage, Liar.forge, Liar.flood,
    Liar.travel,
)  # fmt: skip


def one(data: bytes) -> None:
    """Runs one program.

    Raises:
        Exception: something does not hold.
    """
    program = Program(data)
    stage = Liar(program)
    for _ in range(OPERATIONS):
        if program.over:
            break
        program.choice(OPERATIONS_BY_BYTE)(stage)
        check(stage)
    if not stage.over and not any(side.error for side in stage.pair.sides):
        finish_honest(stage)
    else:
        finish_any(stage)


def seeds() -> Iterator[bytes]:
    """Conversations that go well, are cut and go on; each operation after one; and the vectors as what a liar says."""
    talk = TALK + op(Liar.write, 0, 0, 255) + op(Liar.write, 1, 0, 100) + op(Liar.exchange)
    done = op(Liar.consume, 1, 0, 255) + op(Liar.finish, 0, 0) + op(Liar.finish, 1, 0) + op(Liar.exchange)
    cut = op(Liar.write, 0, 0, 230) + op(Liar.flush, 0, 3) + op(Liar.cut, 0, 210, 100)
    again = op(Liar.reconnect, 1) + done
    stage = bytes(3)
    for mode in range(0, 128, 4):
        yield bytes((mode, 0, 1)) + talk + done
        yield bytes((mode, 1, 1)) + talk + cut + op(Liar.sleep, 2, 0) + again
    opened = op(Liar.open, 0, 1, 0, 0, 0) + op(Liar.exchange) + op(Liar.answer, 1, 1, 1, 0) + op(Liar.exchange)
    for rounds in range(4):
        # Datagrams beside bulk on changing paths: PINGs that report the ones must not meet those that measure by the other.
        said = stage + talk + opened
        for turn in range(40):
            said += op(Liar.send_datagram, 0, 1, 240) + op(Liar.write, 0, 0, 250) + op(Liar.consume, 1, 0, 255)
            said += op(Liar.travel, turn * 7 % len(DELAYS), turn * 5 % len(RATES), rounds)
        yield said + done
    for operation in OPERATIONS_BY_BYTE:
        for who in (0, 1):
            yield stage + talk + op(operation, who, 0, 1, 2, 3, 4) + op(Liar.exchange)
    for kind in range(18):
        for who in (0, 1):
            yield stage + talk + op(Liar.lie, who, 1, 0, kind, 4, 4, 4, 0, 0) + op(Liar.exchange)
            yield stage + talk + op(Liar.flood, who, 1, 0, kind, 4, 4, 250, 250, 250) + op(Liar.exchange)
    for latest in (0, 1):
        yield stage + talk + cut + op(Liar.forge, 0, latest, 4) + op(Liar.exchange)
        yield stage + talk + cut + op(Liar.forge, 1, 4, latest, 4) + op(Liar.exchange)
    for name, mode in (("sessions", 1), ("frames", 0), ("errors", 0)):
        for data in vectors.load(name):
            if len(data) < 1200:
                said = op(Liar.babble, 1, *len(data).to_bytes(2, "big")) + data
                yield bytes((mode, 0, 0)) + said + op(Liar.exchange)


def op(operation: Callable[[Liar], None], *arguments: int) -> bytes:
    """An operation and its arguments, as they stand in a program."""
    return bytes((OPERATIONS_BY_BYTE.index(operation), *arguments))


TALK = op(Liar.open, 0, 0, 0, 0, 0) + op(Liar.exchange) + op(Liar.answer, 1, 0, 1, 0) + op(Liar.exchange)
"""The client has a stream, and the server has accepted it."""


# What must hold


def check(stage: Liar) -> None:
    """After every operation."""
    stage.notice()
    for side in stage.pair.sides:
        side.check()
        _check_bounds(side)
        assert side.error is None or stage.over, side.error
        assert side.error is None or isinstance(side.error, SessionError)
    if not stage.lied:
        for stream, written in stage.written.items():
            for other in stage.far_ends(stream):
                assert written.startswith(other.sink.data), "other bytes than were written"


def finish_honest(stage: Liar) -> None:
    """Everybody reads and answers: all that was written arrives, and nothing is left behind."""
    pair = stage.pair
    stage.unblock()
    if pair.client.dead or pair.client.machine is not pair.client.mux:
        if pair.client.mux.resumption.possible:
            assert stage.connect()
        else:
            return
    stage.exchange()
    before = None
    while (
        waiting := [(each.queued, each.receive_window.unread) for side in pair.sides for each in side.all]
    ) != before:
        before = waiting
        for side in pair.sides:
            for stream in side.all:
                stream.consumed(stream.receive_window.unread)
                if stream.sending is Sending.UNDECIDED:
                    with contextlib.suppress(LocalProtocolError):
                        stream.accept()
        stage.exchange()
        # A replay buffer that is full of tiny frames waits for an ACK, which has no reason to hurry.
        stage.pass_time(pair.now + 0.03, pump=True)
    marred = {stream.id for stream in stage.marred}
    for stream, written in stage.written.items():
        if stream.id and stream not in stage.marred and stream.id not in marred:
            far = stage.far_ends(stream)
            assert far, "its OPEN never arrived"
            assert all(bytes(other.sink.data) == written for other in far), "not all that was written arrived"
    for side in pair.sides:
        for stream in side.all:
            stream.cancel()
            stream.release()
    stage.pass_time(pair.now + 6, pump=True)
    assert not any(side.error for side in pair.sides)
    pair.assert_empty()


def finish_any(stage: Liar) -> None:
    """Closed, both sides let go of everything."""
    for side in stage.pair.sides:
        if side.error is None:
            side.mux.close(0, "")
        side.check()
        mux = side.mux
        assert not any((mux.streams, mux.opens, mux.control, mux.owed))
        assert all(stream.sink.is_closed for stream in side.all)
        assert mux.receive(b"whatever comes", stage.pair.now) == 14
        side.blocked = side.dead = False
        side.machine = mux
        for _ in range(4):
            mux.data_to_send(stage.pair.now)
        assert not mux.awake
        assert mux.next_deadline() is None


def _check_bounds(side) -> None:
    """What one side holds for its peer's sake is within its limits."""
    mux = side.mux
    streams = [*mux.streams.values()]
    assert sum(stream.receive_window.unread for stream in streams) <= mux.pool.size
    assert len(mux.control) <= 2 * mux.limits.initial_streams + mux.admission.opened
    assert len(side.rest) <= 8 + mux.limits.max_frame
    replay = mux.resumption.replay
    if replay is not None:
        assert sum(size for _, _, size in replay._batches) <= mux.limits.replay_buffer + 2 * BATCH
    assert len(mux._deadlines._heap) <= len(mux._deadlines._buckets)
