"""Random operations on two multiplexers against a model: what a pair of byte pipes with errors would do.

The model knows of each half what was written, whether it was finished, and who broke it off. Whatever is done, delivered
in whatever pieces and however late: bytes arrive exact and in order, EOF only after all of them, nobody hears of anything
after ``closed``, and when all is over nothing is left in either multiplexer.
"""

import contextlib

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from konnektor.errors import KonnektorError, LocalProtocolError, SessionClosedError, StreamClosedError
from konnektor.limits import KIB, Limits
from konnektor.states import Sending
from tests.link import PIECE, Link
from tests.pair import Pair

LIMITS = Limits(initial_window=16 * KIB, initial_streams=8, receive_pool=320 * KIB, ack_bytes=8 * KIB)
CODES = st.sampled_from([0, 32, 39, 40, 2**31, 2**32 - 1])
SIZES = st.one_of(st.integers(0, 40), st.integers(0, 70_000), st.sampled_from([1023, 1024, 1025, 16 * KIB, 65_528]))


class Half:
    """One direction of one stream: what its writer did and what its reader may see."""

    def __init__(self, writer, reader_side):
        self.writer = writer
        self.reader_side = reader_side
        self.reader = None
        self.written = bytearray()
        self.finished = False
        self.broken = False  # reset, stopped, refused or cancelled by anybody

    def check(self):
        if self.reader is None:
            return
        sink = self.reader.sink
        assert self.written.startswith(sink.data)
        if "eof" in sink.kinds:
            assert self.finished
            assert len(sink.data) == len(self.written)
        failed = [event for event in sink.events if event[0] == "failed" and event[2]]
        assert len(failed) <= 1
        if failed:
            assert self.broken or self.reader_side.pair.over

    def check_settled(self):
        """When all was delivered and consumed."""
        if self.reader is not None and self.finished and not self.broken:
            assert bytes(self.reader.sink.data) == bytes(self.written)
            assert "eof" in self.reader.sink.kinds


class MuxModel(RuleBasedStateMachine):
    streams = Bundle("streams")

    def __init__(self):
        super().__init__()
        self.pair = Pair(LIMITS, resumable=True)
        self.pair.over = False
        self.halves = {}
        self.byte = 0
        for side in self.pair.sides:
            side.auto = False
            side.on_open = lambda stream, side=side: self.opened(side, stream)

    def opened(self, side, stream):
        opener = next(s for s in side.peer.all if s.id == stream.id and s.id & 1 == side.peer.mux.admission.next_id & 1)
        self.halves[opener].reader = stream
        half = self.halves[stream] = Half(stream, side.peer)
        half.reader = opener
        half.broken = self.halves[opener].broken

    def break_both(self, stream):
        self.halves[stream].broken = True
        other = self.halves[stream].reader
        if other is not None:
            self.halves[other].broken = True

    def both(self, stream):
        other = self.halves[stream].reader
        return [self.halves[stream]] + ([self.halves[other]] if other is not None else [])

    def side_of(self, stream):
        return next(side for side in self.pair.sides if stream in side.all)

    # what an application does

    @rule(target=streams, who=st.integers(0, 1), priority=st.integers(0, 2), deadline=st.sampled_from([0.2, 5.0, None]))
    def open(self, who, priority, deadline):
        side = self.pair.sides[who]
        try:
            stream = side.open(auto=False, priority=priority, deadline=deadline)
        except SessionClosedError:
            assert side.mux.draining or side.error is not None
            return multiple()
        self.halves[stream] = Half(stream, side.peer)
        return stream

    def theirs(self, stream, other):
        """One end or the other of a stream."""
        if other and self.halves[stream].reader is not None:
            return self.halves[stream].reader
        return stream

    @rule(stream=streams, data=st.integers(0, 99))
    def accept(self, stream, data):
        other = self.halves[stream].reader
        if other is not None and stream.sending is Sending.UNDECIDED:
            stream, other = other, stream
        if other is not None:
            with contextlib.suppress(LocalProtocolError):
                other.accept(b"h" * data)

    @rule(stream=streams, code=CODES)
    def refuse(self, stream, code):
        other = self.halves[stream].reader
        if other is not None and other.sending is Sending.UNDECIDED:
            other.refuse(code, "no")
            self.break_both(stream)

    @rule(stream=streams, other=st.booleans(), size=SIZES)
    def write(self, stream, other, size):
        stream = self.theirs(stream, other)
        self.byte = (self.byte + 1) % 256
        data = bytes([self.byte]) * size
        try:
            stream.write(data)
        except (StreamClosedError, LocalProtocolError):
            return
        self.halves[stream].written += data

    @rule(stream=streams, other=st.booleans())
    def finish(self, stream, other):
        stream = self.theirs(stream, other)
        open_ = stream.sending in (Sending.OPEN, Sending.UNSENT)
        with contextlib.suppress(LocalProtocolError):
            stream.finish()
            if open_:
                self.halves[stream].finished = True

    @rule(stream=streams, other=st.booleans(), share=st.integers(1, 4))
    def consume(self, stream, other, share):
        stream = self.theirs(stream, other)
        stream.consumed(-(-stream.receive_window.unread // share))
        stream.consumed(0)

    @rule(stream=streams, other=st.booleans(), code=CODES, how=st.sampled_from(["reset", "stop", "cancel"]))
    def break_off(self, stream, other, code, how):
        stream = self.theirs(stream, other)
        mine, *rest = self.both(stream)
        undecided = stream.sending in (Sending.UNDECIDED, Sending.UNSENT)
        getattr(stream, how)(code)
        pending = any(half.writer.sending is Sending.UNDECIDED for half in rest)
        for half in (mine, *rest) if undecided or pending or how == "cancel" or not rest else ():
            half.broken = True
        if how != "stop":
            mine.broken = True
        if how != "reset":
            for half in rest:
                half.broken = True
        # A reset before the answer crosses the peer's accept, or makes it refuse.
        if self.pair.over or stream.receiving.name in ("AWAITING", "GIVEN_UP"):
            self.break_both(stream)

    @rule(stream=consumes(streams))
    def release_and_cancel(self, stream):
        for half in self.both(stream):
            half.writer.cancel()
            half.writer.release()
        self.break_both(stream)

    @rule(stream=streams, other=st.booleans(), priority=st.integers(0, 2), weight=st.integers(1, 255))
    def prioritize(self, stream, other, priority, weight):
        self.theirs(stream, other).prioritize(priority, weight)

    @rule(stream=streams, low=st.integers(0, 10_000))
    def want_room(self, stream, low):
        stream.want_room(low)

    @rule(who=st.integers(0, 1))
    def ping(self, who):
        self.pair.sides[who].mux.ping()

    # what the world does

    @rule(who=st.integers(0, 1), max_bytes=st.sampled_from([64, 1000, 16 * KIB, 64 * KIB]))
    def flush(self, who, max_bytes):
        self.pair.sides[who].flush(max_bytes)

    @rule(who=st.integers(0, 1), size=st.one_of(st.integers(1, 60), st.integers(1, 100_000)))
    def deliver(self, who, size):
        self.pair.sides[who].deliver(size)

    @rule(sizes=st.lists(st.integers(1, 30_000), max_size=3))
    def pump(self, sizes):
        self.pair.pump([*sizes, 20_000])

    @rule(client=st.integers(0, 100_000), server=st.integers(0, 100_000), first=st.integers(0, 1), both=st.booleans())
    def cut(self, client, server, first, both):
        """The connection breaks; the server may not notice."""
        notice = ["client", "server"] if both else ["client"]
        if not self.pair.over:
            self.pair.cut(client, server, notice=notice[:: -1 if first else 1])

    @precondition(lambda self: self.pair.client.gone)
    @rule(client=st.integers(0, 100_000), server=st.integers(0, 100_000), times=st.integers(0, 3))
    def reconnect(self, client, server, times):
        """On another connection the two go on, or begin to, and that one is cut, too."""
        pair = self.pair
        for _ in range(times):
            pair.reconnect()
            for side, count in (
                (pair.client, client),
                (pair.server, server),
                (pair.client, 200),
                (pair.server, server),
            ):
                side.flush()
                side.deliver(min(count, len(side.wire)))
            pair.cut(client % 97, server % 89)
        self.unblock()
        pair.resume()

    @precondition(lambda self: not self.pair.client.gone)
    @rule(seconds=st.sampled_from([0.001, 0.03, 0.5, 6.0]))
    def sleep(self, seconds):
        for stream in list(self.halves):
            # A deadline may pass on either end.
            if stream.sending in (Sending.UNSENT, Sending.UNDECIDED) or stream.receiving.name == "AWAITING":
                self.break_both(stream)
        if seconds > 1:
            # Blocked for longer a side would rightly be taken for dead.
            self.unblock()
        self.pair.sleep(seconds)

    @precondition(lambda self: not any(side.gone or side.dead for side in self.pair.sides))
    @rule(
        delay=st.sampled_from([0.0, 0.001, 0.05, 0.5]),
        rate=st.sampled_from([50e3, 1e6, 1e8]),
        rounds=st.sampled_from([1, 2, 10]),
    )
    def travel(self, delay, rate, rounds):
        """Time passes on a path with a delay and a rate; what is under way at its end comes later, or is cut."""
        for stream in list(self.halves):
            if stream.sending in (Sending.UNSENT, Sending.UNDECIDED) or stream.receiving.name == "AWAITING":
                self.break_both(stream)
        self.unblock()
        link = Link(self.pair, delay=delay, rate=rate, queue=64 * KIB)
        # One round brings a piece at least, or many of them would be a silence.
        link.run(rounds * (2 * delay + PIECE / rate))
        link.stop()

    @rule(who=st.integers(0, 1))
    def be_blocked(self, who):
        """The transport takes nothing for a while."""
        side = self.pair.sides[who]
        side.blocked = not side.blocked

    def unblock(self):
        for side in self.pair.sides:
            side.blocked = False
            side.pending = side.pending or (side.mux.awake and not side.gone)

    @precondition(lambda self: len(self.halves) > 4 and not self.pair.client.gone)
    @rule(who=st.integers(0, 1), grace=st.sampled_from([0.0, 1.0, 100.0]))
    def drain(self, who, grace):
        side = self.pair.sides[who]
        side.mux.drain(grace, self.pair.now)
        self.pair.over = True
        for stream in list(self.halves):
            self.break_both(stream)

    @invariant()
    def checks(self):
        for side in self.pair.sides:
            side.check()
            if not self.pair.over:
                assert side.error is None, side.error
        for half in list(self.halves.values()):
            half.check()

    def teardown(self):
        pair = self.pair
        self.unblock()
        if pair.client.gone and not pair.over:
            pair.resume()
        # Everybody reads, and whoever was asked answers.
        for _ in range(30):
            pair.pump([30_000])
            for stream in list(self.halves):
                stream.consumed(stream.receive_window.unread)
                if stream.sending is Sending.UNDECIDED:
                    with contextlib.suppress(KonnektorError):
                        stream.accept()
            if all(not stream.queued for stream in self.halves):
                pair.pump()
        for half in list(self.halves.values()):
            if not pair.over:
                half.check()
                half.check_settled()
        for stream in list(self.halves):
            stream.cancel()
            stream.release()
        pair.pump()
        pair.sleep(6)
        if not any(side.error for side in pair.sides):
            pair.assert_empty()


TestMuxModel = MuxModel.TestCase
