"""One session's streams of one type, as an anyio listener."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import anyio
import anyio.abc

from konnektor.changes import Changes
from konnektor.errors import Code, PeerError
from konnektor.handlers import Entry
from konnektor.stream import Stream
from konnektor.stream_types import StreamType

if TYPE_CHECKING:
    from konnektor.session import Session

__all__ = ["StreamListener"]

T = TypeVar("T", bound=StreamType)


class _Offer:
    """A stream that the peer has opened, until somebody has served it."""

    __slots__ = ("done", "stream", "taken")

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.taken = False
        self.done = anyio.Event()


class StreamListener(anyio.abc.Listener[Stream], Generic[T]):
    """An anyio listener for one session's streams of one type; made by ``Session.listen``.

    Every stream is accepted; where that is to be decided, use a handler.
    """

    def __init__(self, session: Session, request: type[T]) -> None:
        self._session = session
        self._name = request.name
        self._offers: deque[_Offer] = deque()
        self._changes = Changes()
        self._closed = False
        self.entry: Final = Entry(request, self._take)

    async def _take(self, stream: Stream, _request: T) -> None:
        offer = _Offer(stream)
        if not self._closed:
            self._offers.append(offer)
            self._changes.notify()
            try:
                await offer.done.wait()
            finally:
                if not offer.taken and not self._closed:
                    self._offers.remove(offer)  # the opener gave up
        if not offer.taken:
            await stream.reject(Code.UNSUPPORTED, "no longer served")

    async def serve(self, handler: Callable[[Stream], Any], task_group: anyio.abc.TaskGroup | None = None) -> None:
        """Accepts every stream of the type and runs ``handler(stream)`` for it.

        Returns after ``aclose`` or the end of the session, when its handlers have ended; cancelling is safe. A
        handler that raises resets its stream, and the error goes to the task group.

        Args:
            task_group: runs the handlers; one of its own if None.
        """

        async def run(offer: _Offer, *, task_status: anyio.abc.TaskStatus[None]) -> None:
            task_status.started()
            stream = offer.stream
            try:
                try:
                    await stream.accept()
                except PeerError as error:
                    # The opener gave up: nothing that the other streams' handlers should suffer for.
                    self._session.log.info("%s stream %d: %s", self._name, stream.id, error)
                    return
                await handler(stream)
            except BaseException:
                stream.reset()
                raise
            finally:
                offer.done.set()

        async with AsyncExitStack() as stack:
            group = task_group
            if group is None:
                group = await stack.enter_async_context(anyio.create_task_group())
            while True:
                await self._changes.wait_for(lambda: self._offers or self._closed)
                if self._closed:
                    return
                # Nothing awaits from here to where the stream is somebody's: cancelled in between, it would be lost.
                offer = self._offers.popleft()
                offer.taken = True
                try:
                    await group.start(run, offer)
                except BaseException:  # perhaps before the first step of its task, which then does nothing at all
                    offer.stream.reset()
                    offer.done.set()
                    raise

    def close(self) -> None:
        """``aclose`` for callers that are not coroutines."""
        listeners = self._session._serving.listeners
        if listeners.get(self._name) is self:
            del listeners[self._name]
        self._closed = True
        while self._offers:
            self._offers.popleft().done.set()
        self._changes.notify()

    async def aclose(self) -> None:
        """Serves the type no more; streams that are open go on."""
        self.close()
