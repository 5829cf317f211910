"""One stream of a multiplexer: its two halves, its windows, its queue."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from konnektor.credit import ReceiveWindow, SendWindow
from konnektor.datagrams import DatagramQueue
from konnektor.errors import (
    Code,
    LocalProtocolError,
    PeerError,
    SessionError,
    SessionLost,
    StreamClosedError,
    StreamStateError,
)
from konnektor.frames import MAX_OPEN, MAX_PAYLOAD, OPEN_HEADER, Buffer
from konnektor.scheduler import Flow
from konnektor.states import (
    EVENT_DO_ACCEPT,
    EVENT_DO_FINISH,
    EVENT_DO_REFUSE,
    EVENT_DO_RESET,
    EVENT_DO_STOP,
    RECEIVE,
    RECEIVING_AWAITING,
    RECEIVING_DISCARDING,
    RECEIVING_ENDED,
    RECEIVING_GIVEN_UP,
    RECEIVING_OPEN,
    SEND,
    SENDING_ENDED,
    SENDING_FINISHING,
    SENDING_OPEN,
    SENDING_UNDECIDED,
    SENDING_UNSENT,
    Event,
    Receiving,
    Sending,
)

if TYPE_CHECKING:
    from konnektor.mux import Mux

__all__ = ["DatagramSink", "DirectSink", "MuxStream", "Sink", "check_priority"]


class Sink(Protocol):
    """Where a stream's events go: called directly, never queued.

    A sink may call back into its stream, others, and the multiplexer. It must not raise: nothing above it could
    know what to do.
    """

    def accepted(self) -> None:
        """The peer accepted the stream we opened."""

    def data_received(self, data: bytes | memoryview, /) -> None:
        """Bytes came; of ``MuxStream.ending`` the last. Report them with ``consumed`` when they are used.

        ``data`` is valid during the call only, or for as long as ``MuxStream.gather`` says. On a stream of the peer's bytes may
        come before ``accept``; they are not to be used before it.
        """

    def eof_received(self) -> None:
        """The peer has sent all it will."""

    def writable(self) -> None:
        """The queue has drained to the low-water mark, after ``want_room``."""

    def failed(self, error: PeerError, /, *, receiving: bool, sending: bool) -> None:
        """One half or both ended abruptly, and not by a call of this side's.

        Unread bytes count as consumed, unless it was the session that ended.
        """

    def closed(self) -> None:
        """The stream is forgotten: the last call."""


class DirectSink:
    """For sinks that are compiled, too: the method is called directly then, and not looked up by its name."""

    __slots__ = ()

    def data_received(self, data: bytes | memoryview, /) -> None:
        """See ``Sink``."""
        raise NotImplementedError


class DatagramSink(Sink, Protocol):
    """The sink of a stream whose type carries datagrams."""

    def datagram_received(self, data: memoryview, /) -> None:
        """A datagram came. ``data`` is valid during the call only."""


class MuxStream(Flow):
    """A stream as the multiplexer keeps it. Made by ``Mux.open`` and ``Handler.stream_opened``.

    Attributes:
        id: its number on the wire, 0 until OPEN is rendered.
        name: the stream type.
        tlvs: parameters of the peer's OPEN or ACCEPT, by ``OpenTLV``.
        sink: where events go; may be exchanged at any time.
        queued: bytes waiting to be sent.
        datagrams: those waiting to be sent; None if the stream's type has none.
        pinned: a rule of this side's set class and weight, and the peer's PRIORITY does not change them.
        ending: what its sink is given by ``data_received`` has the peer's FIN with it, and ``eof_received`` is next.
        low_water: where ``sink.writable`` is called after ``want_room``.
        deadline: when the opening is given up.
        repeatable: if its OPEN was perhaps accepted, and nothing sent after it, another will do no harm.
        owed: since when the peer owes its end, and how many sequenced frames had come when that was looked at last.
    """

    __slots__ = (
        "_head",
        "_mux",
        "_queue",
        "accept_tlvs",
        "credit_due",
        "datagrams",
        "deadline",
        "ending",
        "finish_wanted",
        "forgotten",
        "id",
        "in_control",
        "low_water",
        "name",
        "owed",
        "pinned",
        "priority_due",
        "queued",
        "receive_window",
        "receiving",
        "released",
        "repeatable",
        "reset_code",
        "reset_text",
        "retired",
        "retry_ms",
        "room_wanted",
        "send_window",
        "sending",
        "sink",
        "stop_code",
        "stop_due",
        "stop_received",
        "tlvs",
        "watch",
    )

    def __init__(
        self,
        mux: Mux,
        sink: Sink,
        name: str,
        priority: int,
        tlvs: Mapping[int, bytes],
        receiving: Receiving,
        sending: Sending,
        now: float,
    ) -> None:
        super().__init__(priority)
        self._mux = mux
        self.sink = sink
        self.id = 0
        self.name = name
        self.tlvs = tlvs
        self.receiving = receiving
        self.sending = sending
        self.ending = False
        self.receive_window = ReceiveWindow(mux.pool, mux.limits.max_window, now)
        self.send_window = SendWindow(0)
        # What waits to be sent: the first chunk, and those behind it. Mostly there is one and no more, and most streams are
        # idle: a deque takes 600 bytes, and longer to make than to send a small message takes.
        self._head: Buffer | None = None
        self._queue: deque[Buffer] | None = None
        self.queued = 0
        self.datagrams: DatagramQueue | None = None
        self.low_water = 0
        self.room_wanted = False
        self.finish_wanted = False
        self.deadline = 0.0
        self.watch: int | None = None
        self.pinned = False
        self.repeatable = False
        self.owed: tuple[float, int] | None = None
        # what is to be said at the next rendering
        self.in_control = False
        self.accept_tlvs: Mapping[int, bytes] | None = None
        self.credit_due = False
        self.stop_due = False
        self.stop_code = 0
        self.reset_code = 0
        self.reset_text = ""
        self.retry_ms = 0
        self.priority_due = False
        # the end
        self.stop_received = False
        self.released = False
        self.forgotten = False
        self.retired = False

    def __repr__(self) -> str:
        return f"<MuxStream {self.id} {self.name} receiving={self.receiving.name} sending={self.sending.name}>"

    @property
    def header(self) -> bytes:
        """The stream type's own header, from OPEN or ACCEPT."""
        return self.tlvs.get(OPEN_HEADER, b"")

    @property
    def wanted(self) -> tuple[bool, bool]:
        """Whether receiving and sending still matter to the application: neither over nor given up by it."""
        return (
            self.receiving in (RECEIVING_OPEN, RECEIVING_AWAITING),
            self.sending in (SENDING_OPEN, SENDING_FINISHING, SENDING_UNSENT, SENDING_UNDECIDED),
        )

    @property
    def owes(self) -> bool:
        """Whether the peer has to end its half, which was stopped or refused, and has not."""
        return self.receiving in (RECEIVING_DISCARDING, RECEIVING_GIVEN_UP)

    # Answering an OPEN of the peer

    def accept(self, header: bytes = b"") -> None:
        """The target is reached. Data may flow both ways.

        Raises:
            LocalProtocolError: already accepted, refused or cancelled; or the header is too long.
        """
        if len(header) > MAX_OPEN - 4:
            raise LocalProtocolError(f"an ACCEPT takes at most {MAX_OPEN - 4} bytes of header, not {len(header)}")
        self.move_sending(EVENT_DO_ACCEPT)
        self.accept_tlvs = {OPEN_HEADER: header} if header else {}
        self._mux.decided(self)
        self._mux.want_control(self)

    def refuse(self, code: int, text: str = "", *, retry_after: float = 0.0) -> None:
        """Says no. The text reaches the peer's logs; it must hold nothing secret. ``retry_after`` is in seconds.

        Raises:
            LocalProtocolError: already accepted (``reset`` and ``stop`` then), or no code.
        """
        _check_code(code)
        before = self.sending
        self.move_sending(EVENT_DO_REFUSE)
        if before is not SENDING_UNDECIDED:
            return
        self.move_receiving(EVENT_DO_REFUSE)
        self.receive_window.drop()
        self._mux.freed()
        self.reset_code, self.reset_text = code, text
        self.retry_ms = int(max(0.0, min(retry_after, 86_400.0)) * 1000)
        self._mux.decided(self)
        self._mux.want_control(self)

    # Sending

    def write(self, data: bytes) -> None:
        """Queues bytes. They must not change afterwards; nothing bounds the queue but the caller (``queued``).

        Raises:
            StreamClosedError: the sending half has ended or is ending.
            LocalProtocolError: the peer's OPEN was not accepted yet.
        """
        if self.sending is not SENDING_OPEN:
            self._check_sendable()
        if not data:
            return
        if self._head is None:
            self._head = data
        elif self._queue is None:
            self._queue = deque((data,))
        else:
            self._queue.append(data)
        self.queued += len(data)
        if not self.place:
            window, mux = self.send_window, self._mux
            if window.limit - window.sent >= self.queued and self.accept_tlvs is None and self.sending is SENDING_OPEN:
                # It has to send, and may: no need to ask.
                mux.scheduler.add(self)
                if not mux.awake:
                    mux.wake()
            else:
                mux.activate(self)

    def _check_sendable(self) -> None:
        if self.sending is SENDING_UNDECIDED:
            raise LocalProtocolError("accept the stream before sending on it")
        if self.sending not in (SENDING_OPEN, SENDING_UNSENT) or self.finish_wanted:
            raise StreamClosedError("the sending half of the stream is closed")

    def carry_datagrams(self) -> None:
        """The stream's type has datagrams: to be called before anything of the stream is sent or received."""
        self.datagrams = DatagramQueue(self._mux.datagrams.outgoing)

    @property
    def max_datagram(self) -> int:
        """Bytes of the largest datagram that the peer takes."""
        return min(MAX_PAYLOAD, self._mux.peer.max_frame) - 1

    def send_datagram(self, data: bytes) -> None:
        """Queues a datagram, which must not change afterwards; the queue is bounded and drops its oldest.

        Before the peer's ACCEPT it waits: the peer would drop it.

        Raises:
            StreamClosedError: the sending half has ended or is ending.
            LocalProtocolError: it is too large, the stream's type has none, or the peer's OPEN was not accepted yet.
        """
        self._check_sendable()
        if self.datagrams is None:
            raise LocalProtocolError(f"streams of type {self.name!r} have no datagrams")
        if len(data) > self.max_datagram:
            raise LocalProtocolError(f"a datagram takes at most {self.max_datagram} bytes, not {len(data)}")
        self.datagrams.put(data)
        self._mux.activate(self)

    def datagram_inbox(self) -> DatagramQueue | None:
        """A queue for what comes, within the bound of the session; None if the stream's type has no datagrams."""
        return None if self.datagrams is None else DatagramQueue(self._mux.datagrams.incoming)

    @property
    def hurried(self) -> bool:
        """Whether bulk, this stream's perhaps, has an interactive stream beside it: less should be done in one go."""
        return self._mux.flight.tight

    def want_room(self, low_water: int = 0) -> None:
        """Asks for one ``sink.writable`` once sending has brought the queue down to ``low_water`` bytes.

        For a queue that holds more than that: nothing is sent, and nothing called, on account of an empty one.
        """
        self.low_water = low_water
        self.room_wanted = True

    def finish(self) -> None:
        """FIN after what is queued. Nothing happens if the half has ended.

        Raises:
            LocalProtocolError: the peer's OPEN was not accepted yet.
        """
        self.move_sending(EVENT_DO_FINISH)
        self.finish_wanted = True
        self._mux.activate(self)

    def reset(self, code: int = Code.CANCELLED, text: str = "") -> None:
        """Ends the sending half abruptly: the queue is dropped. Nothing happens if it has ended."""
        _check_code(code)
        before = self.sending
        if before is SENDING_UNSENT:
            self._mux.give_up(self)
            return
        if before is SENDING_UNDECIDED:
            self.refuse(code, text)
            return
        self.move_sending(EVENT_DO_RESET)
        if before is not self.sending:
            self.reset_code, self.reset_text = code, text
            self.drop_queue()
            self._mux.want_control(self)

    # Receiving

    def consumed(self, count: int) -> None:
        """The application took ``count`` bytes: their credit goes back to the peer."""
        window, mux = self.receive_window, self._mux
        unread = window.received - window.consumed
        if count > unread:
            count = unread
        if not count:
            return
        if window.consume(count) and self.receiving is RECEIVING_OPEN:
            self.credit_due = True
            mux.want_control(self)
        elif self.forgotten:
            mux.retire(self)
        if mux.opens:
            mux.freed()

    def gather(self, deliver: Callable[[], None]) -> None:
        """Calls ``deliver`` once all that came in the same read has been given to its sinks.

        For a sink that is just being given data: it is valid until then. If its stream ends or fails in the same read, the sink
        is told so before.
        """
        self._mux.gathering.append(deliver)

    def stop(self, code: int = Code.CANCELLED) -> None:
        """Asks the peer to stop sending. What came and comes is discarded.

        Before an answer to the peer's OPEN this refuses it.
        """
        _check_code(code)
        before = self.receiving
        if self.sending is SENDING_UNSENT:
            self._mux.give_up(self)
        elif self.sending is SENDING_UNDECIDED and before is RECEIVING_OPEN:
            self.refuse(code)
        else:
            self.move_receiving(EVENT_DO_STOP)
            self.receive_window.drop()
            self._mux.freed()
            if before is not self.receiving:
                self.stop_due, self.stop_code = True, code
                self._mux.stopped(self)
            else:
                self._mux.retire(self)

    def cancel(self, code: int = Code.CANCELLED, text: str = "") -> None:
        """Ends both halves abruptly: STOP, and RESET unless FIN was sent."""
        if self.sending not in (SENDING_UNSENT, SENDING_UNDECIDED):
            self.stop(code)
        self.reset(code, text)

    # Both

    def prioritize(self, priority: int, weight: int = 1) -> None:
        """Changes class (0 interactive, 1 default, 2 bulk) and weight (1 to 255), here and at the peer.

        The peer learns the latest state; whoever changes it more often than once a second may find that it learns it late.
        """
        check_priority(priority, weight)
        self.priority, self.weight = priority, weight
        if self.sending is not SENDING_UNSENT and self.receiving in (RECEIVING_OPEN, RECEIVING_AWAITING):
            self.priority_due = True
            if self.sending is not SENDING_UNDECIDED:
                self._mux.want_control(self)

    def pin(self, priority: int, weight: int) -> None:
        """``prioritize`` by a rule of this side's: here it holds whatever the peer asks for, who is asked for the same.

        With rules at both ends each decides what it sends itself; whose PRIORITY comes last decides nothing.
        """
        self.pinned = True
        if (priority, weight) != (self.priority, self.weight):
            self.prioritize(priority, weight)

    def release(self) -> None:
        """The handler of a stream the peer opened is done with it; its place may be given to another."""
        if not self.released:
            self._mux.release(self)

    # The multiplexer's

    def move_receiving(self, event: Event) -> None:
        """One transition of the receiving half.

        Raises:
            StreamStateError: the peer's frame does not fit.
            LocalProtocolError: the call does not fit.
        """
        state = RECEIVE.get((self.receiving, event))
        if state is None:
            raise self._misfit(event, self.receiving)
        self.receiving = state

    def move_sending(self, event: Event) -> None:
        """One transition of the sending half; raises as ``move_receiving``."""
        state = SEND.get((self.sending, event))
        if state is None:
            raise self._misfit(event, self.sending)
        self.sending = state

    def _misfit(self, event: Event, state: Receiving | Sending) -> StreamStateError | LocalProtocolError:
        what = event.name.removeprefix("DO_")
        cls = LocalProtocolError if what != event.name else StreamStateError
        return cls(f"{what} on stream {self.id}, whose state is {state.name}")

    def take(self, count: int, parts: list[Buffer]) -> None:
        """Moves ``count`` queued bytes to ``parts``, whole chunks uncopied."""
        self.queued -= count
        head = self._head
        while count:
            assert head is not None
            size = len(head)
            if size > count:
                view = memoryview(head)
                parts.append(view[:count])
                head = view[count:]
                break
            parts.append(head)
            count -= size
            queue = self._queue
            if queue is None:
                head = None
            else:
                head = queue.popleft()
                if not queue:
                    self._queue = None
        self._head = head

    def take_whole(self, most: int) -> Buffer | None:
        """All that is queued, if that is at most one chunk of ``most`` bytes and may be sent at once: empty before a FIN alone.

        None if not: then nothing was taken.
        """
        count = self.queued
        window = self.send_window
        if (
            count > most
            or self._queue is not None
            or window.limit - window.sent < count
            or self.datagrams is not None
            or not (self.sending is SENDING_FINISHING or (count and self.sending is SENDING_OPEN))
        ):
            return None
        if not count:
            return b""
        head, self._head = self._head, None
        self.queued = 0
        window.sent += count
        return head

    def has_room(self) -> None:
        """The queue has come down to where ``want_room`` asked to be told."""
        self.room_wanted = False
        self.sink.writable()

    def drop_queue(self) -> None:
        """What is queued will not be sent."""
        self._head = self._queue = None
        self.queued = 0
        self.room_wanted = False
        if self.datagrams is not None:
            self.datagrams.clear()

    def fail(self, error: PeerError, wanted: tuple[bool, bool]) -> None:
        """Tells the sink about the halves that it still ``wanted``."""
        receiving, sending = wanted
        if receiving or sending:
            self.sink.failed(error, receiving=receiving, sending=sending)

    def break_off(self, error: PeerError, code: int) -> None:
        """Cancels the stream on the multiplexer's own account."""
        wanted = self.wanted
        self.cancel(code, error.reason)
        self.fail(error, wanted)

    def end(self) -> None:
        """It is over, on both sides or with the session: nothing more is sent or expected."""
        self.receiving = RECEIVING_ENDED
        self.sending = SENDING_ENDED
        self.forgotten = True
        self.drop_queue()

    def lost(self, error: SessionError, wanted: tuple[bool, bool]) -> None:
        """Tells the sink that the session has ended, and how far the stream got."""
        sent, received = self.send_window.sent, self.receive_window.received
        self.fail(SessionLost(str(error), error.code, sent=sent, received=received), wanted)
        self.sink.closed()

    def assert_invariants(self) -> None:
        """For tests."""
        self.receive_window.assert_invariants()
        self.send_window.assert_invariants()
        assert self.queued == len(self._head or b"") + sum(map(len, self._queue or ()))
        assert not self.datagrams or self.sending in (SENDING_OPEN, SENDING_FINISHING, SENDING_UNSENT)


def check_priority(priority: int, weight: int) -> None:
    """Raises LocalProtocolError if there is no such class or weight."""
    if not (0 <= priority <= 2 and 1 <= weight <= 255):
        raise LocalProtocolError(f"class {priority} and weight {weight} are not 0 to 2 and 1 to 255")


def _check_code(code: int) -> None:
    if not 0 <= code < 2**32:
        raise LocalProtocolError(f"{code} is no error code: those are 0 to 2**32 - 1")
