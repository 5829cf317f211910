"""How many bytes may be on their way unacknowledged, and the estimates that this rests on.

Theory of operation. Bytes in flight beyond what keeps the path busy only add delay: they stand in
kernel buffers and at the peer, and whatever is sent later stands behind them. So the sender keeps
at most ``cap`` bytes unacknowledged:

    cap = max(floor, gain * rate * (rtt_min + slack))

or, while an interactive stream is active, because then delay matters more:

    cap = max(floor, rate * min(tighter gain * (rtt_min + tighter slack), gain * (rtt_min - turns)))

A round trip of less than ``turns`` is no path but what two busy processes take to answer, and there the floor does:
bulk gives up a fifth of its rate, and what is in a hurry waits half as long. From 1 ms on the path is filled.

The rate is the largest recent delivery rate (draft-ietf-ccwg-bbr, "delivery rate samples"): bytes
acknowledged between the sending of a batch and its ACK, over the time between. Samples of batches that ended for want
of data say nothing about the path and do not count, unless they are higher. The slack covers the peer's delay in
acknowledging. The gain, 2, lets the cap find a faster path by doubling each round trip.

``rtt_min`` is the smallest of the recent *clean* PINGs: those sent with next to nothing of ours in flight, for which
bulk pauses now and then. When several in a row take longer, the path has become longer, and the older ones are forgotten. One that was answered from behind bulk of the peer's does not count then, or two ends that
both send bulk would each take the other's queue for a longer path, and drive each other up. What the path can
take is forgotten at clean PINGs, no sooner. If rates were forgotten by the clock, a path that becomes longer would look
like a slower one: the cap lets less through per second, which lowers the rate, which lowers the cap, until next to
nothing is left of it.

Datagrams are not acknowledged. The connection keeps its order, so a PONG tells that all sent before its PING has
arrived: until then they are in flight, too, and after REPORT_EVERY bytes of them a PING is wanted for their sake.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final

from konnektor.limits import FULL_FRAME

__all__ = ["FRAME_FLOOR", "Flight"]

FRAME_FLOOR: Final = 4096
"""Bytes of DATA that may always go in one frame."""

SLACK_TIGHT: Final = 0.000_1
SLACK_LOOSE: Final = 0.002
GAIN_TIGHT: Final = 1.25
TURNS: Final = 0.000_5
GAIN_LOOSE: Final = 2.0
INTERACTIVE_FOR: Final = 1.0
"""Seconds within which a small stream beside bulk is served twice while it is active."""

REMEMBERED: Final = 20
"""Clean PINGs: on a busy machine most of them take longer than the path does."""
AGREEING: Final = 3
"""Clean PINGs in a row that say that the path is longer than it was, and the older ones of no use."""
LONGER: Final = 1.25
"""They do if each took so many times the shortest, and ``SLACK_LOOSE``: the tightest gain covers less."""
CLEAN_FLIGHT: Final = FULL_FRAME
"""A PING sent behind no more than this measures the path rather than our own queue."""
LONGEST: Final = 10.0
"""Seconds of the longest round trip that is believed."""
REPORT_EVERY: Final = 64 * 1024
"""Bytes of datagrams after which the peer is asked how far it is."""
CLEAN_EVERY: Final = 40
"""Round trips between PINGs for which the queue is drained: at most a fortieth of the path is idle for it."""
DRAIN_LIMIT: Final = 0.1
"""Seconds, or four round trips if those are longer, that bulk pauses at most: small streams may keep the queue up."""


class Flight:
    """The sequenced frames that were sent, until the peer acknowledges them; and the datagrams, until a PONG does.

    Attributes:
        sent: sequenced frames sent.
        acked: of these, acknowledged.
        delivered: their bytes.
        in_flight: bytes (headers included) of those between, and of datagrams.
        sequenced: of these, the bytes of sequenced frames.
        rate: bytes per second the path was seen to take, 0 before the first sample.
        rtt: smoothed round trip in seconds, 0 before the first sample.
        rtt_min: smallest recent round trip in seconds that was no queue of ours, 0 before the first sample.
        tight: an interactive stream is active beside bulk: what is queued anywhere, or done in one go, should be less.
        unreported: bytes of datagrams since the last PING.
    """

    __slots__ = (
        "_acked_at",
        "_batched",
        "_batches",
        "_clean_at",
        "_first",
        "_first_sent_at",
        "_floor",
        "_interactive_at",
        "_paths",
        "_paused_at",
        "_ping_clean",
        "_ping_paused",
        "_rates",
        "_received",
        "_reporting",
        "_sizes",
        "acked",
        "delivered",
        "in_flight",
        "rate",
        "rtt",
        "rtt_min",
        "sent",
        "sequenced",
        "tight",
        "unreported",
    )

    def __init__(self, floor: int) -> None:
        self._floor = floor
        self._sizes: list[int] = []
        self._first = 0
        """Where in ``_sizes`` those begin that are not acknowledged. A list that is cut now and then: compiled, a deque is asked through
        the interpreter."""
        self._batches: deque[tuple[int, float, int, float, float, bool]] = deque()
        self._batched = 0
        self.delivered = 0
        self._acked_at = 0.0
        self._first_sent_at = 0.0
        # Lists: an empty deque takes twelve times as much, and a worker that only waits has these and little more.
        self._rates = [0.0]
        """Highest rate between one clean PONG and the next; these reach further back than it takes to see a longer path."""
        self._paths: list[float] = []
        """Round trips of clean PINGs."""
        self._interactive_at = -math.inf
        self.tight = False
        self._clean_at = -math.inf
        self._ping_clean = False
        self._ping_paused = False
        self._paused_at: float | None = None
        self._received = 0
        self.unreported = 0
        self._reporting = 0
        self.sent = 0
        self.acked = 0
        self.in_flight = 0
        self.sequenced = 0
        self.rate = 0.0
        self.rtt = 0.0
        self.rtt_min = 0.0

    def on_sent(self, size: int) -> None:
        """One sequenced frame of ``size`` bytes went out."""
        self.sent += 1
        self.in_flight += size
        self.sequenced += size
        self._sizes.append(size)

    def on_frames(self, sizes: list[int]) -> None:
        """Sequenced frames of these sizes went out."""
        size = sum(sizes)
        self.sent += len(sizes)
        self.in_flight += size
        self.sequenced += size
        self._sizes.extend(sizes)

    def on_datagram(self, size: int) -> None:
        """One datagram of ``size`` bytes, header included, went out."""
        self.in_flight += size
        self.unreported += size

    @property
    def report_wanted(self) -> bool:
        """Whether so much has gone out in datagrams since the last PING that there should be another."""
        return self.unreported >= REPORT_EVERY

    def forget_datagrams(self) -> None:
        """They went down with the connection."""
        self.in_flight = self.sequenced
        self.unreported = self._reporting = 0

    def on_batch(self, now: float, *, limited: bool) -> None:
        """The frames since the last call were one batch; ``limited`` if it ended for want of data."""
        if self._batched == self.sent:
            return
        if self.acked >= self._batched:
            # Nothing was in flight before: the path's clock starts here.
            self._acked_at = self._first_sent_at = now
        self._batched = self.sent
        self._batches.append((self.sent, now, self.delivered, self._acked_at, self._first_sent_at, limited))

    def on_interactive(self, now: float, *, declared: bool = False) -> None:
        """A small stream was served while bulky ones waited; ``declared`` if its class says that it is interactive.

        Bulk gives way for the sake of those that follow: by now it was served. Where nobody has said so, once proves nothing.
        """
        self.tight = declared or now - self._interactive_at < INTERACTIVE_FOR
        self._interactive_at = now

    def pause_wanted(self, now: float) -> bool:
        """Whether bulk should pause until little is in flight, so that a PING can measure the path itself.

        Without it the round trip that is measured under load contains the queue, the cap grows with it, and the
        queue with the cap (BBR's ProbeRTT is there for the same reason).
        """
        if self.in_flight <= CLEAN_FLIGHT or now - self._clean_at <= CLEAN_EVERY * self.rtt_min:
            return False
        if self._paused_at is None:
            self._paused_at = now
        if now - self._paused_at > max(DRAIN_LIMIT, 4 * self.rtt):
            # Not this time.
            self._paused_at = None
            self._clean_at = now
            return False
        return True

    @property
    def pausing(self) -> bool:
        """Whether bulk pauses for a PING."""
        return self._paused_at is not None

    def on_ping(self, now: float, received: int, *, report: bool = False) -> None:
        """A PING goes out, the only one: its PONG reports the datagrams before it. ``received`` bytes came so far.

        One that is only a ``report`` measures nothing: bulk goes on pausing for one that does.
        """
        self._reporting += self.unreported
        self.unreported = 0
        self._received = received
        self._ping_clean = self.in_flight <= CLEAN_FLIGHT and not report
        if report:
            return
        if self._ping_clean:
            self._clean_at = now
        self._ping_paused = self._paused_at is not None
        self._paused_at = None

    def on_rtt(self, sample: float, received: int) -> None:
        """A PONG came ``sample`` seconds after its PING; ``received`` bytes in all."""
        self.in_flight -= self._reporting
        self._reporting = 0
        # No path takes longer; a peer that holds its answers back does, or a process that was stopped meanwhile. Deadlines are
        # stretched by multiples of this.
        sample = min(max(sample, 1e-6), LONGEST)
        self.rtt = sample if not self.rtt else self.rtt + (sample - self.rtt) / 8
        if self._ping_clean and not (self._ping_paused and received - self._received > CLEAN_FLIGHT):
            paths = self._paths
            paths.append(sample)
            del paths[:-REMEMBERED]
            latest = paths[-AGREEING:]
            if min(latest) > LONGER * min(paths) + SLACK_LOOSE:
                paths[:] = latest
            self.rtt_min = min(paths)
            self._rates.append(0.0)
            del self._rates[: -AGREEING - 2]
            self.rate = max(self._rates)

    def on_ack(self, seq: int, now: float) -> None:
        """The peer took in ``seq`` frames in all; ``acked <= seq <= sent`` was checked."""
        sizes, first = self._sizes, self._first
        end = first + seq - self.acked
        freed = 0
        for at in range(first, end):
            freed += sizes[at]
        if 2 * end >= len(sizes):  # no more is moved than is dropped
            del sizes[:end]
            end = 0
        self._first = end
        self.acked = seq
        self.in_flight -= freed
        self.sequenced -= freed
        self.delivered += freed
        batches = self._batches
        last = None
        while batches and batches[0][0] <= seq:
            last = batches.popleft()
        if last is not None:
            _, sent_at, delivered, acked_at, first_sent_at, limited = last
            self._acked_at = now
            self._first_sent_at = sent_at
            # The slower of sending and acknowledging: ACKs that were held up and come together prove no speed.
            elapsed = max(now - acked_at, sent_at - first_sent_at)
            if elapsed > 0:
                rate = (self.delivered - delivered) / elapsed
                if (not limited or rate > self.rate) and rate > self._rates[-1]:
                    self._rates[-1] = rate
                    self.rate = max(self.rate, rate)

    def reconnected(self) -> None:
        """What is in flight goes again, on another path: estimates start anew."""
        self._batches.clear()
        self._batched = self.sent
        self._rates = [0.0]
        self._paths.clear()
        self._clean_at = -math.inf
        self._ping_clean = self._ping_paused = False
        self._paused_at = None
        self._received = 0
        self.rate = self.rtt = self.rtt_min = 0.0

    def cap(self, now: float) -> int:
        """How many bytes may be in flight at ``now``."""
        if self.tight:
            self.tight = now - self._interactive_at < INTERACTIVE_FOR
            rtt = self.rtt_min
            cap = int(self.rate * min(GAIN_TIGHT * (rtt + SLACK_TIGHT), GAIN_LOOSE * (rtt - TURNS)))
        else:
            cap = int(GAIN_LOOSE * self.rate * (self.rtt_min + SLACK_LOOSE))
        return cap if cap > self._floor else self._floor

    def frame_limit(self) -> int:
        """Largest DATA payload worth sending: about 8 ms of the rate, at least ``FRAME_FLOOR``."""
        return max(FRAME_FLOOR, int(self.rate * 0.008)) if self.rate else 65_535

    def assert_invariants(self) -> None:
        """For tests."""
        assert self.acked + len(self._sizes) - self._first == self.sent
        assert sum(self._sizes[self._first :]) == self.sequenced == self.in_flight - self.unreported - self._reporting
        assert self.rate == max(self._rates)
        assert self.rtt_min == min(self._paths, default=0.0)
