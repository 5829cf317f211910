"""Flow control: what a peer may send, and the pool that bounds it all.

Theory of operation. Credit is per stream and absolute (QUIC, RFC 9000 section 4.1): the receiver
says up to which offset it takes bytes. There is no window for the whole connection, because one
stalled stream would exhaust it for everybody. Memory is bounded by the *pool* instead: the sum
of ``granted - consumed`` over all streams never exceeds its size. Each stream that exists, or that
the peer may still open, has W0 bytes of the pool reserved; what it is granted beyond W0 comes out
of the rest, and only while there is a rest. So a stalled stream can cost its window, never
another stream's.

Credit returns when the application *consumes*, not when bytes arrive. A window starts at W0 and
grows when the sender says that it was blocked.
"""

from __future__ import annotations

from konnektor.errors import FlowControlError
from konnektor.frames import MAX_OFFSET

__all__ = ["Pool", "ReceiveWindow", "SendWindow"]

CRUMB = 1024
"""A sender waits for this much credit rather than sending crumbs (silly window syndrome, RFC 1122 4.2.3.4)."""


class Pool:
    """The bytes a session may have granted and not yet seen consumed.

    Attributes:
        size: the bound (B).
        base: reserved for each stream (W0).
        slots: streams that have a reservation: those the peer may have open, and our own.
        extra: granted beyond reservations.
    """

    __slots__ = ("base", "extra", "size", "slots")

    def __init__(self, size: int, base: int, slots: int) -> None:
        self.size = size
        self.base = base
        self.slots = slots
        self.extra = 0
        self.assert_invariants()

    @property
    def free(self) -> int:
        """Bytes neither reserved nor granted."""
        return self.size - self.base * self.slots - self.extra

    @property
    def scarce(self) -> bool:
        """Less than a quarter is free: windows shrink back to W0 at their next grant."""
        return self.free < self.size >> 2

    def reserve(self) -> bool:
        """Takes a slot for one more stream of our own; False if the pool has no room for it now."""
        if self.free < self.base:
            return False
        self.slots += 1
        return True

    def release(self) -> None:
        """Gives a slot back."""
        self.slots -= 1

    def assert_invariants(self) -> None:
        """For tests: nothing negative, nothing over the bound."""
        assert self.slots >= 0
        assert self.extra >= 0
        assert self.free >= 0


class ReceiveWindow:
    """What one stream's peer may send.

    Attributes:
        granted: offset up to which the peer may send.
        received: bytes that came.
        consumed: bytes the application took (or that were dropped for it).
        size: the current window (W): how far ahead of ``consumed`` grants go.
        blocked: the sender said that it waits for credit.
    """

    __slots__ = ("_limit", "_pool", "blocked", "consumed", "granted", "received", "size")

    def __init__(self, pool: Pool, limit: int) -> None:
        self._pool = pool
        self._limit = limit
        self.granted = self.size = pool.base
        self.received = 0
        self.consumed = 0
        self.blocked = False

    @property
    def unread(self) -> int:
        """Bytes that came and were not consumed."""
        return self.received - self.consumed

    def receive(self, count: int) -> None:
        """Counts arrived bytes.

        Raises:
            FlowControlError: more than was granted.
        """
        received = self.received + count
        if received > self.granted:
            raise FlowControlError(f"{received - self.granted} bytes beyond the credit of {self.granted}")
        self.received = received

    def consume(self, count: int) -> bool:
        """Counts bytes the application took. True if a grant is due: a quarter of the window or more."""
        pool = self._pool
        over = self.granted - self.consumed - pool.base
        if over > 0:
            pool.extra -= min(count, over)
        self.consumed += count
        size = self.size
        if self.consumed + size - self.granted < size >> 2:
            # Not due by the whole window, so not by the smaller one of a scarce pool either.
            return False
        return not pool.scarce or self.consumed + pool.base - self.granted >= pool.base >> 2

    def grant(self) -> int | None:
        """The new offset for a CREDIT frame, taken from the pool now; None if there is nothing to add.

        A sender that was blocked gets four times the window, as far as the pool allows.
        """
        pool = self._pool
        base = pool.base
        free = pool.free
        if self.blocked:
            self.blocked = False
            self.size = max(base, min(4 * self.size, self._limit, base + (free >> 2)))
        if free < pool.size >> 2:
            # Scarce: back to the reservation, which is always there.
            self.size = base
        target = self.consumed + self.size
        if target <= self.granted:
            return None
        held = max(self.granted - self.consumed, base)
        over = self.size - held
        if over > free:
            target -= over - free
            over = free
        if over > 0:
            pool.extra += over
        if target <= self.granted:
            return None
        self.granted = target
        return target

    def end(self) -> None:
        """The peer's half is over (FIN): what was granted beyond it goes back to the pool."""
        self._shrink(self.received)

    def drop(self) -> None:
        """Nobody will read what came: all of it counts as consumed."""
        self.consume(self.unread)

    def _shrink(self, granted: int) -> None:
        pool = self._pool
        before = max(0, self.granted - self.consumed - pool.base)
        after = max(0, granted - self.consumed - pool.base)
        pool.extra -= before - after
        self.granted = granted

    def assert_invariants(self) -> None:
        """For tests: offsets in order."""
        assert 0 <= self.consumed <= self.received <= self.granted
        assert self.size >= self._pool.base


class SendWindow:
    """What this side may send on one stream.

    Attributes:
        limit: offset up to which the peer takes bytes.
        sent: bytes put on the wire.
        blocked_at: the limit for which the peer was last told that we wait, -1 if never.
    """

    __slots__ = ("blocked_at", "limit", "sent")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.sent = 0
        self.blocked_at = -1

    def sendable(self, pending: int) -> int:
        """Bytes of ``pending`` that may go now: 0 rather than crumbs."""
        room = self.limit - self.sent
        return 0 if room < CRUMB and room < pending else min(room, pending)

    def raise_limit(self, limit: int) -> bool:
        """Takes in a CREDIT; a lower one is ignored (they cross). True if it raised the limit.

        Raises:
            FlowControlError: beyond any offset a stream can have.
        """
        if limit > MAX_OFFSET:
            raise FlowControlError(f"CREDIT up to {limit}, beyond {MAX_OFFSET}")
        if limit <= self.limit:
            return False
        self.limit = limit
        return True

    def assert_invariants(self) -> None:
        """For tests: never beyond the limit."""
        assert 0 <= self.sent <= self.limit
