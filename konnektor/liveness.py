"""Whether the peer still lives: PING after silence, and when silence is death.

Theory of operation. Any byte is life. After ``silence`` seconds without one a PING goes out; after
``patience`` more the peer is dead. Two things keep an innocent peer alive. The verdict falls only
when reads had another chance *after* the deadline, because this process may have been too busy to
read. And if the timer itself came late (a paused virtual machine), the silence was ours: it starts again.

A peer that talks and yet acknowledges nothing for STUCK seconds is as good as dead: without it,
what waits for the cap on bytes in flight would wait for ever. So is one that takes nothing: when the transport has been
full for STUCK seconds, during which nothing was acknowledged either, whatever the peer has said meanwhile. An
ACK counts as progress, for a slow path may need longer than that to make room.

The round trip is measured by PINGs alone, one every PING_INTERVAL while data or datagrams flow. A PING that only asks
how far the datagrams are (see flight.py) stands behind a queue of theirs: it neither delays nor replaces one that measures.
Whoever asks for more has them at a pace that the peer's limit allows.
"""

from __future__ import annotations

import math
from typing import Final

from konnektor.abuse import OWN_PINGS, PING_BYTES, PINGS, Allowance, too_often
from konnektor.errors import ProtocolError

__all__ = ["LATE_TIMER", "Liveness"]

PING_INTERVAL: Final = 0.5
SILENCE: Final = 15.0
DEAD_AFTER: Final = 10.0
LATE_TIMER: Final = 1.0
JUDGING: Final = 0.05
"""Seconds the driver gets to read what may have come meanwhile."""
STUCK: Final = 30.0
UNANSWERED: Final = 300.0
"""Seconds that the answer to a PING may take while other bytes come: what lies ahead of it on a slow path is on its way."""


class Liveness:
    """The state of one connection.

    Attributes:
        heard_at: when bytes came last.
        due: when ``check`` should be called.
        ping_due: a PING is wanted; it waits while another is out.
        stuck: seconds without progress of what is sent, after which the peer is given up.
    """

    __slots__ = (
        "_asked_at",
        "_blocked_at",
        "_established",
        "_judging",
        "_limit",
        "_pace",
        "_ping_count",
        "_ping_sent_at",
        "_pinged_at",
        "_progress_at",
        "_report_out",
        "_silence",
        "due",
        "heard_at",
        "ping_due",
        "stuck",
    )

    def __init__(self, now: float, hello_timeout: float) -> None:
        self._established = False
        self.heard_at = now
        self._silence = hello_timeout
        self._judging = False
        self._limit = Allowance(*PINGS)
        self._pace = Allowance(*OWN_PINGS)
        self._ping_count = 0
        self._ping_sent_at: float | None = None
        self._asked_at = math.inf
        self._pinged_at = -math.inf
        self._report_out = False
        self._progress_at = math.inf
        self._blocked_at = math.inf
        self.stuck = STUCK
        self.ping_due = False
        self.due = now + hello_timeout

    # What came

    def heard(self, now: float) -> None:
        """Bytes came."""
        self.heard_at = now
        self._judging = False

    def established(self, idle_timeout: float) -> None:
        """The peer's HELLO came; ``idle_timeout`` is the shorter one of the two."""
        self._established = True
        self._silence = min(SILENCE, idle_timeout / 2)
        self.due = self.heard_at + self._silence
        self.ping_due = True

    def suspended(self) -> None:
        """The connection is gone: nothing is expected."""
        self._ping_sent_at = None
        self._asked_at = self._progress_at = self._blocked_at = math.inf
        self.ping_due = False
        self.due = math.inf

    def resumed(self, now: float, *, waiting: bool) -> None:
        """There is another connection; ``waiting`` for what was sent on the old one to be acknowledged."""
        self.heard(now)
        # The other end starts counting anew, too.
        self._limit = Allowance(*PINGS)
        self._pace = Allowance(*OWN_PINGS)
        self.due = now + self._silence
        self._progress_at = now if waiting else math.inf
        self.ping_due = True

    def pong(self, opaque: int, now: float) -> float:
        """A PONG came; the round trip in seconds.

        Raises:
            ProtocolError: it answers no PING that is out.
        """
        if self._ping_sent_at is None or opaque != self._ping_count:
            raise ProtocolError("a PONG that matches no PING")
        rtt = now - self._ping_sent_at
        self._ping_sent_at = None
        self._asked_at = math.inf
        return rtt

    def asked(self, received: int, now: float) -> None:
        """A PING came, after so many bytes on this connection.

        Raises:
            CalmError: one too many.
        """
        if not self._limit.take(received // PING_BYTES, now):
            raise too_often("PINGs", *PINGS)

    def acked(self, now: float, *, all_of_it: bool) -> None:
        """An ACK came that advances."""
        self._progress_at = math.inf if all_of_it else now
        self._blocked_at = max(self._blocked_at, now)

    # What goes out

    def sent(self, now: float) -> None:
        """Sequenced frames went out."""
        if self._progress_at == math.inf:
            self._progress_at = now

    def write_blocked(self, now: float) -> None:
        """The transport takes no more."""
        self._blocked_at = now
        if self._established:
            self.due = min(self.due, now + self.stuck)

    def write_resumed(self) -> None:
        """It does again."""
        self._blocked_at = math.inf

    def measure_due(self, now: float) -> bool:
        """Whether, data flowing, the round trip should be measured again."""
        return (
            self._established
            and (self._ping_sent_at is None or self._report_out)
            and now - self._pinged_at >= PING_INTERVAL
        )

    @property
    def ping_out(self) -> bool:
        """Whether a PING is out: no other may be sent."""
        return self._ping_sent_at is not None

    @property
    def ping_ready(self) -> bool:
        """Whether a PING should go out, as soon as the pace allows."""
        return self.ping_due and self._ping_sent_at is None

    def ping_at(self, sent: int) -> float:
        """From when on the pace allows a PING, after so many bytes on this connection."""
        return self._pace.ready_at(sent // PING_BYTES)

    def want_ping(self) -> int:
        """Asks for a PING; returns what its PONG will repeat."""
        self.ping_due = True
        return self._ping_count + 1

    def ping(self, now: float, sent: int = 0, *, report: bool = False) -> int:
        """What a PING says that is sent now, after so many bytes on this connection.

        Args:
            report: it is for the datagrams' sake alone.
        """
        self.ping_due = False
        self._ping_count += 1
        self._pace.take(sent // PING_BYTES, now)
        self._ping_sent_at = self._asked_at = now
        self._report_out = report
        if not report:
            self._pinged_at = now
        return self._ping_count

    # Time

    def heard_lately(self, now: float) -> bool:
        """Whether the peer lives, and it is not the connection that keeps it from doing what it should."""
        return now < self.heard_at + self._silence

    def overdue(self, now: float, rtt: float) -> bool:
        """Whether the peer has been silent past its deadline: ``check`` gives it up, as soon as it has looked once more.

        Not if nobody has checked for so long that it was this process that was away.
        """
        return now < self.due + LATE_TIMER and now >= self.heard_at + self._silence + _patience(rtt)

    def check(self, now: float, rtt: float) -> str | None:
        """Judges at ``now``: why the peer is given up, or None. May ask for a PING, and moves ``due``."""
        if not self._established:
            # No excuse here: only HELLO itself helps, however many bytes of something else came.
            return f"no HELLO within {self._silence:g} s"
        silence = self._silence
        if now - self.due > LATE_TIMER:
            self.heard_at = now - silence
            self._judging = False
            self._progress_at = max(self._progress_at, now)
            self._asked_at = max(self._asked_at, now)
            self._blocked_at = max(self._blocked_at, now)
        # Sums are compared, not differences: due must lie ahead whatever the rounding.
        if now >= self._progress_at + self.stuck and self.heard_at > self._progress_at:
            return f"the peer has acknowledged nothing for {now - self._progress_at:.0f} s"
        if now >= self._asked_at + UNANSWERED and self.heard_at > self._asked_at:
            return f"the peer has left a PING unanswered for {now - self._asked_at:.0f} s"
        if now >= self._blocked_at + self.stuck:
            return f"the peer has taken nothing for {now - self._blocked_at:.0f} s"
        ping_at = self.heard_at + silence
        dead_at = ping_at + _patience(rtt)
        if now < ping_at:
            self.due = ping_at
        elif now < dead_at:
            if self._ping_sent_at is None:
                self.ping_due = True
            self.due = dead_at
        elif not self._judging:
            self._judging = True
            self.due = now + JUDGING
        else:
            return f"the peer has been silent for {now - self.heard_at:.0f} s"
        if self._progress_at + self.stuck > now:
            self.due = min(self.due, self._progress_at + self.stuck)
        self.due = min(self.due, self._blocked_at + self.stuck)
        return None


def _patience(rtt: float) -> float:
    """Seconds that the answer to a PING may take."""
    return max(DEAD_AFTER, 4 * rtt)
