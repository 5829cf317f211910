"""Which of the routes that workers claim count, and the streams that go by one: what a control plane's grants decide."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Final

from konnektor.addresses import parse_host, unwrap
from konnektor.arguments import listed
from konnektor.errors import Code, ConfigurationError, DeniedError
from konnektor.mux import MuxStream
from konnektor.router import Route, granted_routes, parse_grant_route, parse_route
from konnektor.session import Session

__all__ = ["Claims", "Grants", "about", "parse_grants"]

Grants = tuple[tuple[str, Route], ...]
"""(worker's name, route) each."""

SWEEP: Final = 64
"""Streams of a session that are over and not forgotten yet, about."""

logger: Final = logging.getLogger("konnektor.control_plane")


class Claims:
    """Those of all sessions with workers.

    Args:
        grants: what workers may claim beyond their own names.

    Attributes:
        grants: as they are now.
    """

    def __init__(self, grants: Grants) -> None:
        self.grants = grants
        self._routes: dict[Session, tuple[Route, ...]] = {}
        self._routed: dict[Session, dict[MuxStream, str]] = {}
        """Streams that were opened by a route, and to which host; swept now and then of those that are over."""

    def add(self, session: Session) -> None:
        """A worker's session is up: its claims are judged, and the log is told of those that do not count."""
        self._routes[session] = self._granted(session, tell=True)

    def remove(self, session: Session) -> None:
        """It has ended."""
        self._routes.pop(session, None)
        self._routed.pop(session, None)

    def routes(self, session: Session) -> tuple[Route, ...]:
        """What counts of its claims."""
        return self._routes[session]

    def replace(self, grants: Grants) -> list[Session]:
        """Other grants from now on. Returns the sessions that lost a route, whose streams should be judged."""
        self.grants = grants
        before, self._routes = self._routes, {session: self._granted(session) for session in self._routes}
        return [one for one in self._routed if not set(before[one]) <= set(self._routes[one])]

    def serves(self, session: Session, host: str) -> bool:
        """Whether a route that the worker may claim now is for the host."""
        destination = parse_host(host)
        if not isinstance(destination, str):
            destination = unwrap(destination)
        return any(route.matches(destination) for route in self._routes.get(session, ()))

    def note(self, stream: MuxStream, session: Session, host: str) -> None:
        """The stream goes by a route, and may have to end with it."""
        if session.closed:
            return
        routed = self._routed.setdefault(session, {})
        if len(routed) >= SWEEP + 2 * session.stream_count:
            for over in [stream for stream in routed if stream.forgotten]:
                del routed[over]
        routed[stream] = host

    def judge(self, session: Session) -> None:
        """The worker has lost a route: streams that no other one is for end."""
        routed = self._routed.get(session, {})
        withdrawn = {host for host in set(routed.values()) if not self.serves(session, host)}
        for stream, host in list(routed.items()):
            if host in withdrawn and not stream.forgotten:
                logger.warning(
                    "ended a stream to %s: worker %s has no route for it any more",
                    host, session.peer_name, extra=about(session),
                )  # fmt: skip
                stream.break_off(DeniedError("the route was withdrawn"), Code.DENIED)

    def _granted(self, session: Session, *, tell: bool = False) -> tuple[Route, ...]:
        name, settings = session.peer_name, session.peer_settings
        assert settings is not None
        claims = []
        for claim in settings.routes:
            try:
                claims.append(parse_route(claim))
            except ConfigurationError as error:
                if tell:
                    logger.warning("worker %s: ignored a claimed route: %s", name, error, extra=about(session))
        routes, ignored = granted_routes(name, claims, self.grants)
        for route in ignored if tell else ():
            logger.warning(
                "worker %s: ignored route %s, which no --grant-route grants", name, route, extra=about(session)
            )
        return routes


def parse_grants(grants: Iterable[object]) -> Grants:
    """What ``grant_routes`` lists.

    Raises:
        ConfigurationError: one of them is none, or they are not a list.
    """
    return tuple(map(parse_grant_route, listed("grant_routes", grants, '["node-1=cidr=10.1.0.0/16"]')))


def about(session: Session) -> dict[str, Any]:
    """The fields of a record of the log that is about a worker's session."""
    return {**session._log_fields, "worker": session.peer_name}
