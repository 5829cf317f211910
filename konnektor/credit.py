"""Flow control: what a peer may send, and the pool that bounds it all.

Theory of operation. Credit is per stream and absolute (QUIC, RFC 9000 section 4.1): the receiver
says up to which offset it takes bytes. There is no window for the whole connection, because one
stalled stream would exhaust it for everybody. Memory is bounded by the *pool* instead: the sum
of ``granted - consumed`` over all streams never exceeds its size. Each stream that exists, or that
the peer may still open, has W0 bytes of the pool reserved; what it is granted beyond W0 comes out
of the rest, and is never more than three times what it leaves to all others (a dynamic threshold, Choudhury and
Hahne 1998). So one stream alone may have most of the rest; a stalled stream can cost its window, never another
stream's; and where many want much, all converge on the same share. What is sent and not acknowledged may borrow from the
rest, too, by the same rule, for who sends much seldom receives as much.

Credit returns when the application *consumes*, not when bytes arrive. A window W starts at W0. Whenever a quarter
of it has been consumed, it is judged whether it held the stream back:

    excess = consumed - W/2 * elapsed / (RTTmin + TURN)
    if the sender was blocked and excess > 0:  W = min(W + 4 * excess, 4 * W, limit, share of the pool)

which ends at twice what the application takes in a round trip: a quarter of W may be consumed and not granted yet, and
what is left covers a round trip that takes half as long again as the shortest one. So credit holds nobody back who reads
at once, and a reader that is slower than the path has a window that fits its own pace. After 30 s without a grant W shrinks.
"""

from __future__ import annotations

from typing import Final

from konnektor.errors import FlowControlError
from konnektor.frames import MAX_OFFSET
from konnektor.limits import MIB

__all__ = ["Pool", "ReceiveWindow", "SendWindow"]

CRUMB: Final = 1024
"""A sender waits for this much credit rather than sending crumbs (silly window syndrome, RFC 1122 4.2.3.4)."""

STEP: Final = MIB
"""A grant is due at a quarter of the window, or this much if that is less: a wide window is nearly all usable."""

TURN: Final = 0.002
"""Seconds that both ends' turns of the loop add to the path's round trip under load; nearly all of it on a LAN."""

IDLE: Final = 30.0
"""Seconds without a grant after which a window is halved, and again for each such period."""


class Pool:
    """The bytes a session may have granted and not yet seen consumed.

    Attributes:
        size: the bound (B).
        base: reserved for each stream (W0).
        slots: streams that have a reservation: those the peer may have open, and our own.
        extra: granted beyond reservations.
        lent: to what was sent and may have to be sent again.
    """

    __slots__ = ("base", "extra", "lent", "size", "slots")

    def __init__(self, size: int, base: int, slots: int) -> None:
        self.size = size
        self.base = base
        self.slots = slots
        self.extra = 0
        self.lent = 0
        self.assert_invariants()

    @property
    def free(self) -> int:
        """Bytes neither reserved nor granted nor lent."""
        return self.size - self.base * self.slots - self.extra - self.lent

    def share(self, held: int) -> int:
        """What a stream that holds ``held`` bytes beyond its reservation may hold: three times what it leaves to others.

        A sixteenth of the pool is left out, for streams to come.
        """
        return max(0, 3 * (self.free - (self.size >> 4) + held) >> 2)

    def lend(self, wanted: int) -> None:
        """What is kept to be sent again takes ``wanted`` bytes more than are set aside for it; of those, its share counts.

        Whoever keeps to ``share(lent)`` before has all of it counted; a share that shrinks meanwhile takes nothing back.
        """
        self.lent = max(0, min(wanted, max(self.lent, self.share(self.lent))))

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
        assert self.lent >= 0
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

    __slots__ = ("_judged", "_judged_at", "_limit", "_pool", "blocked", "consumed", "granted", "received", "size")

    def __init__(self, pool: Pool, limit: int, now: float) -> None:
        self._pool = pool
        self._limit = max(limit, pool.base)
        self.granted = self.size = pool.base
        self.received = 0
        self.consumed = 0
        self.blocked = False
        self._judged = 0
        self._judged_at = now

    @property
    def unread(self) -> int:
        """Bytes that came and were not consumed."""
        return self.received - self.consumed

    @property
    def held(self) -> int:
        """Bytes of the pool beyond the reservation."""
        return max(0, self.granted - self.consumed - self._pool.base)

    def idle(self, now: float) -> bool:
        """Whether nothing was granted for so long that the window is due to shrink."""
        return now - self._judged_at >= IDLE

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
        """Counts bytes the application took. True if a grant is due: a quarter of the window, or STEP."""
        granted, size = self.granted, self.size
        over = granted - self.consumed - self._pool.base
        if over > 0:
            self._pool.extra -= over if over < count else count
        self.consumed += count
        due = self.consumed + size - granted
        return due >= STEP or due >= size >> 2

    def grant(self, now: float, rtt: float) -> int | None:
        """The new offset for a CREDIT frame, taken from the pool now; None if there is nothing to add.

        Args:
            now: the time.
            rtt: smallest recent round trip of the path in seconds; 0 if it was not measured yet, and then nothing grows.
        """
        self._judge(now, rtt)
        pool, held = self._pool, self.held
        self.size = min(self.size, pool.base + pool.share(held))
        target = self.consumed + self.size
        if target <= self.granted:
            return None
        pool.extra += self.size - pool.base - held
        self.granted = target
        return target

    def _judge(self, now: float, rtt: float) -> None:
        """Fits the window to what was consumed since it was judged last."""
        size = self.size
        consumed = self.consumed - self._judged
        elapsed = now - self._judged_at
        if self.idle(now):
            self.size = max(self._pool.base, int(size * 0.5 ** (elapsed // IDLE)))
        elif consumed < size >> 2:
            return
        elif self.blocked and rtt:
            excess = consumed - 0.5 * size * elapsed / (rtt + TURN)
            if excess > 0:
                self.size = min(size + int(4 * excess), 4 * size, self._limit)
        self.blocked = False
        self._judged = self.consumed
        self._judged_at = now

    def end(self) -> None:
        """The peer's half is over (FIN): what was granted beyond it goes back to the pool."""
        before = self.held
        self.granted = self.received
        self._pool.extra -= before - self.held

    def drop(self) -> None:
        """Nobody will read what came: all of it counts as consumed."""
        self.consume(self.unread)

    def assert_invariants(self) -> None:
        """For tests: offsets in order."""
        assert 0 <= self.consumed <= self.received <= self.granted
        assert self._pool.base <= self.size <= self._limit


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
        return pending if room >= pending else room if room >= CRUMB else 0

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
