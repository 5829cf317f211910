"""What the peer owes: an end to each stream that this side has stopped or refused, and by when.

Theory of operation. That STOP or REFUSE has arrived is known by its ACK; within RESET_OWED of that the peer must have ended its
half. The RESET is sequenced, and stands behind whatever the peer had to say before: after a resume, behind all that is sent
again. So as long as sequenced frames come nobody is late, up to RESET_OWED_AT_MOST. Without a connection nothing can come: the
time stands still, and is given anew with the next one.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from konnektor.mux import Mux
    from konnektor.mux_stream import MuxStream

__all__ = ["RESET_OWED", "OwedEnds"]

RESET_OWED: Final = 30.0
"""Seconds after the ACK of a STOP or REFUSE, or after the last look that found sequenced frames to have come since."""

RESET_OWED_AT_MOST: Final = 600.0
"""Seconds after the ACK beyond which those are no excuse."""

OVER: Final = 64
"""Streams that have ended and are still remembered, at least, before they are swept out."""


class OwedEnds:
    """Those of one session. Its length is the number of STOPs and REFUSEs that are not acknowledged."""

    __slots__ = ("_mux", "_said")

    def __init__(self, mux: Mux) -> None:
        self._mux = mux
        self._said: deque[tuple[int, int]] = deque()
        """Number in the sequence, and stream."""

    def __len__(self) -> int:
        return len(self._said)

    def said(self, stream: MuxStream) -> None:
        """STOP or REFUSE was the frame that went out last."""
        mux, said = self._mux, self._said
        said.append((mux.flight.sent, stream.id))
        if len(said) > 2 * len(mux.streams) + OVER:
            # The peer ended most of them without acknowledging anything. However long it goes on so, nothing is kept of them.
            self._said = deque(each for each in said if each[1] in mux.streams)

    def acked(self, seq: int, now: float) -> None:
        """The peer has taken in ``seq`` frames: from here on it has its time for those that were among them."""
        said = self._said
        while said and said[0][0] <= seq:
            stream = self._mux.streams.get(said.popleft()[1])
            if stream is not None and stream.owes:
                self._expect(stream, now)

    def _expect(self, stream: MuxStream, now: float) -> None:
        stream.owed = now, self._mux.inbound.acks.seq
        self._mux.unwatch(stream)
        self._mux.watch(stream, now + RESET_OWED)

    def late(self, stream: MuxStream, now: float, *, stalled: bool) -> str | None:
        """The time is over. What the peer has to be told for it; None if it has more time, or has long ended its half.

        Args:
            stalled: this process stood still meanwhile: what it is owed may be there, unread.
        """
        if stream.owed is None or not stream.owes:
            return None
        since, seen = stream.owed
        came = self._mux.inbound.acks.seq
        if stalled or (came > seen and now < since + RESET_OWED_AT_MOST):
            stream.owed = since, came
            self._mux.watch(stream, now + RESET_OWED)
            return None
        return f"stream {stream.id} was not ended within {now - since:.0f} s of STOP or REFUSE"

    def suspended(self) -> None:
        """The connection broke."""
        for stream in self._mux.streams.values():
            if stream.owed is not None:
                self._mux.unwatch(stream)

    def resumed(self, now: float) -> None:
        """There is another one."""
        for stream in self._mux.streams.values():
            if stream.owed is not None and stream.owes:
                self._expect(stream, now)

    def clear(self) -> None:
        """The session is over."""
        self._said.clear()
