"""What goes on the wire next: deficit round robin over the streams that have something to send.

Theory of operation. A stream is *active* while it has data and credit. Active streams stand in one
of two queues, as in FQ-CoDel (RFC 8290 section 4.2): a stream that was idle enters ``fresh`` and goes
ahead of the ``waiting`` ones for one quantum; then it joins them. A stream found empty leaves.

Three departures. A deficit may be overdrawn by one frame, so that frames are never cut to fit. A
stream that keeps sending much *turns bulky*: it spends a bucket that refills at a fixed rate, and once
that is empty it enters behind the others, however often it runs dry: only what stays small stays ahead.
And when fresh streams have sent FRESH_RUN bytes in a row, a waiting one has a turn: many small streams
together slow a bulky one down and cannot starve it.

The quantum is the class's share: interactive 8, default 4, bulk 1, times the stream's weight.
"""

from __future__ import annotations

from typing import Final

from konnektor.limits import FULL_FRAME

__all__ = ["FRESH", "FRESH_RUN", "IDLE", "INTERACTIVE", "Flow", "Scheduler"]

IDLE: Final = 0
FRESH: Final = 1
WAITING: Final = 2

INTERACTIVE: Final = 0
"""The class whose streams say that delay matters to them."""

SHARES: Final = [8, 4, 1]
"""Of each class. (Compiled code would make a tuple anew each time it looks something up in it.)"""
QUANTUM: Final = FULL_FRAME // 4
"""Bytes of one share: by default a stream's turn is one full frame."""

BUCKET: Final = FULL_FRAME
"""A stream that sent this much beyond its refill is bulky."""

REFILL: Final = 4 * 1024 * 1024
"""Bytes a second that any stream may send without turning bulky."""

FRESH_RUN: Final = 4 * FULL_FRAME
"""Bytes fresh streams may send in a row while others wait."""


class Flow:
    """What the scheduler keeps on a stream, which derives from this.

    Args:
        priority: class: index into SHARES.

    Attributes:
        place: IDLE, FRESH or WAITING.
        deficit: bytes it may send before the next stream's turn.
        spent: how much of the bucket is gone.
        spent_at: when ``spent`` was true.
        priority: as given.
        weight: 1 to 255.
        behind: the next one in its queue.
    """

    __slots__ = ("behind", "deficit", "place", "priority", "spent", "spent_at", "weight")

    def __init__(self, priority: int) -> None:
        self.place: int = IDLE
        self.deficit = 0
        self.spent = 0.0
        self.spent_at = 0.0
        self.priority = priority
        self.weight = 1
        self.behind: Flow | None = None


class FlowQueue:
    """Flows in a row, linked through themselves: to stand in it takes no memory, and compiled no call of the interpreter's.

    Attributes:
        first: whose turn is next.
    """

    __slots__ = ("_last", "first")

    def __init__(self) -> None:
        self.first: Flow | None = None
        self._last: Flow | None = None

    def append(self, flow: Flow) -> None:
        """At the end; it stands in no other queue."""
        if self._last is None:
            self.first = flow
        else:
            self._last.behind = flow
        self._last = flow

    def popleft(self) -> Flow:
        """Takes out the first, which there must be."""
        flow = self.first
        assert flow is not None
        self.first, flow.behind = flow.behind, None
        if self.first is None:
            self._last = None
        return flow


class Scheduler:
    """The active streams of a session, in the order they are served. Constant time per call.

    Attributes:
        active: how many there are.
        fresh, waiting: the two queues; ``first`` of each, to look at.
    """

    __slots__ = ("_run", "active", "fresh", "waiting")

    def __init__(self) -> None:
        self.fresh = FlowQueue()
        self.waiting = FlowQueue()
        self._run = 0
        self.active = 0

    @property
    def contended(self) -> bool:
        """Whether streams are waiting behind a fresh one."""
        return self.fresh.first is not None and self.waiting.first is not None

    def add(self, flow: Flow) -> None:
        """The flow has something to send; nothing happens if that was known."""
        if flow.place != IDLE:
            return
        self.active += 1
        flow.deficit = SHARES[flow.priority] * flow.weight * QUANTUM
        if flow.spent < BUCKET:
            flow.place = FRESH
            self.fresh.append(flow)
        else:
            flow.place = WAITING
            self.waiting.append(flow)

    def next(self, *, fresh_only: bool = False) -> Flow | None:
        """Whose turn it is. The same one again until ``charge`` or ``remove`` moves it.

        Args:
            fresh_only: pass the waiting ones over: the connection is full enough for bulk.
        """
        waiting = self.waiting
        flow = self.fresh.first
        if flow is not None and (fresh_only or self._run < FRESH_RUN or waiting.first is None):
            return flow
        if fresh_only:
            return None
        while (flow := waiting.first) is not None and flow.deficit <= 0:
            flow.deficit += SHARES[flow.priority] * flow.weight * QUANTUM
            waiting.append(waiting.popleft())
        return flow

    def charge(self, flow: Flow, size: int, now: float) -> None:
        """The flow that ``next`` named sent ``size`` bytes and has more."""
        self._spend(flow, size, now)
        self._run = self._run + size if flow.place == FRESH else 0
        flow.deficit -= size
        if flow.place == FRESH and (flow.deficit <= 0 or flow.spent >= BUCKET):
            self.fresh.popleft()
            flow.place = WAITING
            self.waiting.append(flow)

    def charge_alone(self, flow: Flow, size: int, now: float) -> None:
        """The flow that ``next`` named, a waiting one, sent ``size`` bytes and has more, and no other has anything.

        Its turn goes on: who comes next finds it where it was.
        """
        self._run = 0
        self._spend(flow, size, now)

    def finish(self, flow: Flow, size: int, now: float) -> None:
        """The flow that ``next`` named sent ``size`` bytes (0: it was reset) and has no more for now."""
        # As ``_spend``, without a call more: this runs for every small message.
        spent = flow.spent - (now - flow.spent_at) * REFILL
        flow.spent = spent + size if spent > 0 else float(size)
        flow.spent_at = now
        if flow.place == FRESH:
            self._run += size
            self.fresh.popleft()
        else:
            self._run = 0
            self.waiting.popleft()
        flow.place = IDLE
        self.active -= 1

    def _spend(self, flow: Flow, size: int, now: float) -> None:
        """Takes ``size`` bytes out of the flow's bucket."""
        spent = flow.spent - (now - flow.spent_at) * REFILL
        flow.spent = spent + size if spent > 0 else float(size)
        flow.spent_at = now
