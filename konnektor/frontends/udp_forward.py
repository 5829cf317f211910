"""Fixed forwards of UDP: each address that sends to a local one gets a stream of its own to one destination."""

from __future__ import annotations

import asyncio
import socket
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from konnektor.errors import KonnektorError, PeerError, StreamError
from konnektor.session import Session
from konnektor.stream_types import Udp
from konnektor.udp_relay import IDLE, UdpRelay, UdpSocket
from konnektor.udp_wildcard import WildcardSocket, is_wildcard

__all__ = ["UdpForward"]

MAX_FLOWS: Final = 512
"""Senders that one listener serves at once: source addresses are easily made up, and each costs the worker a socket."""

HOLD: Final = 1.0
"""Seconds after a refusal in which nobody new is served: an answer to every packet would be a flood."""


class UdpForward:
    """One listening socket and its *flows*: for each sender a stream, until it is idle or the table is full.

    When it is full, the flow that was used least recently makes room.

    Args:
        sock: bound, and this object's from now on.
        choose: the session to use now; raises a KonnektorError if there is none.
        request: what to open.
        on_refused: told why a stream could not be opened.
        on_closed: called once, with this object, when everything is closed.
        idle: seconds without a datagram after which a flow ends.
        max_flows: as ``MAX_FLOWS``.
    """

    def __init__(
        self,
        sock: socket.socket,
        choose: Callable[[], Session],
        request: Udp,
        on_refused: Callable[[KonnektorError], object],
        on_closed: Callable[[UdpForward], object],
        *,
        idle: float = IDLE,
        max_flows: int = MAX_FLOWS,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._choose = choose
        self._request = request
        self._on_refused = on_refused
        self._idle = idle
        self._max_flows = max_flows
        self._flows: OrderedDict[Any, UdpRelay] = OrderedDict()
        self._held_until = 0.0
        self._leaving = False
        # Who asks two of our addresses from one port has two flows: each answers from the address that was asked.
        kind = WildcardSocket if is_wildcard(sock) else UdpSocket
        self._socket = kind(sock, self._received, partial(on_closed, self))

    async def open(self) -> None:
        """Begins to listen. Cancelled or failed, the socket is closed."""
        await self._socket.open()

    def __len__(self) -> int:
        return len(self._flows)

    def _received(self, data: bytes, address: Any) -> None:
        flow = self._flows.get(address)
        if flow is None:
            flow = self._flow(address)
            if flow is None:
                return
        else:
            self._flows.move_to_end(address)
        flow.packet_received(data)

    def _flow(self, address: Any) -> UdpRelay | None:
        """A stream for a sender that has none, or None."""
        if self._leaving or self._loop.time() < self._held_until:
            return None
        while len(self._flows) >= self._max_flows:
            next(iter(self._flows.values())).close()
        relay = UdpRelay(partial(self._reply, address), partial(self._ended, address), self._idle)
        self._flows[address] = relay
        try:
            relay.attach(self._choose().open_sink(self._request, relay))
        except KonnektorError as error:
            self._refused(error)
            relay.close()
            return None
        return relay

    def _reply(self, address: Any, data: bytes | memoryview) -> None:
        if address in self._flows:
            self._flows.move_to_end(address)
        self._socket.send(data, address)

    def _ended(self, address: Any, error: PeerError | None) -> None:
        del self._flows[address]
        if isinstance(error, StreamError) and error.refused:
            self._refused(error)
        if self._leaving and not self._flows:
            self._socket.close()

    def _refused(self, error: KonnektorError) -> None:
        # One line a second, too, and not one for each of those that were waiting.
        if self._loop.time() >= self._held_until:
            self._held_until = self._loop.time() + HOLD
            self._on_refused(error)

    def leave(self) -> None:
        """Serves nobody new, and waits no longer than it must for the last flow to end; then it closes."""
        self._leaving = True
        for flow in list(self._flows.values()):
            flow.leave()
        if not self._flows:
            self._socket.close()

    def close(self) -> None:
        """Ends every flow."""
        self._leaving = True
        for flow in list(self._flows.values()):
            flow.close()
        self._socket.close()
