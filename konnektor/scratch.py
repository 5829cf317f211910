"""Receive buffers that connections share: an idle one holds none.

Both asyncio and uvloop call ``get_buffer``, read, and call ``buffer_updated`` without another
protocol in between, so one buffer a thread serves every connection. The exception is a protocol that
is fed from within another's ``buffer_updated`` (a session inside a stream): it finds the buffer busy and
gets one of its own.
"""

from __future__ import annotations

import threading
from typing import Final

__all__ = ["Scratch", "scratch"]

SIZE: Final = (256 + 64 + 1) * 1024
"""What uvloop decrypts in one go, behind the beginning of a frame whose rest had not come: where it finds no room for all
of it, the rest waits for another turn of the loop, with an ACK of its own, and what is read meanwhile makes it stop reading."""


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
