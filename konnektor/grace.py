"""What the end of a drain's grace did to the streams that were still open: one line in the log."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Final

from konnektor.mux import MuxStream

if TYPE_CHECKING:
    from konnektor.session import Session

__all__ = ["Grace"]

BEFORE: Final = 0.1
"""Seconds ahead of its end that the open streams are noted: soon after it, those that were cut off are forgotten."""


class Grace:
    """One session's.

    Args:
        session: whose.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._ends = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._open: list[MuxStream] = []

    def begin(self, seconds: float) -> None:
        """A drain begins, or is to end sooner; to be called ahead of the multiplexer's."""
        loop = self._session.loop
        ends = loop.time() + max(0.0, seconds)
        if ends >= self._ends or self._session.closed:
            return
        self._ends = ends
        self._stop()
        if seconds <= BEFORE:
            self._note()
        else:
            self._timer = loop.call_at(ends - BEFORE, self._note)

    def _note(self) -> None:
        self._open = [stream for stream in self._session._mux.streams.values() if any(stream.wanted)]
        # Late enough for the multiplexer, whose timer rings at the end itself.
        self._timer = self._session.loop.call_at(self._ends + BEFORE, self._tell)

    def ended(self) -> None:
        """The session is over."""
        self._tell()
        self._ends = -math.inf

    def _tell(self) -> None:
        """Who was open just before, and was broken off at this side, was cut off."""
        self._stop()
        count = sum(1 for stream in self._open if stream.reset_text or stream.stop_code)
        self._open = []
        if count:
            session = self._session
            what = "1 stream" if count == 1 else f"{count} streams"
            session.log.warning("the grace is over: cut off %s with %s", what, session._peer())

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
