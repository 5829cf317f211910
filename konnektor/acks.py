"""When to acknowledge what was taken in: after so many bytes, or so much time."""

from __future__ import annotations

import math

__all__ = ["Acks"]


class Acks:
    """The sequenced frames that came, and whether the peer should be told.

    Attributes:
        seq: sequenced frames taken in so far: what an ACK says.
        due: an ACK should be sent now.
        due_at: when one will be, infinite while nothing is unacknowledged.
    """

    __slots__ = ("_bytes", "_delay", "_threshold", "due", "due_at", "seq")

    def __init__(self, threshold: int, delay: float) -> None:
        self._threshold = threshold
        self._delay = delay
        self._bytes = 0
        self.seq = 0
        self.due = False
        self.due_at = math.inf

    def taken(self, size: int, now: float) -> None:
        """Sequenced frames of ``size`` bytes in all, headers included, came in (``seq`` counts them)."""
        self._bytes += size
        if self._bytes >= self._threshold:
            self.due = True
        elif not self.due and self.due_at == math.inf:
            self.due_at = now + self._delay

    def check(self, now: float) -> None:
        """Makes an ACK due if one has waited long enough."""
        if now >= self.due_at:
            self.due_at = math.inf
            self.due = True

    def forget(self) -> None:
        """The connection is gone: what it took in will be told in other ways."""
        self.rendered()

    def rendered(self) -> int:
        """What the ACK says that is sent now."""
        self.due = False
        self.due_at = math.inf
        self._bytes = 0
        return self.seq
