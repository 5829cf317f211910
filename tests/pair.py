"""Two multiplexers crossed in memory, with a clock that only moves when told.

Each side is driven exactly as a driver may: ``data_to_send`` is called only after ``output_pending``, and
``handle_timeout`` only at the time that ``deadline_moved`` named. So a wake-up or a timer that the core forgets
shows as a test that hangs still, instead of being covered up by polling.
"""

import itertools
import math

from konnektor.errors import CalmError, Code, SessionError
from konnektor.frames import Feature
from konnektor.limits import KIB, Limits
from konnektor.mux import BATCH, Mux
from konnektor.rejoin import Rejoin
from konnektor.replay import BATCH_COST, Ticket
from konnektor.settings import Settings
from konnektor.states import Receiving, Sending

SMALL = Limits(initial_window=16 * KIB, initial_streams=8, receive_pool=512 * KIB)


class Recorder:
    """A sink that keeps what it is told. ``auto`` consumes at once; ``on`` maps events to calls back into the mux."""

    def __init__(self, *, auto=True, on=None):
        self.stream = None
        self.auto = auto
        self.on = on or {}
        self.data = bytearray()
        self.datagrams = []
        self.events = []
        self.error = None
        self.is_closed = False
        self.ended = False  # what came last was to have the peer's FIN with it

    def _event(self, *event):
        assert not self.is_closed, f"{event} after closed"
        assert not self.ended or event[0] == "eof", f"{event} after what was to be the last"
        self.ended = False
        self.events.append(event)
        if (call := self.on.get(event[0])) is not None:
            call(self.stream)

    def accepted(self):
        self._event("accepted")

    def data_received(self, data):
        assert isinstance(data, bytes | memoryview)
        assert "eof" not in self.kinds
        self.data += data
        if self.auto:
            self.stream.consumed(len(data))
        self._event("data", len(data))
        self.ended = self.stream.ending and self.stream.receiving is Receiving.OPEN

    def datagram_received(self, data):
        assert isinstance(data, memoryview)
        assert "eof" not in self.kinds
        self.datagrams.append(bytes(data))
        self._event("datagram", len(data))

    def eof_received(self):
        assert "eof" not in self.kinds
        self._event("eof")

    def writable(self):
        self._event("writable")

    def failed(self, error, /, *, receiving, sending):
        assert receiving or sending
        self.error = error
        self._event("failed", type(error).__name__, receiving, sending)

    def closed(self):
        self._event("closed")
        self.is_closed = True

    @property
    def kinds(self):
        return [event[0] for event in self.events]

    def clear(self):
        events, self.events = self.events, []
        return events


class Side:
    """One mux, its handler and its driver."""

    def __init__(self, pair, role, limits, *, ticket=None, **declared):
        self.pair = pair
        self.limits = limits
        self.events = []
        self.opened = []
        self.all = []  # every stream there ever was, for the pool's books
        self.pending = False
        self.timer = None
        self.on_open = None
        self.auto = True
        self.on = {}  # the handler's own events
        self.sink_on = {}  # those of the sinks of streams that the peer opens
        self.wire = bytearray()  # rendered, not yet delivered to the peer
        self.blocked = False  # the transport takes nothing
        self.rest = b""
        self.dead = False  # the connection is, which this side may not have noticed
        self.deceived = False  # has been sent what the peer's mux never would
        nonce = (b"C" if role == "client" else b"S") * 32
        settings = Settings.of(limits, **declared)
        self.mux = Mux(role, self, limits, settings, nonce=nonce, now=pair.now, ticket=ticket)
        self.machine = self.mux  # what the connection's bytes go to; another one while a session is being resumed
        self.mux.start()

    # mux.Handler

    def output_pending(self):
        assert self.machine.awake or self.mux.awake
        self.pending = True

    def deadline_moved(self, when):
        assert self.timer is None or when < self.timer
        self.timer = when

    def hello_received(self, settings):
        self._event("hello")

    def stream_opened(self, stream):
        sink = stream.sink = Recorder(auto=self.auto, on=dict(self.sink_on))
        sink.stream = stream
        self.opened.append(stream)
        self.all.append(stream)
        if stream.name == "udp":
            stream.carry_datagrams()
        self._event("opened", stream.id)
        if self.on_open is not None:
            self.on_open(stream)

    def pong_received(self, opaque, rtt):
        self._event("pong", opaque, rtt)

    def goaway_received(self, code, grace, reason):
        self._event("goaway", code, grace, reason)

    def session_closed(self, error):
        self._event("closed", type(error).__name__)

    def connection_dead(self, reason):
        self._event("dead", reason)
        self.lose()

    # another connection

    def resume_requested(self, frame, nonces):
        if not self.mux.resumption.begin_afresh():
            self.mux.close(Code.RESUME_REFUSED, "no such session")

    def lose(self):
        """The connection is gone, as this side sees it; what it had written may still arrive."""
        self.rest = b""
        self.pending = False
        self.machine = self.mux
        if self.mux.resumption.possible and not self.mux.resumption.suspended:
            self.mux.resumption.suspend("cut", self.pair.now)

    def rejoined(self):
        """RejoinHandler: the client's session goes on, or has just ended, and says so."""
        if self.error is None:
            self._event("resumed")
        self.machine = self.mux
        self.pending = True

    def rejoin_failed(self, error):
        """RejoinHandler: it does not."""
        self.rejoin_error = error

    def _event(self, *event):
        assert "closed" not in self.kinds, f"{event} after closed"
        self.events.append(event)
        if (call := self.on.get(event[0])) is not None:
            call(self)

    @property
    def kinds(self):
        return [event[0] for event in self.events]

    @property
    def gone(self):
        """Whether the connection is, and the session waits for another."""
        return self.mux.resumption.suspended

    @property
    def peer(self):
        return self.pair.server if self is self.pair.client else self.pair.client

    @property
    def error(self):
        return self.mux.error

    # the application

    def open(self, name="echo", header=b"", *, auto=True, on=None, **kwargs):
        sink = Recorder(auto=auto, on=on)
        stream = sink.stream = self.mux.open(name, header, sink, now=self.pair.now, **kwargs)
        self.all.append(stream)
        return stream

    # the driver

    def flush(self, max_bytes=64 * KIB):
        """Writes while the mux is awake and was heard to be."""
        while self.pending and not self.blocked:
            self.render(max_bytes)

    def render(self, max_bytes):
        """Writes one batch."""
        machine = self.machine
        args = () if isinstance(machine, Rejoin) else (max_bytes,)
        data = b"".join(machine.chunks_to_send(self.pair.now, *args))
        if not self.dead:
            self.wire += data
        if not machine.awake:
            self.pending = False
        else:
            assert data, "awake, and nothing to send: a driver would stop here for ever"
        self.check()

    def deliver(self, count=None):
        """Brings ``count`` bytes of what was written to the peer."""
        count = len(self.wire) if count is None else count
        data, self.wire[:count] = bytes(self.wire[:count]), b""
        self.carry(data)

    def carry(self, data):
        """Brings these bytes to the peer."""
        peer = self.peer
        data = peer.rest + data
        if data:
            machine = peer.machine
            used = machine.receive(data, self.pair.now)
            if peer.machine is not machine:
                used += peer.machine.receive(data[used:], self.pair.now)
            peer.rest = data[used:]
            assert len(peer.rest) <= 8 + peer.limits.max_frame
            peer.check()
            if not peer.deceived:
                peer.check_calm()

    def inject(self, *frames):
        """Bytes to the peer that our mux never sent."""
        self.peer.deceived = True
        data = b"".join(frame if isinstance(frame, bytes) else frame.encode() for frame in frames)
        assert self.peer.mux.receive(data, self.pair.now) == len(data)
        self.peer.check()

    def check_calm(self):
        """An honest peer stays far from every limit: it needs nothing of what is there to begin with, and half of the rest."""
        admission, flight, abuse, live = self.mux.admission, self.mux.flight, self.mux.inbound.abuse, self.mux.liveness
        assert not isinstance(self.error, CalmError) or not self.error.limit
        assert abuse._credits <= 4 * flight.sent
        assert abuse._streams <= admission.opened
        assert abuse._late_ends <= 2 * admission.opens
        assert abuse._goaways <= 2
        assert abuse._acks.ready_at == -math.inf, "an ACK that acknowledges nothing"
        assert live._limit.ready_at(0) <= self.pair.now - 2
        assert abuse._hints.ready_at(admission.opens) <= self.pair.now - 5

    def check(self):
        mux = self.mux
        mux.assert_invariants()
        assert not mux.awake or self.pending or mux.error is not None or self.machine is not mux or self.gone
        extra = 0
        for stream in self.all:
            stream.assert_invariants()
            window = stream.receive_window
            held = window.granted - window.consumed
            if stream.forgotten:
                assert stream.receiving is Receiving.ENDED and stream.sending is Sending.ENDED
                assert mux.error or stream.sink.is_closed
                assert stream not in mux.streams.values()
                held = window.unread if stream.id and not mux.error else 0
            extra += max(0, held - mux.pool.base)
        if mux.error is None:
            assert mux.pool.extra == extra, (mux.pool.extra, extra)
            own = sum(1 for s in self.all if s.id and s.id & 1 == mux.admission.next_id & 1 and not s.retired)
            assert mux.pool.slots == self.limits.initial_streams + own
            replay = mux.resumption.replay
            over = replay.footprint - self.limits.replay_buffer if replay is not None else 0
            assert mux.pool.lent <= max(0, over)
            assert over <= mux.pool.lent + BATCH + BATCH_COST + 64 * KIB
            assert (mux.next_deadline() or 0) >= (self.timer or 0) - 1e-9 or mux.next_deadline() is None
            assert self.timer is not None
            if mux.leaving.begun or mux.draining:
                assert not mux.opens


class Newcomer:
    """The server's side of a new connection, as the session does it: a fresh mux, until its RESUME is judged."""

    def __init__(self, server, knows=None):
        self.server = server
        self.knows = knows  # the id of the server's session, if it is looked up by that
        self.limits = server.limits
        self.error = None
        settings = server.mux.settings
        ticket = Ticket(b"n" * 16, b"N" * 32)
        self.mux = Mux("server", self, self.limits, settings, nonce=b"n" * 32, now=server.pair.now, ticket=ticket)

    def output_pending(self):
        self.server.pending = True

    def deadline_moved(self, when):
        pass

    def hello_received(self, settings):
        raise AssertionError("a session of its own")

    def resume_requested(self, frame, nonces):
        server, mux = self.server, self.server.mux
        found = self.knows is None or frame.session_id == self.knows
        if not (found and mux.resumption.may_grant(frame, nonces)):
            self.mux.close(Code.RESUME_REFUSED, "no such session")
            return
        if not mux.resumption.suspended:
            server.lose()
        server.machine = mux
        mux.resumption.grant(frame, nonces, server.pair.now)
        server.pending = True
        self.mux.end(SessionError("resumed another"), None)

    def session_closed(self, error):
        self.error = error


class Pair:
    """A client and a server; ``now`` is their clock. ``resumable`` ones can have their connection cut."""

    def __init__(self, limits=SMALL, server_limits=None, *, hello=True, resumable=False):
        self.now = 1000.0
        features = Feature.DATAGRAM | (Feature.RESUME if resumable else 0)
        ticket = Ticket(b"session id of 16", b"K" * 32) if resumable else None
        self.client = Side(self, "client", limits, features=features)
        self.server = Side(self, "server", server_limits or limits, features=features, ticket=ticket)
        if hello:
            self.pump()
            self.client.events.clear()
            self.server.events.clear()

    @property
    def sides(self):
        return (self.client, self.server)

    def pump(self, sizes=None, *, rounds=10_000):
        """Moves bytes both ways until nothing moves, in pieces of ``sizes`` (all there is without)."""
        sizes = itertools.cycle(sizes) if sizes else itertools.repeat(None)
        for _ in range(rounds):
            moved = False
            for side in self.sides:
                side.flush()
                if side.wire:
                    moved = True
                    side.deliver(next(sizes))
            if not moved:
                return
        raise AssertionError("bytes move for ever")

    def cut(self, client=None, server=None, *, notice=("client", "server")):
        """The connection breaks: of what each side had written only so many bytes still arrive, or none."""
        for side, count in ((self.client, client), (self.server, server)):
            if count:
                side.deliver(min(count, len(side.wire)))
        for side in self.sides:
            side.wire.clear()
            side.dead = True
        for name in notice:
            getattr(self, name).lose()

    def reconnect(self):
        """A new connection, on which the client is about to ask for the session."""
        client, server = self.client, self.server
        if not client.gone:
            client.lose()
        for side in self.sides:
            side.wire.clear()
            side.rest = b""
            side.dead = False
        client.machine = Rejoin(client.mux, client, b"c" * 32)
        client.pending = True
        newcomer = Newcomer(server)
        server.pending = False
        server.machine = newcomer.mux
        newcomer.mux.start()
        return newcomer

    def resume(self):
        """All of it, until the session goes on and nothing moves."""
        self.reconnect()
        self.pump()
        assert not self.client.gone
        assert not self.server.gone

    def sleep(self, seconds, *, pump=True):
        """Lets time pass, timer by timer."""
        end = self.now + seconds
        if pump:
            self.pump()
        while True:
            timers = [(side.timer, side) for side in self.sides if side.timer is not None and side.error is None]
            when, side = min(timers, key=lambda pair: pair[0], default=(None, None))
            if when is None or when > end:
                break
            self.now = max(self.now, when)
            self.fire(side)
            if pump:
                self.pump()
        self.now = end

    def fire(self, side):
        side.timer = None
        side.mux.handle_timeout(self.now)
        side.check()

    def open(self, opener=None, *, accept=True, auto=True, **kwargs):
        """A stream that both sides have: (the opener's, the accepter's)."""
        opener = opener or self.client
        stream = opener.open(auto=auto, **kwargs)
        self.pump()
        theirs = opener.peer.opened[-1]
        assert theirs.id == stream.id
        theirs.sink.auto = auto
        if accept:
            theirs.accept()
            self.pump()
        return stream, theirs

    def assert_empty(self):
        """Nothing is left of any stream, once what was sent is acknowledged."""
        self.sleep(0.1)
        for side in self.sides:
            for stream in side.opened:
                stream.release()
            side.check()
            assert not side.mux.streams and not side.mux.opens and not side.mux.control and not side.mux.owed
            assert not side.mux.scheduler.active
            assert side.mux.pool.extra == 0
            assert side.mux.pool.slots == side.limits.initial_streams
            assert side.mux.admission.retired == side.mux.admission.taken
            assert all(stream.sink.is_closed for stream in side.all)
