"""Stream: one stream of a session as an anyio byte stream."""

from __future__ import annotations

import asyncio
import contextlib
import warnings
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled

from konnektor.errors import Code, LocalProtocolError, PeerError, StreamClosedError
from konnektor.inbox import Inbox
from konnektor.mux import MuxStream
from konnektor.states import Receiving, Sending
from konnektor.stream_types import StreamType

if TYPE_CHECKING:
    from konnektor.session import Session

__all__ = ["Stream", "StreamAttribute"]


class StreamAttribute(anyio.TypedAttributeSet):
    """Typed attributes of a stream (``stream.extra(StreamAttribute.peer)``)."""

    session: Session = anyio.typed_attribute()
    request: StreamType = anyio.typed_attribute()
    peer: str = anyio.typed_attribute()
    stream_id: int = anyio.typed_attribute()


class _Leftover:
    """The sink of a stream that was closed before the peer answered: wants nothing but to be stopped then."""

    __slots__ = ("_mux",)

    def __init__(self, mux_stream: MuxStream) -> None:
        self._mux = mux_stream

    def accepted(self) -> None:
        self._mux.stop()

    def data_received(self, data: bytes | memoryview, /) -> None: ...
    def eof_received(self) -> None: ...
    def writable(self) -> None: ...
    def failed(self, error: PeerError, /, *, receiving: bool, sending: bool) -> None: ...
    def closed(self) -> None: ...


class Stream(anyio.abc.ByteStream):
    """A two-way stream of bytes with half-close, made by ``Session.open`` or given to a handler.

    One task may receive and one may send at a time; a second gets ``anyio.BusyResourceError``. What breaks a
    stream raises a ``PeerError`` (an ``anyio.BrokenResourceError`` and ``ConnectionError``); use after close a
    ``StreamClosedError``. Leaving ``async with`` by an exception resets the stream, so the peer
    never takes a broken-off transfer for a whole one.

    Attributes:
        session: the session it belongs to.
        request: the stream type's struct, as opened.
    """

    def __init__(self, session: Session, mux_stream: MuxStream, inbox: Inbox, request: StreamType) -> None:
        self.session = session
        self.request = request
        self._mux = mux_stream
        self._inbox = inbox
        inbox.mux = mux_stream
        inbox.datagrams = mux_stream.datagram_inbox()
        inbox.queue_limit = session.limits.send_queue
        self._closed = False
        self._detached = False
        self._sending = False

    def __repr__(self) -> str:
        return f"<Stream {self._mux.id} {self._mux.name} of {self.session!r}>"

    @property
    def id(self) -> int:
        """Number on the wire; 0 while the OPEN waits."""
        return self._mux.id

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return {
            StreamAttribute.session: lambda: self.session,
            StreamAttribute.request: lambda: self.request,
            StreamAttribute.peer: lambda: self.session.peer_name,
            StreamAttribute.stream_id: lambda: self._mux.id,
        }

    # Scheduling

    @property
    def priority(self) -> int:
        """Class by which this side sends: 0 interactive, 1 default, 2 bulk."""
        return self._mux.priority

    @property
    def weight(self) -> int:
        """Weight by which this side sends, among the streams of its class: 1 to 255."""
        return self._mux.weight

    def set_priority(self, priority: int, weight: int = 1) -> None:
        """Changes class and weight from here on, and asks the peer to send its direction so, too.

        The peer learns the latest state, and no more often than once a second; a rule of its own comes first there.

        Args:
            priority: class 0 interactive, 1 default, 2 bulk, whose shares of the path are 8, 4 and 1.
            weight: 1 to 255, which multiplies the share.

        Raises:
            LocalProtocolError: there is no such class or weight.
        """
        self._mux.prioritize(priority, weight)

    # Opening

    @property
    def header(self) -> bytes:
        """What the peer's OPEN (in a handler) or ACCEPT (at the opener) carried for the stream type."""
        return self._mux.header

    @property
    def decided(self) -> bool:
        """Whether ``accept`` or ``reject`` has been called (or needs not be: we opened it)."""
        return self._mux.sending is not Sending.UNDECIDED

    @property
    def deadline(self) -> float:
        """When, by the loop's clock, the peer stops waiting for ``accept``."""
        return self._mux.deadline

    async def accept(self, header: bytes = b"") -> None:
        """Tells the peer that the target is reached. Cancelling is safe: nothing was sent then.

        Raises:
            PeerError: the peer gave up meanwhile.
            LocalProtocolError: called twice, or on a stream that this side opened.
        """
        await checkpoint_if_cancelled()
        self.accept_now(header)

    def accept_now(self, header: bytes = b"") -> None:
        """``accept`` for callers that are not coroutines."""
        self._raise_if(self._inbox.send_error)
        if self._closed:
            raise StreamClosedError("the stream was closed here")
        self._mux.accept(header)
        self._inbox.on_cancel = None

    async def reject(self, code: int = Code.DENIED, text: str = "") -> None:
        """Refuses the peer's stream. The text goes into the peer's log. Cancelling is safe: nothing was sent then.

        Raises:
            LocalProtocolError: the stream was accepted before (``reset`` it), or this side opened it.
        """
        await checkpoint_if_cancelled()
        self._mux.refuse(code, text)
        if not self._closed:
            self._close(graceful=False)

    async def opened(self) -> None:
        """Waits for the peer's answer to an OPEN (after ``open(early=True)``). Cancelling is safe.

        Raises:
            StreamError: the peer refused.
            SessionLost: the session ended.
            StreamClosedError: closed here.
            anyio.BusyResourceError: another task is waiting.
        """
        inbox = self._inbox
        if inbox.opened is not None:
            raise anyio.BusyResourceError("waiting for")
        while not self._closed and self._mux.receiving is Receiving.AWAITING and inbox.receive_error is None:
            inbox.opened = asyncio.get_running_loop().create_future()
            try:
                await inbox.opened
            finally:
                inbox.opened = None
        if self._closed:
            raise StreamClosedError("the stream was closed here")
        if not inbox.answered:
            # Accepted and then broken is for the next call to say.
            self._raise_if(inbox.receive_error)

    # Receiving

    async def receive(self, max_bytes: int = 65_536) -> bytes:
        """At least one byte, at most ``max_bytes``. Cancelling loses nothing.

        Raises:
            anyio.EndOfStream: the peer finished, and everything was read.
            PeerError: the stream broke; what was unread is gone. Where the session ended, that is read first.
            StreamClosedError: closed here.
            LocalProtocolError: the peer's stream was not accepted yet.
            anyio.BusyResourceError: another task is receiving.
        """
        inbox = self._inbox
        if max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        if inbox.reader is not None:
            raise anyio.BusyResourceError("receiving from")
        await checkpoint_if_cancelled()
        self._check_receivable()
        while not inbox.chunks:
            self._raise_if(inbox.receive_error)
            if inbox.eof:
                raise anyio.EndOfStream
            inbox.reader = asyncio.get_running_loop().create_future()
            try:
                await inbox.reader
            finally:
                inbox.reader = None
            self._check_receivable()
        # From here on nothing awaits: what is taken is returned.
        chunks = inbox.chunks
        chunk = chunks.popleft()
        if len(chunk) > max_bytes:
            # A view: reading byte by byte must not copy the rest each time.
            view = memoryview(chunk)
            chunks.appendleft(view[max_bytes:])
            chunk = view[:max_bytes]
        data = bytes(chunk)
        self._mux.consumed(len(data))
        return data

    def _check_receivable(self) -> None:
        if self._closed:
            raise StreamClosedError("the stream was closed here")
        if not self.decided:
            raise LocalProtocolError("accept the stream before receiving from it")

    # Sending

    async def send(self, item: bytes) -> None:
        """Returns when the last byte is in the stream's queue (64 KiB), not when the peer has it.

        Cancelled while waiting for room, it has queued a part of ``item``: reset the stream then.

        Raises:
            PeerError: the stream broke, or the peer asked to stop.
            StreamClosedError: ``send_eof`` or ``aclose`` was called.
            anyio.BusyResourceError: another task is sending.
        """
        if self._sending:
            raise anyio.BusyResourceError("sending to")
        await checkpoint_if_cancelled()
        inbox, stream = self._inbox, self._mux
        self._check_sendable()
        if len(item) <= inbox.queue_limit - stream.queued:
            stream.write(bytes(item))
            return
        self._sending = True
        inbox.unsent = memoryview(item).cast("B")
        try:
            inbox.writable()
            while inbox.unsent is not None:
                inbox.writer = asyncio.get_running_loop().create_future()
                await inbox.writer
                self._check_sendable()
        finally:
            self._sending = False
            inbox.unsent = inbox.writer = None

    def _check_sendable(self) -> None:
        if self._closed or self._mux.finish_wanted:
            raise StreamClosedError("the sending half was closed here")
        self._raise_if(self._inbox.send_error)
        if not self.decided:
            raise LocalProtocolError("accept the stream before sending on it")

    async def send_eof(self) -> None:
        """FIN after what is queued: the peer reads EOF, this side goes on receiving. Cancelling is safe.

        Safe to call again, and on a stream that the peer broke.

        Raises:
            StreamClosedError: ``aclose`` was called.
            anyio.BusyResourceError: another task is sending.
            LocalProtocolError: the peer's stream was not accepted yet.
        """
        if self._sending:
            raise anyio.BusyResourceError("sending to")
        await checkpoint_if_cancelled()
        if self._closed:
            raise StreamClosedError("the stream was closed here")
        if self._inbox.send_error is None:
            self._mux.finish()

    # Datagrams

    @property
    def max_datagram(self) -> int:
        """Bytes of the largest datagram: 65,534, or less if the peer takes only smaller frames."""
        return self._mux.max_datagram

    @property
    def datagrams_dropped(self) -> int:
        """Datagrams of this stream thrown away at this end, either way: too many were waiting, or it ended."""
        return sum(queue.dropped for queue in (self._mux.datagrams, self._inbox.datagrams) if queue is not None)

    def send_datagram(self, data: bytes) -> None:
        """Queues a datagram, and never waits: of too many that wait (64 KiB), the oldest are dropped.

        It may be lost on the way, too, or overtake another. Before the peer has accepted the stream it waits.

        Raises:
            LocalProtocolError: it is larger than ``max_datagram``, the stream's type has no datagrams, or the peer's
                stream was not accepted yet.
            PeerError: the stream broke, or the peer asked to stop.
            StreamClosedError: ``send_eof`` or ``aclose`` was called.
        """
        self._check_sendable()
        self._mux.send_datagram(bytes(data))

    async def receive_datagram(self) -> bytes:
        """The next datagram; of too many that wait (64 KiB), the oldest are dropped. Cancelling loses nothing.

        Raises:
            LocalProtocolError: the stream's type has no datagrams, or the peer's stream was not accepted yet.
            anyio.EndOfStream: the peer finished, and everything was read.
            PeerError: the stream broke; what was unread is gone. Where the session ended, that is read first.
            StreamClosedError: closed here.
            anyio.BusyResourceError: another task is receiving one.
        """
        inbox, queue = self._inbox, self._inbox.datagrams
        if queue is None:
            raise LocalProtocolError(f"streams of type {self._mux.name!r} have no datagrams")
        if inbox.datagram_reader is not None:
            raise anyio.BusyResourceError("receiving from")
        await checkpoint_if_cancelled()
        self._check_receivable()
        while not queue:
            self._raise_if(inbox.receive_error)
            if inbox.eof:
                raise anyio.EndOfStream
            inbox.datagram_reader = asyncio.get_running_loop().create_future()
            try:
                await inbox.datagram_reader
            finally:
                inbox.datagram_reader = None
            self._check_receivable()
        return queue.take()

    # The end

    async def aclose(self) -> None:
        """FIN after what is queued, and STOP unless the peer has finished; does not wait for the peer.

        Cancelled, it resets the stream instead. Safe to call again.
        """
        if self._closed:
            return
        try:
            await checkpoint()
        except BaseException:
            self.reset()
            raise
        self.close()

    def close(self) -> None:
        """``aclose`` for callers that are not coroutines."""
        if not self._closed:
            self._close(graceful=True)

    def reset(self, code: int = Code.CANCELLED, text: str = "") -> None:
        """Ends both halves at once: what is queued or unread is dropped, and the peer's stream breaks."""
        if not self._closed:
            self._close(graceful=False, code=code, text=text)

    def _close(self, *, graceful: bool, code: int = Code.CANCELLED, text: str = "") -> None:
        self._closed = True
        inbox, stream = self._inbox, self._mux
        inbox.clear()
        inbox.unsent = inbox.on_cancel = None
        if not inbox.forgotten:
            if not graceful or stream.sending is Sending.UNDECIDED:
                stream.cancel(code, text)
            else:
                stream.finish()
                if stream.receiving is Receiving.AWAITING:
                    # STOP now would cancel the peer's dial, and what was sent would be lost.
                    stream.sink = _Leftover(stream)
                else:
                    stream.stop(code)
        stream.consumed(stream.receive_window.unread)
        inbox.wake_all()

    def detach(self) -> MuxStream:
        """Gives the underlying stream to another sink, which takes over every duty; this object is done.

        What came before and was not read is in ``Inbox.chunks`` of ``mux_stream.sink``.
        """
        if self._closed:
            raise StreamClosedError("the stream was closed here")
        if self._inbox.reader is not None or self._inbox.datagram_reader is not None or self._sending:
            raise anyio.BusyResourceError("using")
        self._closed = self._detached = True
        self._inbox.on_cancel = None
        return self._mux

    @property
    def detached(self) -> bool:
        """Whether another sink has taken over."""
        return self._detached

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        if exc_type is not None:
            self.reset()
        else:
            await self.aclose()

    def __del__(self) -> None:
        # __init__ may have failed before the attribute was there.
        if getattr(self, "_closed", True):
            return
        self._closed = True
        # Not here: the collector runs in any thread, and in the middle of anything.
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.session.loop.call_soon_threadsafe(_drop, self._mux, self._inbox)
        if not self._inbox.forgotten:
            warnings.warn(f"{self!r} was dropped without aclose()", ResourceWarning, stacklevel=1, source=self)

    @staticmethod
    def _raise_if(error: PeerError | None) -> None:
        if error is not None:
            raise error.with_traceback(None)

    # Views

    def as_asyncio(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The stream as an asyncio reader and writer, which take it over: close the writer in the end.

        Raises:
            LocalProtocolError: the peer's stream was not accepted yet.
        """
        from konnektor.transport import stream_pair

        return stream_pair(self)


def _drop(mux_stream: MuxStream, inbox: Inbox) -> None:
    """Ends a stream that nobody refers to any more."""
    inbox.clear()
    mux_stream.cancel()
    mux_stream.consumed(mux_stream.receive_window.unread)
