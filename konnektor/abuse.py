"""How often a peer may do what costs this side work and brings nobody anything; and this side's own pace below that.

Theory of operation. A limit is there for each frame that can be sent without end and without a reason. Where honest
frames have a cause on the wire (a CREDIT follows DATA, a STREAMS follows OPENs), the limit is a *budget*: some
to begin with, and more for each cause. Where they have none (PING, PRIORITY), it is a *bucket*: some at once, and so many
a second. Both are a few numbers, whatever comes. Who exceeds one is not slowed but shown out, because no honest peer
does: nothing that its users or targets do makes it send more, and what its application could ask for too often (PING,
PRIORITY) it paces itself, well below the limit.

Tiny frames are the exception: they are legitimate, and only dear. Beyond a rate, reading pauses.
"""

from __future__ import annotations

import math
from typing import Final

from konnektor.errors import CalmError

__all__ = ["CRUMB", "OWN_HINTS", "OWN_PINGS", "PINGS", "PING_BYTES", "Abuse", "Allowance", "Bucket", "too_often"]

IDLE_ACKS: Final = (20, 10.0)
"""At once, and a second: ACKs that acknowledge nothing new. Against settings floods (CVE-2019-9515)."""

PINGS: Final = (20, 4.0)
"""At once, and a second, and one per PING_BYTES. Against ping floods (CVE-2019-9512)."""
PING_BYTES: Final = 64 * 1024
"""Bytes of the connection: only PONG tells a sender of datagrams how many have arrived, so it asks as often."""

HINTS: Final = (100, 10.0)
"""At once, and a second, and one per OPEN of either side: PRIORITY and unknown ignorable frames. Against priority
churn, the resource loop (CVE-2019-9513)."""

CREDITS: Final = (64, 2, 8)
"""To begin with, per OPEN of either side, and per sequenced frame sent to the peer. Against floods of window
updates, as in the data dribble (CVE-2019-9511). An honest reader sends four per frame at most."""

STREAMS: Final = (64, 1)
"""To begin with, and per OPEN sent to the peer. Against floods of raised limits (QUIC's MAX_STREAMS)."""

LATE_ENDS: Final = (200, 3)
"""To begin with, and per OPEN of either side: RESET and STOP for forgotten streams. Against reset floods (CVE-2019-9514)."""

GOAWAYS: Final = 4
"""In all. Against GOAWAY floods, each of which would walk through what waits to be opened."""

CRUMB: Final = 64
CRUMBS: Final = 20_000.0
"""A second: frames beyond one per CRUMB bytes of payload. Against empty-frame floods (CVE-2019-9518)."""

CRUMBS_AHEAD: Final = 0.05
"""Seconds' worth of crumbs that may come at once."""
CRUMBS_DEBT: Final = 1.0
"""Seconds' worth of crumbs that are remembered at most: for so long is a flood resented after its end."""
PAUSE: Final = 0.05
"""Longest pause of reading, in seconds: the peer's other streams stand still as long."""

OWN_PINGS: Final = (10, 3.0)
"""What this side sends at most: half and three quarters of the peer's limit, for clocks differ, and one may have been
under way. Measuring alone takes two a second, and so has always one left."""
OWN_HINTS: Final = (20, 1.0)
"""What this side sends of PRIORITY at most. What a stalled connection held back comes all at once; it stalls for half a
minute, or is given up."""


class Bucket:
    """A token bucket, kept as the time at which it would be full (the ATM Forum's "generic cell rate algorithm").

    It has half a token to spare, so that ``burst`` at once are right whatever the rounding.
    """

    __slots__ = ("_full_at", "_interval", "_slack")

    def __init__(self, burst: int, rate: float) -> None:
        self._interval = 1 / rate
        self._slack = (burst - 0.5) / rate
        self._full_at = -math.inf

    @property
    def ready_at(self) -> float:
        """From when on there is a token."""
        return self._full_at - self._slack

    def take(self, now: float) -> bool:
        """Takes a token; False if there is none."""
        if now < self.ready_at:
            return False
        self._full_at = max(self._full_at, now) + self._interval
        return True


class Allowance:
    """One for each cause, and beside that what a bucket gives."""

    __slots__ = ("_bucket", "_free")

    def __init__(self, burst: int, rate: float) -> None:
        self._bucket = Bucket(burst, rate)
        self._free = 0

    def ready_at(self, causes: int) -> float:
        """From when on there may be another, after so many causes."""
        return -math.inf if self._free < causes else self._bucket.ready_at

    def take(self, causes: int, now: float) -> bool:
        """Counts one; False if it is one too many."""
        if self._free < causes:
            self._free += 1
            return True
        return self._bucket.take(now)


class Abuse:
    """What one peer has used up of its limits.

    Every method counts one frame of the peer's, and raises CalmError if it was one too many. ``opens`` are the OPENs of
    both sides so far. (PINGs are counted by ``Liveness``, as they belong to the connection.)
    """

    __slots__ = ("_acks", "_credits", "_crumbs_until", "_goaways", "_hints", "_late_ends", "_streams")

    def __init__(self) -> None:
        self._acks = Bucket(*IDLE_ACKS)
        self._hints = Allowance(*HINTS)
        self._credits = 0
        self._streams = 0
        self._late_ends = 0
        self._goaways = 0
        self._crumbs_until = -math.inf

    def idle_ack(self, now: float) -> None:
        """An ACK that acknowledges nothing new."""
        if not self._acks.take(now):
            raise too_often("ACKs that acknowledge nothing", *IDLE_ACKS)

    def hint(self, opens: int, now: float) -> None:
        """A PRIORITY, or an ignorable frame that is not known."""
        if not self._hints.take(opens, now):
            raise too_often("PRIORITYs and unknown frames", *HINTS)

    def credit(self, opens: int, sent: int) -> None:
        """A CREDIT, ``sent`` being the sequenced frames that went to the peer."""
        base, per_open, per_frame = CREDITS
        self._credits = _count("CREDITs", self._credits, base + per_open * opens + per_frame * sent)

    def streams(self, opened: int) -> None:
        """A STREAMS, ``opened`` being the OPENs that went to the peer."""
        base, per_open = STREAMS
        self._streams = _count("STREAMS frames", self._streams, base + per_open * opened)

    def late_end(self, opens: int) -> None:
        """A RESET or STOP for a forgotten stream."""
        base, per_open = LATE_ENDS
        self._late_ends = _count("RESETs and STOPs for forgotten streams", self._late_ends, base + per_open * opens)

    def goaway(self) -> None:
        """A GOAWAY."""
        self._goaways = _count("GOAWAYs", self._goaways, GOAWAYS)

    def crumbs(self, frames: int, size: int, now: float) -> float:
        """``frames`` came in ``size`` bytes, which is little: until when reading should pause.

        CREDIT and ACK are not to be counted here: they have limits of their own, and a fast download has many.
        """
        ahead = max(self._crumbs_until, now) + (frames - size // CRUMB) / CRUMBS
        self._crumbs_until = min(ahead, now + CRUMBS_DEBT)
        return min(self._crumbs_until - CRUMBS_AHEAD, now + PAUSE)


def _count(what: str, count: int, allowed: int) -> int:
    if count >= allowed:
        raise CalmError(f"{count + 1} {what}; {allowed} were allowed", limit=what)
    return count + 1


def too_often(what: str, burst: int, rate: float) -> CalmError:
    """The end of a session whose peer sent more of something than there were tokens for."""
    return CalmError(f"{what} beyond {burst} at once and {rate:g} a second", limit=what)
