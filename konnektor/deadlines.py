"""Many coarse deadlines at the price of one timer: a wheel of buckets."""

from __future__ import annotations

import heapq
import math
from typing import Final, Generic, TypeVar

__all__ = ["Deadlines"]

T = TypeVar("T")

TICK: Final = 0.05
"""Seconds. An item expires at the tick after its deadline: late by at most this, never early."""


class Deadlines(Generic[T]):
    """Hashable items, each with a time at which it is due; those of a tick come in the order they were added. ``add`` and ``discard`` take constant time."""

    __slots__ = ("_buckets", "_heap")

    def __init__(self) -> None:
        self._buckets: dict[int, dict[T, None]] = {}
        self._heap: list[int] = []

    def add(self, item: T, deadline: float) -> int:
        """Returns the key that ``discard`` wants back."""
        tick = math.ceil(deadline / TICK)
        bucket = self._buckets.get(tick)
        if bucket is None:
            bucket = self._buckets[tick] = {}
            heapq.heappush(self._heap, tick)
        bucket[item] = None
        return tick

    def discard(self, item: T, tick: int) -> None:
        """Forgets an item, expired or not."""
        bucket = self._buckets.get(tick)
        if bucket is not None:
            bucket.pop(item, None)

    def is_due(self, tick: int, now: float) -> bool:
        """Whether ``expire(now)`` takes out what was added under this key."""
        return tick * TICK <= now

    def next(self) -> float | None:
        """When ``expire`` should be called, or None. Buckets that have emptied since are dropped here."""
        heap, buckets = self._heap, self._buckets
        while heap and not buckets[heap[0]]:
            del buckets[heapq.heappop(heap)]
        return heap[0] * TICK if heap else None

    def expire(self, now: float) -> list[T]:
        """Takes out and returns what is due."""
        due: list[T] = []
        while self._heap and self._heap[0] * TICK <= now:
            due.extend(self._buckets.pop(heapq.heappop(self._heap)))
        return due
