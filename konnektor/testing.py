"""For tests, yours too: two sessions joined in memory, without certificates or ports."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from konnektor.limits import Limits
from konnektor.session import Handlers, Session

__all__ = ["memory_session_pair"]


@asynccontextmanager
async def memory_session_pair(
    *,
    client_handlers: Handlers | None = None,
    server_handlers: Handlers | None = None,
    client_limits: Limits | None = None,
    server_limits: Limits | None = None,
) -> AsyncIterator[tuple[Session, Session]]:
    """``async with memory_session_pair() as (client, server)``: two sessions of this process, joined to each other.

    They run the real driver over a socket pair of the kernel's, in plaintext: backpressure, scheduling and errors
    are the real ones; only certificates and ports are missing. Leaving closes both.

    Args:
        client_handlers, server_handlers: what each side serves; more can be added to ``session.handlers``.
        client_limits, server_limits: each side's limits.
    """
    ours, theirs = socket.socketpair()
    sessions: list[Session] = []

    async def client() -> None:
        sessions.append(await Session.client(ours, handlers=client_handlers, limits=client_limits))

    async with anyio.create_task_group() as group:
        group.start_soon(client)
        server = await Session.server(theirs, handlers=server_handlers, limits=server_limits)
    try:
        yield sessions[0], server
    finally:
        with anyio.CancelScope(shield=True):
            await sessions[0].aclose()
            await server.aclose()
