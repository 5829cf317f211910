"""Which worker serves which destination: routes, the grants that make claims count, and the choice among workers.

A destination's worker is, in this order:

1. the one its name says: ``HOST.WORKER.konnektor.internal`` (the suffix is stripped before the worker sees it). Both
   halves may contain dots, so the longest known name that leaves a usable host is the worker, whether it is connected
   or not: with workers ``b.c`` and ``c``, ``a.b.c`` is ``a`` at ``b.c``, and nowhere while that one is away. Known is
   who was connected since the start, and who is named by a grant or a forward (``Router.know``). After a restart a
   worker that nothing names is unknown until it has connected once: one whose name ends in another's wants a grant;
2. the one the ``Konnektor-Worker`` header says;
3. one that holds the most specific route: exact host, then the longest CIDR, then the glob with most literal
   characters;
4. one that holds the default route.

Workers with the same route share its destinations, the least loaded first. A less specific route is another place,
not a second try: ``10.0.0.7`` here may be a different host from ``10.0.0.7`` there.
"""

from __future__ import annotations

import re
from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from ipaddress import ip_network
from typing import Final, NamedTuple

from konnektor.addresses import (
    IPAddress,
    IPNetwork,
    parse_host,
    parse_network,
    quote,
    unwrap,
)
from konnektor.arguments import listed, named, object_or_text
from konnektor.errors import ConfigurationError, NoRouteError

__all__ = [
    "DEFAULT",
    "SUFFIX",
    "Route",
    "RouteChoice",
    "Router",
    "as_routes",
    "granted_routes",
    "parse_grant_route",
    "parse_route",
]

SUFFIX: Final = ".konnektor.internal"
"""Names under it say their worker: ``HOST.WORKER.konnektor.internal``."""

_GLOB: Final = re.compile(r"[-a-z0-9_.*?]{1,253}")


@dataclass(frozen=True, slots=True)
class Route:
    """Destinations that a worker serves. ``parse_route`` makes them from text.

    Attributes:
        match: a DNS name, a glob over names (``*`` any characters, ``?`` one), a network, or None for the default.
    """

    match: str | IPNetwork | None

    def __str__(self) -> str:
        if self.match is None:
            return "default"
        return f"host={self.match}" if isinstance(self.match, str) else f"cidr={self.match}"

    @property
    def glob(self) -> str | None:
        """The match if it is a glob."""
        return self.match if isinstance(self.match, str) and ("*" in self.match or "?" in self.match) else None

    def matches(self, destination: IPAddress | str) -> bool:
        """Whether the destination is one of its: an address (not an IPv4-mapped one), or a name in lower case."""
        if self.match is None:
            return True
        if not isinstance(self.match, str):
            return not isinstance(destination, str) and destination in self.match
        return isinstance(destination, str) and (
            destination == self.match if self.glob is None else fnmatchcase(destination, self.match)
        )

    def covers(self, other: Route) -> bool:
        """Whether a grant of this route is also one of the other, which is the same or narrower."""
        if self == other:
            return True
        mine, theirs = self.match, other.match
        if mine is None or theirs is None:
            return False
        if isinstance(mine, str):
            if not isinstance(theirs, str) or self.glob is None:
                return False
            if other.glob is None:
                return fnmatchcase(theirs, mine)
            # Of two globs this much is plain: names that end so, with more conditions, are some of those that end so.
            end = mine[1:]
            return mine[0] == "*" and Route(end).glob is None and theirs.endswith(end)
        return (
            not isinstance(theirs, str)
            and mine.version == theirs.version
            and mine.prefixlen <= theirs.prefixlen
            and theirs.network_address in mine
        )


DEFAULT: Final = Route(None)
"""The route of everything that no other route matches."""


class RouteChoice(NamedTuple):
    """Where a destination goes: the worker's name, and the host to ask it for."""

    worker: str
    host: str


def parse_route(text: str) -> Route:
    """``host=GLOB``, ``cidr=NET`` or ``default``. An IP address as host is the CIDR of that one address.

    Raises:
        ConfigurationError: one sentence that says what to write.
    """
    if text == "default":
        return DEFAULT
    kind, _, value = text.partition("=")
    if kind == "cidr":
        network = parse_network(value)
        if isinstance(network, str):
            raise ConfigurationError(f"route {quote(text)} has no network: write cidr=10.1.0.0/16 or cidr=fd00::/8")
        return Route(network)
    if kind == "host":
        glob = value.lower().removesuffix(".")
        if Route(glob).glob:
            if _GLOB.fullmatch(glob):
                return Route(glob)
            raise ConfigurationError(
                f"route {quote(text)} is not a pattern of a name: write letters, digits, '-', '.', '*' and '?'"
            )
        if "/" not in value:
            return Route(parse_network(value))
    raise ConfigurationError(f"route {quote(text)} is unknown: write host=NAME, host=*.example, cidr=NET or default")


def parse_grant_route(grant: object) -> tuple[str, Route]:
    """A route that the worker NAME may claim: ``NAME=ROUTE``, or (name, route), the route being one or its text.

    Raises:
        ConfigurationError: one sentence that says what to write.
    """
    return named(grant, _as_route, "ROUTE", "node-1=cidr=10.1.0.0/16", '("node-1", "cidr=10.1.0.0/16")')


def as_routes(routes: Iterable[Route | str]) -> tuple[Route, ...]:
    """The routes that a worker is to claim, text among them parsed.

    Raises:
        ConfigurationError: one sentence that says what to write.
    """
    return tuple(map(_as_route, listed("routes", routes, '["cidr=10.1.0.0/16", "host=db.example"]')))


def _as_route(route: object) -> Route:
    return object_or_text("route", route, Route, parse_route, "host=NAME, cidr=NET or default")


def granted_routes(
    name: str, claims: Iterable[Route], grants: Iterable[tuple[str, Route]]
) -> tuple[tuple[Route, ...], tuple[Route, ...]]:
    """What of a worker's claims counts.

    Args:
        name: the name in the worker's certificate. The route ``host=NAME`` is always granted, claimed or not,
            if it is a name for a host.
        claims: the routes that the worker says it serves.
        grants: the operator's grants, for any worker.

    Returns:
        The routes that count, and the claims to ignore (with a warning).
    """
    try:
        own = [parse_route(f"host={name}")]
    except ConfigurationError:  # a good name for a worker is not always one for a host: "42"
        own = []
    # Each once, in order, and looked up: a worker may claim hundreds, and hold a grant for each.
    allowed = dict.fromkeys(own + [route for owner, route in grants if owner == name])
    claims = dict.fromkeys(claims)
    counted = dict.fromkeys(own)
    for claim in claims:
        if claim in allowed or any(grant.covers(claim) for grant in allowed):
            counted[claim] = None
    return tuple(counted), tuple(claim for claim in claims if claim not in counted)


class Router:
    """The connected workers' routes, and the choice of a worker.

    Args:
        load: how busy a worker is; the least busy comes first, equals take turns.
    """

    def __init__(self, load: Callable[[str], int] = lambda _worker: 0) -> None:
        self._load = load
        self._routes: dict[str, tuple[Route, ...]] = {}
        self._holders: dict[Route, list[str]] = {}
        self._dotted: set[str] = set()
        """Known names that may end in another's. They come from certificates and the operator: as many as there are."""
        # What a lookup walks, most specific first: prefix lengths, and globs by their literal characters.
        self._prefixes: list[tuple[int, int]] = []
        self._globs: list[tuple[int, str]] = []

    def know(self, worker: str) -> None:
        """There is such a worker, connected or not: what its name may stand for is not another's meanwhile."""
        if "." in worker:
            self._dotted.add(worker)

    def set_routes(self, worker: str, routes: Iterable[Route]) -> None:
        """The worker is connected and serves exactly these routes (granted ones: see ``granted_routes``)."""
        self.know(worker)
        self.remove(worker)
        self._routes[worker] = tuple(dict.fromkeys(routes))
        for route in self._routes[worker]:
            if route not in self._holders:
                self._holders[route] = []
                self._index(route)
            self._holders[route].append(worker)

    def remove(self, worker: str) -> None:
        """The worker is gone; unknown names are fine."""
        for route in self._routes.pop(worker, ()):
            holders = self._holders[route]
            holders.remove(worker)
            if not holders:
                del self._holders[route]
                self._unindex(route)

    def routes(self, worker: str) -> tuple[Route, ...]:
        """The routes of a worker; none for one that is not connected."""
        return self._routes.get(worker, ())

    def choose(self, host: str, header: str | None = None) -> RouteChoice:
        """The first of ``candidates``.

        Raises:
            ConfigurationError, NoRouteError: as ``candidates``.
        """
        return self.candidates(host, header)[0]

    def candidates(self, host: str, header: str | None = None) -> list[RouteChoice]:
        """The workers that serve a destination, best first; never empty.

        Args:
            host: the destination, as ``canonical_host`` gives it.
            header: the worker that the client asked for, if it did.

        Raises:
            ConfigurationError: the worker is to be found by the host, which is neither an IP address nor a DNS name.
            NoRouteError: no worker serves the destination; the text says why.
        """
        name = host.lower().removesuffix(".")
        if name.endswith(SUFFIX):
            return [self._by_suffix(name.removesuffix(SUFFIX))]
        if header is not None:
            if header not in self._routes:
                raise NoRouteError(f"worker {quote(header)} is not connected")
            return [RouteChoice(header, host)]
        destination = parse_host(host)
        workers = self._by_name(destination) if isinstance(destination, str) else self._by_address(unwrap(destination))
        workers = workers or self._holders.get(DEFAULT)
        if not workers:
            raise NoRouteError(f"no worker serves {quote(host)}")
        best_first = sorted(workers, key=self._load)
        workers.append(workers.pop(0))  # sorting is stable: among equals, the next one has its turn
        return [RouteChoice(worker, host) for worker in best_first]

    def _by_suffix(self, rest: str) -> RouteChoice:
        """The longest known name that leaves a usable host is the worker."""
        dot = rest.find(".")
        while dot >= 0:
            host, worker = rest[:dot], rest[dot + 1 :]
            if worker in self._routes or worker in self._dotted:
                try:
                    choice = RouteChoice(worker, str(parse_host(host)))
                except ConfigurationError:
                    pass
                else:
                    if worker in self._routes:
                        return choice
                    raise NoRouteError(f"{quote(rest + SUFFIX)} names worker {worker}, which is not connected")
            dot = rest.find(".", dot + 1)
        if rest in self._routes:
            raise NoRouteError(f"{quote(rest + SUFFIX)} names a worker but no host: write HOST.{rest}{SUFFIX}")
        raise NoRouteError(f"{quote(rest + SUFFIX)} names no connected worker")

    def _by_name(self, name: str) -> list[str] | None:
        exact = self._holders.get(Route(name))
        if exact:
            return exact
        return next((self._holders[Route(glob)] for _, glob in self._globs if fnmatchcase(name, glob)), None)

    def _by_address(self, address: IPAddress) -> list[str] | None:
        for negative_length, version in self._prefixes:
            if version == address.version:
                network = ip_network((address, -negative_length), strict=False)
                holders = self._holders.get(Route(network))
                if holders:
                    return holders
        return None

    def _index(self, route: Route) -> None:
        if route.glob is not None:
            insort(self._globs, _by_literals(route.glob))
        elif route.match is not None and not isinstance(route.match, str):
            key = (-route.match.prefixlen, route.match.version)
            if key not in self._prefixes:
                insort(self._prefixes, key)

    def _unindex(self, route: Route) -> None:
        # A prefix length that nobody holds any more costs one failed lookup: it stays.
        if route.glob is not None:
            self._globs.remove(_by_literals(route.glob))


def _by_literals(glob: str) -> tuple[int, str]:
    """A sort key: globs with more literal characters first."""
    return glob.count("*") + glob.count("?") - len(glob), glob
