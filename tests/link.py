"""A path between the two multiplexers of a ``Pair``: a rate, a delay and a queue each way, in virtual time.

Nothing here sleeps or depends on the machine: a run gives the same bytes at the same times whenever and wherever. Each
side is driven as ``Pair`` drives it, so a wake-up that the core forgets shows as a transfer that stops.
"""

import heapq
import itertools
from collections import deque

from konnektor.limits import KIB, MIB
from tests.pair import Recorder

PIECE = 16 * KIB
"""Bytes arrive in pieces of this size, as TLS records do."""
BLOCK = bytes(64 * KIB)


class Meter(Recorder):
    """A sink that counts what comes, consuming it at once, and writes as long as it may."""

    def __init__(self, stream, *, reading=True):
        super().__init__(auto=reading)
        self.stream = stream
        self.received = 0
        self.writing = False
        stream.sink = self

    def data_received(self, data):
        self.received += len(data)
        if self.auto:
            self.stream.consumed(len(data))

    def write(self):
        """Sends without end from here on."""
        self.writing = True
        self.writable()

    def writable(self):
        while self.writing and self.stream.queued < 4 * len(BLOCK):
            self.stream.write(BLOCK)
        self.stream.want_room(2 * len(BLOCK))

    def failed(self, error, /, *, receiving, sending):
        self.writing = False
        super().failed(error, receiving=receiving, sending=sending)


class Link:
    """The path; make streams with ``open``, then let time pass with ``run``.

    Args:
        delay: seconds from one side to the other.
        rate: bytes a second each way.
        queue: bytes that wait at the bottleneck, the sender's own kernel included, before the transport takes no more.

    ``delay`` and ``rate`` may be changed meanwhile; what is under way keeps its time. ``watch`` is called after each event.
    What comes to a side that has lost its connection is lost, and what a blocked side has to say waits.
    """

    def __init__(self, pair, *, delay, rate, queue=16 * MIB, watch=None):
        self.pair = pair
        self.delay = delay
        self.rate = rate
        self.queue = queue
        self.watch = watch or (lambda: None)
        self._events = []
        self._order = itertools.count()
        self._free_at = dict.fromkeys(pair.sides, 0.0)
        self._arrives_at = dict.fromkeys(pair.sides, 0.0)
        self._under_way = {side: deque() for side in pair.sides}

    def open(self, opener=None, **kwargs):
        """A stream that both ends have: their meters."""
        opener = opener or self.pair.client
        stream = opener.open(**kwargs)
        for _ in range(10):  # beside bulk it may stand in a queue
            self.run(2 * self.delay + 0.01)
            if (theirs := opener.peer.opened[-1]).id == stream.id:
                break
        assert theirs.id == stream.id
        theirs.accept()
        meters = Meter(stream), Meter(theirs)
        self.run(2 * self.delay + 0.01)
        return meters

    def _at(self, when, call):
        heapq.heappush(self._events, (when, next(self._order), call))

    def _send(self, side):
        """Renders while the bottleneck's queue has room."""
        now = self.pair.now
        while side.wire or (side.pending and not side.blocked):
            backlog = (self._free_at[side] - now) * self.rate
            if backlog > self.queue:
                self._at(now + (backlog - self.queue / 2) / self.rate, lambda: None)
                return
            if side.pending and not side.blocked:
                side.render(64 * KIB)
            for size in [PIECE] * (len(side.wire) // PIECE) + [len(side.wire) % PIECE]:
                data, side.wire[:size] = bytes(side.wire[:size]), b""
                if data:
                    self._free_at[side] = max(now, self._free_at[side]) + size / self.rate
                    arrival = max(self._free_at[side] + self.delay, self._arrives_at[side])
                    self._arrives_at[side] = arrival
                    self._under_way[side].append(data)
                    self._at(arrival, lambda: self._arrive(side))

    def _arrive(self, side):
        data = self._under_way[side].popleft()
        peer = side.peer
        if not peer.gone or peer.machine is not peer.mux:
            side.carry(data)

    def stop(self):
        """The path is no more: what was under way is back on the sides' wires."""
        self._events.clear()
        for side, under_way in self._under_way.items():
            side.wire[:0] = b"".join(under_way)
            under_way.clear()

    def run(self, seconds):
        """Lets time pass, event by event."""
        pair = self.pair
        end = pair.now + seconds
        while True:
            for side in pair.sides:
                self._send(side)
            timers = [(side.timer, side) for side in pair.sides if side.timer is not None and side.error is None]
            timer, timed = min(timers, key=lambda each: each[0], default=(end, None))
            event = self._events[0][0] if self._events else end
            when = min(timer, event)
            if when >= end:
                pair.now = end
                return
            pair.now = max(pair.now, when)
            if event <= timer:
                heapq.heappop(self._events)[2]()
            else:
                pair.fire(timed)
            self.watch()

    def goodput(self, meter, seconds):
        """Bytes a second that ``meter`` takes while so much time passes."""
        before = meter.received
        self.run(seconds)
        return (meter.received - before) / seconds
