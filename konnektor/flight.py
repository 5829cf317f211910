"""How many bytes may be on their way unacknowledged, and the estimates that this rests on.

Theory of operation. Bytes in flight beyond what keeps the path busy only add delay: they stand in
kernel buffers and at the peer, and whatever is sent later stands behind them. So the sender keeps
at most ``cap`` bytes unacknowledged:

    cap = max(floor, gain * rate * (rtt_min + slack))

The rate is the largest recent delivery rate (draft-ietf-ccwg-bbr, "delivery rate samples"): bytes
acknowledged between the sending of a batch and its ACK, over the time between. The gain, 2, lets the cap
find a faster path by doubling each round trip. Samples of batches that ended for want of data say
nothing about the path and do not count, unless they are higher. The slack covers the peer's delay in
acknowledging. Gain and slack are tight while an interactive stream was active, because then delay matters more.

Datagrams are not acknowledged. The connection keeps its order, so a PONG tells that all sent before its PING has
arrived: until then they are in flight, too, and after REPORT_EVERY bytes of them a PING is wanted for their sake.
"""

from __future__ import annotations

from collections import deque
from typing import Final

__all__ = ["Flight", "WindowedMax", "WindowedMin"]

SLACK_TIGHT: Final = 0.000_25
SLACK_LOOSE: Final = 0.002
RTT_WINDOW: Final = 10.0
RATE_WINDOW: Final = 0.5
"""Shortest memory of the rate, in seconds; it is ten round trips where that is longer."""
GAIN_TIGHT: Final = 1.25
GAIN_LOOSE: Final = 2.0
INTERACTIVE_FOR: Final = 1.0

CLEAN_FLIGHT: Final = 64 * 1024
"""A PING sent behind no more than this measures the path rather than our own queue."""
REPORT_EVERY: Final = 64 * 1024
"""Bytes of datagrams after which the peer is asked how far it is."""
CLEAN_EVERY: Final = 40
"""Round trips between PINGs for which the queue is drained: at most a fortieth of the path is idle for it."""


class WindowedMax:
    """The largest of the samples of a sliding window, in two halves: constant space and time."""

    __slots__ = ("_older", "_since", "_younger")

    def __init__(self) -> None:
        self._older = self._younger = 0.0
        self._since = 0.0

    def add(self, value: float, now: float, window: float) -> None:
        """Takes in a sample."""
        if now - self._since > window / 2:
            self._older = self._younger if now - self._since <= window else 0.0
            self._younger = 0.0
            self._since = now
        self._younger = max(self._younger, value)

    @property
    def value(self) -> float:
        """The maximum, 0 without samples."""
        return max(self._older, self._younger)


class WindowedMin:
    """The smallest of the samples of a sliding window."""

    __slots__ = ("_inverse",)

    def __init__(self) -> None:
        self._inverse = WindowedMax()

    def add(self, value: float, now: float, window: float) -> None:
        """Takes in a sample above 0."""
        self._inverse.add(1 / value, now, window)

    @property
    def value(self) -> float:
        """The minimum, 0 without samples."""
        inverse = self._inverse.value
        return 1 / inverse if inverse else 0.0


class Flight:
    """The sequenced frames that were sent, until the peer acknowledges them; and the datagrams, until a PONG does.

    Attributes:
        sent: sequenced frames sent.
        acked: of these, acknowledged.
        delivered: their bytes.
        in_flight: bytes (headers included) of those between, and of datagrams.
        rtt: smoothed round trip in seconds, 0 before the first sample.
        unreported: bytes of datagrams since the last PING.
    """

    __slots__ = (
        "_acked_at",
        "_batched",
        "_batches",
        "_clean_at",
        "_first_sent_at",
        "_floor",
        "_interactive_at",
        "_rate",
        "_reporting",
        "_rtt_min",
        "_sizes",
        "acked",
        "delivered",
        "in_flight",
        "rtt",
        "sent",
        "unreported",
    )

    def __init__(self, floor: int) -> None:
        self._floor = floor
        self._sizes: deque[int] = deque()
        self._batches: deque[tuple[int, float, int, float, float, bool]] = deque()
        self._batched = 0
        self.delivered = 0
        self._acked_at = 0.0
        self._first_sent_at = 0.0
        self._rate = WindowedMax()
        self._rtt_min = WindowedMin()
        self._interactive_at = float("-inf")
        self._clean_at = float("-inf")
        self.unreported = 0
        self._reporting = 0
        self.sent = 0
        self.acked = 0
        self.in_flight = 0
        self.rtt = 0.0

    @property
    def rate(self) -> float:
        """Bytes per second the path was seen to take, 0 before the first sample."""
        return self._rate.value

    @property
    def rtt_min(self) -> float:
        """Smallest recent round trip in seconds, 0 before the first sample."""
        return self._rtt_min.value

    def on_sent(self, size: int) -> None:
        """One sequenced frame of ``size`` bytes went out."""
        self.sent += 1
        self.in_flight += size
        self._sizes.append(size)

    def on_datagram(self, size: int) -> None:
        """One datagram of ``size`` bytes, header included, went out."""
        self.in_flight += size
        self.unreported += size

    @property
    def sequenced(self) -> int:
        """Of the bytes in flight, those of sequenced frames."""
        return self.in_flight - self.unreported - self._reporting

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

    def on_interactive(self, now: float) -> None:
        """A small stream was served while bulky ones waited."""
        self._interactive_at = now

    def probe_wanted(self, now: float) -> bool:
        """Whether bulk should pause until little is in flight, so that a PING can measure the path itself.

        Without it the round trip that is measured under load contains the queue, the cap grows with it, and the
        queue with the cap (BBR's ProbeRTT is there for the same reason).
        """
        return self.in_flight > CLEAN_FLIGHT and now - self._clean_at > CLEAN_EVERY * self.rtt

    def on_ping(self, now: float) -> None:
        """A PING goes out, the only one: its PONG reports the datagrams before it."""
        self._reporting += self.unreported
        self.unreported = 0
        if self.in_flight <= CLEAN_FLIGHT:
            self._clean_at = now

    def on_rtt(self, sample: float, now: float) -> None:
        """A PONG came ``sample`` seconds after its PING."""
        self.in_flight -= self._reporting
        self._reporting = 0
        sample = max(sample, 1e-6)
        self.rtt = sample if not self.rtt else self.rtt + (sample - self.rtt) / 8
        self._rtt_min.add(sample, now, RTT_WINDOW)

    def on_ack(self, seq: int, now: float) -> None:
        """The peer took in ``seq`` frames in all; ``acked <= seq <= sent`` was checked."""
        sizes = self._sizes
        freed = 0
        for _ in range(seq - self.acked):
            freed += sizes.popleft()
        self.acked = seq
        self.in_flight -= freed
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
                if not limited or rate > self.rate:
                    self._rate.add(rate, now, max(RATE_WINDOW, 10 * self.rtt))

    def reconnected(self) -> None:
        """What is in flight goes again, on another path: estimates start anew."""
        self._batches.clear()
        self._batched = self.sent
        self._rate = WindowedMax()
        self._rtt_min = WindowedMin()
        self._clean_at = float("-inf")
        self.rtt = 0.0

    def cap(self, now: float) -> int:
        """How many bytes may be in flight at ``now``."""
        if now - self._interactive_at < INTERACTIVE_FOR:
            return max(self._floor, int(GAIN_TIGHT * self.rate * (self.rtt_min + SLACK_TIGHT)))
        return max(self._floor, int(GAIN_LOOSE * self.rate * (self.rtt_min + SLACK_LOOSE)))

    def frame_limit(self) -> int:
        """Largest DATA payload worth sending: about 8 ms of the rate, at least 4 KiB."""
        rate = self.rate
        return max(4096, int(rate * 0.008)) if rate else 65_535

    def assert_invariants(self) -> None:
        """For tests."""
        assert self.acked + len(self._sizes) == self.sent
        assert sum(self._sizes) == self.sequenced
