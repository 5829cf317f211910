"""Datagrams that wait: bounded queues that drop the oldest, and the counts of one session.

Theory of operation. A datagram is worth most when it is new, and nobody may be made to hold many. So a stream's
queue holds at most STREAM_HELD bytes, all queues of one direction of a session together SESSION_HELD, and whatever is
put in beyond displaces the oldest: the stream's own, or whichever is the session's. Each counts as no less than
LEAST, or a flood of empty ones would take a hundred times what the bounds say.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Final

__all__ = ["SESSION_HELD", "STREAM_HELD", "DatagramPool", "DatagramQueue", "Datagrams"]

STREAM_HELD: Final = 64 * 1024
"""Bytes of one stream that wait in one direction."""

SESSION_HELD: Final = 1024 * 1024
"""Bytes of all streams of a session that wait in one direction."""

LEAST: Final = 256
"""What a datagram counts as at least, for the objects that it is kept in."""


class DatagramPool:
    """What the queues of one direction of a session hold together.

    Attributes:
        held: bytes, small datagrams counted as ``LEAST``.
        dropped: datagrams thrown away, ever.
    """

    __slots__ = ("_newest", "_order", "dropped", "held")

    def __init__(self) -> None:
        self._order: OrderedDict[int, DatagramQueue] = OrderedDict()
        self._newest = 0
        self.held = 0
        self.dropped = 0

    def assert_invariants(self) -> None:
        """For tests."""
        queues = set(self._order.values())
        assert len(self._order) == sum(len(queue) for queue in queues)
        assert self.held == sum(queue.held for queue in queues) <= SESSION_HELD


class DatagramQueue:
    """One stream's datagrams in one direction, oldest first.

    Attributes:
        held: bytes, small datagrams counted as ``LEAST``.
        dropped: datagrams thrown away, ever.
    """

    __slots__ = ("_items", "_pool", "dropped", "held")

    def __init__(self, pool: DatagramPool) -> None:
        self._pool = pool
        self._items: deque[tuple[int, bytes]] | None = None
        self.held = 0
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._items) if self._items is not None else 0

    def put(self, data: bytes) -> None:
        """Adds the newest, and drops the oldest until the bounds hold."""
        pool = self._pool
        size = max(LEAST, len(data))
        while self.held + size > STREAM_HELD:
            self._drop()
        while pool.held + size > SESSION_HELD:
            next(iter(pool._order.values()))._drop()
        items = self._items
        if items is None:
            items = self._items = deque()
        pool._newest += 1
        pool._order[pool._newest] = self
        items.append((pool._newest, data))
        self.held += size
        pool.held += size

    def take(self) -> bytes:
        """Removes the oldest.

        Raises:
            IndexError: there is none.
        """
        items = self._items
        if items is None:
            raise IndexError("no datagram waits")
        number, data = items.popleft()
        if not items:
            # An empty deque is 600 bytes, and most streams are idle.
            self._items = None
        size = max(LEAST, len(data))
        del self._pool._order[number]
        self._pool.held -= size
        self.held -= size
        return data

    def discard(self) -> None:
        """Counts a datagram that is not even kept."""
        self.dropped += 1
        self._pool.dropped += 1

    def clear(self) -> None:
        """Drops everything: the stream has ended, or its connection."""
        while self._items is not None:
            self._drop()

    def _drop(self) -> None:
        self.take()
        self.discard()


class Datagrams:
    """What one session knows of datagrams besides each stream's.

    Attributes:
        agreed: both sides said in HELLO that they have them.
        outgoing: what waits to be sent.
        incoming: what came and waits to be read. What came for streams that could not take it is counted here as dropped.
        sent, received: datagrams on the wire, ever.
    """

    __slots__ = ("agreed", "incoming", "outgoing", "received", "sent")

    def __init__(self) -> None:
        self.agreed = False
        self.outgoing = DatagramPool()
        self.incoming = DatagramPool()
        self.sent = 0
        self.received = 0

    @property
    def dropped(self) -> int:
        """Datagrams thrown away in either direction, ever."""
        return self.outgoing.dropped + self.incoming.dropped
