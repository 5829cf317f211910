"""Two sessions joined in memory, without certificates or ports."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from konnektor.handlers import Handlers
from konnektor.limits import Limits
from konnektor.session import Session

__all__ = ["memory_session_pair"]


@asynccontextmanager
async def memory_session_pair(
    *,
    client_handlers: Handlers | None = None,
    server_handlers: Handlers | None = None,
    client_limits: Limits | None = None,
    server_limits: Limits | None = None,
) -> AsyncIterator[tuple[Session, Session]]:
    """Two sessions of this process, joined to each other (``async with`` gives client and server).

    They run the real driver over a socket pair of the kernel's, in plaintext: backpressure, scheduling and errors
    are the real ones; only certificates and ports are missing. Leaving closes both; cancelling is safe.

    Args:
        client_handlers, server_handlers: what each side serves; more can be added to ``session.handlers``.
        client_limits, server_limits: each side's limits.
    """
    client = Session("client", handlers=client_handlers, limits=client_limits)
    server = Session("server", handlers=server_handlers, limits=server_limits)
    ours, theirs = socket.socketpair()
    try:
        await client.connect(ours)
        await server.connect(theirs)
        await client.wait_established()
        await server.wait_established()
        yield client, server
    finally:
        client.close()
        server.close()
        with anyio.CancelScope(shield=True):
            await client.wait_closed()
            await server.wait_closed()
        theirs.close()  # where it came to no connection
