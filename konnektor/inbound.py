"""What the peer's frames do: parsing in place, and each frame's effect on the session and its streams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from konnektor.abuse import CRUMB, Abuse
from konnektor.acks import Acks
from konnektor.errors import (
    Code,
    FlowControlError,
    PeerError,
    ProtocolError,
    StreamStateError,
    VersionError,
    session_error,
    stream_error,
)
from konnektor.frames import (
    HEADER_SIZE,
    OPEN_DEADLINE,
    OPEN_HEADER,
    UNSEQUENCED,
    VERSION,
    Accept,
    Ack,
    Close,
    Credit,
    Data,
    Datagram,
    Frame,
    FrameType,
    Goaway,
    Hello,
    HelloTLV,
    Open,
    OpenTLV,
    Ping,
    Pong,
    Priority,
    Refuse,
    Reset,
    Resume,
    Stop,
    Streams,
    check_header,
    read,
)
from konnektor.limits import MAX_DEADLINE
from konnektor.mux_stream import DirectSink, MuxStream
from konnektor.replay import Ticket
from konnektor.settings import Settings
from konnektor.states import (
    EVENT_ACCEPT,
    EVENT_DATA,
    EVENT_FIN,
    EVENT_REFUSE,
    EVENT_RESET,
    EVENT_STOP,
    RECEIVING_AWAITING,
    RECEIVING_DISCARDING,
    RECEIVING_GIVEN_UP,
    RECEIVING_OPEN,
    SENDING_FINISHING,
    SENDING_OPEN,
    SENDING_UNDECIDED,
)

if TYPE_CHECKING:
    from konnektor.mux import Mux

__all__ = ["Inbound"]


STRETCH: Final = 8 * 1024
"""Bytes of what was received that are copied at a time to be taken apart: many small frames, and next to nothing of a full one."""


class Inbound:
    """The receiving side of one session.

    Attributes:
        acks: what was taken in and not yet acknowledged.
        abuse: how much of its limits the peer has used.
        pong: what the next PONG answers and how many bytes had come before that PING; None if nothing asked.
    """

    __slots__ = ("_mux", "abuse", "acks", "pong")

    def __init__(self, mux: Mux) -> None:
        self._mux = mux
        self.acks = Acks(mux.limits.ack_bytes, mux.limits.ack_delay)
        self.abuse = Abuse()
        self.pong: tuple[int, int] | None = None

    def receive(self, view: memoryview, now: float) -> int:
        """Takes in the whole frames of ``view``; returns how many bytes that were.

        Raises:
            ProtocolError, VersionError, CalmError: the peer's offence, which ends the session.
        """
        mux, acks = self._mux, self.acks
        streams = mux.streams
        max_frame = mux.limits.max_frame
        pos, end = 0, len(view)
        counted = 0
        frames = -acks.seq
        established = mux.hello_received
        # Of bytes, and of nothing else, compiled code takes numbers and slices without calling the interpreter. So a stretch of
        # the view at a time is copied, and small payloads, which are the many, are cut out of that.
        near = b""
        near_from = near_size = 0
        while end - pos >= HEADER_SIZE:
            at = pos - near_from
            if at + HEADER_SIZE > near_size:
                near_from, at = pos, 0
                near = bytes(view[pos : pos + STRETCH])
                near_size = len(near)
            kind = near[at]
            flags = near[at + 1]
            length = near[at + 2] << 8 | near[at + 3]
            stream_id = near[at + 4] << 24 | near[at + 5] << 16 | near[at + 6] << 8 | near[at + 7]
            stop = pos + HEADER_SIZE + length
            stream = streams.get(stream_id) if kind == 0 and established else None
            if stream is not None and flags < 3 and length <= max_frame and (length or flags):
                # The short way, for what is nearly everything: sound DATA of a live stream.
                if stop > end:
                    break
                at += HEADER_SIZE
                payload = near[at : at + length] if at + length <= near_size else view[stop - length : stop]
                if not flags and stream.receiving is RECEIVING_OPEN:
                    stream.receive_window.receive(length)
                    sink: object = stream.sink
                    if isinstance(sink, DirectSink):  # the same call, but where mypyc knows what it calls
                        sink.data_received(payload)
                    else:
                        stream.sink.data_received(payload)
                else:
                    self._data(stream, flags, payload, length)
            else:
                check_header(kind, flags, length, stream_id, max_frame)
                if not mux.hello_received:
                    self._check_first(kind)
                if stop > end:
                    break
                frame = read(kind, flags, stream_id, view[stop - length : stop])
                if frame is None:
                    self.abuse.hint(mux.admission.opens, now)
                else:
                    self._frame(frame, pos, now)
                    established = mux.hello_received
                    frames += _CRUMBS.get(kind, 0)
            pos = stop
            if not kind & UNSEQUENCED:
                acks.seq += 1
                counted += length + HEADER_SIZE
            if mux.error is not None:
                return end
        if counted:
            acks.taken(counted, now)
            if acks.due:
                mux.wake()
            else:
                mux.arm(acks.due_at)
        # FIN and RESET, and what is discarded, give room back to the pool.
        mux.freed()
        frames += acks.seq
        if pos < frames * (HEADER_SIZE + CRUMB):
            mux.pause_reading_until = self.abuse.crumbs(frames, pos - frames * HEADER_SIZE, now)
        return pos

    def _data(self, stream: MuxStream, flags: int, payload: bytes | memoryview, length: int) -> None:
        window = stream.receive_window
        state = stream.receiving
        if state is RECEIVING_OPEN:
            if flags == 2:
                # Before the sink: what it consumes may be due a grant, which should know.
                window.blocked = True
            if length:
                window.receive(length)
                stream.ending = flags == 1
                stream.sink.data_received(payload)
        elif state is RECEIVING_DISCARDING:
            window.receive(length)
            window.consume(length)
        else:
            stream.move_receiving(EVENT_DATA)
        if flags == 1 and self._mux.error is None:
            # The sink may have stopped the stream meanwhile; then it wants to hear no more.
            wanted = stream.receiving is RECEIVING_OPEN
            stream.move_receiving(EVENT_FIN)
            window.end()
            if wanted:
                stream.sink.eof_received()
            self._mux.settle(stream)

    def _check_first(self, kind: int) -> None:
        rejoining = self._mux.resumption.rejoining
        if kind not in (_BEFORE_RESUME if rejoining else _BEFORE_HELLO):
            raise ProtocolError(f"a frame of type 0x{kind:02x} before {'RESUME' if rejoining else 'HELLO'}")

    def _frame(self, frame: Frame, pos: int, now: float) -> None:
        mux = self._mux
        match frame:
            case Open():
                self._open(frame, now)
            case Accept():
                self._accept(frame)
            case Ack(seq):
                mux.acked(seq, now)
            case Credit():
                # An empty DATA is the answer to a CREDIT that was no use: it must not buy the next one.
                self.abuse.credit(mux.admission.opens, mux.flight.sent - mux.outbound.empties)
                stream = self._stream_of(frame)
                if stream is not None and stream.send_window.raise_limit(frame.max_offset):
                    mux.activate(stream)
            case Data(stream_id):
                _ = self._stream_of(frame)  # raises where there never was one
                raise StreamStateError(f"DATA for stream {stream_id}, which is over")
            case Reset():
                self._reset(frame)
            case Stop():
                self._stop(frame)
            case Refuse():
                self._refuse(frame)
            case Streams(max_opens):
                self.abuse.streams(mux.admission.opened)
                if mux.admission.allow(max_opens) and mux.opens:
                    mux.wake()
            case Ping(opaque):
                received = mux.bytes_received + pos
                mux.liveness.asked(received, now)
                self.pong = (opaque, received)
                mux.wake()
            case Pong(opaque):
                mux.pong(opaque, now)
            case Priority(_, priority, weight):
                self.abuse.hint(mux.admission.opens, now)
                if (stream := self._stream_of(frame)) is not None and not stream.pinned:
                    stream.priority, stream.weight = priority, weight
            case Goaway(_, code, grace_ms, text):
                self.abuse.goaway()
                mux.goaway(code, grace_ms / 1000, text)
            case Hello():
                self._hello(frame)
            case Resume() if mux.resumption.rejoining:
                mux.handler.resume_requested(frame, mux.resumption.client_nonce + mux.nonce)
            case Close(code, text):
                mux.end(session_error(code, text), None)
            case Datagram():
                self._datagram(frame)
            case _:
                raise ProtocolError(f"{_name(frame)} without having said so in HELLO")

    def _stream_of(self, frame: Accept | Credit | Data | Priority | Refuse | Reset | Stop) -> MuxStream | None:
        """The frame's stream, None if it is forgotten.

        Raises:
            ProtocolError: it was never opened.
        """
        stream = self._mux.streams.get(frame.stream)
        if stream is None and not self._mux.admission.was_opened(frame.stream):
            raise ProtocolError(f"{_name(frame)} for stream {frame.stream}, which was never opened")
        return stream

    def _hello(self, frame: Hello) -> None:
        if self._mux.hello_received:
            raise ProtocolError("a second HELLO")
        if not frame.vmin <= VERSION <= frame.vmax:
            raise VersionError(
                f"no version in common: this side speaks {VERSION}, the peer {frame.vmin} to {frame.vmax}"
            )
        mux = self._mux
        if HelloTLV.RESUME_INTENT in frame.tlvs:
            if mux.role == "client":
                raise ProtocolError("RESUME_INTENT in a server's HELLO")
            if frame.tlvs[HelloTLV.RESUME_INTENT] or frame.tlvs.get(HelloTLV.AFRESH):
                raise ProtocolError("a RESUME_INTENT or AFRESH that is not empty")
            mux.resumption.intended(frame)
            return
        mux.established_with(Settings.from_tlvs(frame.tlvs), Ticket.from_tlvs(frame.tlvs))

    def _open(self, frame: Open, now: float) -> None:
        mux = self._mux
        mux.admission.take(frame.stream)
        mux.grant_opens()
        tlvs = _kept(frame.tlvs)
        stream = MuxStream(mux, _UNSET, frame.name, frame.priority, tlvs, RECEIVING_OPEN, SENDING_UNDECIDED, now)
        stream.id = frame.stream
        stream.send_window.limit = mux.peer.initial_window
        mux.streams[frame.stream] = stream
        raw = frame.tlvs.get(OPEN_DEADLINE)
        if raw is not None and len(raw) != 4:
            raise ProtocolError(f"an OPEN deadline of {len(raw)} bytes, not 4")
        allowed = mux.limits.open_deadline if raw is None else min(MAX_DEADLINE, int.from_bytes(raw, "big") / 1000)
        stream.deadline = now + allowed
        unknown = _critical(frame.tlvs)
        if unknown is not None:
            stream.released = True
            stream.refuse(Code.UNSUPPORTED, f"OPEN with unknown critical parameter {unknown}")
        elif mux.leaving.refuses(frame.stream, now):
            stream.released = True
            stream.refuse(Code.LIMIT, "this side is draining")
        else:
            mux.watch(stream, stream.deadline)
            mux.handler.stream_opened(stream)

    def _datagram(self, frame: Datagram) -> None:
        datagrams = self._mux.datagrams
        datagrams.received += 1
        stream = self._mux.streams.get(frame.stream)
        take = None
        if stream is not None and stream.receiving is RECEIVING_OPEN and stream.sending is not SENDING_UNDECIDED:
            if stream.datagrams is None:
                raise StreamStateError(f"DATAGRAM on stream {frame.stream}, whose type has none")
            if frame.context == 0:
                # A sink that knows bytes alone lets them pass.
                take = getattr(stream.sink, "datagram_received", None)
        if take is None:
            datagrams.incoming.dropped += 1
        else:
            take(frame.payload)

    def _accept(self, frame: Accept) -> None:
        stream = self._stream_of(frame)
        if stream is None:
            raise StreamStateError(f"ACCEPT for stream {frame.stream}, which is over")
        wanted = stream.receiving is RECEIVING_AWAITING
        stream.move_receiving(EVENT_ACCEPT)
        if not wanted:
            return
        self._mux.unwatch(stream)
        unknown = _critical(frame.tlvs)
        if unknown is not None:
            text = f"ACCEPT with unknown critical parameter {unknown}"
            stream.break_off(stream_error(Code.UNSUPPORTED, text), Code.UNSUPPORTED)
            return
        stream.tlvs = _kept(frame.tlvs)
        stream.sink.accepted()
        if stream.datagrams:
            self._mux.activate(stream)

    def _refuse(self, frame: Refuse) -> None:
        stream = self._stream_of(frame)
        if stream is None:
            raise StreamStateError(f"REFUSE for stream {frame.stream}, which is over")
        wanted = stream.wanted
        stream.move_receiving(EVENT_REFUSE)
        self._mux.unwatch(stream)
        stream.receive_window.end()
        if stream.sending in (SENDING_OPEN, SENDING_FINISHING):
            stream.reset_code, stream.reset_text = int(Code.CANCELLED), ""
            stream.drop_queue()
            self._mux.want_control(stream)
        stream.move_sending(EVENT_REFUSE)
        stream.fail(stream_error(frame.code, frame.text, refused=True, retry_after=frame.retry_ms / 1000), wanted)
        self._mux.settle(stream)

    def _reset(self, frame: Reset) -> None:
        stream = self._stream_of(frame)
        if stream is None:
            self.abuse.late_end(self._mux.admission.opens)
            return
        receiving, sending = stream.wanted
        stream.move_receiving(EVENT_RESET)
        window = stream.receive_window
        if frame.final_offset > window.granted:
            raise FlowControlError(f"RESET at offset {frame.final_offset}, beyond the credit of {window.granted}")
        if frame.final_offset != window.received:
            raise ProtocolError(f"RESET at offset {frame.final_offset}; {window.received} bytes came")
        window.end()
        window.drop()
        undecided = stream.sending is SENDING_UNDECIDED
        if undecided:
            stream.refuse(Code.CANCELLED)
        stream.fail(stream_error(frame.code, frame.text), (receiving, sending and undecided))
        self._mux.settle(stream)

    def _stop(self, frame: Stop) -> None:
        stream = self._stream_of(frame)
        if stream is None:
            self.abuse.late_end(self._mux.admission.opens)
            return
        if stream.stop_received or stream.receiving in (RECEIVING_AWAITING, RECEIVING_GIVEN_UP):
            raise StreamStateError(f"a second STOP, or one before ACCEPT, for stream {frame.stream}")
        stream.stop_received = True
        receiving, sending = stream.wanted
        error = stream_error(frame.code)
        if stream.sending is SENDING_UNDECIDED:
            stream.refuse(Code.CANCELLED)
            stream.fail(error, (receiving, True))
            return
        if stream.sending in (SENDING_OPEN, SENDING_FINISHING):
            stream.reset_code, stream.reset_text = frame.code, ""
            stream.drop_queue()
            self._mux.want_control(stream)
        stream.move_sending(EVENT_STOP)
        stream.fail(error, (False, sending))


def _name(frame: Frame) -> str:
    return type(frame).__name__.upper()


_KNOWN: Final = frozenset(map(int, OpenTLV))


def _kept(tlvs: Mapping[int, bytes]) -> Mapping[int, bytes]:
    """What is kept of the parameters of an OPEN or ACCEPT: of those that nobody knows there may be thousands."""
    return {tlv: value for tlv, value in tlvs.items() if tlv in _KNOWN} if tlvs else tlvs


def _critical(tlvs: Mapping[int, bytes]) -> int | None:
    """The first parameter of an OPEN or ACCEPT that must be understood and is not."""
    for tlv in tlvs:
        if tlv & 1 and tlv != OPEN_HEADER:
            return tlv
    return None


class _Unset:
    """Stands in until the handler has set a sink, which it does at once; and for what is refused before."""

    def accepted(self) -> None: ...
    def data_received(self, data: bytes | memoryview, /) -> None: ...
    def eof_received(self) -> None: ...
    def writable(self) -> None: ...
    def failed(self, error: PeerError, /, *, receiving: bool, sending: bool) -> None: ...
    def closed(self) -> None: ...


_UNSET: Final = _Unset()
_BEFORE_RESUME: Final = (int(FrameType.RESUME), int(FrameType.CLOSE))
_BEFORE_HELLO: Final = (int(FrameType.HELLO), int(FrameType.CLOSE))
_CRUMBS: Final = {int(FrameType.CREDIT): -1, int(FrameType.DATAGRAM): 1}
"""Where the sequence is not the count of frames that may be crumbs."""
