"""What serves the streams that a session's peer opens: which handler, and that each stream gets an answer and an end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from konnektor.errors import Code, LocalProtocolError, PeerError, SessionClosedError, StreamError, describe
from konnektor.handlers import StreamHandler
from konnektor.inbox import Inbox
from konnektor.listener import StreamListener
from konnektor.mux import MuxStream
from konnektor.states import Sending
from konnektor.stream import Stream
from konnektor.stream_types import StreamType, check_type

if TYPE_CHECKING:
    from konnektor.session import Session

__all__ = ["Classify", "Serving", "fail"]

T = TypeVar("T", bound=StreamType)

Classify = Callable[[StreamType], tuple[int, int] | None]
"""Class and weight of a stream by a rule of this side's, None if it has none."""


class Serving:
    """One session's. A listener of the session's own comes before the handlers, which other sessions may share.

    Args:
        session: whose.
        classify: rules for the order in which streams are served.

    Attributes:
        listeners: this session's own, by stream type.
    """

    def __init__(self, session: Session, classify: Classify | None) -> None:
        self._session = session
        self._classify = classify
        self.listeners: dict[str, StreamListener[Any]] = {}

    def listen(self, request: type[T]) -> StreamListener[T]:
        """See ``Session.listen``."""
        check_type(request)
        session = self._session
        if session.closed:
            raise SessionClosedError("the session is closed")
        if request.name in self.listeners or session.handlers.get(request.name) is not None:
            raise LocalProtocolError(f"stream type {request.name!r} has a handler already")
        listener = self.listeners[request.name] = StreamListener(session, request)
        return listener

    def opened(self, mux_stream: MuxStream) -> None:
        """The peer opens a stream: starts its type's handler, or refuses."""
        session = self._session
        listener = self.listeners.get(mux_stream.name)
        entry = listener.entry if listener is not None else session.handlers.get(mux_stream.name)
        if entry is None:
            mux_stream.refuse(Code.UNSUPPORTED, "no such stream type here")
            mux_stream.release()
            return
        request_type, handler, begin = entry
        try:
            request = request_type.decode(mux_stream.header)
        except ValueError as error:
            session.log.warning("refused a %s stream: %s", mux_stream.name, error)
            mux_stream.refuse(Code.UNSUPPORTED, "malformed header")
            mux_stream.release()
            return
        if request_type.datagrams:
            if not session._mux.datagrams.agreed:
                mux_stream.refuse(Code.UNSUPPORTED, "this session has no datagrams")
                mux_stream.release()
                return
            mux_stream.carry_datagrams()
        if self._classify is not None and (rule := self._classify(request)) is not None:
            mux_stream.pin(*rule)
        if begin is not None:
            try:
                begun = begin(session, mux_stream, request)
            except Exception as error:  # noqa: BLE001
                fail(session, mux_stream, error)
                return
            if begun:
                return
        inbox = Inbox()
        mux_stream.sink = inbox
        stream = Stream(session, mux_stream, inbox, request)
        _ = session.spawn(self._serve(stream, inbox, handler))

    async def _serve(self, stream: Stream, inbox: Inbox, handler: StreamHandler) -> None:
        """Runs a handler and sees to it that its stream gets an answer and an end."""
        log, mux_stream = self._session.log, inbox.mux
        task = asyncio.current_task()
        assert mux_stream is not None
        assert task is not None
        code: int = Code.INTERNAL
        failed = True
        try:
            # Only from here on: a task that is cancelled before its first step never gets to the end below.
            inbox.on_cancel = task.cancel
            if not stream.decided:
                await handler(stream, stream.request)
            failed = False
        except asyncio.CancelledError:
            code = Code.CANCELLED
            raise
        except PeerError as error:
            code = error.code if isinstance(error, StreamError) else Code.CANCELLED
            log.info("%s stream %d: %s", mux_stream.name, stream.id, error)
        except Exception:
            log.exception("the handler of a %s stream failed", mux_stream.name)
        finally:
            if not stream.detached:
                if mux_stream.sending is Sending.UNDECIDED and not failed:
                    log.error("the handler of a %s stream neither accepted nor rejected it", mux_stream.name)
                    failed = True
                if failed:
                    stream.reset(code, describe(code))
                else:
                    stream.close()
                mux_stream.release()

    def ended(self) -> None:
        """The session is over: nobody need listen any more."""
        for listener in list(self.listeners.values()):
            listener.close()


def fail(session: Session, mux_stream: MuxStream, error: Exception) -> None:
    """A defect, in what serves a stream without a task: this stream ends, others do not."""
    session.log.error("the handler of a %s stream failed", mux_stream.name, exc_info=error)
    mux_stream.cancel(Code.INTERNAL, describe(Code.INTERNAL))
    mux_stream.release()
