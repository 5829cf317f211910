"""One session's streams of one type, as an anyio listener."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import anyio
import anyio.abc

from konnektor.errors import Code, PeerError
from konnektor.handlers import Entry
from konnektor.stream import Stream
from konnektor.stream_types import StreamType

if TYPE_CHECKING:
    from konnektor.session import Session

__all__ = ["StreamListener"]

T = TypeVar("T", bound=StreamType)


class StreamListener(anyio.abc.Listener[Stream], Generic[T]):
    """An anyio listener for one session's streams of one type; made by ``Session.listen``.

    Every stream is accepted; where that is to be decided, use a handler.
    """

    def __init__(self, session: Session, request: type[T]) -> None:
        self._session = session
        self._name = request.name
        self._put, self._get = anyio.create_memory_object_stream[tuple[Stream, anyio.Event]]()
        self.entry: Final = Entry(request, self._take)

    async def _take(self, stream: Stream, _request: T) -> None:
        done = anyio.Event()
        try:
            await self._put.send((stream, done))
        except (anyio.ClosedResourceError, anyio.BrokenResourceError):
            await stream.reject(Code.UNSUPPORTED, "no longer served")
        else:
            await done.wait()

    async def serve(self, handler: Callable[[Stream], Any], task_group: anyio.abc.TaskGroup | None = None) -> None:
        """Accepts every stream of the type and runs ``handler(stream)`` for it.

        Returns after ``aclose`` or the end of the session, when its handlers have ended; cancelling is safe. A
        handler that raises resets its stream, and the error goes to the task group.

        Args:
            task_group: runs the handlers; one of its own if None.
        """

        async def run(stream: Stream, done: anyio.Event) -> None:
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
                done.set()

        async with AsyncExitStack() as stack:
            group = task_group
            if group is None:
                group = await stack.enter_async_context(anyio.create_task_group())
            with contextlib.suppress(anyio.ClosedResourceError):
                async for stream, done in self._get:
                    group.start_soon(run, stream, done)

    def close(self) -> None:
        """``aclose`` for callers that are not coroutines."""
        listeners = self._session._serving.listeners
        if listeners.get(self._name) is self:
            del listeners[self._name]
        self._put.close()
        self._get.close()

    async def aclose(self) -> None:
        """Serves the type no more; streams that are open go on."""
        self.close()
