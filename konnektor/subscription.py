"""What one subscriber to events has not taken yet."""

from __future__ import annotations

from collections import deque
from typing import Generic, Self, TypeVar

from konnektor.changes import Changes

__all__ = ["Subscription"]

T = TypeVar("T")


class Subscription(Generic[T]):
    """Events in order, for ``async for``. It ends when there will be no more, and what had come is taken.

    Cancelling, as by a timeout around ``anext``, loses no event. Where several tasks iterate, each event is for one.

    Args:
        most: events that wait; of more, the oldest are dropped.
    """

    def __init__(self, most: int) -> None:
        self._events: deque[T] = deque(maxlen=most)
        self._changes = Changes()
        self._ended = False

    def publish(self, event: T) -> None:
        """Something has happened."""
        self._events.append(event)
        self._changes.notify()

    def end(self) -> None:
        """Nothing more will."""
        self._ended = True
        self._changes.notify()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        await self._changes.wait_for(lambda: self._events or self._ended)
        if not self._events:
            raise StopAsyncIteration
        return self._events.popleft()
