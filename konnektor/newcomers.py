"""The connections of a listener from accept until it is known what they want: how many there may be, and how long silent."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final

from konnektor.acceptor import Acceptor
from konnektor.addresses import format_hostport
from konnektor.poller import READ, poller_of

__all__ = ["Newcomers", "Place"]

PLACES: Final = 512
"""Newcomers of one listener, against floods of them; an eighth of the process's descriptors where that is less."""
FIRST_BYTE: Final = 2.0
"""Seconds that a client has for its first byte: it speaks as soon as it is connected, or nobody is there."""

logger: Final = logging.getLogger("konnektor.listening")


class Place:
    """What a newcomer has that has begun to speak."""

    __slots__ = ("_on_left",)

    def __init__(self, on_left: Callable[[], None]) -> None:
        self._on_left: Callable[[], None] | None = on_left

    def leave(self) -> None:
        """It is known what the connection wants, or it is over; more than once is no more than once."""
        if self._on_left is not None:
            on_left, self._on_left = self._on_left, None
            on_left()


class _Silent:
    """A connection from which not a byte came yet, and whoever waits for one."""

    __slots__ = ("_newcomers", "_poller", "_timer", "address", "sock")

    def __init__(self, newcomers: Newcomers, sock: socket.socket, address: Any) -> None:
        loop = asyncio.get_running_loop()
        self._newcomers = newcomers
        self.sock = sock
        self.address = address
        self._poller = poller_of(loop)
        self._poller.add(sock.fileno(), self, READ)
        self._timer = loop.call_later(FIRST_BYTE, newcomers._expired, self)

    def ready(self, events: int) -> None:
        if not _is_silent(self.sock):
            self._newcomers._spoken(self)

    def forget(self) -> None:
        self._timer.cancel()
        self._poller.remove(self.sock.fileno())


class Newcomers:
    """Accepts, and keeps the bounds.

    When the places are taken, the oldest connection that has said nothing makes room: silence costs a stranger nothing,
    and must not keep those out who have something to say. If all have begun to speak, others wait in the kernel's backlog.

    Args:
        sockets: listening, and owned from now on.
        heard: called with each connection that speaks or ends: its socket, which is the callee's, the peer's address, and
            a place to be left. Raising OSError it leaves both to the caller.
        modest: as an ``Acceptor``.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        heard: Callable[[socket.socket, Any, Place], object],
        *,
        modest: bool = False,
    ) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._places = PLACES if soft == resource.RLIM_INFINITY else max(1, min(PLACES, soft // 8))
        self._heard = heard
        self._silent: dict[_Silent, None] = {}
        self._speaking = 0
        self._crowded = False
        self._full = False
        self._acceptors = [Acceptor(sock, self._accepted, modest=modest) for sock in sockets]
        self.name = self._acceptors[0].name

    def __len__(self) -> int:
        return len(self._silent) + self._speaking

    def _accepted(self, sock: socket.socket, address: Any) -> None:
        # What made it acceptable comes with the client's first words, or right before them.
        if _is_silent(sock):
            self._silent[_Silent(self, sock, address)] = None
        else:
            self._begin(sock, address)
        if len(self) > self._places:
            self._make_room()
        elif len(self) <= self._places // 2:
            self._crowded = False

    def _make_room(self) -> None:
        if not self._crowded:  # told once, until it gets better
            logger.warning(
                "%d connections to %s have not said what they want: of those that are silent the oldest go",
                self._places, self.name,
            )  # fmt: skip
        self._crowded = True
        while self._silent and len(self) > self._places:
            oldest = next(iter(self._silent))
            if _is_silent(oldest.sock):
                self._drop(oldest)
            else:
                self._spoken(oldest)

    def _begin(self, sock: socket.socket, address: Any) -> None:
        place = Place(self._left)
        self._speaking += 1
        if self._speaking >= self._places:
            self._full = True
            for acceptor in self._acceptors:
                acceptor.pause()
        try:
            self._heard(sock, address, place)
        except BaseException:
            place.leave()
            raise

    def _left(self) -> None:
        self._speaking -= 1
        if self._full and self._speaking < self._places:
            self._full = False
            for acceptor in self._acceptors:
                acceptor.resume()

    def _spoken(self, silent: _Silent) -> None:
        self._forget(silent)
        try:
            self._begin(silent.sock, silent.address)
        except OSError:  # there is no descriptor left for what watches it
            silent.sock.close()

    def _expired(self, silent: _Silent) -> None:
        address = silent.address
        peer = f"the client at {format_hostport(*address[:2])}" if isinstance(address, tuple) else "a local client"
        logger.warning("refused a connection: %s said nothing for %g s", peer, FIRST_BYTE)
        self._drop(silent)

    def _forget(self, silent: _Silent) -> None:
        del self._silent[silent]
        silent.forget()

    def _drop(self, silent: _Silent) -> None:
        self._forget(silent)
        silent.sock.close()

    def close(self, *, hear: bool = False) -> None:
        """Takes no more. Those that have said nothing are dropped, or, with ``hear``, handed over as if they had."""
        for acceptor in self._acceptors:
            acceptor.close()
        for silent in list(self._silent):
            if hear:
                self._spoken(silent)
            else:
                self._drop(silent)


def _is_silent(sock: socket.socket) -> bool:
    try:
        sock.recv(1, socket.MSG_PEEK)
    except (BlockingIOError, InterruptedError):
        return True
    except OSError:  # reset: who reads will be told
        return False
    return False
