"""Which of many plain sockets are ready, by one epoll of their own: the event loop sees that and none of them.

To a loop each socket is an object and, on uvloop, six calls of epoll_ctl from its first ``add_reader`` to its end. It also
hears of a reset once and never again, if that comes in the same breath as data. Here a socket costs one entry and one
call, if its owner is content to be told of what is new (``EDGES``).
"""

from __future__ import annotations

import asyncio
import select
import threading
from typing import Final, Protocol

__all__ = ["EDGES", "FAILED", "READ", "WRITE", "Pollable", "Poller", "Watcher", "poller_of"]

READ: Final = select.EPOLLIN
WRITE: Final = select.EPOLLOUT
FAILED: Final = select.EPOLLERR | select.EPOLLHUP
"""Told whether it is asked for or not."""
EDGES: Final = select.EPOLLET
"""With the events to watch for: each is told when it begins, not for as long as it lasts, and all that there are once more after
``change`` (epoll(7)). The kernel then need not ask a socket that was served whether it is ready still."""

FEWEST_AT_ONCE: Final = 16
MOST_AT_ONCE: Final = 256
"""Sockets that are served before the loop has its turn: between these two, half of all that are watched. What they brought goes
out then, and the peer works on it while the other half is read. Were all of them read first, the two ends would take turns."""


class Pollable(Protocol):
    """Whoever has a socket that is watched."""

    def ready(self, events: int, /) -> None:
        """What the socket is ready for. May be told too much: the number may have been another socket's a moment ago."""


class Watcher:
    """For Pollables that are compiled, too: the method is called directly then, and not looked up by its name."""

    __slots__ = ()

    def ready(self, events: int, /) -> None:
        """See ``Pollable``."""
        raise NotImplementedError


class Poller:
    """The watched sockets of one loop. It has a descriptor only while there are any."""

    __slots__ = ("_epoll", "_pollables", "_served", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._epoll: select.epoll | None = None
        self._pollables: dict[int, Pollable] = {}
        self._served = False

    def add(self, fd: int, pollable: Pollable, events: int) -> None:
        """Watches a socket from now on.

        Raises:
            OSError: there are no more descriptors, or watches, to be had.
        """
        epoll = self._epoll
        if epoll is None:
            epoll = select.epoll()
            try:
                self.loop.add_reader(epoll.fileno(), self._ready)
            except BaseException:
                epoll.close()
                raise
            self._epoll = epoll
        try:
            epoll.register(fd, events)
        except BaseException:
            self._close_if_unused()
            raise
        self._pollables[fd] = pollable

    def change(self, fd: int, events: int) -> None:
        """Watches it for these events instead; of those that there are already it tells, too."""
        assert self._epoll is not None
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Watches it no more; before it is closed."""
        assert self._epoll is not None
        del self._pollables[fd]
        try:
            self._epoll.unregister(fd)
        finally:
            self._close_if_unused()

    def forget(self, fd: int) -> None:
        """Watches a socket no more that is about to be closed, and was watched for ``EDGES``: the kernel need not be told both.

        Where a forked process has a copy of the descriptor it goes on watching; but then an edge is told once, to nobody.
        """
        del self._pollables[fd]
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        epoll = self._epoll
        if epoll is not None and not self._pollables:
            self.loop.remove_reader(epoll.fileno())
            epoll.close()
            self._epoll = None

    def serve(self) -> None:
        """Serves those that are ready now, ahead of the loop, for which that is the turn."""
        if self._epoll is not None and not self._served:
            self._ready()
            self._served = True
            self.loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._served = False

    def _ready(self) -> None:
        epoll, pollables = self._epoll, self._pollables
        if epoll is None or self._served:  # ``serve`` was first
            return
        at_once = min(max(len(pollables) // 2, FEWEST_AT_ONCE), MOST_AT_ONCE)
        # Those that were told last are the last to be told again (epoll_wait(2) goes round): nobody starves.
        for fd, events in epoll.poll(0, at_once):
            pollable = pollables.get(fd)
            if pollable is not None:
                try:
                    if isinstance(pollable, Watcher):  # the same call, but where mypyc knows what it calls
                        pollable.ready(events)
                    else:
                        pollable.ready(events)
                except Exception as error:  # noqa: BLE001
                    # As a loop does with one of its own callbacks: the others are served.
                    self.loop.call_exception_handler(
                        {"message": "a socket's owner failed", "exception": error, "transport": pollable}
                    )


class _Local(threading.local):
    poller: Poller | None = None


_local = _Local()


def poller_of(loop: asyncio.AbstractEventLoop) -> Poller:
    """The loop's; a thread has one loop at a time."""
    poller = _local.poller
    if poller is None or poller.loop is not loop:
        poller = _local.poller = Poller(loop)
    return poller
