"""Receive buffers that connections share: an idle one holds none.

Both asyncio and uvloop call ``get_buffer``, read, and call ``buffer_updated`` without another
protocol in between, so one buffer a thread serves every connection. The exception is a protocol that
is fed from within another's ``buffer_updated`` (a session inside a stream): it finds the buffer busy and
gets one of its own. What is at the end of a read waits until all of it is decrypted, so it is no larger than two frames.
"""

from __future__ import annotations

import threading
from typing import Final

__all__ = ["Scratch", "scratch"]

SIZE: Final = 128 * 1024


class Scratch:
    """A buffer and whether somebody is parsing in it."""

    __slots__ = ("busy", "view")

    def __init__(self) -> None:
        self.view = memoryview(bytearray(SIZE))
        self.busy = False


class _Local(threading.local):
    def __init__(self) -> None:
        self.scratch = Scratch()


_local = _Local()


def scratch() -> Scratch:
    """This thread's buffer, or a fresh one while that is busy."""
    shared = _local.scratch
    return Scratch() if shared.busy else shared
