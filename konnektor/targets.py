"""Serving ``tcp`` streams: check, dial, splice. The same at both ends."""

from __future__ import annotations

from collections.abc import Callable

from konnektor.dial import dial
from konnektor.errors import StreamError
from konnektor.addresses import format_hostport
from konnektor.policy import AllowList
from konnektor.session import Session, StreamHandler
from konnektor.splice import splice
from konnektor.stream import Stream
from konnektor.stream_types import Tcp

__all__ = ["tcp_handler"]


def tcp_handler(allowed: Callable[[Session], AllowList]) -> StreamHandler:
    """A handler for ``Tcp`` that dials what ``allowed(session)`` allows, and nothing else.

    The address that was checked is the address dialed. The stream is accepted once the target is connected; what
    keeps it from that is logged here in full, and told to the peer as a code.
    """

    async def serve(stream: Stream, request: Tcp) -> None:
        session = stream.session
        allow = allowed(session)
        try:
            allow.check_name(request.host, request.port)
            sock = await dial(request.host, request.port, check=allow.checker(request.host, request.port))
        except StreamError as error:
            target = format_hostport(request.host, request.port)
            session.log.warning("stream %d of %s to %s refused: %s", stream.id, session.peer_name, target, error)
            await stream.reject(error.code)
            return
        await splice(stream, sock)

    return serve
