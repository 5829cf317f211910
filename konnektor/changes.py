"""Waiting until somebody's state is as wanted, told by whoever changes it: a condition without its lock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["Changes"]


class Changes:
    """Between those who wait for a state and those who change it, on one event loop."""

    __slots__ = ("_next",)

    def __init__(self) -> None:
        self._next: asyncio.Event | None = None
        """For those who wait; most changes are nobody's business."""

    def notify(self) -> None:
        """Something has changed; whoever waits looks again."""
        if self._next is not None:
            self._next.set()
            self._next = None

    async def wait_for(self, predicate: Callable[[], object]) -> None:
        """Returns once ``predicate()`` is true, when asked at the start and after each change. Cancelling is safe."""
        while not predicate():
            if self._next is None:
                self._next = asyncio.Event()
            await self._next.wait()
