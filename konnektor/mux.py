"""The multiplexer: many streams over one connection, as a machine without I/O or clock.

Theory of operation. ``Mux.receive`` parses what the connection delivered, in place, and calls sinks;
``Mux.data_to_send`` renders what should be written next (``chunks_to_send`` for who can write several buffers
at once). Both sides of a session run the same code.
Three rules prevent most of what goes wrong in multiplexers: receiving never waits for a stream;
control is *state rendered at write time* (the latest credit, one PONG, one ACK), never a queue of replies;
every wait has a deadline (``next_deadline`` and ``handle_timeout``).

The machine has these parts, each in its file: what frames do (``inbound``), what is sent (``outbound``,
``scheduler``, ``flight``), each stream's state (``mux_stream``, ``states``, ``credit``), who may open how
many (``admission``), whether the peer lives (``liveness``), and the gentle end (``drain``). Here they meet:
streams come and go, wait and are woken.

Sinks are called from ``receive``, ``data_to_send`` and ``handle_timeout`` directly, and may call back
into the multiplexer. ``now`` is any monotonic clock in seconds.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Protocol

from konnektor.admission import Admission, Role
from konnektor.credit import Pool
from konnektor.datagrams import Datagrams
from konnektor.deadlines import Deadlines
from konnektor.drain import Drain, Step
from konnektor.errors import (
    CalmError,
    Code,
    DialTimeoutError,
    LocalProtocolError,
    PeerTimeoutError,
    ProtocolError,
    SessionClosedError,
    SessionError,
    ShutdownError,
    StreamError,
    VersionError,
    session_error,
    stream_error,
)
from konnektor.flight import Flight
from konnektor.frames import (
    MAX_OPEN,
    MAX_OPENS,
    OPEN_DEADLINE,
    OPEN_HEADER,
    Buffer,
    Close,
    Feature,
    Resume,
    is_type_name,
)
from konnektor.inbound import Inbound
from konnektor.limits import MAX_DEADLINE, Limits
from konnektor.liveness import LATE_TIMER, Liveness
from konnektor.mux_stream import DatagramSink, DirectSink, MuxStream, Sink, check_priority
from konnektor.outbound import BATCH, PAYLOAD, TIGHT_BATCH, Outbound, joined
from konnektor.owed import OwedEnds
from konnektor.replay import Ticket
from konnektor.resumption import Resumption, unreachable
from konnektor.scheduler import Scheduler
from konnektor.settings import FLOORS, Settings
from konnektor.states import (
    RECEIVING_AWAITING,
    RECEIVING_ENDED,
    RECEIVING_GIVEN_UP,
    SENDING_ENDED,
    SENDING_FINISHING,
    SENDING_OPEN,
    SENDING_UNDECIDED,
    SENDING_UNSENT,
)

__all__ = ["BATCH", "PAYLOAD", "DatagramSink", "DirectSink", "Handler", "Mux", "MuxStream", "Role", "Sink"]


class Handler(Protocol):
    """What a multiplexer tells its driver."""

    def output_pending(self) -> None:
        """There is something to send; called once until ``data_to_send`` has rendered all of it."""

    def deadline_moved(self, when: float) -> None:
        """``next_deadline`` is now ``when``, earlier than it was."""

    def hello_received(self, settings: Settings) -> None:
        """The peer's HELLO is here: the session is up."""

    def stream_opened(self, stream: MuxStream) -> None:
        """The peer opens a stream: set ``stream.sink``, then ``accept`` or ``refuse``, now or later."""

    def pong_received(self, opaque: int, rtt: float) -> None:
        """A ping came back."""

    def connection_dead(self, reason: str) -> None:
        """The peer does not answer: drop the connection, and ``suspend``."""

    def resume_requested(self, frame: Resume, nonces: bytes) -> None:
        """The peer wants to go on with an older session over this connection: ``grant_resume`` there, or refuse."""

    def goaway_received(self, code: int, grace: float, reason: str) -> None:
        """The peer takes no more streams and leaves within ``grace`` seconds."""

    def session_closed(self, error: SessionError) -> None:
        """The session is over, once. What ``data_to_send`` still gives should be written, then the connection closed."""


class Mux:
    """One session.

    Args:
        role: ``client`` dialed, ``server`` accepted; after HELLO the two are equal.
        settings: what to declare in HELLO (``Settings.of(limits, ...)``).
        nonce: 32 random bytes.
        now: the time.
        ticket: of a server that lets its clients resume (``settings.features`` says so, too).

    Attributes:
        peer: what the peer declared; ``FLOORS`` before its HELLO.
        error: why the session ended, None while it lives.
        streams: those that are on the wire, by id.
        pool, flight, datagrams: the receive budget, the estimates of the path, and what is lossy; for statistics.
        bytes_received, bytes_sent: on this connection, headers included.
        awake: ``data_to_send`` has more to give.
        resumption: how the session outlives its connection.
        cut_off: streams that were broken off when the grace of this side's drain was over.
        pause_reading_until: the driver should not read before: the peer sends more tiny frames than are good for others.
    """

    def __init__(
        self,
        role: Role,
        handler: Handler,
        limits: Limits,
        settings: Settings,
        *,
        nonce: bytes,
        now: float,
        ticket: Ticket | None = None,
    ) -> None:
        self.role = role
        self.handler = handler
        self.limits = limits
        self.settings = settings
        self.nonce = nonce
        self.peer: Settings = FLOORS
        self.error: SessionError | None = None
        self.bytes_received = 0
        self.bytes_sent = 0
        self.pause_reading_until = -math.inf

        self.streams: dict[int, MuxStream] = {}
        self.opens: OrderedDict[MuxStream, None] = OrderedDict()
        """Our streams whose OPEN is not on the wire."""
        self.control: deque[MuxStream] = deque()
        """Streams that have something to say besides data."""
        self.gathering: list[Callable[[], None]] = []
        """Sinks that keep what this read brought until the end of it."""
        self.cut_off = 0
        self.owed = OwedEnds(self)
        self.pool = Pool(limits.receive_pool, limits.initial_window, limits.initial_streams)
        self.flight = Flight(limits.flight_floor)
        self.datagrams = Datagrams()
        self.scheduler = Scheduler()
        self.admission = Admission(role, limits.initial_streams)
        self.liveness = Liveness(now, limits.hello_timeout)
        self.leaving = Drain()
        self.inbound = Inbound(self)
        self.outbound = Outbound(self)
        self.resumption = Resumption(self, ticket, offered=bool(settings.features & Feature.RESUME))
        self._deadlines: Deadlines[MuxStream] = Deadlines()

        self.hello_received = False
        self._goaway_received = False
        self._close_frame: bytes | None = None
        self.awake = True
        self._rendering = False
        self._armed = math.inf

    def start(self) -> None:
        """Tells the handler of the first output and the first deadline; call once it is ready for calls."""
        self.handler.output_pending()
        self.arm(self.liveness.due)

    # What the driver asks

    @property
    def established(self) -> bool:
        """Whether the peer's HELLO has arrived and the session is not over."""
        return self.hello_received and self.error is None

    @property
    def draining(self) -> bool:
        """Whether GOAWAY was sent or received: no new streams of ours."""
        return self._goaway_received or self.leaving.begun

    @property
    def may_speak(self) -> bool:
        """Whether anything but CLOSE may be sent: the server waits for the client's HELLO, and judges it first."""
        resumption = self.resumption
        return not resumption.suspended and (self.hello_received or resumption.rejoining or self.role == "client")

    @property
    def received_at(self) -> float:
        """When the last bytes came."""
        return self.liveness.heard_at

    def idle_credit(self, now: float) -> int:
        """Bytes of the pool that idle streams hold beyond their reservations: granted, and not to be taken back."""
        windows = (stream.receive_window for stream in self.streams.values())
        return sum(window.held for window in windows if window.idle(now))

    def next_deadline(self) -> float | None:
        """When ``handle_timeout`` should be called, None if never."""
        if self.error is not None:
            return None
        due = min(self.inbound.acks.due_at, self.liveness.due, self.leaving.due, self.resumption.due, self.outbound.due)
        streams = self._deadlines.next()
        return due if streams is None else min(due, streams)

    # Opening and ending

    def open(
        self,
        name: str,
        header: bytes,
        sink: Sink,
        *,
        now: float,
        priority: int = 1,
        weight: int = 1,
        deadline: float | None = None,
        tlvs: Mapping[int, bytes] | None = None,
        datagrams: bool = False,
        repeatable: bool = False,
    ) -> MuxStream:
        """Opens a stream of the type ``name``; the peer's answer comes to the sink.

        Waits inside, until the deadline, while the peer allows no more streams or the pool has no
        room; then the sink's ``failed`` gets a LimitError. Data may be written at once.

        Args:
            name: the type; the peer's handler is found by it.
            sink: where the stream's events go.
            now: the time.
            header: what the stream type puts into its OPEN.
            priority: 0 interactive, 1 default, 2 bulk.
            weight: among those of its class, 1 to 255.
            deadline: seconds the whole opening may take, at most 300.
            tlvs: more parameters, by ``OpenTLV`` id.
            datagrams: whether the type carries them.
            repeatable: whether an OPEN that was perhaps accepted, and after which nothing was sent, may as well be made again.

        Raises:
            SessionClosedError: the session is over or draining.
            UnsupportedError: it is to carry datagrams, and one of the two sides has none.
            StreamError: its connection has been broken for longer than a moment.
            LocalProtocolError: name and header do not fit into an OPEN, or there is no such priority or weight.
        """
        if self.error is not None or self.draining:
            raise SessionClosedError("the session is closed" if self.error else "the session is draining")
        if self.resumption.given_up:
            raise unreachable()
        check_priority(priority, weight)
        params = {OPEN_HEADER: header, OPEN_DEADLINE: b"\0\0\0\0"}
        if tlvs:
            params.update(tlvs)
        size = 2 + len(name)
        for value in params.values():
            size += 4 + len(value)
        if not is_type_name(name) or size > MAX_OPEN:
            raise LocalProtocolError(
                f"an OPEN takes at most {MAX_OPEN} bytes, not {size}, with a printable ASCII name of 1 to 255"
            )
        if datagrams and self.hello_received and not self.datagrams.agreed:
            raise stream_error(Code.UNSUPPORTED, "this session has no datagrams")
        stream = MuxStream(self, sink, name, priority, params, RECEIVING_AWAITING, SENDING_UNSENT, now)
        if datagrams:
            stream.carry_datagrams()
        stream.weight = weight
        stream.send_window.limit = self.peer.initial_window
        stream.deadline = now + max(0.0, min(self.limits.open_deadline if deadline is None else deadline, MAX_DEADLINE))
        stream.repeatable = repeatable
        stream.released = True
        self.opens[stream] = None
        self.watch(stream, stream.deadline)
        self.wake()
        return stream

    def ping(self) -> int:
        """Sends a PING soon, as the pace allows. Returns the ``opaque`` of the PONG that will answer it."""
        opaque = self.liveness.want_ping()
        self.wake()
        return opaque

    def drain(self, grace: float, now: float, *, code: int = Code.SHUTDOWN, reason: str = "") -> None:
        """Ends the session gently: no new streams, open ones have ``grace`` seconds, then RESET and CLOSE.

        A second call can shorten the grace.
        """
        if self.error is not None:
            return
        first = self.leaving.begin(grace, code, reason, now)
        self.arm(self.leaving.due)
        if first:
            self.wake()
            self._fail_opens("this side is draining")
        if self.resumption.suspended:
            self._drain_on(now)

    def close(self, code: int = Code.NO_ERROR, reason: str = "") -> None:
        """Ends the session now: every stream fails with SessionLost, CLOSE is the last frame."""
        self.end(session_error(code, reason), Close(code, reason))

    def connection_lost(self, reason: str) -> None:
        """The transport is gone without CLOSE."""
        self._close_frame = None
        self.end(SessionError(reason, Code.INTERNAL), None)

    def write_blocked(self, now: float) -> None:
        """The transport takes no more until ``write_resumed``; if that takes too long, the session ends with TIMEOUT."""
        self.liveness.write_blocked(now)
        self.arm(self.liveness.due)

    def write_resumed(self) -> None:
        """The transport takes more."""
        self.liveness.write_resumed()

    # Receiving and sending

    def receive(self, data: Buffer, now: float) -> int:
        """Takes in whole frames; returns how many bytes that were. Give the rest again with more behind it.

        Sinks and the handler are called from here. A peer's offence ends the session with CLOSE.
        """
        if self.error is not None:
            return len(data)
        self.liveness.heard(now)
        try:
            try:
                used = self.inbound.receive(memoryview(data), now)
            finally:
                if self.gathering:
                    gathering, self.gathering = self.gathering, []
                    for deliver in gathering:
                        deliver()
        except (ProtocolError, VersionError, CalmError) as error:
            self.end(error, Close(error.code, error.reason))
            return len(data)
        self.bytes_received += used
        return used

    def data_to_send(self, now: float, max_bytes: int = BATCH) -> bytes:
        """What to write next, scheduled and joined; empty if there is nothing (see ``awake``)."""
        return b"".join(self.chunks_to_send(now, max_bytes))

    def chunks_to_send(self, now: float, max_bytes: int = BATCH) -> list[Buffer]:
        """``data_to_send`` in pieces, none of them empty: large payloads are not copied."""
        if self.leaving.begun:
            self._drain_on(now)
        if self.flight.tight and max_bytes > TIGHT_BATCH:
            max_bytes = TIGHT_BATCH
        parts: list[Buffer] = []
        self.awake = False
        replay = self.resumption.replay
        flight = self.flight
        sequenced = flight.sequenced
        if self.error is None:
            # What sinks add meanwhile needs no call of output_pending: whoever called is asked to come again.
            self._rendering = True
            try:
                if self.outbound.render(parts, max_bytes, now):
                    self.awake = True
            finally:
                self._rendering = False
        if self.error is not None:
            # A sink may have ended the session just now: of what was rendered nothing matters any more.
            self.awake = False
            parts.clear()
            if self._close_frame is not None:
                # Perhaps the first frame, too: whoever is refused gets a CLOSE in place of HELLO.
                parts.append(self._close_frame)
                self._close_frame = None
        if not parts:
            return parts
        chunks = joined(parts)
        if replay is not None and (new := flight.sequenced - sequenced):
            lossy = frozenset(self.outbound.lossy)
            kept = [part for at, part in enumerate(parts) if at not in lossy] if lossy else parts
            # Large payloads are kept as they are held anyway: what was joined with their headers would be a copy more.
            replay.keep(kept if len(chunks) > 1 else joined(kept), new)
            if self.pool.lent or replay.footprint > self.limits.replay_buffer:
                self.resumption.book()
        for chunk in chunks:
            self.bytes_sent += len(chunk)
        return chunks

    def handle_timeout(self, now: float) -> None:
        """Does what is due at ``now``; call at ``next_deadline`` or whenever."""
        stalled = now - self._armed > LATE_TIMER
        self._armed = math.inf
        if self.error is not None:
            return
        self.inbound.acks.check(now)
        if self.inbound.acks.due:
            self.wake()
        self.outbound.check(now)
        for stream in self._deadlines.expire(now):
            # Unless the sink of another has ended this one meanwhile.
            if stream.watch is not None and self._deadlines.is_due(stream.watch, now):
                stream.watch = None
                self._deadline_passed(stream, now, stalled=stalled)
        if now >= self.liveness.due:
            self._check_alive(now)
        if now >= self.resumption.due:
            self.resumption.check(now)
        if self.leaving.begun:
            self._drain_on(now)
        if (when := self.next_deadline()) is not None:
            self.arm(when)

    def _check_alive(self, now: float) -> None:
        verdict = self.liveness.check(now, self.flight.rtt)
        if verdict is not None and self.resumption.possible and not self.liveness.heard_lately(now):
            self.handler.connection_dead(verdict)
        elif verdict is not None:
            self.end(PeerTimeoutError(verdict), Close(Code.TIMEOUT, verdict))
        elif self.liveness.ping_ready:
            self.wake()

    def _deadline_passed(self, stream: MuxStream, now: float, *, stalled: bool) -> None:
        if stream.sending is SENDING_UNSENT:
            self._abandon(stream, stream_error(Code.LIMIT, "no stream was allowed within the deadline", refused=True))
        elif stream.receiving is RECEIVING_AWAITING:
            late = stream.deadline + 2 * self.flight.rtt
            if now < late:
                # The accepter counts from receipt, and its answer travels.
                self.watch(stream, late)
            else:
                stream.break_off(DialTimeoutError("no answer within the deadline"), Code.CANCELLED)
        elif stream.sending is SENDING_UNDECIDED:
            stream.break_off(DialTimeoutError("not ready within the deadline"), Code.DIAL_TIMEOUT)
        elif (verdict := self.owed.late(stream, now, stalled=stalled)) is not None:
            self.end(PeerTimeoutError(verdict), Close(Code.TIMEOUT, verdict))

    # What the session's own frames do

    def established_with(self, peer: Settings, ticket: Ticket | None) -> None:
        """The peer's HELLO came; a server's may hold a ticket."""
        self.peer = peer
        self.resumption.agreed(ticket, both=bool(self.settings.features & peer.features & Feature.RESUME))
        self.hello_received = True
        self.datagrams.agreed = bool(self.settings.features & peer.features & Feature.DATAGRAM)
        self.admission.allow(min(peer.initial_streams, MAX_OPENS))
        for stream in (*self.streams.values(), *self.opens):
            # Opened by a client that did not wait; what exceeds the floors may flow from here on.
            stream.send_window.raise_limit(peer.initial_window)
            self.activate(stream)
        self.liveness.established(min(peer.idle_timeout, self.limits.idle_timeout))
        self.arm(self.liveness.due)
        self.wake()
        self.handler.hello_received(peer)

    def acked(self, seq: int, now: float) -> None:
        """ACK: the peer took in ``seq`` frames in all.

        Raises:
            ProtocolError: more than were sent.
            CalmError: nothing new, and that too often.
        """
        flight = self.flight
        if seq > flight.sent:
            raise ProtocolError(f"ACK of {seq} frames; {flight.sent} were sent")
        if seq <= flight.acked:
            self.inbound.abuse.idle_ack(now)
            return
        flight.on_ack(seq, now)
        if (replay := self.resumption.replay) is not None:
            replay.release(flight.delivered)
            if self.pool.lent:
                self.resumption.book()
        self.liveness.acked(now, all_of_it=seq == flight.sent)
        self.owed.acked(seq, now)
        if self.scheduler.active or self.control or self.opens or self.outbound.streams_due or self.leaving.goaway_due:
            # Which waited for the cap on bytes in flight, or for room in the replay buffer.
            self.wake()
        if self.leaving.begun:
            self.leaving.progressed(now)
            self._drain_on(now)

    def pong(self, opaque: int, now: float) -> None:
        """PONG: the round trip is known.

        Raises:
            ProtocolError: it answers no PING.
        """
        rtt = self.liveness.pong(opaque, now)
        self.flight.on_rtt(rtt, self.bytes_received)
        if self.liveness.ping_due or self.scheduler.active or self.flight.report_wanted:
            self.wake()
        self.handler.pong_received(opaque, rtt)

    def goaway(self, code: int, grace: float, reason: str) -> None:
        """GOAWAY: this side opens no more streams."""
        first = not self._goaway_received
        self._goaway_received = True
        self._fail_opens("the peer is draining")
        if first and self.error is None:
            self.handler.goaway_received(code, grace, reason)

    # The end

    def _drain_on(self, now: float) -> None:
        """Takes the steps of the drain that are possible now."""
        leaving, flight = self.leaving, self.flight
        while self.error is None:
            quiet = not self.control and flight.acked == flight.sent
            held = self.resumption.suspended
            if held and quiet and not self.streams:
                # Nobody misses anything.
                self.close(leaving.code, leaving.reason)
                return
            # What has ended here may not have arrived there, and will if there is another connection.
            streams = bool(self.streams) or held
            match leaving.step(now, acked=flight.acked, streams=streams, quiet=quiet):
                case Step.WAIT:
                    return
                case Step.SAY_GOAWAY:
                    self.wake()
                case Step.LINGER:
                    leaving.linger(now)
                    self.arm(leaving.due)
                    self.cut_off = sum(any(stream.wanted) for stream in self.streams.values())
                    for stream in list(self.streams.values()):
                        code = Code.LIMIT if stream.sending is SENDING_UNDECIDED else Code.CANCELLED
                        stream.break_off(ShutdownError("the session was drained"), code)
                case _:
                    self.close(leaving.code, leaving.reason)

    def _fail_opens(self, reason: str) -> None:
        for stream in list(self.opens):
            if stream.sending is SENDING_UNSENT:
                self._abandon(stream, stream_error(Code.LIMIT, reason, refused=True))

    def fail_pending(self) -> None:
        """The connection did not come back at once: what the peer has not accepted can be tried elsewhere."""
        for stream in list(self.opens):
            if stream.sending is SENDING_UNSENT:
                self._abandon(stream, unreachable())
        for stream in list(self.streams.values()):
            if stream.receiving is RECEIVING_AWAITING:
                # The peer may have accepted it and taken in what was sent ahead, and the answer be lost with the connection.
                harmless = stream.repeatable and not stream.send_window.sent
                stream.break_off(unreachable(refused=harmless), Code.CANCELLED)

    def reconnected(self, now: float) -> None:
        """There is a connection again: what was wanted meanwhile is wanted anew, and the peer's silence counts."""
        self.owed.resumed(now)
        if self.leaving.begun:
            self.leaving.progressed(now)
            self.arm(self.leaving.due)
        self.awake = False
        self.wake()
        self.arm(self.liveness.due)

    def disconnected(self, now: float) -> None:
        """There is no connection: nothing of its state matters any more, and a drain need not wait for the peer."""
        self.bytes_received = self.bytes_sent = 0
        self.inbound.pong = None
        self.inbound.acks.forget()
        self.liveness.suspended()
        self.drop_datagrams()
        self.owed.suspended()
        self.arm(self.resumption.due)
        if self.leaving.begun:
            self.leaving.held()
            self._drain_on(now)

    def give_up(self, stream: MuxStream) -> None:
        """An OPEN that is not on the wire is cancelled."""
        self._abandon(stream, None)

    def _abandon(self, stream: MuxStream, error: StreamError | None) -> None:
        """An OPEN that never went out: the stream never existed."""
        wanted = stream.wanted
        del self.opens[stream]
        self.unwatch(stream)
        stream.end()
        stream.retired = True
        if error is not None:
            stream.fail(error, wanted)
        stream.sink.closed()

    def end(self, error: SessionError, close: Close | None) -> None:
        """Ends the session, unless it was over: with a CLOSE of ours if the peer is to know."""
        if self.error is not None:
            return
        self.error = error
        streams = [(stream, stream.wanted) for stream in (*self.streams.values(), *self.opens)]
        self.streams.clear()
        self.opens.clear()
        self.control.clear()
        self.owed.clear()
        # First all of them, then the sinks: whatever those call finds every stream at its end.
        for stream, _ in streams:
            stream.end()
            stream.retired = True
        defect: Exception | None = None
        for stream, wanted in streams:
            try:
                stream.lost(error, wanted)
            except Exception as raised:  # noqa: BLE001
                # A sink's defect must not keep the end from the other sinks, nor from the driver.
                defect = defect or raised
        self.awake = False
        if close is not None:
            self._close_frame = (self.resumption.refusal or close).encode()
            self.wake()
        self.handler.session_closed(error)
        if defect is not None:
            raise defect

    # What streams and the other parts ask

    def activate(self, stream: MuxStream) -> None:
        """The stream may have become able to send."""
        if not stream.place and self.has_to_send(stream):
            self.scheduler.add(stream)
            if not self.awake:
                self.wake()

    def schedule(self, stream: MuxStream) -> None:
        """As ``activate``, while frames are rendered."""
        if self.has_to_send(stream):
            self.scheduler.add(stream)

    def has_to_send(self, stream: MuxStream) -> bool:
        """Whether the stream has data, datagrams or its FIN to send, and may."""
        sending = stream.sending
        if stream.accept_tlvs is not None or (sending is not SENDING_OPEN and sending is not SENDING_FINISHING):
            return False
        if stream.datagrams and self.may_send_datagrams(stream):
            return True
        pending = stream.queued
        window = stream.send_window
        if pending:
            return window.sendable(pending) > 0 or window.blocked_at != window.limit
        return sending is SENDING_FINISHING

    def may_send_datagrams(self, stream: MuxStream) -> bool:
        """Whether the peer would take a datagram: not before it has accepted the stream."""
        return self.datagrams.agreed and stream.receiving not in (RECEIVING_AWAITING, RECEIVING_GIVEN_UP)

    def drop_datagrams(self) -> None:
        """The connection is gone: what waits to be sent is dropped, and nothing of them is in flight any more."""
        for stream in (*self.streams.values(), *self.opens):
            if stream.datagrams is not None:
                stream.datagrams.clear()
        self.flight.forget_datagrams()

    def want_control(self, stream: MuxStream) -> None:
        """The stream has something to say besides data."""
        if not stream.in_control and stream.id and self.error is None:
            stream.in_control = True
            self.control.append(stream)
            self.wake()

    def freed(self) -> None:
        """The pool may have room for an OPEN that waits for it."""
        if self.opens:
            self.wake()

    def decided(self, stream: MuxStream) -> None:
        """ACCEPT or REFUSE is settled: the deadline no longer matters."""
        self.unwatch(stream)

    def stopped(self, stream: MuxStream) -> None:
        """STOP is due: the deadline of the opening no longer matters."""
        self.unwatch(stream)
        self.want_control(stream)

    def settle(self, stream: MuxStream) -> None:
        """Forgets the stream if both halves have ended."""
        if stream.receiving is RECEIVING_ENDED and stream.sending is SENDING_ENDED and not stream.forgotten:
            stream.forgotten = True
            stream.room_wanted = False
            del self.streams[stream.id]
            self.unwatch(stream)
            stream.sink.closed()
            self.retire(stream)
            if self.leaving.begun:
                self.wake()

    def release(self, stream: MuxStream) -> None:
        """See ``MuxStream.release``."""
        stream.released = True
        self.retire(stream)

    def retire(self, stream: MuxStream) -> None:
        """Gives the stream's slot back once it is forgotten, read or dropped, and its handler gone."""
        if stream.retired or not stream.forgotten or not stream.released or stream.receive_window.unread:
            return
        stream.retired = True
        if self.admission.is_ours(stream.id):
            self.pool.release()
            self.freed()
        else:
            self.admission.retire()
            self.grant_opens()

    def grant_opens(self) -> None:
        """Lets the peer open more, if it is worth saying."""
        if self.admission.grant_due:
            self.outbound.streams_due = True
            self.wake()

    def wake(self) -> None:
        """There is something to send."""
        if not self.awake and (self.error is None or self._close_frame is not None):
            self.awake = True
            if not self._rendering:
                self.handler.output_pending()

    def arm(self, when: float) -> None:
        """Something is due at ``when``."""
        if when < self._armed and self.error is None:
            self._armed = when
            self.handler.deadline_moved(when)

    def watch(self, stream: MuxStream, when: float) -> None:
        """Calls ``_deadline_passed`` with the stream at ``when``."""
        stream.watch = self._deadlines.add(stream, when)
        self.arm(self._deadlines.next() or when)

    def unwatch(self, stream: MuxStream) -> None:
        """Forgets the stream's deadline."""
        if stream.watch is not None:
            self._deadlines.discard(stream, stream.watch)
            stream.watch = None

    def assert_invariants(self) -> None:
        """For tests: what must hold after every call."""
        self.pool.assert_invariants()
        self.flight.assert_invariants()
        self.admission.assert_invariants()
        self.leaving.assert_invariants()
        self.datagrams.outgoing.assert_invariants()
        self.datagrams.incoming.assert_invariants()
        for stream in (*self.streams.values(), *self.opens):
            stream.assert_invariants()
            assert not stream.forgotten
        granted = sum(s.receive_window.granted - s.receive_window.consumed for s in self.streams.values())
        assert granted + self.pool.lent <= self.pool.size
