"""How a session ends gently: two GOAWAYs, the streams' grace, and the wait for the last ACK.

Theory of operation. The first GOAWAY asks for no more streams and names no limit, because OPENs may
be on their way; once it has been read (or after SETTLE) the second names the last stream taken, and
whatever comes beyond is refused. When no stream is left, or the grace is over and the rest is reset,
the side *lingers* until all it sent is acknowledged, and then sends CLOSE: at most LINGER after the last ACK that advanced,
or after the grace. Without a connection nothing can be acknowledged, so it waits for another, until the grace is over.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Final

from konnektor.errors import Code
from konnektor.frames import Goaway

__all__ = ["Drain", "Step"]

ALL_IDS: Final = 2**32 - 1
MAX_GRACE_MS: Final = 2**32 - 1
SETTLE: Final = 5.0
LINGER: Final = 5.0
"""Seconds."""


class Step(Enum):
    """What the session should do now."""

    WAIT = 0
    SAY_GOAWAY = 1
    """Send the second GOAWAY."""
    LINGER = 2
    """End the streams that are left, and then call ``linger``."""
    CLOSE = 3


class Drain:
    """One side's leaving.

    Attributes:
        begun: GOAWAY was sent or is about to be.
        goaway_due: a GOAWAY should go out now.
        last_taken: what the second GOAWAY said, None before; OPENs above it are refused.
        code, reason: what GOAWAY and CLOSE say.
    """

    __slots__ = (
        "_closes_by",
        "_goaway_seq",
        "_goaways",
        "_grace_ends",
        "_linger_ends",
        "_lingering",
        "_settle_ends",
        "begun",
        "code",
        "goaway_due",
        "last_taken",
        "reason",
    )

    def __init__(self) -> None:
        self.begun = False
        self.goaway_due = False
        self.last_taken: int | None = None
        self.code: int = Code.SHUTDOWN
        self.reason = ""
        self._goaways = 0
        self._goaway_seq = 0
        self._grace_ends = math.inf
        self._settle_ends = math.inf
        self._lingering = False
        self._linger_ends = math.inf
        self._closes_by = math.inf

    @property
    def due(self) -> float:
        """When ``step`` should be called at the latest."""
        return min(self._grace_ends, self._settle_ends, self._linger_ends)

    def begin(self, grace: float, code: int, reason: str, now: float) -> bool:
        """Starts leaving; True the first time. Later calls can only shorten the grace."""
        ends = now + max(0.0, grace)
        if self._lingering:
            self._closes_by = min(self._closes_by, ends + LINGER)
            self._linger_ends = min(self._linger_ends, self._closes_by)
        else:
            self._grace_ends = min(self._grace_ends, ends)
        if self.begun:
            return False
        self.begun = self.goaway_due = True
        self.code, self.reason = code, reason
        return True

    def goaway(self, last_taken: int, now: float) -> Goaway:
        """The frame that is sent now; tell ``sent`` its number in the sequence."""
        self.goaway_due = False
        self._goaways += 1
        if self._goaways == 1:
            last_id = ALL_IDS
            self._settle_ends = now + SETTLE
        else:
            last_id = self.last_taken = last_taken
        left = min(self._grace_ends - now, MAX_GRACE_MS / 1000) if self._grace_ends < math.inf else 0.0
        return Goaway(last_id, self.code, max(0, int(left * 1000)), self.reason)

    def sent(self, seq: int) -> None:
        """The GOAWAY was the frame ``seq`` of the sequence."""
        self._goaway_seq = seq

    def step(self, now: float, *, acked: int, streams: bool, quiet: bool) -> Step:
        """What is possible now.

        Args:
            now: the time.
            acked: frames of the sequence that the peer acknowledged.
            streams: whether any are left.
            quiet: whether nothing is to be sent or unacknowledged.
        """
        lingering = self._lingering
        if self._goaways == 1 and not self.goaway_due and (acked >= self._goaway_seq or now >= self._settle_ends):
            self._settle_ends = math.inf
            self.goaway_due = True
            return Step.SAY_GOAWAY
        if not lingering and (now >= self._grace_ends or (self._goaways == 2 and not streams)):
            return Step.LINGER
        if lingering and (now >= self._linger_ends or (not streams and quiet and not self.goaway_due)):
            return Step.CLOSE
        return Step.WAIT

    def refuses(self, stream_id: int, now: float) -> bool:
        """Whether an OPEN comes too late: behind the second GOAWAY, or when the grace of the streams is over."""
        too_high = self.last_taken is not None and stream_id > self.last_taken
        return too_high or self._lingering or now >= self._grace_ends

    def linger(self, now: float) -> None:
        """The streams have ended or been reset."""
        self._closes_by = max(self._grace_ends, now) + LINGER
        self._grace_ends = math.inf
        self._lingering = True
        self.progressed(now)

    def progressed(self, now: float) -> None:
        """The peer acknowledged something, or is there again."""
        if self._lingering:
            self._linger_ends = min(now + LINGER, self._closes_by)

    def held(self) -> None:
        """There is no connection."""
        self._linger_ends = self._closes_by  # both infinite before it lingers

    def assert_invariants(self) -> None:
        """For tests."""
        assert self._goaways <= 2
        assert self.begun or self.due == math.inf
