"""The multiplexer: many streams over one connection, as a machine without I/O or clock.

Theory of operation. ``Mux.receive`` parses what the connection delivered, in place, and calls sinks;
``Mux.data_to_send`` renders what should be written next. Both sides of a session run the same code.
Three rules prevent most of what goes wrong in multiplexers: receiving never waits for a stream;
control is *state rendered at write time* (the latest credit, one PONG, one ACK), never a queue of replies;
every wait has a deadline (``next_deadline`` and ``handle_timeout``).

Sinks are called from ``receive`` and ``data_to_send`` directly, and may call back into the multiplexer.
``now`` is any monotonic clock in seconds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Final, Literal, Protocol, TypeAlias

from konnektor.credit import Pool
from konnektor.deadlines import Deadlines
from konnektor.errors import (
    CalmError,
    Code,
    DialTimeoutError,
    FlowControlError,
    LimitError,
    LocalProtocolError,
    PeerTimeoutError,
    ProtocolError,
    SessionClosedError,
    SessionError,
    ShutdownError,
    StreamStateError,
    VersionError,
    session_error,
    stream_error,
)
from konnektor.flight import Flight
from konnektor.frames import (
    HEADER,
    HEADER_SIZE,
    MAX_OPEN,
    MAX_OPENS,
    UNSEQUENCED,
    VERSION,
    Accept,
    Ack,
    Buffer,
    Close,
    Credit,
    Data,
    Datagram,
    Frame,
    FrameType,
    Goaway,
    Hello,
    Open,
    OpenTLV,
    Ping,
    Pong,
    Priority,
    Refuse,
    Reset,
    Resume,
    Resumed,
    Stop,
    Streams,
    check_header,
    data_header,
    decode,
)
from konnektor.limits import Limits
from konnektor.mux_stream import MuxStream, Sink
from konnektor.scheduler import FRESH, Scheduler
from konnektor.settings import FLOORS, Settings
from konnektor.states import Event, Receiving, Sending

__all__ = ["BATCH", "Handler", "Mux", "MuxStream", "Role", "Sink"]

Role: TypeAlias = Literal["client", "server"]

BATCH: Final = 64 * 1024
"""Bytes of one ``data_to_send``: joined at once, written at once. Larger blocks cost more than the
system calls they save, because the allocator returns them to the kernel each time."""

PAYLOAD: Final = BATCH - HEADER_SIZE
"""Largest DATA payload sent: with its header it fills four TLS records exactly."""

FRESH_PAYLOAD: Final = 16 * 1024
"""Largest DATA payload that may pass the cap on bytes in flight, for a stream that was idle."""

LAST_ID: Final = 2**31 - 2**20
"""Ids end here; whoever reaches it drains, so that the client dials a new session."""

MAX_GRACE: Final = 2**32 - 1

PING_INTERVAL: Final = 2.0
SILENCE: Final = 15.0
DEAD_AFTER: Final = 10.0
LATE_TIMER: Final = 1.0
LINGER: Final = 5.0


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

    Attributes:
        peer: what the peer declared; ``FLOORS`` before its HELLO.
        error: why the session ended, None while it lives.
        bytes_received, bytes_sent: on this connection, headers included.
    """

    def __init__(
        self, role: Role, handler: Handler, limits: Limits, settings: Settings, *, nonce: bytes, now: float
    ) -> None:
        self._role = role
        self._handler = handler
        self._limits = limits
        self._settings = settings
        self._nonce = nonce
        self.peer: Settings = FLOORS
        self.error: SessionError | None = None
        self.bytes_received = 0
        self.bytes_sent = 0

        self._streams: dict[int, MuxStream] = {}
        self._opens: deque[MuxStream] = deque()
        self._control: deque[MuxStream] = deque()
        self._scheduler = Scheduler()
        self._pool = Pool(limits.receive_pool, limits.initial_window, limits.initial_streams)
        self._flight = Flight(limits.flight_floor)
        self._deadlines: Deadlines[MuxStream] = Deadlines()

        self._next_id = 1 if role == "client" else 2
        self._next_peer_id = 2 if role == "client" else 1
        self._opens_allowed = FLOORS.initial_streams
        self._opens_sent = 0
        self._opens_granted = limits.initial_streams
        self._opens_received = 0
        self._retired = 0

        self._awake = False
        self._hello_sent = False
        self._hello_received = False
        self._close_frame: bytes | None = None
        self._closed = False

        self._ack_bytes = 0
        self._rx_seq = 0
        self._ack_due = False
        self._ack_at = math.inf
        self._streams_due = False
        self._pong: int | None = None
        self._pong_bytes = 0
        self._ping_due = False
        self._ping_count = 0
        self._ping_sent_at: float | None = None
        self._last_ping_at = -math.inf

        self._received_at = now
        self._alive_by = now + limits.hello_timeout
        self._judging = False
        self._armed = math.inf

        self._goaway_received = False
        self._leaving = False
        self._drain_by = math.inf
        self._drain_reason = (int(Code.SHUTDOWN), "")
        self._goaway_due = False
        self._goaways_sent = 0
        self._goaway_seq = 0
        self._settle_by = math.inf
        self._linger_by = math.inf
        self._last_taken: int | None = None

        self._wake()

    def start(self) -> None:
        """Arms the first deadline; call once the handler is ready for calls."""
        self._arm(self._alive_by)

    # What the driver asks

    @property
    def awake(self) -> bool:
        """Whether ``data_to_send`` has more to give."""
        return self._awake

    @property
    def established(self) -> bool:
        """Whether the peer's HELLO has arrived and the session is not over."""
        return self._hello_received and self.error is None

    @property
    def draining(self) -> bool:
        """Whether GOAWAY was sent or received: no new streams of ours."""
        return self._goaway_received or self._leaving

    @property
    def streams(self) -> Mapping[int, MuxStream]:
        """The streams that are on the wire, by id."""
        return self._streams

    @property
    def max_window(self) -> int:
        """Largest receive window of one stream."""
        return self._limits.max_window

    @property
    def pool(self) -> Pool:
        """The receive budget; for statistics."""
        return self._pool

    @property
    def flight(self) -> Flight:
        """The estimates of the path; for statistics."""
        return self._flight

    def next_deadline(self) -> float | None:
        """When ``handle_timeout`` should be called, None if never."""
        if self.error is not None:
            return None
        due = min(self._ack_at, self._alive_by, self._settle_by, self._linger_by, self._drain_by)
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
        deadline: float | None = None,
        tlvs: Mapping[int, bytes] | None = None,
    ) -> MuxStream:
        """Opens a stream of the type ``name``; the peer's answer comes to the sink.

        Waits inside, until the deadline, while the peer allows no more streams or the pool has no
        room; then the sink's ``failed`` gets a LimitError. Data may be written at once.

        Args:
            header: what the stream type puts into its OPEN.
            priority: 0 interactive, 1 default, 2 bulk.
            deadline: seconds the whole opening may take.
            tlvs: more parameters, by ``OpenTLV`` id.

        Raises:
            SessionClosedError: the session is over or draining.
            LocalProtocolError: name and header do not fit into an OPEN.
        """
        if self.error is not None or self.draining:
            raise SessionClosedError("the session is closed" if self.error else "the session is draining")
        deadline = self._limits.open_deadline if deadline is None else deadline
        params = {int(OpenTLV.HEADER): header, int(OpenTLV.DEADLINE): b"\0\0\0\0", **(tlvs or {})}
        size = 2 + len(name) + sum(4 + len(value) for value in params.values())
        if len(name) > 255 or not name.isascii() or size > MAX_OPEN:
            raise LocalProtocolError(f"an OPEN takes at most {MAX_OPEN} bytes with an ASCII name of 255, not {size}")
        stream = MuxStream(self, sink, name, priority, params, Receiving.AWAITING, Sending.UNSENT)
        stream.send_window.limit = self.peer.initial_window
        stream.deadline = now + deadline
        stream.released = True
        self._watch(stream, stream.deadline)
        self._opens.append(stream)
        self._wake()
        return stream

    def ping(self) -> int:
        """Sends a PING soon. Returns the ``opaque`` of the PONG that will answer it."""
        self._ping_due = True
        self._wake()
        return self._ping_count + 1

    def drain(self, grace: float, now: float, *, code: int = Code.SHUTDOWN, reason: str = "") -> None:
        """Ends the session gently: no new streams, open ones have ``grace`` seconds, then RESET and CLOSE."""
        if self.error is not None:
            return
        if self._linger_by == math.inf:
            self._drain_by = min(self._drain_by, now + grace)
            self._arm(self._drain_by)
        if self._leaving:
            return
        self._leaving = True
        self._drain_reason = (code, reason)
        self._goaway_due = True
        self._fail_opens("this side is draining")
        self._wake()
        self._check_drained(now)

    def close(self, code: int = Code.NO_ERROR, reason: str = "") -> None:
        """Ends the session now: every stream fails with SessionLost, CLOSE is the last frame."""
        if self.error is None:
            self._end(session_error(code, reason), Close(code, reason))

    def connection_lost(self, reason: str) -> None:
        """The transport is gone without CLOSE."""
        self._close_frame = None
        self._closed = True
        if self.error is None:
            self._end(SessionError(reason, Code.INTERNAL), None)

    # Receiving

    def receive(self, data: Buffer, now: float) -> int:
        """Takes in whole frames; returns how many bytes that were. Give the rest again with more behind it.

        Sinks and the handler are called from here. A peer's offence ends the session with CLOSE.
        """
        if self.error is not None:
            return len(data)
        self._received_at = now
        self._judging = False
        try:
            used = self._receive(memoryview(data), now)
        except (ProtocolError, VersionError, CalmError) as error:
            self._end(error, Close(error.code, error.reason))
            return len(data)
        self.bytes_received += used
        return used

    def _receive(self, view: memoryview, now: float) -> int:
        unpack = HEADER.unpack_from
        streams = self._streams
        max_frame = self._limits.max_frame
        pos, end = 0, len(view)
        counted = 0
        while end - pos >= HEADER_SIZE:
            kind, flags, length, stream_id = unpack(view, pos)
            body = pos + HEADER_SIZE
            stop = body + length
            if kind == 0 and flags < 3 and 0 < length <= max_frame and stream_id in streams:
                # The short way, for what is nearly everything: sound DATA of a live stream.
                if stop > end:
                    break
                self._data(streams[stream_id], flags, view[body:stop], length)
            else:
                check_header(kind, flags, length, stream_id, max_frame)
                if not self._hello_received and kind != FrameType.HELLO and kind != FrameType.CLOSE:
                    raise ProtocolError(f"a frame of type 0x{kind:02x} before HELLO")
                if stop > end:
                    break
                frame = decode(kind, flags, stream_id, view[body:stop], max_frame)
                if frame is not None:
                    self._frame_received(frame, pos, now)
            pos = stop
            if not kind & UNSEQUENCED:
                self._rx_seq += 1
                counted += length + HEADER_SIZE
            if self.error is not None:
                return len(view)
        if counted:
            self._ack_bytes += counted
            if self._ack_bytes >= self._limits.ack_bytes:
                self._ack_due = True
                self._wake()
            elif self._ack_at == math.inf:
                self._ack_at = now + self._limits.ack_delay
                self._arm(self._ack_at)
        return pos

    def _data(self, stream: MuxStream, flags: int, payload: memoryview, length: int) -> None:
        window = stream.receive_window
        state = stream.receiving
        if state is Receiving.OPEN:
            window.receive(length)
            if flags == 2:
                # Before the sink: what it consumes may be due a grant, which should know.
                window.blocked = True
            if length:
                stream.sink.data_received(payload)
        elif state is Receiving.DISCARDING:
            window.receive(length)
            window.consume(length)
        else:
            stream.move_receiving(Event.DATA)
        if flags == 1 and self.error is None:
            # The sink may have stopped the stream meanwhile; then it wants to hear no more.
            discarding = stream.receiving is Receiving.DISCARDING
            stream.move_receiving(Event.FIN)
            window.end()
            if not discarding:
                stream.sink.eof_received()
            self._settled(stream)

    def _frame_received(self, frame: Frame, pos: int, now: float) -> None:
        match frame:
            case Ack(seq):
                self._ack_received(seq, now)
            case Credit():
                stream = self._stream_of(frame)
                if stream is not None and stream.send_window.raise_limit(frame.max_offset):
                    self.activate(stream)
            case Open():
                self._open_received(frame, now)
            case Accept():
                self._accept_received(frame)
            case Data(stream_id, payload, flags):
                stream = self._stream_of(frame)
                if stream is None:
                    raise StreamStateError(f"DATA for stream {stream_id}, which is over")
                self._data(stream, flags, memoryview(payload), len(payload))
            case Reset():
                self._reset_received(frame)
            case Stop():
                self._stop_received(frame)
            case Refuse():
                self._refuse_received(frame)
            case Streams(max_opens):
                if max_opens > MAX_OPENS:
                    raise ProtocolError(f"STREAMS of {max_opens}, more than there are ids")
                if max_opens > self._opens_allowed:
                    self._opens_allowed = max_opens
                    if self._opens:
                        self._wake()
            case Ping(opaque):
                self._pong = opaque
                self._pong_bytes = self.bytes_received + pos
                self._wake()
            case Pong(opaque):
                self._pong_received(opaque, now)
            case Priority(_, priority, weight):
                if (stream := self._stream_of(frame)) is not None:
                    stream.priority, stream.weight = priority, weight
            case Goaway():
                self._goaway_taken(frame)
            case Hello():
                self._hello(frame)
            case Close(code, text):
                self._end(session_error(code, text), None)
                self._closed = True
            case Datagram(stream_id):
                if self._stream_of(frame) is not None:
                    raise StreamStateError(f"DATAGRAM on stream {stream_id}, whose type has none")
            case Resume() | Resumed():
                raise ProtocolError(f"{type(frame).__name__.upper()} without having said so in HELLO")

    def _stream_of(self, frame: Frame) -> MuxStream | None:
        """The frame's stream, None if it is forgotten.

        Raises:
            ProtocolError: it was never opened.
        """
        stream_id: int = frame.stream  # type: ignore[union-attr]
        stream = self._streams.get(stream_id)
        if stream is None:
            ours = (stream_id & 1) == (self._next_id & 1)
            if stream_id >= (self._next_id if ours else self._next_peer_id) and not isinstance(frame, Datagram):
                raise ProtocolError(f"{type(frame).__name__.upper()} for stream {stream_id}, which was never opened")
        return stream

    def _hello(self, frame: Hello) -> None:
        if self._hello_received:
            raise ProtocolError("a second HELLO")
        if not frame.vmin <= VERSION <= frame.vmax:
            raise VersionError(
                f"no version in common: this side speaks {VERSION}, the peer {frame.vmin} to {frame.vmax}"
            )
        self.peer = Settings.from_tlvs(frame.tlvs)
        self._hello_received = True
        self._opens_allowed = max(self._opens_allowed, self.peer.initial_streams)
        for stream in (*self._streams.values(), *self._opens):
            if stream.sending is not Sending.UNDECIDED and stream.send_window.raise_limit(self.peer.initial_window):
                self.activate(stream)
        self._alive_by = self._received_at + self._silence
        self._ping_due = True
        self._wake()
        self._handler.hello_received(self.peer)

    @property
    def _silence(self) -> float:
        return min(SILENCE, min(self.peer.idle_timeout, self._limits.idle_timeout) / 2)

    def _open_received(self, frame: Open, now: float) -> None:
        if frame.stream != self._next_peer_id:
            raise ProtocolError(f"OPEN of stream {frame.stream}; the next one is {self._next_peer_id}")
        self._next_peer_id += 2
        self._opens_received += 1
        if self._opens_received > self._opens_granted:
            raise ProtocolError(f"OPEN number {self._opens_received}; {self._opens_granted} were allowed")
        stream = MuxStream(
            self, _DISCARD, frame.name, frame.priority, frame.tlvs, Receiving.OPEN, Sending.UNDECIDED
        )
        stream.id = frame.stream
        stream.send_window.limit = self.peer.initial_window
        self._streams[frame.stream] = stream
        raw = frame.tlvs.get(OpenTLV.DEADLINE)
        if raw is not None and len(raw) != 4:
            raise ProtocolError(f"an OPEN deadline of {len(raw)} bytes, not 4")
        deadline = self._limits.open_deadline if raw is None else min(300.0, int.from_bytes(raw, "big") / 1000)
        stream.deadline = now + deadline
        unknown = [tlv for tlv in frame.tlvs if tlv & 1 and tlv != OpenTLV.HEADER]
        if unknown:
            stream.released = True
            stream.refuse(Code.UNSUPPORTED, f"OPEN with unknown critical parameter {unknown[0]}")
        elif self._last_taken is not None and frame.stream > self._last_taken:
            stream.released = True
            stream.refuse(Code.LIMIT, "this side is draining")
        else:
            self._watch(stream, stream.deadline)
            self._handler.stream_opened(stream)

    def _accept_received(self, frame: Accept) -> None:
        stream = self._stream_of(frame)
        if stream is None:
            raise StreamStateError(f"ACCEPT for stream {frame.stream}, which is over")
        given_up = stream.receiving is Receiving.GIVEN_UP
        stream.move_receiving(Event.ACCEPT)
        self._unwatch(stream)
        if not given_up:
            stream.tlvs = frame.tlvs
            stream.sink.accepted()

    def _refuse_received(self, frame: Refuse) -> None:
        stream = self._stream_of(frame)
        if stream is None:
            raise StreamStateError(f"REFUSE for stream {frame.stream}, which is over")
        given_up = stream.receiving is Receiving.GIVEN_UP
        stream.move_receiving(Event.REFUSE)
        self._unwatch(stream)
        stream.receive_window.end()
        stream.reset_code, stream.reset_text = int(Code.CANCELLED), ""
        stream.drop_queue()
        stream.move_sending(Event.REFUSE)
        if stream.sending is Sending.RESETTING:
            self.want_control(stream)
        if not given_up:
            error = stream_error(frame.code, frame.text, refused=True, retry_after=frame.retry_ms / 1000)
            stream.sink.failed(error, receiving=True, sending=True)
        self._settled(stream)

    def _reset_received(self, frame: Reset) -> None:
        stream = self._stream_of(frame)
        if stream is None:
            return
        discarding = stream.receiving is Receiving.DISCARDING
        stream.move_receiving(Event.RESET)
        window = stream.receive_window
        if frame.final_offset > window.granted:
            raise FlowControlError(f"RESET at offset {frame.final_offset}, beyond the credit of {window.granted}")
        if frame.final_offset != window.received:
            raise ProtocolError(f"RESET at offset {frame.final_offset}; {window.received} bytes came")
        window.end()
        window.drop()
        error = stream_error(frame.code, frame.text)
        undecided = stream.sending is Sending.UNDECIDED
        if undecided:
            stream.refuse(Code.CANCELLED)
        if not discarding:
            stream.sink.failed(error, receiving=True, sending=undecided)
        self._settled(stream)

    def _stop_received(self, frame: Stop) -> None:
        stream = self._stream_of(frame)
        if stream is None:
            return
        if stream.stop_received or stream.receiving is Receiving.AWAITING:
            raise StreamStateError(f"a second STOP, or one before ACCEPT, for stream {frame.stream}")
        stream.stop_received = True
        before = stream.sending
        if before is Sending.UNDECIDED:
            stream.refuse(Code.CANCELLED)
            stream.sink.failed(stream_error(frame.code), receiving=True, sending=True)
            self._settled(stream)
            return
        stream.reset_code = stream.reset_code or frame.code
        stream.move_sending(Event.STOP)
        if before in (Sending.OPEN, Sending.FINISHING):
            stream.drop_queue()
            self.want_control(stream)
            stream.sink.failed(stream_error(frame.code), receiving=False, sending=True)

    def _ack_received(self, seq: int, now: float) -> None:
        flight = self._flight
        if seq > flight.sent:
            raise ProtocolError(f"ACK of {seq} frames; {flight.sent} were sent")
        if seq <= flight.acked:
            return
        flight.on_ack(seq, now)
        if self._scheduler:
            self._wake()
        if self._leaving:
            self._check_drained(now)

    def _pong_received(self, opaque: int, now: float) -> None:
        if self._ping_sent_at is None or opaque != self._ping_count:
            raise ProtocolError("a PONG that matches no PING")
        rtt = now - self._ping_sent_at
        self._ping_sent_at = None
        self._flight.on_rtt(rtt, now)
        self._handler.pong_received(opaque, rtt)

    def _goaway_taken(self, frame: Goaway) -> None:
        first = not self._goaway_received
        self._goaway_received = True
        self._fail_opens("the peer is draining")
        if first:
            self._handler.goaway_received(frame.code, frame.grace_ms / 1000, frame.text)

    # Sending

    def data_to_send(self, now: float, max_bytes: int = BATCH) -> bytes:
        """What to write next, scheduled and joined; empty if there is nothing (see ``awake``)."""
        if self._closed:
            self._awake = False
            return b""
        parts: list[Buffer] = []
        size = 0
        if not self._hello_sent:
            self._hello_sent = True
            parts.append(self._render_hello())
            size = len(parts[0])
        if self._close_frame is not None:
            parts.append(self._close_frame)
            self._close_frame = None
            self._closed = True
            self._awake = False
            return self._rendered(parts)
        if self._role == "server" and not self._hello_received:
            self._awake = False
            return self._rendered(parts)

        sent_before = self._flight.sent
        size += self._render_session_control(parts, now)
        budget = size + (max_bytes >> 2)
        while self._control and size < budget:
            size += self._render_stream_control(self._control.popleft(), parts)
        while self._opens and size < budget:
            rendered = self._render_open(parts, now)
            if rendered == 0:
                break
            size += rendered
        more = size >= budget
        if size < max_bytes and self._scheduler:
            size = self._render_data(parts, size, max_bytes, now)
            more = more or size >= max_bytes
        if self._flight.sent != sent_before:
            self._flight.on_batch(now, limited=not self._scheduler)
            if now - self._last_ping_at >= PING_INTERVAL and self._ping_sent_at is None and self._hello_received:
                parts.append(self._render_ping(now))
        self._awake = more
        if self._leaving:
            self._check_drained(now)
        return self._rendered(parts)

    def _rendered(self, parts: list[Buffer]) -> bytes:
        data = parts[0] if len(parts) == 1 and isinstance(parts[0], bytes) else b"".join(parts)
        self.bytes_sent += len(data)
        return data

    def _render_hello(self) -> bytes:
        tlvs = self._settings.to_tlvs()
        # One reserved id, different each time, so that peers learn to skip what they do not know.
        grease = (self._nonce[0] & 0xF0 | 0x0A) << 8 | self._nonce[1] & 0xF0 | 0x0A
        tlvs[grease] = self._nonce[2 : 2 + self._nonce[2] % 8]
        return Hello(VERSION, VERSION, self._nonce, tlvs).encode()

    def _render_session_control(self, parts: list[Buffer], now: float) -> int:
        """PONG, ACK, PING, STREAMS and GOAWAY, each at most once, as they are now."""
        before = len(parts)
        if self._pong is not None:
            parts.append(Pong(self._pong, self._pong_bytes).encode())
            self._pong = None
        if self._ack_due:
            parts.append(Ack(self._rx_seq).encode())
            self._ack_due = False
            self._ack_bytes = 0
            self._ack_at = math.inf
        if self._ping_due and self._ping_sent_at is None:
            parts.append(self._render_ping(now))
        if self._streams_due:
            self._streams_due = False
            self._opens_granted = min(MAX_OPENS, self._limits.initial_streams + self._retired)
            parts.append(self._sequenced(Streams(self._opens_granted).encode()))
        if self._goaway_due:
            parts.append(self._render_goaway(now))
        return sum(map(len, parts[before:]))

    def _sequenced(self, frame: bytes) -> bytes:
        self._flight.on_sent(len(frame))
        return frame

    def _render_ping(self, now: float) -> bytes:
        self._ping_due = False
        self._ping_count += 1
        self._ping_sent_at = self._last_ping_at = now
        return Ping(self._ping_count).encode()

    def _render_goaway(self, now: float) -> bytes:
        """First "no more streams, please", and when that has been read, which was the last one taken."""
        self._goaway_due = False
        self._goaways_sent += 1
        grace = min(MAX_GRACE, max(0, round((self._drain_by - now) * 1000)))
        if self._goaways_sent == 1:
            last_id = 2**32 - 1
            self._settle_by = now + LINGER
            self._arm(self._settle_by)
        else:
            last_id = self._last_taken = max(0, self._next_peer_id - 2)
        code, reason = self._drain_reason
        frame = self._sequenced(Goaway(last_id, code, grace, reason).encode())
        self._goaway_seq = self._flight.sent
        return frame

    def _render_stream_control(self, stream: MuxStream, parts: list[Buffer]) -> int:
        """What one stream has to say besides data, as it is now."""
        stream.in_control = False
        frames: list[bytes] = []
        if stream.accept_tlvs is not None:
            frames.append(Accept(stream.id, stream.accept_tlvs).encode())
            stream.accept_tlvs = None
        if stream.sending is Sending.REFUSING:
            frames.append(Refuse(stream.id, stream.reset_code, stream.retry_ms, stream.reset_text).encode())
            stream.move_sending(Event.SENT_END)
        if stream.credit_due:
            stream.credit_due = False
            if stream.receiving in (Receiving.OPEN, Receiving.AWAITING):
                offset = stream.receive_window.grant()
                if offset is not None:
                    frames.append(Credit(stream.id, offset).encode())
        if stream.stop_due:
            stream.stop_due = False
            if stream.receiving in (Receiving.DISCARDING, Receiving.GIVEN_UP):
                frames.append(Stop(stream.id, stream.stop_code).encode())
        if stream.sending is Sending.RESETTING:
            offset = stream.send_window.sent
            frames.append(Reset(stream.id, stream.reset_code, offset, stream.reset_text).encode())
            stream.move_sending(Event.SENT_END)
        if stream.priority_due is not None:
            if stream.id in self._streams and stream.receiving is not Receiving.ENDED:
                frames.append(Priority(stream.id, *stream.priority_due).encode())
            stream.priority_due = None
        for frame in frames:
            parts.append(self._sequenced(frame))
        self._settled(stream)
        return sum(map(len, frames))

    def _render_open(self, parts: list[Buffer], now: float) -> int:
        """The first of the waiting OPENs, if the peer and the pool allow it."""
        stream = self._opens[0]
        if stream.sending is not Sending.UNSENT:
            self._opens.popleft()
            return 1
        if self._opens_sent >= self._opens_allowed or not self._pool.reserve():
            return 0
        self._opens.popleft()
        self._opens_sent += 1
        stream.id = self._next_id
        self._next_id += 2
        self._streams[stream.id] = stream
        left = max(1, round((stream.deadline - now) * 1000))
        params = {**stream.tlvs, int(OpenTLV.DEADLINE): min(left, 300_000).to_bytes(4, "big")}
        stream.tlvs = _NO_TLVS
        frame = self._sequenced(Open(stream.id, stream.priority, stream.name, params).encode())
        parts.append(frame)
        stream.move_sending(Event.SENT_OPEN)
        if stream.finish_wanted:
            stream.move_sending(Event.DO_FINISH)
        self.activate(stream)
        if self._next_id >= LAST_ID:
            self.drain(MAX_GRACE / 1000, now, reason="out of stream ids")
        return len(frame)

    def _render_data(self, parts: list[Buffer], size: int, max_bytes: int, now: float) -> int:
        scheduler, flight = self._scheduler, self._flight
        cap = flight.cap(now)
        frame_limit = min(self.peer.max_frame, PAYLOAD, flight.frame_limit())
        interactive = False
        while size < max_bytes:
            over = flight.in_flight - cap
            stream = scheduler.next(fresh_only=over >= 0) if over < cap else None
            if stream is None:
                break
            assert isinstance(stream, MuxStream)
            if scheduler.contended and stream.place == FRESH:
                interactive = True
            sending = stream.sending
            if sending is not Sending.OPEN and sending is not Sending.FINISHING:
                scheduler.finish(stream, 0, now)
                continue
            window = stream.send_window
            pending = stream.queued
            count = min(window.sendable(pending), frame_limit if over < 0 else FRESH_PAYLOAD)
            left = pending - count
            flags = 0
            if not left:
                flags = 1 if sending is Sending.FINISHING else 0
            elif count == 0 or window.limit - window.sent - count < min(left, 1024):
                flags = 2
                window.blocked_at = window.limit
            if count == 0 and not flags:
                scheduler.finish(stream, 0, now)
                continue
            parts.append(data_header(0, flags, count, stream.id))
            if count:
                window.sent += count
                stream.take(count, parts)
            frame_size = count + HEADER_SIZE
            size += frame_size
            flight.on_sent(frame_size)
            if flags == 1:
                scheduler.finish(stream, frame_size, now)
                stream.move_sending(Event.SENT_END)
                self._settled(stream)
            elif left and not flags:
                scheduler.charge(stream, frame_size, now)
            else:
                scheduler.finish(stream, frame_size, now)
            if stream.room_wanted and stream.queued <= stream.low_water:
                stream.room_wanted = False
                stream.sink.writable()
        if interactive:
            flight.on_interactive(now)
        return size

    # Time

    def handle_timeout(self, now: float) -> None:
        """Does what is due at ``now``; call at ``next_deadline`` or whenever."""
        self._armed = math.inf
        if self.error is not None:
            return
        if now >= self._ack_at:
            self._ack_at = math.inf
            self._ack_due = True
            self._wake()
        for stream in self._deadlines.expire(now):
            self._deadline_passed(stream, now)
        if now >= self._alive_by:
            self._check_alive(now)
        if self._leaving and self.error is None:
            if now >= self._drain_by:
                self._linger(now)
            self._check_drained(now)
        if (when := self.next_deadline()) is not None:
            self._arm(when)

    def _check_alive(self, now: float) -> None:
        """PING after silence; dead after more of it, judged only when reads had another chance."""
        if not self._hello_received:
            self._end(
                PeerTimeoutError(f"no HELLO within {self._limits.hello_timeout:g} s"),
                Close(Code.TIMEOUT, "no HELLO in time"),
            )
            return
        late = now - self._alive_by > LATE_TIMER
        patience = max(DEAD_AFTER, 4 * self._flight.rtt)
        quiet = now - self._received_at
        if late:
            # This process slept (a paused VM): the peer has had no chance to be heard.
            self._received_at = now - self._silence
            self._judging = False
            quiet = self._silence
        if quiet < self._silence:
            self._alive_by = self._received_at + self._silence
        elif quiet < self._silence + patience:
            if self._ping_sent_at is None:
                self.ping()
            self._alive_by = self._received_at + self._silence + patience
        elif not self._judging:
            self._judging = True
            self._alive_by = now + 0.05
        else:
            text = f"the peer has been silent for {quiet:.0f} s"
            self._end(PeerTimeoutError(text), Close(Code.TIMEOUT, text))

    def _deadline_passed(self, stream: MuxStream, now: float) -> None:
        if stream.sending is Sending.UNSENT:
            self._abandon(stream, LimitError("no stream was allowed within the deadline"))
        elif stream.receiving is Receiving.AWAITING:
            if now < stream.deadline + 2 * self._flight.rtt:
                self._watch(stream, stream.deadline + 2 * self._flight.rtt)
                return
            stream.cancel(Code.CANCELLED)
            stream.sink.failed(DialTimeoutError("no answer within the deadline"), receiving=True, sending=True)
        elif stream.sending is Sending.UNDECIDED:
            stream.refuse(Code.DIAL_TIMEOUT, "not ready within the deadline")
            error = DialTimeoutError("not ready within the deadline")
            stream.sink.failed(error, receiving=True, sending=True)

    # Drain and end

    def _check_drained(self, now: float) -> None:
        """Takes the next step of the drain that is possible."""
        if self.error is not None:
            return
        flight = self._flight
        if self._goaways_sent == 1 and not self._goaway_due:
            if flight.acked >= self._goaway_seq or now >= self._settle_by:
                self._settle_by = math.inf
                self._goaway_due = True
                self._wake()
        elif self._goaways_sent == 2 and not self._streams and self._linger_by == math.inf:
            self._linger(now)
        if self._linger_by < math.inf:
            said = not self._streams and not self._control and not self._goaway_due and flight.acked == flight.sent
            if said or now >= self._linger_by:
                code, reason = self._drain_reason
                self._end(session_error(code, reason), Close(code, reason))

    def _linger(self, now: float) -> None:
        """Drained, or out of grace: RESET what is left; CLOSE follows once all of it is acknowledged."""
        self._drain_by = math.inf
        self._linger_by = now + LINGER
        self._arm(self._linger_by)
        for stream in list(self._streams.values()):
            stream.cancel(Code.SHUTDOWN)
            stream.sink.failed(ShutdownError("the session was drained"), receiving=True, sending=True)

    def _fail_opens(self, reason: str) -> None:
        while self._opens:
            stream = self._opens.popleft()
            if stream.sending is Sending.UNSENT:
                self._abandon(stream, stream_error(Code.LIMIT, reason, refused=True))

    def _abandon(self, stream: MuxStream, error: LimitError | None) -> None:
        """An OPEN that never went out: the stream never existed."""
        self._unwatch(stream)
        stream.drop_queue()
        stream.move_sending(Event.DO_RESET)
        stream.receiving = Receiving.ENDED
        if error is not None:
            stream.sink.failed(error, receiving=True, sending=True)
        stream.forgotten = stream.retired = True
        stream.sink.closed()

    def _end(self, error: SessionError, close: Close | None) -> None:
        self.error = error
        self._close_frame = close.encode() if close is not None else None
        streams = [*self._streams.values(), *(s for s in self._opens if s.sending is Sending.UNSENT)]
        self._streams.clear()
        self._opens.clear()
        self._control.clear()
        for stream in streams:
            stream.lost(error)
        self._wake()
        self._handler.session_closed(error)

    # What streams ask

    def activate(self, stream: MuxStream) -> None:
        """The stream may have become able to send."""
        if stream.place:
            return
        sending = stream.sending
        if sending is Sending.OPEN or sending is Sending.FINISHING:
            window = stream.send_window
            pending = stream.queued
            if pending:
                if not window.sendable(pending) and window.blocked_at == window.limit:
                    return
            elif sending is not Sending.FINISHING:
                return
            self._scheduler.add(stream)
            if not self._awake:
                self._wake()

    def want_control(self, stream: MuxStream) -> None:
        """The stream has something to say besides data."""
        if not stream.in_control and stream.id:
            stream.in_control = True
            self._control.append(stream)
            self._wake()

    def _credit_due(self, stream: MuxStream) -> None:
        stream.credit_due = True
        self.want_control(stream)

    def consumed(self, stream: MuxStream, count: int) -> None:
        """See ``MuxStream.consumed``."""
        if stream.receive_window.consume(count) and stream.receiving is Receiving.OPEN:
            self._credit_due(stream)
        elif stream.forgotten:
            self._retire(stream)

    def give_up(self, stream: MuxStream) -> None:
        """An OPEN that is not on the wire is cancelled."""
        self._abandon(stream, None)

    def decided(self, stream: MuxStream) -> None:
        """ACCEPT or REFUSE is settled: the deadline no longer matters."""
        self._unwatch(stream)

    def _settled(self, stream: MuxStream) -> None:
        """Forgets the stream if both halves have ended."""
        if (
            stream.receiving is Receiving.ENDED
            and stream.sending is Sending.ENDED
            and not stream.forgotten
            and stream.id
        ):
            stream.forgotten = True
            self._streams.pop(stream.id, None)
            self._unwatch(stream)
            stream.sink.closed()
            self._retire(stream)

    def settle(self, stream: MuxStream) -> None:
        """A half may have ended by a call."""
        self._settled(stream)

    def release(self, stream: MuxStream) -> None:
        """See ``MuxStream.release``."""
        stream.released = True
        if stream.forgotten:
            self._retire(stream)

    def _retire(self, stream: MuxStream) -> None:
        """Gives the stream's slot back once it is forgotten, read or dropped, and its handler gone."""
        if stream.retired or not stream.released or stream.receive_window.unread or self.error is not None:
            return
        stream.retired = True
        if (stream.id & 1) == (self._next_id & 1):
            self._pool.release()
            if self._opens:
                self._wake()
            return
        self._retired += 1
        limit = self._limits.initial_streams
        due = limit + self._retired - self._opens_granted
        if due >= limit >> 3 or self._opens_granted - self._opens_received < limit >> 2:
            self._streams_due = True
            self._wake()

    # Small things

    def _wake(self) -> None:
        if not self._awake:
            self._awake = True
            self._handler.output_pending()

    def _arm(self, when: float) -> None:
        if when < self._armed:
            self._armed = when
            self._handler.deadline_moved(when)

    def _watch(self, stream: MuxStream, when: float) -> None:
        stream.watch = self._deadlines.add(stream, when)
        self._arm(self._deadlines.next() or when)

    def _unwatch(self, stream: MuxStream) -> None:
        if stream.watch is not None:
            self._deadlines.discard(stream, stream.watch)
            stream.watch = None

    def assert_invariants(self) -> None:
        """For tests: what must hold after every call."""
        self._pool.assert_invariants()
        self._flight.assert_invariants()
        for stream in self._iterate():
            stream.assert_invariants()
        granted = sum(s.receive_window.granted - s.receive_window.consumed for s in self._streams.values())
        assert granted <= self._pool.size

    def _iterate(self) -> Iterator[MuxStream]:
        yield from self._streams.values()
        yield from self._opens


class _Discard:
    """Stands in until the handler has set a sink: nothing is lost, because it is set at once."""

    def accepted(self) -> None: ...
    def data_received(self, data: memoryview, /) -> None: ...
    def eof_received(self) -> None: ...
    def writable(self) -> None: ...
    def failed(self, error: Exception, /, *, receiving: bool, sending: bool) -> None: ...
    def closed(self) -> None: ...


_DISCARD: Final = _Discard()
_NO_TLVS: Final[Mapping[int, bytes]] = {}
