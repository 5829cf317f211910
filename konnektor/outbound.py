"""What goes on the wire next: control as it stands now, then OPENs, then data in the scheduler's order."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from konnektor.abuse import OWN_HINTS, Allowance
from konnektor.datagrams import DatagramQueue
from konnektor.flight import FRAME_FLOOR
from konnektor.frames import (
    HEADER_SIZE,
    OPEN_DEADLINE,
    VERSION,
    Ack,
    Buffer,
    Credit,
    FrameType,
    Hello,
    HelloTLV,
    Ping,
    Pong,
    Priority,
    Refuse,
    Reset,
    Stop,
    Streams,
    data_header,
    encode_accept,
    encode_open,
)
from konnektor.limits import FULL_FRAME
from konnektor.mux_stream import MuxStream
from konnektor.scheduler import FRESH, FRESH_RUN, IDLE, INTERACTIVE
from konnektor.states import (
    EVENT_DO_FINISH,
    EVENT_SENT_END,
    EVENT_SENT_OPEN,
    RECEIVING_AWAITING,
    RECEIVING_ENDED,
    RECEIVING_OPEN,
    SENDING_FINISHING,
    SENDING_OPEN,
    SENDING_REFUSING,
    SENDING_RESETTING,
)

if TYPE_CHECKING:
    from konnektor.mux import Mux

__all__ = ["BATCH", "Outbound", "joined"]

_DATAGRAM: Final = int(FrameType.DATAGRAM)

BATCH: Final = 4 * FULL_FRAME
"""Bytes of one ``data_to_send``, written at once: each write costs a system call and wakes the peer, whatever its size. uvloop
reads 256 KiB at once, so one that comes by itself is taken in whole.
(Blocks of this size are cheap only where the allocator keeps them: see runtime.py.)"""

TIGHT_BATCH: Final = FULL_FRAME
"""The same while an interactive stream is active beside bulk: what it has to say waits for the end of a batch."""

RECORD: Final = 16 * 1024
"""Bytes of a full TLS record."""

LARGE: Final = 2 * RECORD
"""Payloads from this size on are not copied to be joined with others."""

PAYLOAD: Final = FULL_FRAME - HEADER_SIZE
"""Largest DATA payload sent."""

FRESH_PAYLOAD: Final = 16 * 1024
"""Largest DATA payload that may pass the cap on bytes in flight, for a stream that was idle."""

UNACKNOWLEDGED: Final = 65_536
"""Frames that may be unacknowledged where none is kept to be sent again: of each its size is remembered, and little more."""

MAX_GRACE: Final = 2**32 / 1000
"""Seconds: as long as GOAWAY can say."""


def joined(parts: list[Buffer]) -> list[Buffer]:
    """The same bytes in as few buffers as is cheap: small ones joined, large ones left as they are.

    Each buffer begins a TLS record of its own. So what is joined takes as much of the large one behind it as makes the
    record full.
    """
    for part in parts:
        if len(part) >= LARGE:
            break
    else:
        return [b"".join(parts)]
    chunks: list[Buffer] = []
    small: list[Buffer] = []
    size = 0
    for part in parts:
        if len(part) < LARGE:
            small.append(part)
            size += len(part)
        elif not size:
            chunks.append(part)
        else:
            fill = -size % RECORD
            view = memoryview(part)
            small.append(view[:fill])
            chunks += (b"".join(small), view[fill:])
            small = []
            size = 0
    if size:
        chunks.append(b"".join(small))
    return chunks


class Outbound:
    """The sending side of one session.

    Attributes:
        hello_sent: HELLO went out, and is not due again.
        streams_due: a STREAMS is worth sending.
        empties: DATA frames that said BLOCKED and nothing else.
        lossy: which parts of the latest batch are datagrams: they are not sent again.
        due: when a PING or PRIORITY that had to wait for its pace may go out, infinite if none does.
    """

    __slots__ = ("_hints", "_mux", "_passed", "_waiting", "due", "empties", "hello_sent", "lossy", "streams_due")

    def __init__(self, mux: Mux) -> None:
        self._mux = mux
        self.hello_sent = False
        self.streams_due = False
        self.empties = 0
        self._passed = 0
        """Bytes that fresh streams sent beyond the cap since one that waits for room in it has sent any."""
        self.lossy: list[int] = []
        self.due = math.inf
        self._hints = Allowance(*OWN_HINTS)
        self._waiting: dict[MuxStream, None] = {}
        """Those whose PRIORITY has to wait."""

    def check(self, now: float) -> None:
        """Lets what had to wait try again, if it is time."""
        if now >= self.due:
            self.due = math.inf
            waiting, self._waiting = self._waiting, {}
            for stream in waiting:
                self._mux.want_control(stream)
            self._mux.wake()

    def _wait(self, when: float) -> None:
        self.due = min(self.due, when)
        self._mux.arm(self.due)

    def render(self, parts: list[Buffer], max_bytes: int, now: float) -> bool:
        """Appends about ``max_bytes`` of frames to ``parts``; True if there is more."""
        mux = self._mux
        resumption, flight = mux.resumption, mux.flight
        if self.lossy:
            self.lossy.clear()
        if not mux.may_speak:
            return False
        size = 0 if self.hello_sent else self._hello(parts)
        if resumption.rejoining:
            return False
        if resumption.greeting:
            parts.append(resumption.greeting)
            resumption.greeting = b""
        # What is not sequenced stands first in its batch: the rest of it, but datagrams, is what is kept to be sent again.
        if mux.inbound.pong is not None or mux.inbound.acks.due or mux.liveness.ping_due or flight.unreported:
            size += self._unsequenced(parts, now)
        sequenced_from = len(parts)
        if resumption.replaying is not None:
            if again := next(resumption.replaying, None):
                parts.append(again)
                return True
            resumption.replaying = None
        if resumption.replay is not None:
            kept = resumption.replay.footprint
            if kept >= mux.limits.replay_buffer and kept >= resumption.room:
                # Full, it blocks; it never trims.
                return False
        elif flight.sent - flight.acked >= UNACKNOWLEDGED:
            return False
        sent_before = flight.sent
        if self.streams_due or mux.leaving.goaway_due:
            size += self._session_control(parts, now)
        # Beyond its quarter control waits for the next batch, so that no flood of it starves the data.
        budget = size + (max_bytes >> 2)
        control, opens = mux.control, mux.opens
        while control and size < budget:
            size += self._stream_control(control.popleft(), parts, now)
        while opens and size < budget and mux.admission.may_open and mux.pool.reserve():
            size += self._open(opens.popitem(last=False)[0], parts, now)
        more = size >= budget
        scheduler = mux.scheduler
        pause = (
            mux.liveness.measure_due(now)
            and (scheduler.active > 0 or flight.sent != sent_before)
            and self._measure(parts, sequenced_from, now)
        )
        if size < max_bytes and scheduler.active:
            size = self._data(parts, size, max_bytes, now, fresh_only=pause)
            more = more or (size >= max_bytes and scheduler.active > 0)
        if flight.sent != sent_before:
            flight.on_batch(now, limited=not scheduler.active)
            mux.liveness.sent(now)
        return more

    def _hello(self, parts: list[Buffer]) -> int:
        """HELLO, once."""
        self.hello_sent = True
        nonce = self._mux.nonce
        tlvs = self._mux.settings.to_tlvs()
        # One reserved id, different each time, so that peers learn to skip what they do not know.
        grease = (nonce[0] & 0xF0 | 0x0A) << 8 | nonce[1] & 0xF0 | 0x0A
        tlvs[grease] = nonce[2 : 2 + nonce[2] % 8]
        if self._mux.role == "server" and (ticket := self._mux.resumption.ticket) is not None:
            tlvs[HelloTLV.SESSION_ID] = ticket.session_id
            tlvs[HelloTLV.RESUME_KEY] = ticket.key
        hello = Hello(VERSION, VERSION, nonce, tlvs).encode()
        parts.append(hello)
        return len(hello)

    def _ping(self, now: float, *, report: bool = False) -> bytes:
        mux = self._mux
        mux.flight.on_ping(now, mux.bytes_received, report=report)
        return Ping(mux.liveness.ping(now, mux.bytes_sent, report=report)).encode()

    def _pace_ping(self, parts: list[Buffer], now: float, *, report: bool) -> None:
        when = self._mux.liveness.ping_at(self._mux.bytes_sent)
        if now >= when:
            parts.append(self._ping(now, report=report))
        else:
            self._wait(when)

    def _measure(self, parts: list[Buffer], place: int, now: float) -> bool:
        """Puts a PING at ``place``, to measure the round trip again; True if bulk must pause for it instead.

        Due while sequenced frames flow, also where they are nothing but CREDIT: windows are fitted by it.
        """
        if self._mux.flight.pause_wanted(now):
            # A PING behind a queue of our own measures the queue: let it drain first.
            return True
        if not self._mux.liveness.ping_out:
            # One PING is out at a time; if it is a report's, this one follows as soon as that is answered.
            parts.insert(place, self._ping(now))
        return False

    def _unsequenced(self, parts: list[Buffer], now: float) -> int:
        """PONG, ACK and PING, each at most once, as they are now."""
        mux, inbound = self._mux, self._mux.inbound
        before = len(parts)
        if inbound.pong is not None:
            parts.append(Pong(*inbound.pong).encode())
            inbound.pong = None
        if inbound.acks.due:
            parts.append(Ack(inbound.acks.rendered()).encode())
        if mux.liveness.ping_ready:
            self._pace_ping(parts, now, report=False)
        elif not mux.liveness.ping_out and (mux.flight.report_wanted or (mux.flight.pausing and mux.flight.unreported)):
            # Of datagrams only a PONG tells that they are gone. One that measures tells it, too, and a report upon the
            # other must not keep that from going.
            measures = mux.liveness.measure_due(now) and not mux.flight.pause_wanted(now)
            self._pace_ping(parts, now, report=not measures)
        return sum(map(len, parts[before:]))

    def _session_control(self, parts: list[Buffer], now: float) -> int:
        """STREAMS and GOAWAY, each at most once, as they are now."""
        mux = self._mux
        size = 0
        if self.streams_due:
            self.streams_due = False
            size += self._put(parts, Streams(mux.admission.grant()).encode())
        if mux.leaving.goaway_due:
            size += self._put(parts, mux.leaving.goaway(mux.admission.last_taken, now).encode())
            mux.leaving.sent(mux.flight.sent)
            mux.arm(mux.leaving.due)
        return size

    def _put(self, parts: list[Buffer], frame: bytes) -> int:
        """Appends a sequenced frame, and returns its size."""
        parts.append(frame)
        size = len(frame)
        self._mux.flight.on_sent(size)
        return size

    def _stream_control(self, stream: MuxStream, parts: list[Buffer], now: float) -> int:
        """What one stream has to say besides data, as it is now. ACCEPT first: nothing may overtake it."""
        stream.in_control = False
        size = 0
        owed = False
        if stream.accept_tlvs is not None:
            size += self._put(parts, encode_accept(stream.id, stream.accept_tlvs))
            stream.accept_tlvs = None
        if stream.sending is SENDING_REFUSING:
            refuse = Refuse(stream.id, stream.reset_code, stream.retry_ms, stream.reset_text)
            size += self._put(parts, refuse.encode())
            stream.move_sending(EVENT_SENT_END)
            owed = stream.receiving is not RECEIVING_ENDED
        if stream.credit_due:
            stream.credit_due = False
            if stream.receiving is RECEIVING_OPEN:
                offset = stream.receive_window.grant(now, self._mux.flight.rtt_min)
                if offset is not None:
                    size += self._put(parts, Credit(stream.id, offset).encode())
        if stream.stop_due:
            stream.stop_due = False
            if stream.receiving is not RECEIVING_ENDED:
                size += self._put(parts, Stop(stream.id, stream.stop_code).encode())
                owed = True
        if stream.sending is SENDING_RESETTING:
            reset = Reset(stream.id, stream.reset_code, stream.send_window.sent, stream.reset_text)
            size += self._put(parts, reset.encode())
            stream.move_sending(EVENT_SENT_END)
        if stream.priority_due:
            opens = self._mux.admission.opens
            if stream.receiving not in (RECEIVING_OPEN, RECEIVING_AWAITING):
                stream.priority_due = False
            elif self._hints.take(opens, now):
                stream.priority_due = False
                size += self._put(parts, Priority(stream.id, stream.priority, stream.weight).encode())
            else:
                self._waiting[stream] = None
                self._wait(self._hints.ready_at(opens))
        if owed:
            self._mux.owed.said(stream)
        if stream.queued or stream.datagrams or stream.sending is SENDING_FINISHING:
            # What was written before the ACCEPT went out.
            self._mux.schedule(stream)
        self._mux.settle(stream)
        return size

    def _open(self, stream: MuxStream, parts: list[Buffer], now: float) -> int:
        """OPEN: from here on the stream exists, and has its id."""
        mux = self._mux
        stream.id = mux.admission.open()
        mux.streams[stream.id] = stream
        left = max(1, int((stream.deadline - now) * 1000))
        params = {**stream.tlvs, OPEN_DEADLINE: left.to_bytes(4, "big")}
        stream.tlvs = {}
        size = self._put(parts, encode_open(stream.id, stream.priority, stream.name, params))
        stream.move_sending(EVENT_SENT_OPEN)
        if stream.finish_wanted:
            stream.move_sending(EVENT_DO_FINISH)
        mux.schedule(stream)
        if stream.weight != 1:
            stream.priority_due = True
            mux.want_control(stream)
        if mux.admission.exhausted:
            mux.drain(MAX_GRACE, now, reason="out of stream ids")
        return size

    def _data(self, parts: list[Buffer], size: int, max_bytes: int, now: float, *, fresh_only: bool) -> int:
        mux = self._mux
        scheduler, flight = mux.scheduler, mux.flight
        cap = flight.cap(now)
        frame_limit = 0
        interactive = declared = False
        if cap > mux.limits.replay_buffer and mux.resumption.replay is not None:
            cap = min(cap, mux.resumption.room)
        if scheduler.fresh.first is not None and scheduler.waiting.first is None:
            size = self._messages(parts, size, min(max_bytes, size + cap - flight.in_flight), now)
        while size < max_bytes and scheduler.active:
            over = flight.in_flight - cap
            if over >= cap:
                break
            # What passes the cap can keep it full for ever: then it is the turn of those that wait for room, too.
            full = over >= 0 and self._passed < FRESH_RUN
            stream = scheduler.next(fresh_only=fresh_only or full)
            if stream is None:
                break
            assert isinstance(stream, MuxStream)
            fresh = stream.place == FRESH
            hurried = fresh and scheduler.contended
            sending = stream.sending
            if sending is not SENDING_OPEN and sending is not SENDING_FINISHING:
                scheduler.finish(stream, 0, now)
                continue
            if stream.datagrams is not None:
                if stream.datagrams and mux.may_send_datagrams(stream):
                    size += self._datagram(stream, stream.datagrams, parts, now)
                    if hurried and stream.place == IDLE:
                        interactive = True
                        declared = declared or stream.priority == INTERACTIVE
                    continue
                if not mux.has_to_send(stream):
                    # What it had was dropped meanwhile: others' were newer.
                    scheduler.finish(stream, 0, now)
                    continue
            window = stream.send_window
            pending = stream.queued
            count = window.sendable(pending) if pending else 0
            if count > FRAME_FLOOR:
                frame_limit = frame_limit or min(mux.peer.max_frame, PAYLOAD, flight.frame_limit())
                limit = frame_limit if over < 0 else min(frame_limit, FRESH_PAYLOAD)
                if count >= 2 * limit and over < 0 and scheduler.active == 1 and not fresh:
                    size += self._bulk(stream, count, limit, min(max_bytes - size, -over), parts, now)
                    continue
                if count > limit:
                    count = limit
            left = pending - count
            flags = 0
            if not left:
                flags = 1 if sending is SENDING_FINISHING else 0
            elif count == 0 or window.limit - window.sent - count < min(left, 1024):
                flags = 2
                window.blocked_at = window.limit
                if not count:
                    self.empties += 1
            parts.append(data_header(0, flags, count, stream.id))
            if count:
                window.sent += count
                stream.take(count, parts)
            frame_size = count + HEADER_SIZE
            size += frame_size
            flight.on_sent(frame_size)
            if not fresh:
                self._passed = 0
            elif over >= 0:
                self._passed += frame_size
            if flags == 1:
                scheduler.finish(stream, frame_size, now)
                stream.move_sending(EVENT_SENT_END)
                if stream.datagrams:
                    stream.datagrams.clear()
                mux.settle(stream)
            elif left and not flags:
                scheduler.charge(stream, frame_size, now)
            else:
                scheduler.finish(stream, frame_size, now)
            if hurried and not left:
                # All it had: the beginning of something bulky is as much ahead, and no reason to hold others back.
                interactive = True
                declared = declared or stream.priority == INTERACTIVE
            if stream.room_wanted and stream.queued <= stream.low_water:
                stream.has_room()
        if interactive:
            flight.on_interactive(now, declared=declared)
        if flight.report_wanted and not mux.liveness.ping_out:
            # It goes ahead of the next batch.
            mux.wake()
        return size

    def _messages(self, parts: list[Buffer], size: int, most: int, now: float) -> int:
        """Small messages of streams that were idle, each in a frame of its own, while nothing waits behind them.

        They are what a tunnel is for, mostly: what ``_data`` does for each, less what need not be asked.

        Args:
            size: bytes of the batch so far; what is returned counts the messages in.
            most: of the batch, exceeded by one message at most.
        """
        mux = self._mux
        scheduler, flight = mux.scheduler, mux.flight
        fresh, waiting = scheduler.fresh, scheduler.waiting
        sizes: list[int] = []
        while (stream := fresh.first) is not None and waiting.first is None and size < most:
            assert isinstance(stream, MuxStream)
            message = stream.take_whole(FRAME_FLOOR)
            if message is None:
                break
            count = len(message)
            last = stream.sending is SENDING_FINISHING
            parts.append(data_header(0, 1 if last else 0, count, stream.id))
            if count:
                parts.append(message)
            frame_size = count + HEADER_SIZE
            sizes.append(frame_size)
            size += frame_size
            scheduler.finish(stream, frame_size, now)
            if not last and not stream.room_wanted:
                continue
            # Sinks are called: they find everything counted.
            flight.on_frames(sizes)
            sizes.clear()
            if last:
                stream.move_sending(EVENT_SENT_END)
                mux.settle(stream)
            if stream.room_wanted:
                stream.has_room()
        flight.on_frames(sizes)
        return size

    def _bulk(self, stream: MuxStream, count: int, limit: int, most: int, parts: list[Buffer], now: float) -> int:
        """Full frames of the only stream that has anything, in one go; never the last that it may send.

        Args:
            count: bytes that it may send, two frames or more.
            limit: bytes of payload in each.
            most: bytes in all, exceeded by one frame at most.
        """
        frame_size = limit + HEADER_SIZE
        frames = min(count // limit - 1, -(-most // frame_size))
        header = data_header(0, 0, limit, stream.id)
        for _ in range(frames):
            parts.append(header)
            stream.take(limit, parts)
        stream.send_window.sent += frames * limit
        self._mux.flight.on_frames([frame_size] * frames)
        self._passed = 0
        size = frames * frame_size
        self._mux.scheduler.charge_alone(stream, size, now)
        if stream.room_wanted and stream.queued <= stream.low_water:
            stream.has_room()
        return size

    def _datagram(self, stream: MuxStream, queue: DatagramQueue, parts: list[Buffer], now: float) -> int:
        """The stream's oldest datagram."""
        mux = self._mux
        data = queue.take()
        self.lossy += (len(parts), len(parts) + 1)
        parts.append(data_header(_DATAGRAM, 0, len(data) + 1, stream.id) + b"\0")
        parts.append(data)
        size = HEADER_SIZE + 1 + len(data)
        mux.datagrams.sent += 1
        mux.flight.on_datagram(size)
        if mux.has_to_send(stream):
            mux.scheduler.charge(stream, size, now)
        else:
            mux.scheduler.finish(stream, size, now)
        return size
