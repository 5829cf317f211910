"""A TCP proxy between two programs that makes the path long, slow, or faulty while they run."""

from __future__ import annotations

import asyncio
import math
import socket
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeAlias, get_args

import anyio

from konnektor.acceptor import Acceptor
from konnektor.addresses import format_hostport, parse_hostport
from konnektor.errors import ConfigurationError, ListenError
from konnektor.limits import MIB
from konnektor.listening import BACKLOG
from konnektor.testing.links import CutOrder, Link, Socket

__all__ = ["FaultProxy", "ProxiedConnection", "ProxyStats", "Side", "delaying_relay"]

BUFFER: Final = 64 * MIB

Side: TypeAlias = Literal["client", "target"]
"""Who dialed the proxy, or whom the proxy dialed. A direction is named after the side that it leads to."""

SIDES: Final[tuple[Side, ...]] = get_args(Side)


@dataclass(frozen=True, slots=True)
class ProxyStats:
    """What a proxy has done so far.

    Attributes:
        connections: accepted.
        to_client: bytes delivered to clients.
        to_target: bytes delivered to the target.
        faults: how often a connection was hit, by the name of the method; each ``cut_after`` when it cuts.
    """

    connections: int
    to_client: int
    to_target: int
    faults: Mapping[str, int]


class _Faults(ABC):
    """What can be done to a connection, and so to all connections of a proxy.

    Methods take effect at once, never wait, and are to be called from the event loop's thread. ``to`` is the side
    that a direction leads to; None means both directions.
    """

    __slots__ = ()

    @abstractmethod
    def _each(self) -> Collection[ProxiedConnection]: ...

    def _hit_links(self, fault: str, to: Side | None) -> Iterator[Link]:
        sides = _sides(to)
        for connection in self._each():
            connection._hit(fault)
            for side in sides:
                yield connection._links[side]

    def delay(self, seconds: float, *, to: Side | None = None) -> None:
        """Every byte, and the end, is under way for so long: half a round trip. What is under way keeps its time.

        Exact to about a millisecond. Order is kept, and connecting itself is not delayed.
        """
        _check_seconds("seconds", seconds)
        for link in self._hit_links("delay", to):
            link.delay = seconds

    def drip(self, rate: float | None, *, to: Side | None = None) -> None:
        """At most ``rate`` bytes a second are delivered, byte by byte where that is few; None lifts the limit.

        Bytes beyond it wait in the proxy's buffer; when that is full, the sender is not read.
        """
        _check_rate(rate)
        for link in self._hit_links("drip", to):
            link.set_rate(rate)

    def silence(self, *, to: Side | None = None) -> None:
        """Goes on accepting bytes and delivers nothing, neither data nor ends, until ``resume``: a half-open connection.

        What is accepted is kept, so that nothing is missing afterwards; when the buffer is full, the sender is not read.
        TCP itself goes on: acknowledgements and keep-alives are the kernel's, and it answers them.
        """
        for link in self._hit_links("silence", to):
            link.set_silent(True)

    def resume(self, *, to: Side | None = None) -> None:
        """Ends a silence: all that was kept is delivered."""
        for side in _sides(to):
            for connection in self._each():
                connection._links[side].set_silent(False)

    def cut(self, first: Side | None = None, *, other_after: float | None = None) -> None:
        """Resets the connection (RST to both sides); what is under way is lost.

        Args:
            first: the side that notices now. For the other one the connection is silent, and what it sends is lost,
                until it is cut as well.
            other_after: seconds after which that happens; None waits for another ``cut``.
        """
        _sides(first)
        if other_after is not None:
            _check_seconds("other_after", other_after)
            if first is None:
                raise ConfigurationError("other_after needs first: say which side notices now")
        for connection in self._each():
            connection._hit("cut")
            connection._cut(first, other_after)

    def cut_after(self, count: int | None, *, to: Side) -> None:
        """Cuts as soon as the ``count``-th byte from now on has arrived at a side, and not one more.

        A reset does not destroy them: the side's kernel has acknowledged them all. 0 cuts at once; None calls it off.
        """
        order = _order(count)
        (side,) = _sides(to)
        for connection in self._each():
            connection._arm(order, side)

    def close(self) -> None:
        """Ends both directions now (FIN to both sides); what is under way and what still comes is lost.

        The sockets are closed when the sides have ended, too.
        """
        for connection in self._each():
            connection._hit("close")
            connection._close()


class ProxiedConnection(_Faults):
    """One connection of a ``FaultProxy``; its faults are its own.

    Attributes:
        peername: the client's address, as ``socket.getpeername`` gives it.
    """

    __slots__ = ("_client", "_links", "_proxy", "_second_cut", "_target", "peername")

    def __init__(self, proxy: FaultProxy, peername: Any) -> None:
        self.peername = peername
        self._proxy = proxy
        self._second_cut: asyncio.TimerHandle | None = None
        self._client = Socket(self._lost)
        self._target = Socket(self._lost)
        ends: tuple[tuple[Side, Socket, Socket], ...] = (
            ("client", self._target, self._client),
            ("target", self._client, self._target),
        )
        self._links: dict[Side, Link] = {
            side: Link(
                source,
                sink,
                delay=proxy._delays[side],
                rate=proxy._rates[side],
                buffer=proxy._buffer,
                on_cut=self._cut_at_byte,
            )
            for side, source, sink in ends
        }

    def delivered(self, to: Side) -> int:
        """Bytes delivered to a side so far."""
        (side,) = _sides(to)
        return self._links[side].delivered

    def _start(self, sock: socket.socket, target: _Address | None, orders: Mapping[Side, CutOrder | None]) -> None:
        self._client.attach(sock)
        if target is not None:
            self._target.dial(*target)
        for side, order in orders.items():
            self._arm(order, side)

    def _each(self) -> Collection[ProxiedConnection]:
        return (self,)

    def _hit(self, fault: str) -> None:
        self._proxy._faults[fault] += 1

    def _arm(self, order: CutOrder | None, side: Side) -> None:
        self._links[side].set_order(order)

    def _cut_at_byte(self) -> None:
        self._hit("cut_after")
        self._cut(None, None)

    def _cut(self, first: Side | None, other_after: float | None) -> None:
        self._stop()
        sides = {"client": self._client, "target": self._target}
        for side in SIDES if first is None else (first,):
            sides.pop(side).reset()
        if other_after is not None:
            (other,) = sides.values()
            self._second_cut = asyncio.get_running_loop().call_later(other_after, other.reset)

    def _close(self) -> None:
        self._stop()
        self._client.finish()
        self._target.finish()

    def _stop(self) -> None:
        """Nothing is delivered any more."""
        if self._second_cut is not None:
            self._second_cut.cancel()
        for link in self._links.values():
            link.close()

    def _lost(self) -> None:
        if self._client.lost and self._target.lost:
            self._stop()
            self._proxy._forget(self)


class FaultProxy(_Faults):
    """A TCP proxy whose path is as long, as slow and as faulty as a test wants, while it runs.

        async with FaultProxy(control_plane.address, delay=0.005) as proxy:
            async with kk.Worker([proxy.address], tls=files, allow=rules) as worker:
                await worker.wait_connected()
                proxy.delay(0.040)  # the round trip is 80 ms from here on
                proxy.cut()  # RST to both sides; the worker dials again, and passes

    An async context manager: entering listens, leaving resets what is still connected. Faults hit all connections
    there are, or one: ``for connection in proxy: connection.cut()``. ``delay``, ``drip`` and ``cut_after`` are for
    connections to come as well. Without a fault, bytes and ends pass in order: a FIN as a FIN, a reset as a reset. A target
    that is not reached resets the client's connection.

    A path is a pipe that holds as much as is under way, each direction for itself: to fill one of 500 MB/s with 50 ms
    takes 25 MB. So ``buffer`` should be above the rate times the delay; it is also the queue that a limited rate builds up.
    TCP on either side of the proxy sees loopback: no slow start, no loss. The proxy's own kernel buffers come on top,
    some MB each.

    Args:
        target: ``HOST:PORT`` to dial for each connection.
        listen: ``HOST:PORT``; port 0 chooses one.
        delay: seconds that each byte is under way, in either direction: half a round trip.
        rate: bytes a second in each direction of a connection; None is no limit.
        buffer: bytes under way in each direction of a connection. While it is full, the sender is not read.

    Raises:
        ConfigurationError: an argument is not what it should be, or the target does not resolve.
        ListenError: the address cannot be listened on.
    """

    def __init__(
        self,
        target: str,
        *,
        listen: str = "127.0.0.1:0",
        delay: float = 0.0,
        rate: float | None = None,
        buffer: int = BUFFER,
    ) -> None:
        self._target = parse_hostport(target)
        self._listen = parse_hostport(listen, zero=True)
        _check_seconds("delay", delay)
        _check_rate(rate)
        _check_count("buffer", buffer, 1)
        self._delays: dict[Side, float] = dict.fromkeys(SIDES, delay)
        self._rates: dict[Side, float | None] = dict.fromkeys(SIDES, rate)
        self._buffer = buffer
        self._orders: dict[Side, CutOrder | None] = {}
        self._connections: dict[ProxiedConnection, None] = {}  # in the order they came
        self._accepted = 0
        self._delivered: Counter[Side] = Counter()  # by connections that are gone
        self._faults: Counter[str] = Counter()
        self._swallowing = False
        self._dial_to: _Address | None = None
        self._listen_on: _Address | None = None
        self._port: socket.socket | None = None
        self._acceptor: Acceptor | None = None
        self._changed = asyncio.Event()

    # Life

    async def __aenter__(self) -> Self:
        self._dial_to = await _resolve("target", *self._target)
        family, address = await _resolve("listen", *self._listen)
        # Keeps the port while connections are refused: one that is bound, but does not listen, refuses them.
        self._port = _bind(family, address)
        self._listen_on = family, self._port.getsockname()
        try:
            self.admit()
        except BaseException:
            self._port.close()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._port is not None
        self.refuse()
        self._port.close()
        self._listen_on = None
        for connection in self._each():
            connection._cut(None, None)
        with anyio.CancelScope(shield=True):
            while self._connections:
                self._changed.clear()
                await self._changed.wait()

    @property
    def address(self) -> str:
        """``HOST:PORT`` to dial."""
        return format_hostport(*self._listening()[1][:2])

    @property
    def port(self) -> int:
        """The port of it."""
        return int(self._listening()[1][1])

    def _listening(self) -> _Address:
        if self._listen_on is None:
            raise ConfigurationError("the proxy was not started: enter it with async with")
        return self._listen_on

    # Connections

    def __iter__(self) -> Iterator[ProxiedConnection]:
        """The connections there are, the oldest first."""
        return iter(self._each())

    def __len__(self) -> int:
        return len(self._connections)

    def _each(self) -> Collection[ProxiedConnection]:
        return list(self._connections)

    def _accept(self, sock: socket.socket, peername: Any) -> None:
        self._accepted += 1
        connection = ProxiedConnection(self, peername)
        self._connections[connection] = None
        connection._start(sock, None if self._swallowing else self._dial_to, self._orders)
        if self._swallowing:
            connection._hit("swallow")

    def _forget(self, connection: ProxiedConnection) -> None:
        if connection in self._connections:
            del self._connections[connection]
            for side in SIDES:
                self._delivered[side] += connection.delivered(side)
            self._changed.set()

    def stats(self) -> ProxyStats:
        """Counters over all connections so far."""
        to = {side: self._delivered[side] + sum(each.delivered(side) for each in self) for side in SIDES}
        return ProxyStats(self._accepted, to["client"], to["target"], dict(self._faults))

    # New connections

    def admit(self) -> None:
        """New connections pass, as at first.

        Raises:
            ListenError: another program has taken the port meanwhile, which takes intent.
        """
        self._swallowing = False
        if self._acceptor is None:
            sock = _bind(*self._listening())
            sock.listen(BACKLOG)
            self._acceptor = Acceptor(sock, self._accept)

    def refuse(self) -> None:
        """New connections are refused (ECONNREFUSED) until ``admit``."""
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None

    def swallow(self) -> None:
        """New connections are accepted and lead nowhere, as if the host were lost just then, until ``admit``.

        Those that were swallowed stay so; ``cut`` and ``close`` end them.
        """
        self.admit()
        self._swallowing = True

    # Faults that are for connections to come as well

    def delay(self, seconds: float, *, to: Side | None = None) -> None:
        super().delay(seconds, to=to)
        for side in _sides(to):
            self._delays[side] = seconds

    def drip(self, rate: float | None, *, to: Side | None = None) -> None:
        super().drip(rate, to=to)
        for side in _sides(to):
            self._rates[side] = rate

    def cut_after(self, count: int | None, *, to: Side) -> None:
        """Cuts the connection on which the ``count``-th byte from now on arrives at a side first, and not one more.

        Each connection counts by itself, and those to come count as well; done once. The side's kernel has acknowledged
        the bytes, so the reset does not destroy them. 0 cuts the next one at once, if there is none now; None calls it off.
        """
        order = _order(count)
        (side,) = _sides(to)
        self._orders[side] = order
        for connection in self._each():
            connection._arm(order, side)


def delaying_relay(
    target: str, round_trip: float, *, listen: str = "127.0.0.1:0", rate: float | None = None, buffer: int = BUFFER
) -> FaultProxy:
    """A path with a round trip of so many seconds: ``FaultProxy`` with half of it each way.

    The arguments are those of ``FaultProxy``. ``delay`` changes it at run time, and takes the time of one way.
    """
    _check_seconds("round_trip", round_trip)
    return FaultProxy(target, listen=listen, delay=round_trip / 2, rate=rate, buffer=buffer)


_Address: TypeAlias = tuple[int, Any]
"""Family, and what ``socket.connect`` takes."""


async def _resolve(what: str, host: str, port: int) -> _Address:
    try:
        infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        where = format_hostport(host, port)
        raise ConfigurationError(f"{what} {where} does not resolve ({error.strerror})") from None
    return infos[0][0], infos[0][4]


def _bind(family: int, address: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise ListenError(f"cannot listen on {format_hostport(*address[:2])}: {error.strerror}") from None
    return sock


# Arguments


def _sides(to: Side | None) -> tuple[Side, ...]:
    if to is None:
        return SIDES
    if to not in SIDES:
        raise ConfigurationError(f"{to!r} is not a side: write 'client', 'target', or None for both")
    return (to,)


def _check_seconds(name: str, value: float) -> None:
    if not _is_number(value) or not 0 <= value < math.inf:
        raise ConfigurationError(f"{name} must be a number of seconds of at least 0, not {value!r}")


def _check_rate(rate: float | None) -> None:
    if rate is not None and not (_is_number(rate) and 0 < rate < math.inf):
        raise ConfigurationError(f"rate must be bytes a second, above 0, or None for no limit, not {rate!r}")


def _check_count(name: str, count: object, least: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise ConfigurationError(f"{name} must be a number of bytes of at least {least}, not {count!r}")


def _order(count: int | None) -> CutOrder | None:
    if count is None:
        return None
    _check_count("count", count, 0)
    return CutOrder(count)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
